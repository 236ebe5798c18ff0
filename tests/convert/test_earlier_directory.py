"""A directory that an earlier commit wrote loads, verifies and generates the same tokens.

tests/fixtures/converted was made of tests/fixtures/transformers by `flashmoe-convert -q --q-bits 4
--q-group-size 32` of commit 38a069a, and converted_tokens.json by generating from it greedily.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step

from flashmoe_mlx import load
from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main

FIXTURES = Path(__file__).parents[1] / "fixtures"
RECORD = 5888  # bytes of an expert, of which each layer has 8
LAYERS = 4
CARD, MANIFEST = "README.md", "model_experts/manifest.json"


def files(directory: Path) -> dict[str, bytes]:
    """Return all files but the card, whose words may change, and the manifest."""
    return {
        name: path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and (name := path.relative_to(directory).as_posix()) != CARD
        if name != MANIFEST
    }


def manifest(directory: Path) -> dict:
    """Return the manifest without what differs: paths, versions, the card."""
    found = json.loads((directory / MANIFEST).read_text())
    for name in ("source", "tools", "manifest_checksum"):
        del found[name]
    found["files"] = [file for file in found["files"] if file["file"] != CARD]
    return found


@pytest.fixture
def directory(tmp_path) -> Path:
    return shutil.copytree(FIXTURES / "converted", tmp_path / "converted")


def assert_tokens(model) -> None:
    expected = json.loads((FIXTURES / "converted_tokens.json").read_text())
    prompt, count = mx.array(expected["prompt"]), len(expected["tokens"])
    found = [int(token) for token, _ in generate_step(prompt, model, max_tokens=count)]
    assert found == expected["tokens"] and count == 64


@pytest.mark.parametrize("slots", [3, 8])
def test_it_gives_its_tokens(directory, slots):
    model, _ = load(directory, expert_cache=slots * RECORD * LAYERS)
    assert_tokens(model)
    assert (model.expert_stats().bytes_read > 0) == (slots == 3)
    model.close()


def test_stock_mlx_lm_gives_its_tokens(directory):
    model, _ = mlx_lm.load(str(directory), trust_remote_code=True)
    assert_tokens(model)
    model.close()


def test_it_verifies(directory, capsys):
    main(["verify", str(directory)])
    assert "every byte is as it was written" in capsys.readouterr().out


def test_its_source_still_gives_the_same_bytes(directory, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / "transformers" / name, source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, source)
    convert(source, tmp_path / "again", quantize=True, q_bits=4, q_group_size=32)
    assert files(tmp_path / "again") == files(directory)
    assert manifest(tmp_path / "again") == manifest(directory)
