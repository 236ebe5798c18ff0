"""`flashmoe-bench io`: its reads, its output, and its temporary file."""

import json

import numpy as np
import pytest

from flashmoe_mlx.bench import io as bench_io
from flashmoe_mlx.bench.main import main
from flashmoe_mlx.profile.read_speed import in_threads, record_buffers, scratch_ranges
from flashmoe_mlx.store.host import BLOCK
from flashmoe_mlx.store.io_mode import obstacle
from flashmoe_mlx.store.sizing import BUFFERED, CachePlan
from flashmoe_mlx.store.store import ExpertStore

QUICK = ["io", "--rounds", "2", "--sample-mib", "1", "--threads", "1", "3"]


def run(args, capsys) -> tuple[dict, str]:
    with pytest.raises(SystemExit) as exit_:
        main([*args, "--json"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    return json.loads(out.splitlines()[-1]), out


def test_every_method_is_measured_and_the_file_is_removed(tmp_path, capsys):
    found, out = run([*QUICK, "--dir", str(tmp_path), "--record", "110592", "49152"], capsys)
    assert not list(tmp_path.iterdir())
    assert [entry["record"] for entry in found["records"]] == [110592, 49152]
    with scratch_ranges(tmp_path, 110592, 110592) as ranges:
        direct = obstacle(bench_io.scratch_layout(ranges, 110592)) is None
    methods = [(s, m) for s, ms in bench_io.METHODS.items() for m in ms]
    methods = [pair for pair in methods if direct or "direct" not in pair[1]]
    for entry in found["records"]:
        cases = [(row["state"], row["way"], row["threads"]) for row in entry["rows"]]
        assert cases == [(*pair, threads) for pair in methods for threads in (1, 3)]
        assert all(len(row["rounds"]) == 2 and min(row["rounds"]) > 0 for row in entry["rows"])
        for state in ("cold", "warm"):
            best = max(
                row["bytes_per_s"]
                for row in entry["rows"]
                if row["state"] == state and not row["way"].startswith(("store", "memcpy"))
            )
            assert entry[state]["best_bytes_per_s"] == best
            assert entry[state]["store"]["way"].startswith("store")
            assert entry[state]["share"] == entry[state]["store_bytes_per_s"] / best
    assert out.count("of the best") == 4
    assert found["cores"] and found["packages"]["mlx"]


def test_a_model_in_small_pieces_is_read_without_direct_reads(models, capsys):
    found, out = run([*QUICK, "--model", str(models["unmodified"])], capsys)
    assert "is not laid out in blocks of 4096 bytes, because it is not converted: flashmoe-" in out
    assert {row["way"] for row in found["records"][0]["rows"]}.isdisjoint(["direct"])


@pytest.mark.parametrize("record", [36864, 110592, 983_040, 1_769_472])
def test_the_files_records_are_experts_in_blocks(tmp_path, record):
    with scratch_ranges(tmp_path, 4 * record, record) as ranges:
        layout = bench_io.scratch_layout(ranges, record)
        assert layout.record_bytes == record and layout.layers[0].num_experts == 4
        assert [span.offset for span in layout.layers[0].spans(3)] == [3 * record]
        assert all((f.offset | f.stride | f.nbytes) % BLOCK == 0 for f in layout.layers[0].fields)
        store = ExpertStore(layout, CachePlan(2, 0, "a test", BUFFERED), 2)
        (slot,) = store.fetch(0, [2])
        row = b"".join(np.array(array[slot]).tobytes() for array in store.banks[0].arrays)
        assert row == ranges[0][0].read_bytes()[2 * record : 3 * record]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--record", "100"], "--record must be a multiple of 12288, at least 36864, to"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--dir", "/dev/null/x"], "/dev/null/x: cannot be written (Not a directory)"),
        (["--model", "no/such/dir"], "no/such/dir: no such directory"),
    ],
)
def test_bad_flags(args, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as exit_:
        main(["io", *args])
    assert exit_.value.code == 2
    assert f"flashmoe-bench: error: {message}" in capsys.readouterr().err


def test_threads_take_each_number_once():
    taken = []
    assert in_threads(taken.append, 100, threads=3) > 0
    assert sorted(taken) == list(range(100))


def test_buffers_start_at_block_boundaries():
    addresses = [np.asarray(view).ctypes.data for view in record_buffers(5000)]
    assert len(set(addresses)) == 16 and not any(address % BLOCK for address in addresses)
