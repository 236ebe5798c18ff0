"""flashmoe-bench decode, prefill and batch: counters, tables, and an unchanged model."""

import json
import os
from argparse import Namespace
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tiny_bench import RECIPE, RECORD, SLOTS, SMALL_BANK

from flashmoe_mlx import load
from flashmoe_mlx.bench import io as bench_io
from flashmoe_mlx.bench import model as bench_model
from flashmoe_mlx.bench import throughput, workloads
from flashmoe_mlx.bench.arguments import build_parser
from flashmoe_mlx.bench.io import Limit
from flashmoe_mlx.bench.main import main
from flashmoe_mlx.bench.model import Subject
from flashmoe_mlx.bench.synthetic import Recipe, checkpoint
from flashmoe_mlx.format.layout import open_layout
from flashmoe_mlx.profile.counters import Use
from flashmoe_mlx.profile.layers import timed_layers
from flashmoe_mlx.profile.read_speed import ReadSpeed
from flashmoe_mlx.store.sizing import IoPlan
from flashmoe_mlx.store.store import ExpertStats

PARTS = ("attention_ms", "router_ms", "read_ms", "experts_ms")


@pytest.fixture
def subject(directory):
    path = checkpoint(RECIPE, directory)
    model, _ = load(path, expert_cache=SMALL_BANK)
    yield Subject(RECIPE, path, model, model._store)
    model.close()


@pytest.fixture
def run(directory, capsys):
    def run(*args: str) -> tuple[list[str], dict]:
        shape = ["--geometry", "tiny", "--layers", "4", "--vocabulary", "512", "--runs", "1"]
        with pytest.raises(SystemExit) as exit_:
            main([*args, *shape, "--dir", str(directory), "--json"])
        out, err = capsys.readouterr()
        assert exit_.value.code == 0, err
        *table, last = out.splitlines()
        return table, json.loads(last)

    return run


def parse(arguments):
    return build_parser().parse_args(arguments)


def logits(model, tokens=(1, 2, 3)):
    return model(mx.array([tokens]), cache=make_prompt_cache(model)).astype(mx.float32)


def test_decode_counts_what_it_reads(run):
    table, result = run("decode", "--tokens", "5", "--cold", "--expert-cache", SMALL_BANK)
    asked = sum(layer["asked"] for layer in result["per_layer"])
    assert asked == 5 * 4 * 4
    assert [layer["kind"] for layer in result["per_layer"]] == ["linear"] * 3 + ["full"]
    for layer in result["per_layer"]:
        assert layer["hits"] < layer["asked"] == layer["distinct"]
        assert all(layer[part] > 0 for part in PARTS)
    missed = round(asked * (1 - result["hit_rate"]))
    useless = result["useless_bytes_per_token"]
    assert result["bytes_per_token"] - useless == pytest.approx(missed * RECORD / 5)
    assert (result["slots"], result["top_k"], result["cold"]) == (SLOTS, 4, True)
    assert result["packages"]["mlx"] and result["peak_bytes"] > 0
    assert len(result["disk_bytes_per_s"]) == len(result["step_s"]) == 2
    assert result["limit"]["best"]["cold"]["bytes_per_s"] > 0
    assert result["limit"]["reached"]["decode"]["bytes_per_s"] > 0
    assert sum(line.endswith("  median") for line in table) == 1
    assert sum(line.endswith("  1") for line in table) == len(result["runs"]) == 1


def test_resident_experts_are_hits_and_nothing_is_read(run):
    _, result = run("decode", "--tokens", "3", "--top-k", "2")
    assert result["hit_rate"] == 1 and result["bytes_per_token"] == 0
    assert result["read_bytes_per_s"] is None and result["floor_disk_s"] == 0
    assert sum(layer["asked"] for layer in result["per_layer"]) == 3 * 4 * 2


@pytest.mark.parametrize("forced", [True, False])
def test_tokens_are_random_or_the_models_own(forced, subject, monkeypatch):
    tokens, real = [], workloads.generate_step

    def watched(*args, **options):
        for token, logits in real(*args, **options):
            tokens.append((token, mx.argmax(logits).item()))
            yield token, logits

    monkeypatch.setattr(workloads, "generate_step", watched)
    args = Namespace(vocabulary=512, tokens=6, forced=forced)
    begin = partial(workloads.begin, subject.store, cold=False)
    workloads.decode(args, subject.model, seed=4, begin=begin)
    given, likeliest = zip(*tokens, strict=True)
    assert len(given) == bench_model.WARM_UP + 6 + 1
    expected = bench_model.random_tokens(512, len(given), seed=5) if forced else likeliest
    assert list(given) == list(expected)
    assert (given == likeliest) != forced


