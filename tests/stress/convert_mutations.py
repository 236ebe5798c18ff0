"""Random changes that damage a checkpoint, for `convert_fuzz.py`.

Each function takes a checkpoint's directory and a random generator, and makes one change.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashmoe_mlx.format.headers import ITEM_SIZE
from flashmoe_mlx.format.layout import EXPERT_DIR

INDEX = "model.safetensors.index.json"
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 8, 31, 64, 1 << 20, 1 << 31, 1 << 63, 1 << 64, 10**30, 1.5,
    -0.0, 1e300, float("nan"), float("inf"), "", "x", "..", "../../x", "/etc/passwd", "\0",
    "\ud800", "a" * 5000, [], {}, [1], [[]], {"a": 1}, "F32", "BF16", "F16", "U32", "I32", "U8",
    "F64", "BOOL", "model.safetensors", "layer_00.safetensors", "qwen3_5_moe", "affine", "mxfp4",
)  # fmt: skip
NAMES = (
    "../../x", "/x", "__metadata__", "", "\0", "\ud800", "x" * 1001, "mtp.norm.weight",
    "language_model.model.norm.weight", "experts.0.up_proj.weight",
    "model.language_model.layers.0.mlp.experts.gate_up_proj",
    "model.language_model.layers.99999999999999999999.mlp.gate.weight", "lm_head.weight",
    "language_model.model.layers.3.mlp.switch_mlp.up_proj.scales", "model.layers.0.x\nsecond line",
    "language_model.model.layers.1.linear_attn.conv1d.weight",
    "layers.0.mlp.experts.-1.up_proj.weight",
    "model.language_model.layers.0.mlp.experts.٣.up_proj.weight",
)  # fmt: skip


def weight_file(source: Path, chances: random.Random) -> Path:
    """Choose a safetensors file."""
    return chances.choice([p for p in sorted(source.rglob("*.safetensors")) if p.is_file()])


def json_file(source: Path, chances: random.Random) -> Path:
    """Choose a JSON file that a plan reads."""
    names = ("config.json", "config.json", INDEX, f"{EXPERT_DIR}/manifest.json")
    return chances.choice([source / name for name in names if (source / name).is_file()])


def read_raw(path: Path) -> tuple[bytes, bytes]:
    """Return the header's text and the data."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def write_raw(path: Path, text: bytes, data: bytes) -> None:
    """Write a safetensors file from its parts."""
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def change_value(node: Any, chances: random.Random) -> None:
    """Replace, remove, rename or repeat a random part of a JSON value."""
    places = list(_places(node))
    parent, key = chances.choice(places)
    kind = chances.random()
    if kind < 0.6:
        parent[key] = _near(parent[key], chances)
    elif kind < 0.75:
        del parent[key]
    elif isinstance(parent, dict):
        parent[chances.choice((*NAMES, *map(str, parent)))] = parent.pop(key)
    else:
        parent.insert(key, chances.choice(parent))


def _places(node: Any) -> Any:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


