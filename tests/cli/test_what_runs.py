"""What runs here: fits, cache, prediction, disk and commands, on machines of several kinds."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashmoe_mlx.cli import here, plan, what_runs
from flashmoe_mlx.cli.here import Here
from flashmoe_mlx.cli.what_runs import best, render_rows
from flashmoe_mlx.format.layout import ExpertLayout
from flashmoe_mlx.profile.read_speed import ReadSpeed
from flashmoe_mlx.store.sizing import IoPlan, plan_cache

GB = 10**9
READ = ReadSpeed(2 * GB, 100, 8, 1.0, "cold", "a test")
FOLDER = Path("models")


@pytest.fixture(autouse=True)
def linux(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(what_runs, "models_folder", lambda: FOLDER)


def machine(available=23 * GB, free=500 * GB, **changes) -> Here:
    whole = Here(
        "a CPU", 2, None, None, 25 * GB, available, None, 25 * GB, "measured", FOLDER, free, READ,
        5 * GB,
    )  # fmt: skip
    return replace(whole, **changes)


def rows(found: Here) -> dict[tuple[str, int], what_runs.Row]:
    return {(row.model, row.bits): row for row in what_runs.what_runs(found)}


def text(found: Here) -> str:
    return "\n".join(render_rows(what_runs.as_dict(found, what_runs.what_runs(found))))


def test_a_small_machine_streams():
    found = rows(machine())
    assert list(found) == [(m, bits) for m in ("35b", "122b", "397b") for bits in (4, 2)]
    assert found["35b", 2].resident and not found["35b", 4].resident
    assert all(row.runs and row.tokens_per_s > 0 for row in found.values())
    speeds = [found[model, 4].tokens_per_s for model in ("35b", "122b", "397b")]
    assert speeds == sorted(speeds, reverse=True)
    assert found["122b", 4].commands == (
        "flashmoe-convert --hf-path mlx-community/Qwen3.5-122B-A10B-4bit --mlx-path qwen-122b",
        'flashmoe-generate --model qwen-122b --prompt "Hello"',
    )
    assert found["122b", 2].commands[0].endswith("--mlx-path qwen-122b-2bit -q --q-bits 2")


@pytest.mark.parametrize("available", [8 * GB, 23 * GB, 27 * GB, 40 * GB, 300 * GB])
def test_the_cache_is_the_one_that_a_load_chooses(available):
    for (model, bits), row in rows(machine(available)).items():
        weights = what_runs.count_bytes(what_runs.named_args(model), bits)
        slot = int(weights.layers * weights.record)
        sizes = SimpleNamespace(num_experts=weights.experts, token_bytes=slot)
        layout = SimpleNamespace(**vars(sizes), layers=[sizes])
        trunk = round(weights.trunk)
        direct = available - trunk < 0.8 * weights.expert_bytes
        io = IoPlan(direct, "a test")
        chosen = plan_cache("auto", _as_layout(layout), weights.top_k, trunk, available, io)
        assert row.resident == (chosen.slots == weights.experts)
        assert row.cache == pytest.approx(chosen.nbytes, abs=slot)


def _as_layout(sizes: object) -> ExpertLayout:
    return sizes  # type: ignore[return-value]


def test_a_large_machine_runs_the_checkpoint_itself():
    found = rows(machine(400 * GB))
    assert list(found) == [("35b", 4), ("122b", 4), ("397b", 4)]
    (command,) = found["397b", 4].commands
    assert command == (
        'flashmoe-generate --model mlx-community/Qwen3.5-397B-A17B-4bit --prompt "Hello"'
    )
    assert found["397b", 4].disk_needed == pytest.approx(223 * GB, rel=0.01)


def test_too_little_memory_or_disk():
    found = rows(machine(6 * GB, free=30 * GB))
    assert not found["397b", 4].fits and found["397b", 4].tokens_per_s is None
    assert found["35b", 2].runs and not found["35b", 4].disk_fits
    said = text(machine(6 * GB, free=30 * GB))
    assert "✗ needs 10.8 GB" in said and "✗ 234 GB" in said
    assert "Fastest, at 2 bits: Qwen3.5-35B-A3B, about" in said and "Largest" not in said
    assert "Nothing fits" in text(machine(1 * GB))
    assert best(what_runs.what_runs(machine(free=GB))) == {}


def test_best_prefers_four_bits():
    chosen = best(what_runs.what_runs(machine(free=90 * GB)))
    named = {why: (row.model, row.bits) for why, row in chosen.items()}
    assert named == {"fastest": ("35b", 4), "largest": ("122b", 4)}


def test_a_gpu_with_its_own_memory_has_no_prediction():
    gpu = machine(gpu="a GPU (CUDA)", gpu_memory=40 * GB, available=100 * GB)
    found = rows(gpu)
    assert found["35b", 4].resident and not found["122b", 4].resident
    trunk = what_runs.count_bytes(what_runs.named_args("122b"), 4).trunk
    assert found["122b", 4].cache == pytest.approx(0.7 * 40 * GB - trunk, abs=GB)
    assert {row.tokens_per_s for row in found.values()} == {None}
    assert "no figures for GPUs with their own memory" in text(gpu)


def test_a_mac_streams_through_the_page_cache(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    mac = machine(available=36 * GB, memory=48 * GB, gpu="Apple M3 Max (Metal)")
    found = rows(mac)
    trunk = what_runs.count_bytes(what_runs.named_args("397b"), 4).trunk
    assert found["397b", 4].cache == pytest.approx((36 * GB - trunk) / 4, rel=0.01)
    assert "on a CPU" not in text(mac)


def test_a_disk_that_was_not_measured():
    found = rows(machine(read="not measured: Read-only file system (/x)"))
    assert found["35b", 2].tokens_per_s > 0 and found["35b", 4].tokens_per_s is None
    assert "the disk could not be measured" in text(
        machine(read="not measured: Read-only file system (/x)")
    )


def test_another_folder_is_in_the_commands():
    row = rows(machine(folder=Path("/big disk")))["122b", 4]
    assert "--mlx-path '/big disk/qwen-122b'" in row.commands[0]
    assert "--model '/big disk/qwen-122b'" in row.commands[1]


# ---- flashmoe-plan without flags -----------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Short measurements."""
    monkeypatch.undo()
    monkeypatch.setattr(here, "BLOCK", 1 << 20)
    monkeypatch.setattr(here.look, "__defaults__", (4 << 20,))


