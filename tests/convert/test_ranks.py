"""A directory that holds one rank's experts: the same bytes as in the whole conversion."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from convert_helpers import (
    EXPERTS,
    KILLER,
    LAYERS,
    contents,
    flip,
    read,
)
from family_helpers import published, write

from flashmoe_mlx import load
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.source.open import open_source
from flashmoe_mlx.convert.verify import repair, verify
from flashmoe_mlx.convert.write.output import write_manifest
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.layout import ExpertLayout, open_layout
from flashmoe_mlx.format.placement import Placement

MANIFEST = "model_experts/manifest.json"
LAYER = "model_experts/layer_02.safetensors"
SPLITS = [(2, None), (3, "3,1,2")]
Records = dict[tuple[int, int], bytes]


@pytest.fixture(scope="module")
def root(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources, their whole conversions NAME-whole, and a rank's directory `one`."""
    root = shutil.copytree(root, tmp_path_factory.mktemp("ranks"), dirs_exist_ok=True)
    config, weights = published("qwen3_moe")
    write(root / "experts-apart", config, weights)
    (root / "whole").rename(root / "hf-whole")
    (root / "packed").rename(root / "stock-whole")
    convert(root / "experts-apart", root / "experts-apart-whole", quantize=True)
    convert(root / "hf", root / "one", quantize=True, ranks=2, rank=1)
    return root


@pytest.fixture
def one(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "one", tmp_path / "one")


def layout_of(directory: Path) -> ExpertLayout:
    layout = open_source(directory, "x").layout
    assert layout
    return layout


def records(layout: ExpertLayout) -> Records:
    """Return every expert's bytes, by layer and number in the model."""
    found = {}
    for layer in layout.layers:
        data = layer.fields[0].file.read_bytes()
        for place, number in enumerate(layer.numbers or range(layer.num_experts)):
            (span,) = layer.spans(place)
            found[layer.layer, number] = data[span.offset : span.offset + layer.record_bytes]
    return found


@pytest.mark.parametrize("source", ["hf", "stock", "hf-whole", "experts-apart"])
@pytest.mark.parametrize(("split", "weights"), SPLITS)
def test_the_ranks_hold_every_expert_once(root, tmp_path, source, split, weights):
    """From floats, from stacked and packed experts, and through mlx-lm's `sanitize`."""
    options = {"quantize": source in ("hf", "experts-apart")}
    whole = root / f"{source.removesuffix('-whole')}-whole"
    convert(root / source, tmp_path / "out", **options, split=split, rank_weights=weights)
    expected, seen = records(layout_of(whole)), []
    kept = {name: data for name, data in contents(whole).items() if "model_experts" not in name}
    for rank in range(split):
        out, layout = tmp_path / f"out-rank{rank}", layout_of(tmp_path / f"out-rank{rank}")
        assert layout.placement == Placement(rank, (3, 1, 2) if weights else (1, 1))
        found = records(layout)
        assert all(found[key] == expected[key] for key in found)
        seen += found
        made = contents(out)
        assert all(made[name] == data for name, data in kept.items() if name != "README.md")
        assert "those of rank" in made["README.md"].decode()
        assert verify.verify(out) == []
    assert sorted(seen) == sorted(expected) and not (tmp_path / "out").exists()
    assert records(layout_of(whole).part(layout.placement)) == found
    assert "placement" not in read(whole / MANIFEST)


def test_tensors_have_the_models_numbers(root):
    tensors = sorted(mx.load(str(root / "one" / LAYER)))
    assert {int(name.split(".")[1]) for name in tensors} == {1, 3, 5, 7}
    manifest = read(root / "one" / MANIFEST)
    assert manifest["placement"] == {"rank": 1, "weights": [1, 1]}
    assert manifest["layers"][2]["numbers"] == [1, 3, 5, 7]
    assert manifest["num_experts"] == EXPERTS


def test_damage_is_named_and_repaired(root, one):
    record = layout_of(one).record_bytes
    before, size = contents(one), (one / LAYER).stat().st_size
    flip(one / LAYER, size - record - 1)  # the third of four
    flip(one / "model.safetensors", 9000)
    problems = verify.verify(one)
    assert [(p.layer, p.expert) for p in problems] == [(None, None), (2, 5)]
    assert "layer 2 expert 5 down_proj.biases differs" in str(problems[1])
    assert repair.repair(one, problems, root / "hf") == []
    assert contents(one) == before