def test_prefill_reads_each_expert_once_a_chunk(run):
    table, result = run(
        "prefill", "--tokens", "40", "24", "--chunk", "16", "--expert-cache", SMALL_BANK
    )
    both = hasattr(os, "posix_fadvise")
    cold = [True, False] if both else [False]
    assert [(r["tokens"], r["cold"]) for r in result["rows"]] == [
        (tokens, state) for tokens in (40, 24) for state in cold
    ]
    for row in result["rows"]:
        assert row["read_over_theory"] == 1
        assert row["limit"]["reached"]["warm"]["bytes_per_s"] > 0
        assert row["theory_bytes"] == row["missing"] * RECORD
        assert row["bytes_per_token"] * row["tokens"] == pytest.approx(row["theory_bytes"])
        assert row["missing"] < row["distinct"] <= 4 * 16 * -(-row["tokens"] // 16)
    assert "prompt of 40 tokens, 16 per step" in table


def test_prompts_with_resident_experts_have_no_misses(run):
    _, result = run("prefill", "--tokens", "24", "--chunk", "16")
    for row in result["rows"]:
        assert row["distinct"] > 4 * 16 and row["missing"] == 0 == row["theory_bytes"]
        assert row["read_over_theory"] == 1


def test_batches_share_experts(run):
    table, result = run("batch", "--batch", "1", "4", "--tokens", "4", "--expert-cache", SMALL_BANK)
    one, four = result["rows"]
    assert (one["batch"], four["batch"], one["speedup"]) == (1, 4, 1)
    assert four["bytes_per_token"] < one["bytes_per_token"]
    for layer in result["per_layer"]:
        assert 4 * 4 < layer["distinct"] < 4 * 4 * 4
    assert sum("  median of batch " in line for line in table) == 2


@pytest.mark.parametrize(
    ("args", "key"),
    [(["decode"], "stock_tokens_per_s"), (["prefill"], "stock"), (["batch"], "stock")],
)
def test_stock_runs_beside_ours(run, args, key):
    few = ["--batch", "2", "--tokens", "3"] if args == ["batch"] else ["--tokens", "3"]
    table, result = run(*args, *few, "--stock")
    assert result[key]
    assert any(line.startswith("stock mlx-lm, all resident: ") for line in table)


def test_stock_has_the_same_weights(subject):
    stock = bench_model.stock_model(subject)
    ours, theirs = logits(subject.model), logits(stock)
    assert mx.abs(ours - theirs).max().item() < 0.02 * mx.abs(theirs).max().item()


def test_profiling_does_not_change_the_model(subject):
    before = logits(subject.model)
    modules = [dict(layer) for layer in subject.model.layers]
    with timed_layers(subject.model, subject.store) as layers:
        during = logits(subject.model)
    assert mx.array_equal(before, during)
    assert all(layer.seconds > 0 for layer in layers)
    assert "request" not in vars(subject.store)
    for layer, known in zip(subject.model.layers, modules, strict=True):
        assert layer.keys() == known.keys()
        assert all(layer[name] is known[name] for name in known)
    assert mx.array_equal(before, logits(subject.model))


def test_only_what_counts_is_profiled(subject):
    def run(model, seed, begin):
        logits(model)
        use = begin()
        logits(model, [1])
        return use()

    work = workloads.Workload({}, "", "", 1, 1, (False,), run, compute=float)
    layers, seconds = throughput.profile(subject, work)
    assert [layer.asked for layer in layers] == [4] * 4
    assert sum(layer.seconds for layer in layers) < seconds


def test_reset_banks_are_full(subject):
    for layer in range(4):
        subject.store.fetch(layer, [15, 14, 13])
    bench_model.reset_caches(subject.store, cold=False)
    for bank in subject.store.banks:
        assert sorted(bank.resident(range(16))) == list(range(SLOTS))


def test_forced_tokens_do_not_depend_on_the_logits():
    sampler = bench_model.forced(1000, seed=3)
    tokens = [sampler(mx.random.normal((2, 1000))).tolist() for _ in range(2)]
    assert np.ravel(tokens).tolist() == bench_model.random_tokens(1000, 4, seed=3)


def test_nothing_is_read_while_computing_is_timed(subject):
    prompt = bench_model.random_tokens(512, 20)
    before = logits(subject.model, prompt)
    with bench_model.without_reads(subject.store):
        views = [view for bank in subject.store.banks for view in bank._views]
        kept = [bytes(view) for view in views]
        during = logits(subject.model, prompt)
        assert kept == [bytes(view) for view in views]
    assert not mx.array_equal(before, during)
    assert mx.array_equal(before, logits(subject.model, prompt))


def test_floor_is_the_longer_of_disk_and_computing():
    stats = ExpertStats(asked=4, reads=4, bytes_read=4000, seconds_waited=1.0, seconds_reading=2.0)
    use = Use(8.0, stats, 3000, 1.0, 0.5)
    assert use.needed == 3000 and replace(use, from_disk=None).needed == 4000
    assert replace(use, from_disk=9000).needed == 4000
    prefetched = replace(use, stats=replace(stats, bytes_useless=1500))
    assert prefetched.needed == 2500 and prefetched.disk_floor([9.0]) == 2500 / 1500
    # Probes at 1000 bytes/s; the run itself read 3000 bytes in 2 seconds.
    assert use.disk_floor([500.0, 1000.0, 9000.0]) == 2.0
    assert use.disk_floor([500.0, 3000.0, 9000.0]) == 1.0
    assert throughput.result(use, 2, 6.0, 4.0)["share_of_floor"] == 0.75
    row = throughput.result(use, 2, 2.0, 4.0)
    assert row["share_of_floor"] == 0.5 and row["tokens_per_s"] == 0.25
    assert row["read_bytes_per_s"] == 4000


def test_limit_adds_the_times_of_disk_and_page_cache(directory, monkeypatch, capsys):
    layout = open_layout(checkpoint(RECIPE, directory), 4, 16)
    limit = Limit(layout)
    with monkeypatch.context() as patch:
        patch.setattr(bench_io, "LIMIT_SAMPLE", 1)
        limit.measure()
        limit.measure()
    assert {case.state for case in limit.rounds} == {"cold", "warm"}
    for case, rounds in limit.rounds.items():
        assert len(rounds) == 2 and case.method in (
            "pread",
            "pread, no read-ahead",
            "direct",
            "mmap",
        )
        speed = {("cold", "mmap", 4): 2000.0, ("warm", "pread", 2): 8000.0}
        rounds[:] = [(speed.get(case, 1000.0), None)] * 2
    stats = ExpertStats(asked=4, reads=4, bytes_read=4000, seconds_waited=1.0, seconds_reading=2.5)
    use = Use(8.0, stats, 2000, 1.0, 0.5)
    assert limit.share(use) == pytest.approx((2000 / 2000 + 2000 / 8000) / 2.5)
    assert limit.share(replace(use, from_disk=9000)) == pytest.approx(4000 / 2000 / 2.5)
    assert limit.share(replace(use, from_disk=None)) is None
    assert limit.share(replace(use, stats=ExpertStats())) is None
    found = limit.report({"decode": [use], "nothing": [replace(use, stats=ExpertStats())]})
    assert found["reached"] == {"decode": {"bytes_per_s": 1600.0, "share": 0.5}, "nothing": None}
    best = found["best"]
    assert (best["cold"]["way"], best["warm"]["bytes_per_s"]) == ("mmap", 8000.0)
    assert (
        "decode: 0.00 GB/s while a read was in flight, 50% of the limit" in capsys.readouterr().out
    )


def test_the_disk_is_measured_as_the_store_reads(subject, monkeypatch):
    asked, speed = [], ReadSpeed(8, 1, 1, 2.0, "cold", "a test")
    monkeypatch.setattr(
        bench_model, "time_reads", lambda *_, direct: (asked.append(direct), speed)[1]
    )
    for direct in (True, False):
        subject.store.plan = replace(subject.store.plan, io=IoPlan(direct, "a test"))
        assert bench_model.bandwidth(subject.store) == 4 and asked[-1] == direct


def test_the_median_run_is_one_that_was_measured():
    rows = [{"tokens_per_s": speed} for speed in (3.0, 1.0, 4.0, 2.0)]
    assert throughput.median_run(rows) is rows[3]
    assert throughput.median_run(rows[:3]) is rows[0]


def test_columns_stand_under_their_titles():
    stats = ExpertStats(4, 1, 3, 3_000_000, 0.001, bytes_useless=500_000)
    use = Use(0.5, stats, 1_500_000, 0.4, 0.1)
    row = throughput.result(use, 1, 0.1, 0.25)
    assert throughput.line(row, 1, "cold") == (
        "     2.00  25.0%      3.00     0.50      1.50   3.00    100.00    250.00    50%   400.00"
        "  100.00  cold"
    )
    assert throughput.HEADER == (
        "    tok/s   hits  MB/token   unused   disk MB   GB/s   disk ms  comp. ms  share  user ms"
        "  sys ms  run"
    )
    unknown = throughput.line(row | {"disk_bytes_per_token": None}, 1, "warm")
    assert unknown.split()[4] == "-"


def test_published_figures_are_of_the_same_geometry_and_width(capsys):
    rows = throughput.print_published(Recipe("397b", 4, 512, 4), "tok/s", 50.0)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("ms per token and layer: 5.000 here;") and len(lines) == len(rows)
    flash_moe = next(r for r in rows if r["name"] == "Flash-MoE, M3 Max 48 GB, 4-bit, K=4")
    assert flash_moe["tokens_per_s"] == 4.36
    assert flash_moe["ms_per_layer"] == pytest.approx(3.82, abs=0.005)
    assert all("2-bit" not in row["name"] for row in rows)
    assert not throughput.print_published(RECIPE, "tok/s", 50.0)
    assert capsys.readouterr().out == ""


def test_layers_are_drawn(run, tmp_path):
    picture = tmp_path / "layers.png"
    run("decode", "--tokens", "2", "--plot", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_plain_output_has_no_json_and_no_published_figures(capsys, directory, tmp_path):
    shape = ["--geometry", "tiny", "--layers", "4", "--vocabulary", "512", "--runs", "1"]
    file = tmp_path / "figures.json"
    command = ["decode", *shape, "--tokens", "2", "--dir", str(directory), "--json", str(file)]
    with pytest.raises(SystemExit):
        main(command)
    out = capsys.readouterr().out
    assert not [line for line in out.splitlines() if line.startswith("{")]
    assert "published" not in out
    found = json.loads(file.read_text())
    assert found["benchmark"] == "decode" and "published" not in found
    path = directory / RECIPE.name
    assert f"\ncheckpoint: {path} (delete it: rm -r {path})\n" in out


def test_each_run_is_printed_when_it_ends(subject, monkeypatch, capsys):
    args = parse(["decode", "--tokens", "2", "--vocabulary", "512", "--runs", "2"])
    (work,) = workloads.workloads(subject, args)
    seen = []

    def compute():
        seen.append(capsys.readouterr().out)
        return 0.1

    limit = Limit(subject.store.layout)
    monkeypatch.setattr(limit, "measure", lambda: None)
    throughput._measure(subject, 2, replace(work, compute=compute), limit)
    rows = [out.splitlines() for out in seen]
    assert rows[0] == [] and [len(lines) for lines in rows[1:]] == [1, 1]
    assert [lines[0].split()[-1] for lines in rows[1:]] == ["1", "2"]


def test_the_suggested_cache_misses(run):
    half = 4 * 16 * RECORD // 2 // 1024
    _, found = run("decode", "--tokens", "2", "--cold", "--expert-cache", f"{half}KiB")
    assert found["hit_rate"] < 1 and found["bytes_per_token"] > 0


def test_reads_that_were_never_waited_for_have_no_speed():
    stats = ExpertStats(asked=4, reads=4, bytes_read=4000, seconds_waited=0.0, seconds_reading=0.0)
    row = throughput.result(Use(8.0, stats, 3000, 1.0, 0.5), 2, 6.0, 4.0)
    assert row["read_bytes_per_s"] is None
    assert throughput.line(row, 2, "1").split()[5] == "-"
