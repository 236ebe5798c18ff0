"""Change files of models at random; loading must reject them or give the same tokens.

    python tests/stress/fuzz_files.py --cases 5000 --minutes 10 --seed 1

A case is a tiny model with a change in a header, config.json, a tokenizer file or the manifest, or
with a pipe, a link or a folder instead of a file. The fuzzer loads it, generates a few tokens from
fixed ids, examines it as flashmoe-doctor does, and verifies it if it is converted. Valid outcomes:

* refused: `load` raises FlashMoEError, and the doctor lists a problem;
* equal: config.json still describes the same model, every tensor has the same dtype, shape and
  bytes, and the tokens equal those of the unchanged model;
* other: config.json describes another model that the headers also fit (for example another RoPE
  base), or a tensor has other bytes or other floats (BF16 read as F16), which `verify` names if it
  has checksums. The fuzzer does not compare the tokens.

Everything else is an error: another exception, a signal, other tokens, codes or shapes that the
unchanged model does not have, or a duration over half a minute. The kernels check their bounds.
"""

import contextlib
import io
import json
import random
import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import mlx.core as mx
from convert_mutations import (
    VALUES,
    any_header,
    any_json,
    bytes_of_header,
    change_value,
    length,
    other_size,
    raw_text,
    read_raw,
    rebuilt,
    repeated_key,
    sizes,
    strange_files,
    write_raw,
)
from mlx_lm.generate import generate_step

from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.headers import ITEM_SIZE, checkpoint_headers
from flashmoe_mlx.format.names import canonical, is_expert
from flashmoe_mlx.loader import load
from flashmoe_mlx.models.qwen3_5.args import ModelArgs

PROMPT, TOKENS = [3, 14, 15, 9, 26, 5], 6
FLOATS = ("BF16", "F16", "F32")
KINDS = ("packed", "stock")
Trunk = dict[str, tuple[str, tuple[int, ...], int]]


def trunk_dtype(source: Path, chances: random.Random) -> None:
    """Change the dtype of one tensor of the trunk; keep its bytes or cut them to fit."""
    path = chances.choice(sorted(source.glob("model*.safetensors")))
    text, data = read_raw(path)
    header = json.loads(text)
    name = chances.choice([n for n in header if n != "__metadata__" and not is_expert(n)])
    begin, end = header[name]["data_offsets"]
    before, after = header[name]["dtype"], chances.choice(list(ITEM_SIZE))
    size = (end - begin) * ITEM_SIZE[after] // ITEM_SIZE[before]
    piece = data[begin:end].ljust(size, b"\0")[:size]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [n + size - (end - begin) for n in entry["data_offsets"]]
    header[name] |= {"dtype": after, "data_offsets": [begin, begin + size]}
    write_raw(path, json.dumps(header).encode(), data[:begin] + piece + data[end:])


def metadata(source: Path, chances: random.Random) -> None:
    """Replace the metadata of a file."""
    path = chances.choice(sorted(source.rglob("*.safetensors")))
    text, data = read_raw(path)
    value = chances.choice((*VALUES, {"format": 1}, {"format": None}, {"a": {"b": "c"}}))
    write_raw(path, json.dumps(json.loads(text) | {"__metadata__": value}).encode(), data)


