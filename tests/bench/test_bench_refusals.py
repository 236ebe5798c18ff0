"""What flashmoe-bench refuses, and the sentence that it says."""

import os

import pytest
from tiny_bench import RECORD, SMALL_BANK

from flashmoe_mlx.bench import model as bench_model
from flashmoe_mlx.bench.main import main


def failure(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*args, "--geometry", "tiny", "--layers", "4", "--vocabulary", "512"])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.count("\n") == 1
    return err.removeprefix("flashmoe-bench: error: ").rstrip()


def test_a_picture_needs_matplotlib(capsys, monkeypatch, directory):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert failure(capsys, "decode", "--plot", "x.png", "--dir", str(directory)) == (
        '--plot x.png: matplotlib is not installed. Install it: pip install "flashmoe-mlx[plot]"'
    )


def test_cold_is_refused_where_all_experts_stay_in_memory(capsys, directory):
    flags, half = ["--cold", "--dir", str(directory)], 4 * 16 * RECORD // 2 // 1024
    for what in ("decode", "batch"):
        assert failure(capsys, what, *flags) == (
            "--cold: all 16 experts of each layer fit in the expert cache, so that nothing is "
            f"read. Give less, such as --expert-cache {half}KiB for half of them."
        )


def test_stock_must_fit(capsys, monkeypatch, directory):
    monkeypatch.setattr(bench_model, "available_bytes", lambda: 1_000_000)
    flags = ["--tokens", "2", "--runs", "1", "--stock", "--dir", str(directory)]
    assert failure(capsys, "decode", *flags) == (
        "--stock: 0.00 GB of experts do not fit in 0.00 GB of available memory. "
        "Leave --stock out, or give fewer --layers."
    )


def test_cold_needs_a_system_that_drops_pages(capsys, monkeypatch, directory):
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    flags = ["--tokens", "2", "--runs", "1", "--cold", "--dir", str(directory)]
    flags += ["--expert-cache", SMALL_BANK]
    message = failure(capsys, "decode", *flags)
    assert message.startswith("--cold: this system cannot drop a file from its page cache. ")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["prefill", "--tokens", "8", "0"], "--tokens must be at least 1, got 0"),
        (["batch", "--batch", "2", "0"], "--batch must be at least 1, got 0"),
        (["decode", "--top-k", "17"], "experts_per_token = 17, but the model has 16 experts"),
        (["decode", "--expert-cache", "1KiB"], "expert_cache = 1024 bytes holds 0 experts"),
        (["decode", "--plot", "no/x.png"], "--plot no/x.png: "),
        (["decode", "--json", "no/x"], "--json no/x: not a file in an existing directory. Give"),
    ],
)
def test_bad_input(args, message, capsys, directory):
    assert failure(capsys, *args, "--dir", str(directory)).startswith(message)