def test_the_plan_without_flags(small, tmp_path, capsys):
    plan.main(["--folder", str(tmp_path), "--json"])
    said, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    found = json.loads(last)
    assert re.match(r"machine  .*\nmemory   .* available of .*\ndisk     .* free at ", said)
    assert said.count("Qwen3.5-") >= 3
    assert found["machine"]["folder"] == str(tmp_path) and not list(tmp_path.iterdir())
    assert found["machine"]["read"]["reads"] == 2 and found["machine"]["bandwidth"] > 0
    assert [row["model"] for row in found["rows"] if row["bits"] == 4] == ["35b", "122b", "397b"]


def test_a_folder_that_cannot_be_written(small, tmp_path, capsys):
    (tmp_path / "file").touch()
    plan.main(["--folder", str(tmp_path / "file")])
    assert "reads: not measured: File exists" in capsys.readouterr().out


def test_the_folder_is_for_this_machine_only(capsys):
    with pytest.raises(SystemExit) as ended:
        plan.main(["--folder", "x", "--model", "35b", "--machine", "m4-32"])
    assert ended.value.code == 2
    assert "--folder is for this machine's own list." in capsys.readouterr().err


def test_the_documentation_shows_the_output(monkeypatch):
    """It is of a real machine, whose rounded figures give the same text."""
    page = Path(__file__).parents[2].joinpath("docs/guides/large-models.md").read_text("utf-8")
    folder = Path.home() / ".cache/huggingface/hub"
    monkeypatch.setattr(what_runs, "models_folder", lambda: folder)
    found = Here(
        "AMD EPYC", 2, None, None, round(25.3 * GB), round(23.7 * GB), None, 21 * GB, "measured",
        folder, round(75.6 * GB), replace(READ, nbytes=715_000_000), 5.12 * GB,
    )  # fmt: skip
    assert text(found) in page
    assert all(f"{name:9}{line}\n" in page for name, line in what_runs.render_machine(found))
