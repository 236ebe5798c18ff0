"""Synthetic checkpoints: the format of a real conversion, sane activations, and reuse."""

import json
import shutil
import subprocess
import sys
from collections import Counter, namedtuple

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.bench import synthetic
from flashmoe_mlx.bench.synthetic import Recipe, checkpoint
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.convert import convert
from flashmoe_mlx.format.headers import read_header
from flashmoe_mlx.format.layout import DATA_ALIGNMENT, EXPERT_DIR, MANIFEST, layer_file

TINY = Recipe("tiny", 4, 512, 4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(TINY, tmp_path_factory.mktemp("synthetic"))


def contents(directory):
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_files_equal_those_of_flashmoe_convert(tiny, tmp_path):
    convert(tiny, tmp_path / "again")
    ours, theirs = contents(tiny), contents(tmp_path / "again")
    del theirs["README.md"]  # a model card that describes the conversion
    assert ours.keys() == theirs.keys()
    manifests = [json.loads(x.pop(f"{EXPERT_DIR}/{MANIFEST}")) for x in (ours, theirs)]
    assert manifests[0].pop("source") == {
        "geometry": "tiny", "layers": 4, "vocabulary": 512, "bits": 4,
    }  # fmt: skip
    theirs_less = {key: manifests[1][key] for key in manifests[0]}
    assert manifests[0] == theirs_less
    configs = [json.loads(x.pop("config.json")) for x in (ours, theirs)]
    assert configs[0] == configs[1]
    assert ours == theirs


def test_routers_have_8_bits_and_the_trunk_4(tmp_path):
    path = checkpoint(Recipe("tiny", 4, 512, 2), tmp_path)
    entries = json.loads((path / "config.json").read_text())["quantization"]
    assert (entries["bits"], entries["group_size"]) == (4, 64)
    kinds = Counter(
        (path.split(".")[-1], entry["bits"])
        for path, entry in entries.items()
        if isinstance(entry, dict)
    )
    assert kinds == {
        ("gate", 8): 4, ("shared_expert_gate", 8): 4,
        ("gate_proj", 2): 4, ("up_proj", 2): 4, ("down_proj", 2): 4,
    }  # fmt: skip
    report = examine(path)
    assert not report.problems and report.bits == (2,)


def test_records_are_aligned_and_differ(tiny):
    path = tiny / EXPERT_DIR / layer_file(0)
    assert min(t.offset for t in read_header(path).values()) == DATA_ALIGNMENT
    layers = json.loads((tiny / EXPERT_DIR / MANIFEST).read_text())["layers"]
    assert len({record for layer in layers for record in layer["records"]}) == 4 * 16


def test_tokens_spread_over_experts_and_activations_stay_finite(tiny):
    model, tokenizer = load(tiny)
    asked = []
    model._store.count_hits = lambda layer, experts: asked.append(experts)  # all are there
    cache, logits = make_prompt_cache(model), []
    for token in np.random.default_rng(0).integers(512, size=100).tolist():
        logits.append(model(mx.array([[token]]), cache=cache))
        mx.eval(logits[-1])
    assert 0.3 < mx.concatenate(logits).std().item() < 3
    counts = Counter(expert for experts in asked for expert in experts)
    assert len(counts) == 16
    # 400 layers and steps, 4 experts of 16 in each: 100 for each expert.
    assert max(counts.values()) < 200
    assert tokenizer.decode([72, 105]) == "Hi" and tokenizer.eos_token_ids == {257}


def test_stock_generate_runs_it(tiny):
    command = [sys.executable, "-m", "mlx_lm", "generate", "--trust-remote-code", "--max-tokens=3"]
    done = subprocess.run(
        [*command, "--model", tiny, "--prompt", "Hello"], capture_output=True, text=True
    )
    assert "Generation: 3 tokens" in done.stdout, done.stderr


def test_a_complete_checkpoint_is_written_once(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(synthetic, "write_index", fail)
        with pytest.raises(KeyboardInterrupt):
            checkpoint(TINY, tmp_path)
    assert not (tmp_path / TINY.name).exists()
    path = checkpoint(TINY, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [TINY.name]
    monkeypatch.setattr(synthetic, "_write", fail)
    assert checkpoint(TINY, tmp_path) == path


@pytest.mark.parametrize(
    "name",
    [
        "model_experts/manifest.json", "model_experts/layer_01.safetensors", "config.json",
        "model.safetensors",
    ],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["cut", "zeroed", "gone"])
def test_a_damaged_checkpoint_is_written_again(name, damage, tiny, tmp_path):
    path = shutil.copytree(tiny, tmp_path / TINY.name) / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else bytes(len(data)))
    if damage == "gone":
        path.unlink()
    assert contents(checkpoint(TINY, tmp_path)) == contents(tiny)


def test_equal_recipes_give_equal_bytes(tiny, tmp_path):
    assert contents(checkpoint(TINY, tmp_path)) == contents(tiny)


def test_a_full_disk_is_detected_before_writing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2000, 1000, 1000))
    with pytest.raises(FlashMoEError) as error:
        checkpoint(Recipe("397b", 60, 248320, 4), tmp_path)
    place = f"{tmp_path}/397b-60-layers-248320-tokens-4-bit-v1"
    assert str(error.value) == (
        f"{place}: needs 223.01 GB, but 0.00 GB are free. Free some space, give "
        "another --dir, or fewer --layers."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_created(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FlashMoEError, match=r"file.*: cannot be written .*Give another --dir\."):
        checkpoint(TINY, tmp_path / "file")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (("9b", 4, 512, 4), "geometry '9b' is unknown. Choose from tiny, 35b, 122b, 397b."),
        (("tiny", 1, 512, 4), "layers must be from 2 to 1000, got 1"),
        (("tiny", 4, 96, 4), "vocabulary must be from 259 to 10000000, got 96"),
        (("tiny", 4, 512, 8), "bits must be 4 or 2, got 8"),
    ],
)
def test_bad_recipes(recipe, message):
    with pytest.raises(FlashMoEError) as error:
        Recipe(*recipe)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("geometry", "record"), [("35b", 1_769_472), ("397b", 7_077_888)])
def test_plans_have_the_models_true_sizes(geometry, record):
    plan = Recipe(geometry, 4, 512, 4).plan()
    assert {layer.record_bytes for layer in plan.layers} == {record}