def tokenizer(source: Path, chances: random.Random) -> None:
    """Change or add values in a tokenizer file or generation_config.json."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer_config.json",
             "generation_config.json")  # fmt: skip
    path = source / chances.choice(names)
    content = json.loads(path.read_text()) if path.exists() else {}
    added = ("tool_parser_type", "chat_template_type", "auto_map", "tokenizer_class",
             "eos_token_id", "eos_token", "chat_template", "added_tokens_decoder",
             "model_max_length", "extra_special_tokens")  # fmt: skip
    if not content or chances.random() < 0.4:
        content[chances.choice(added)] = chances.choice(VALUES)
    else:
        change_value(content, chances)
    path.write_text(json.dumps(content))


def garbage(source: Path, chances: random.Random) -> None:
    """Replace a small file by random bytes, nested brackets or an empty file."""
    path = chances.choice([p for p in sorted(source.iterdir()) if p.suffix in (".json", ".jinja")])
    deep = chances.choice((99, 101, 500, 2000, 100_000))
    path.write_bytes(
        chances.choice((b"", chances.randbytes(200), b"[" * deep + b"]" * deep, b"\xff{}", b"null"))
    )


MUTATIONS = (
    trunk_dtype, trunk_dtype, any_header, any_header, bytes_of_header, rebuilt, rebuilt, metadata,
    length, other_size, any_json, any_json, sizes, raw_text, repeated_key, strange_files,
    tokenizer, tokenizer, garbage,
)  # fmt: skip


class Model:
    """The content of an unchanged directory, and its tokens."""

    def __init__(self, directory: Path) -> None:
        """Load the directory."""
        self.directory = directory
        self.args, self.trunk = described(directory), trunk_of(directory)
        model, _ = load(directory)
        with model:
            self.tokens = generate(model)


def generate(model: Any) -> list[int]:
    """Return the greedy tokens after PROMPT."""
    steps = generate_step(mx.array(PROMPT), model, max_tokens=TOKENS)
    return [int(token) for token, _ in steps]


def described(directory: Path) -> ModelArgs:
    """Return the arguments in config.json, without those that do not affect tokens."""
    args = ModelArgs.from_dict(json.loads((directory / "config.json").read_text()))
    return replace(args, flashmoe={}, quantization={}, layer_types=None, max_position_embeddings=1)


def trunk_of(directory: Path) -> Trunk:
    """Return dtype, shape and checksum of every tensor of the trunk."""
    headers = checkpoint_headers(directory)
    return {
        name: (info.dtype, info.shape, zlib.crc32(file.read_bytes()[info.offset :][: info.nbytes]))
        for key, (file, info) in headers.items()
        if (name := canonical(key)) and not is_expert(key)
    }


def judge(before: Model, directory: Path, tokens: list[int], named: bool) -> str:
    """Return the outcome of a changed directory that loads and gives tokens.

    Args:
        before: the unchanged model.
        directory: the changed directory.
        tokens: its tokens.
        named: whether `verify` names a difference.
    """
    other = described(directory) != before.args
    found = trunk_of(directory)
    assert found.keys() == before.trunk.keys() or other, "accepted another set of tensors"
    for name, (dtype, shape, checksum) in before.trunk.items():
        if name in found and found[name] != (dtype, shape, checksum):
            floats = dtype in FLOATS and found[name][0] in FLOATS
            assert floats or found[name][0] == dtype, f"accepted {name} as {found[name][0]}"
            # In a quantized matrix fewer words mean fewer bits, which mlx-lm infers.
            packed = dtype == "U32" and found[name][1][:-1] == shape[:-1]
            same = found[name][1] == shape or name.endswith("conv1d.weight") or packed
            assert same or other, f"accepted {name} as {found[name][1]}"
            other = True
    if tokens == before.tokens:
        return "equal"
    # Only checksums detect other bytes in experts with the same header.
    assert other or named or before.directory.name == "stock", f"other tokens: {tokens}"
    return "other"


class Cases(harness.Cases):
    """Two tiny models to change: a stock MLX checkpoint and its conversion."""

    patience = 30

    def __init__(self, folder: Path) -> None:
        harness.write_models(folder / "sources")
        self.models = [Model(folder / "sources" / kind) for kind in KINDS]
        self.work = folder / "case"

    def run(self, seed: int) -> str:
        """Change a model, and return "refused", "equal" or "other"; raise otherwise."""
        chances = random.Random(seed)
        with contextlib.redirect_stderr(io.StringIO()):
            return outcome(chances.choice(self.models), self.work, chances)


def outcome(before: Model, work: Path, chances: random.Random) -> str:
    """Copy a model to `work`, change it, use it, and return the outcome in a word."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(before.directory, work)
    change = chances.choice(MUTATIONS)
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, AttributeError):
        change(work, chances)  # the change may not apply to this model
    tokens = None
    try:
        model, words = load(work, io_threads=2)
        with model:
            tokens = generate(model)
            words.decode(words.encode("w1 w2"))
            words.detokenizer.add_token(tokens[0])
    except FlashMoEError as error:
        assert len(str(error)) < 4000, f"an error of {len(str(error))} characters"
    problems = examine(work).problems
    named = False
    if (work / "model_experts").is_dir():
        try:
            named = bool(verify(work))
        except FlashMoEError:
            named = True
    if tokens is None:
        assert problems, "refused, but the doctor lists no problem"
        return "refused"
    return judge(before, work, tokens, named)


if __name__ == "__main__":
    harness.main(__doc__, Cases)
