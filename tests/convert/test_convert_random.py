"""Checkpoints with random changes: each is converted, or refused in one sentence."""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import (
    EXPERTS,
    LAYERS,
    read,
)  # fmt: skip

from flashmoe_mlx.convert.plan.parts import Options
from flashmoe_mlx.convert.plan.plan import build_plan
from flashmoe_mlx.convert.source.open import open_source
from flashmoe_mlx.convert.verify import verify
from flashmoe_mlx.convert.write.output import write_manifest
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.layout import open_layout

VALUES = (
    None, True, 0, 1, -1, 8, 1 << 31, 1 << 63, 10**30, 1.5, 1e300, float("nan"), float("inf"), "",
    "x", "..", "../../x", [], {}, [1], {"a": 1}, "F32", "BF16", "I32", "layer_00.safetensors",
)  # fmt: skip


def changed(value: Any, chances: random.Random) -> Any:
    """Replace, remove, rename or repeat something anywhere in a JSON value."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(value)
    node, key = chances.choice(places)
    kind = chances.random()
    if kind < 0.6:
        node[key] = chances.choice(VALUES)
    elif kind < 0.8:
        del node[key]
    elif isinstance(node, dict):
        node[str(chances.choice(VALUES))] = node.pop(key)
    else:
        node[key] = chances.choice(node)
    return value


def change_header(path: Path, chances: random.Random) -> None:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(changed(json.loads(data[8:end]), chances)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def change_manifest(path: Path, chances: random.Random) -> None:
    """With a correct checksum of its own, as an attacker can write it."""
    manifest = read(path)
    del manifest["manifest_checksum"]
    write_manifest(path.parents[1], changed(manifest, chances))


def change_json(path: Path, chances: random.Random) -> None:
    path.write_text(json.dumps(changed(read(path), chances)))


@pytest.mark.parametrize(
    ("kind", "name", "change"),
    [
        ("hf", "config.json", change_json),
        ("hf", "model.safetensors.index.json", change_json),
        ("hf", "model-00002-of-00003.safetensors", change_header),
        ("stock", "model.safetensors", change_header),
        ("packed", "config.json", change_json),
        ("packed", "model_experts/manifest.json", change_json),
        ("packed", "model_experts/manifest.json", change_manifest),
        ("packed", "model_experts/layer_01.safetensors", change_header),
    ],
)
def test_random_changes(root, tmp_path, kind, name, change):
    """Any content is read, or refused with a FlashMoEError, within 5 seconds."""
    source = shutil.copytree(root / kind, tmp_path / kind)
    before, chances, refusals = (source / name).read_bytes(), random.Random(name), 0
    start = time.monotonic()
    for _ in range(40):
        change(source / name, chances)
        for step in (
            lambda: build_plan(open_source(source, "x"), Options(quantize=True)),
            lambda: open_layout(source, LAYERS, EXPERTS),
            lambda: verify.verify(source),
        ):
            try:
                step()
            except FlashMoEError as error:
                assert len(str(error)) < 2000
                refusals += 1
        (source / name).write_bytes(before)
    assert refusals
    assert time.monotonic() - start < 40 * 5