def test_swapped_experts_are_named(root, one):
    record = layout_of(one).record_bytes
    data = (one / LAYER).read_bytes()
    (one / LAYER).write_bytes(data[: -2 * record] + data[-record:] + data[-2 * record : -record])
    found = [str(problem) for problem in verify.verify(one)]
    assert [text.rpartition(": ")[2] for text in found] == [
        "the bytes of layer 2 expert 7", "the bytes of layer 2 expert 5",
    ]  # fmt: skip


def test_killed_it_resumes(root, tmp_path):
    options = json.dumps({"ranks": 2, "rank": 1})
    with subprocess.Popen(
        [sys.executable, "-c", KILLER, str(root / "hf"), options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as killer:  # fmt: skip

        def ask(call: int, out: str) -> str:
            killer.stdin.write(f"{call} {tmp_path / out}\n")
            killer.stdin.flush()
            return killer.stdout.readline().strip()

        calls = ask(10**9, "whole").split()
        assert ask(len(calls) * 3 // 4, "out") == str(int(signal.SIGKILL))
    begun = contents(tmp_path / "out")
    assert MANIFEST not in begun and "model_experts/layer_00.safetensors" in begun
    for options, other in (({}, "None"), ({"ranks": 2, "rank": 0}, "rank 0 of 2")):
        with pytest.raises(FlashMoEError, match=f"placement rank 1 of 2, not {other}"):
            convert(root / "hf", tmp_path / "out", quantize=True, **options)
    convert(root / "hf", tmp_path / "out", quantize=True, ranks=2, rank=1)
    assert contents(tmp_path / "out") == contents(root / "one") == contents(tmp_path / "whole")


def test_a_split_keeps_what_is_finished(root, tmp_path, capsys):
    command = [
        "--hf-path",
        str(root / "stock"),
        "--mlx-path",
        str(tmp_path / "out"),
        "--split",
        "2",
    ]
    convert(root / "stock", tmp_path / "out-rank0", ranks=2, rank=0)
    before = (tmp_path / "out-rank0" / MANIFEST).stat().st_mtime_ns
    assert main(command) == 0
    assert (tmp_path / "out-rank0" / MANIFEST).stat().st_mtime_ns == before
    assert (
        f"{tmp_path / 'out-rank1'}: the experts of rank 1 of 2.\nDone." in capsys.readouterr().out
    )
    assert main([*command, "--rank-weights", "2,1"]) == 2
    assert "exists already, made with placement 0 [1, 1], not 0 [2, 1]" in capsys.readouterr().err


def test_dry_run(root, tmp_path, capsys):
    convert(root / "stock", tmp_path / "out", ranks=4, rank=3, dry_run=True)
    found = capsys.readouterr().out
    convert(root / "stock", tmp_path / "out", dry_run=True)
    experts = [
        int(re.search(r"^experts +([\d,]+) bytes", text, re.M)[1].replace(",", ""))
        for text in (found, capsys.readouterr().out)
    ]
    assert experts[0] * 4 == experts[1] and "\nranks       rank 3 of 4\n" in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 2}, "--ranks 2 and --rank None go together"),
        ({"rank": 0}, "--ranks None and --rank 0 go together"),
        ({"ranks": 2, "rank": 0, "split": 2}, "--split 2 writes the directories of all ranks"),
        ({"rank_weights": "2,1"}, "--rank-weights 2,1 has no effect without --ranks or --split"),
        ({"ranks": 1, "rank": 0}, "--ranks must be from 2 to 1024, got 1"),
        ({"split": 2000}, "--split must be from 2 to 1024, got 2000"),
        ({"ranks": 2, "rank": 2}, "--rank must be from 0 to 1, got 2"),
        ({"ranks": 2, "rank": -1}, "--rank must be from 0 to 1, got -1"),
        ({"split": 2, "rank_weights": "2,1,1"}, "2,1,1: 3 weights for 2 ranks"),
        ({"split": 2, "rank_weights": "2,0"}, "is not one whole number from 1 to 999 per rank"),
        ({"split": 9}, "rank 8 of 9 would have none of 8 experts"),
        ({"split": 2, "link": True}, "--link is for all experts, not for those of one rank"),
        ({"split": 2, "upload_repo": "a/b", "private": True}, "--upload-repo is for all experts"),
    ],
)
def test_wrong_options(root, tmp_path, options, message):
    with pytest.raises(FlashMoEError, match=re.escape(message)):
        convert(root / "stock", tmp_path / "out", dry_run=True, **options)


