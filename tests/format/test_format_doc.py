"""docs/reference/format.md matches the files: its example is built, its code runs."""

import itertools
import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.write.output import SHIM
from flashmoe_mlx.format.headers import read_header
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.models.qwen3_5.geometry import GEOMETRIES
from flashmoe_mlx.store.io_mode import BLOCK

DOC = (Path(__file__).parents[2] / "docs/reference/format.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+) \| (\d+) \| `([\w.]+)` \| (\w+) \| (\d+) x (\d+) \|$", re.M)
KEY = re.compile(r"^\| `([a-z_]+(?:[\[.][\w.\[\]]*)?)` \| (?:(`[^`]*`) )?\|", re.M)
RANK_KEYS = {
    "placement", "placement.rank", "placement.weights", "layers[0].numbers",
    "layers[0].numbers[0]",
}  # fmt: skip
DUMP = re.compile(r"^[0-9a-f]{8}: ((?:[0-9a-f]{4} ?)+)$", re.M)


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("format") / "OUT"
    convert(BUNDLED_MODEL, out)
    return out


def code(word: str) -> dict:
    """Run the doc's Python block that contains a word, and return its names."""
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", DOC, re.S) if word in b)
    names: dict = {}
    exec(block, names)
    return names


def section(title: str) -> str:
    return DOC.split(f"## {title}\n")[1].split("\n## ")[0]


def test_offsets(example):
    path = example / "model_experts" / "layer_00.safetensors"
    tensors, rows = read_header(path), ROW.findall(DOC)
    assert len(rows) == 12
    for offset, nbytes, name, dtype, *shape in rows:
        found = tensors[name]
        assert (found.offset, found.nbytes) == (int(offset), int(nbytes)), name
        assert (found.dtype, found.shape) == (dtype, tuple(map(int, shape))), name
    data = path.read_bytes()
    shown = bytes.fromhex("".join(DUMP.findall(DOC)))
    assert len(shown) == 64 and data.startswith(shown)
    start = tensors["experts.0.gate_proj.weight"].offset
    assert f"in the example {start - 8:,} |" in DOC and f"starts at byte {start:,}," in DOC
    assert f"has 39,168 bytes, and the file {start:,} + 100 x 39,168 = {len(data):,}." in DOC


def test_manifest(example):
    manifest = json.loads((example / "model_experts" / "manifest.json").read_text())
    rows = [row for row in KEY.findall(section("manifest.json")) if row[0] not in RANK_KEYS]
    named = {re.sub(r"\[\d+\]", "[0]", key) for key, _ in rows}
    for key, shown in rows:
        value = eval(f"m{_brackets(key)}", {"m": manifest})
        assert not shown or json.loads(shown.strip("`")) == value, key
    files = {key for entry in manifest["files"] for key in entry}
    there = {
        *manifest,
        *(f"options.{key}" for key in manifest["options"]),
        *(f"layers[0].{key}" for key in manifest["layers"][0]),
        *(f"files[0].{key}" for key in files),
    }
    assert there == named - {"layers[0].records[0]", "layers[0].tensors[0]"}


def test_a_ranks_manifest(example, tmp_path):
    convert(BUNDLED_MODEL, tmp_path / "out", ranks=2, rank=1, rank_weights="3,1")
    whole, manifest = (
        json.loads((path / "model_experts" / "manifest.json").read_text())
        for path in (example, tmp_path / "out")
    )
    rows = [row for row in KEY.findall(section("manifest.json")) if row[0] in RANK_KEYS]
    assert len(rows) == len(RANK_KEYS)
    for key, shown in rows:
        value = eval(f"m{_brackets(key)}", {"m": manifest})
        assert not shown or json.loads(shown.strip("`")) == value, key
    assert manifest.keys() - whole.keys() == {"placement"}
    assert manifest["layers"][0].keys() - whole["layers"][0].keys() == {"numbers"}
    assert manifest["num_experts"] == whole["num_experts"]
    part = slice(75, 100)
    assert manifest["layers"][3]["records"] == whole["layers"][3]["records"][part]


def _brackets(key: str) -> str:
    """Turn a.b[0].c into ["a"]["b"][0]["c"]."""
    return "".join(f"[{p}]" if p.isdigit() else f"[{p!r}]" for p in re.findall(r"\w+", key))


def test_config_and_shim(example):
    config = json.loads((example / "config.json").read_text())
    source = json.loads((BUNDLED_MODEL / "config.json").read_text())
    new = {key for key in config if config[key] != source.get(key)}
    named = set(re.findall(r"^\| `(\w+)` \|", section("config.json"), re.M))
    assert new <= named and named <= config.keys() and list(config) == sorted(config)
    assert f"```python\n{SHIM}```" in DOC
    assert (example / "flashmoe_model.py").read_text() == SHIM


def test_reader(example):
    """The doc's reader returns the tensors' bytes, and detects a changed one."""
    read_record = code("def read_record")["read_record"]
    path = example / "model_experts" / "layer_02.safetensors"
    found = read_record(str(example), 2, 57)
    for name, tensor in mx.load(str(path)).items():
        if name.startswith("experts.57."):
            field = name.removeprefix("experts.57.")
            view = tensor.view(mx.uint8)
            assert found.pop(field) == np.array(view).tobytes(), name
    assert not found
    altered = bytearray(path.read_bytes())
    altered[-1] ^= 1
    path.write_bytes(altered)
    with pytest.raises(AssertionError, match="damaged"):
        read_record(str(example), 2, 99)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights(bits):
    row_of_weights = code("def row_of_weights")["row_of_weights"]
    dense = mx.array(np.random.default_rng(bits).standard_normal((3, 192), np.float32))
    words, scales, biases = mx.quantize(dense, group_size=64, bits=bits)
    expected = np.array(mx.dequantize(words, scales, biases, group_size=64, bits=bits))
    for row in range(3):
        found = row_of_weights(
            np.array(words)[row].tobytes(), scales[row].tolist(), biases[row].tolist(), bits
        )
        np.testing.assert_allclose(found, expected[row], rtol=1e-6, atol=1e-6)


def test_direct_reads_fit_every_qwen():
    large = [GEOMETRIES[name] for name in ("35b", "122b", "397b")]
    for sizes, bits, group in itertools.product(large, (2, 3, 4, 5, 6, 8), (32, 64, 128)):
        weights = sizes.hidden_size * sizes.moe_intermediate_size
        assert weights * bits // 8 % BLOCK == 0 and 2 * weights // group % BLOCK == 0