def _near(value: Any, chances: random.Random) -> Any:
    """Return another value: of any type, or a number near the old one."""
    if type(value) is int and chances.random() < 0.4:
        return chances.choice(
            (value + 1, value - 1, -value, 2 * value, value // 2, value + (1 << 32))
        )
    return chances.choice(VALUES)


def any_json(source: Path, chances: random.Random) -> None:
    """Change values of config.json, the index or the manifest."""
    path = json_file(source, chances)
    content = json.loads(path.read_text())
    for _ in range(chances.choice((1, 1, 2, 4))):
        change_value(content, chances)
    path.write_text(json.dumps(content))


def sizes(source: Path, chances: random.Random) -> None:
    """Change a size in config.json, which determines the expected shapes."""
    path = source / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", config)
    keys = [key for key, value in text.items() if type(value) is int]
    text[chances.choice(keys)] = chances.choice((1, 2, 3, 4, 7, 8, 31, 32, 64, 96, 128, 1 << 33))
    path.write_text(json.dumps(config))


def any_header(source: Path, chances: random.Random) -> None:
    """Change values of a header."""
    path = weight_file(source, chances)
    text, data = read_raw(path)
    content = json.loads(text)
    for _ in range(chances.choice((1, 1, 2))):
        change_value(content, chances)
    write_raw(path, json.dumps(content).encode(), data)


def raw_text(source: Path, chances: random.Random) -> None:
    """Change the text of a header or a JSON file, which may then be invalid."""
    path = weight_file(source, chances) if chances.random() < 0.5 else json_file(source, chances)
    header = path.suffix == ".safetensors"
    text, data = read_raw(path) if header else (path.read_bytes(), b"")
    place = chances.randrange(len(text))
    piece = chances.choice((
        b"9" * 4000, b"9" * 5000, b"[" * 100_000, b"{", b"\xff\xfe", b"\0", b'"a":1,', b"NaN", b"-",
        b"1e999", b'"\\ud800"', b",", b"\xef\xbb\xbf", chances.randbytes(8), b" " * 1000,
    ))  # fmt: skip
    text = text[:place] + piece + text[place + chances.choice((0, 0, 1, len(piece))) :]
    write_raw(path, text, data) if header else path.write_bytes(text)


def repeated_key(source: Path, chances: random.Random) -> None:
    """Repeat a key in an object of a header or a JSON file."""
    path = weight_file(source, chances) if chances.random() < 0.5 else json_file(source, chances)
    header = path.suffix == ".safetensors"
    text, data = read_raw(path) if header else (path.read_bytes(), b"")
    content = json.loads(text)
    key = chances.choice(list(content))
    again = json.dumps({key: chances.choice((content[key], *VALUES))}).encode()
    text = again[:-1] + b"," + text.strip()[1:]
    write_raw(path, text, data) if header else path.write_bytes(text)


def bytes_of_header(source: Path, chances: random.Random) -> None:
    """Flip bits of a header or its length."""
    path = weight_file(source, chances)
    data = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(chances.choice((1, 1, 2, 8))):
        data[chances.randrange(end)] ^= 1 << chances.randrange(8)
    path.write_bytes(data)


def length(source: Path, chances: random.Random) -> None:
    """Change the length of a header."""
    path = weight_file(source, chances)
    data = bytearray(path.read_bytes())
    old = int.from_bytes(data[:8], "little")
    new = chances.choice(
        (0, 1, 2, old - 1, old + 1, len(data), len(data) - 8, 1 << 31, (1 << 64) - 1)
    )
    path.write_bytes(new.to_bytes(8, "little") + data[8:])


def other_size(source: Path, chances: random.Random) -> None:
    """Truncate a file, or append to it."""
    path = weight_file(source, chances)
    size = path.stat().st_size
    os.truncate(path, chances.choice((0, 1, 8, size // 2, size - 1, size + 1, size + 100, 1 << 40)))


def rebuilt(source: Path, chances: random.Random) -> None:
    """Change a tensor's shape, dtype or name; the header still matches its file."""
    path = weight_file(source, chances)
    text, data = read_raw(path)
    content: dict[str, Any] = json.loads(text)
    content.pop("__metadata__", None)
    for _ in range(chances.choice((1, 1, 2))):
        _reshape(content, chances)
    end, header, pieces = 0, {}, []
    for name, entry in content.items():
        nbytes = math.prod(entry["shape"]) * ITEM_SIZE[entry["dtype"]]
        if nbytes > 1 << 22 or nbytes < 0:
            raise ValueError("too large to write")
        begin = entry["data_offsets"][0]
        pieces.append(data[begin : begin + nbytes].ljust(nbytes, b"\0"))
        header[name] = entry | {"data_offsets": [end, end + nbytes]}
        end += nbytes
    write_raw(path, json.dumps(header).encode(), b"".join(pieces))


def _reshape(content: dict[str, Any], chances: random.Random) -> None:
    name = chances.choice(list(content))
    entry = content[name]
    shape = list(entry["shape"])
    kind = chances.randrange(8)
    if kind == 0:
        shape = chances.choice(
            ([], [0], [0, 64], [64, 0], [0, 1, 4], [1], [1, 1, 1, 1], [math.prod(shape)])
        )
    elif kind == 1:
        chances.shuffle(shape)
    elif kind == 2 and shape:
        place = chances.randrange(len(shape))
        shape[place] = chances.choice((0, 1, shape[place] + 1, 2 * shape[place], shape[place] // 2))
    elif kind == 3:
        shape.insert(chances.randint(0, len(shape)), 1)
    elif kind == 4:
        entry["dtype"] = chances.choice(list(ITEM_SIZE))
    elif kind == 5:
        content[chances.choice(NAMES)] = content.pop(name)
    elif kind == 6:
        other = chances.choice(list(content))
        content[name], content[other] = content[other], content[name]
        return
    else:
        del content[name]
        return
    entry["shape"] = shape


def strange_files(source: Path, chances: random.Random) -> None:
    """Replace a file by a link, a pipe, a folder or a copy, or add one."""
    path = chances.choice([p for p in sorted(source.rglob("*")) if p.is_file()])
    kind = chances.randrange(8)
    if kind == 0:
        name = chances.choice(("model-evil.safetensors", "model\n.safetensors", "tokenizer_x.json"))
        shutil.copy(path, source / name)
        return
    path.unlink()
    if kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.mkdir()
    elif kind == 3:
        path.write_bytes(b"")
    elif kind < 7:
        targets = (
            "/etc/passwd",
            path.name,
            "/dev/zero",
            "nowhere",
            "..",
            "config.json",
            "/proc/self/mem",
        )
        os.symlink(chances.choice(targets), path)


def values(source: Path, chances: random.Random) -> None:
    """Change weights to random bytes, including NaN and infinity."""
    path = weight_file(source, chances)
    text, data = read_raw(path)
    spoiled = bytearray(data)
    for _ in range(chances.choice((1, 10))):
        place = chances.randrange(max(1, len(spoiled) - 64))
        spoiled[place : place + 64] = chances.choice((b"\xff", b"\x7f", b"\0", b"\x80")) * 64
    write_raw(path, text, bytes(spoiled[: len(data)]))


MUTATIONS: tuple[Callable[[Path, random.Random], None], ...] = (
    any_json, sizes, any_header, raw_text, repeated_key, bytes_of_header, length, other_size,
    rebuilt, rebuilt, rebuilt, strange_files, values,
)  # fmt: skip