def test_a_rank_is_no_source(root, one, tmp_path):
    with pytest.raises(FlashMoEError, match=r"one: holds only the experts of rank 1 of 2\. Give"):
        convert(one, tmp_path / "out")


def test_it_serves_its_own_rank_only(one):
    layout = layout_of(one)
    assert layout.part(Placement(1, (7, 7))) is layout  # weights count up to a factor
    for other in (Placement(0, (1, 1)), Placement(1, (1, 2))):
        with pytest.raises(FlashMoEError, match=f"of rank 1 of 2, but this is {other}. Start it"):
            layout.part(other)


def test_one_machine_cannot_load_it(one):
    with pytest.raises(FlashMoEError, match=r"holds only the experts of rank 1 of 2\. Start all"):
        load(one)
    report = examine(one)
    assert not report.problems and report.as_dict()["experts"] == EXPERTS // 2


def rewritten(directory: Path, **changes: object) -> None:
    """Change entries of a manifest, which keeps a right checksum."""
    content = read(directory / MANIFEST) | changes
    head = ("format", "version", "checksum", "manifest_checksum")
    write_manifest(directory, {k: v for k, v in content.items() if k not in head})


@pytest.mark.parametrize(
    "entry",
    [
        1, [], "rank 1", {}, {"rank": 1}, {"rank": 1, "weights": []}, {"rank": 1, "weights": 2},
        {"rank": 2, "weights": [1, 1]}, {"rank": -1, "weights": [1, 1]},
        {"rank": True, "weights": [1, 1]}, {"rank": 1.0, "weights": [1, 1]},
        {"rank": 0, "weights": [1, 0]}, {"rank": 0, "weights": ["1", 1]},
        {"rank": 0, "weights": {"0": 1}}, {"rank": 1, "weights": [1, 1], "more": 1},
    ],
)  # fmt: skip
def test_hostile_placements(root, one, entry):
    rewritten(one, placement=entry)
    with pytest.raises(FlashMoEError) as error:
        open_layout(one, LAYERS, EXPERTS)
    assert str(error.value).startswith(f"{one / MANIFEST}: placement = {entry!r} is not one of")
    assert "Convert the model again." in str(error.value)
    with pytest.raises(FlashMoEError, match="placement"):
        repair.repair(one, [], root / "hf")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rank": 0, "weights": [1, 1]}, "no tensor experts.0.gate_proj.weight; config.json asks "
         "for 8 experts, 4 of them on rank 0 of 2"),
        ({"rank": 1, "weights": [1, 1, 1]}, "no tensor experts.4.gate_proj.weight; config.json "
         "asks for 8 experts, 3 of them on rank 1 of 3"),
        ({"rank": 7, "weights": [1] * 8}, "holds 36 tensors, expected 9"),
        ({"rank": 0, "weights": [1, 10**9]}, "would have none of 8 experts"),
        (None, "no tensor experts.0.gate_proj.weight; config.json asks for 8 experts"),
    ],
)  # fmt: skip
def test_other_experts_than_the_placements(one, entry, message):
    rewritten(one, placement=entry)
    with pytest.raises(FlashMoEError, match=rf"layer_00\.safetensors: .*{re.escape(message)}"):
        open_layout(one, LAYERS, EXPERTS)
    with pytest.raises(FlashMoEError, match=re.escape(message)):
        load(one)  # before it talks to other ranks


@pytest.mark.parametrize("numbers", [[1, 3], [1, 3, 5, 7, 9], 5, {"a": 1}])
def test_numbers_that_do_not_fit_the_records(one, numbers):
    layers = read(one / MANIFEST)["layers"]
    layers[1]["numbers"] = numbers
    rewritten(one, layers=layers)
    with pytest.raises(FlashMoEError, match=r"manifest\.json: damaged"):
        verify.verify(one)
