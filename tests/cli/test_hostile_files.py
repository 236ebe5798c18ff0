"""Malformed small files in a model directory each cause a one-sentence error.

The loader rejects them before mlx-lm or transformers opens them.
"""

import json
import os
import socket
from pathlib import Path

import fuzz_files
import pytest
from hostile_helpers import copy_bundled, refused

from flashmoe_mlx.cli import plan
from flashmoe_mlx.format.json_file import MOST_BYTES, parse
from flashmoe_mlx.format.model_files import READ_AS_JSON, check_small_files
from flashmoe_mlx.loader import BUNDLED_MODEL

SMALL = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
UNUSED = ("hf_quant_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


@pytest.fixture
def model(tmp_path) -> Path:
    return copy_bundled(tmp_path / "model")


def make_socket(path: Path) -> None:
    os.chdir(path.parent)  # the absolute path may be too long for a socket
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


KINDS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": make_socket,
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*SMALL, *UNUSED, "chat_template.jinja"])
def test_no_file_at_all(model, name, kind, monkeypatch):
    """Opening a pipe would block, and reading /dev/zero would fill the memory."""
    monkeypatch.chdir(model)
    (model / name).unlink(missing_ok=True)
    KINDS[kind](model / name)
    if kind == "folder" and name not in READ_AS_JSON:
        return check_small_files(model)  # no read blocks on it
    refused(model, rf"{name}: not a regular file\.")
    if name == "config.json":
        with pytest.raises(SystemExit):
            plan.main(["--model", str(model)])


def test_a_folder_of_templates_is_checked(model):
    """transformers reads every template in this folder."""
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / "config.json").write_text("[")
    check_small_files(model)
    os.mkfifo(folder / "tool.jinja")
    refused(model, r"tool\.jinja: not a regular file\.")


@pytest.mark.parametrize("name", [*SMALL, "chat_template.jinja"])
def test_too_large_files(model, name):
    with open(model / name, "wb") as file:
        file.truncate(MOST_BYTES + 1)
    refused(model, rf"{name}: 100000001 bytes long, but at most 100000000 are allowed\.")


TEXTS = {
    "empty": (b"", r"not JSON \(Expecting value"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"not JSON \(nested more than 100"),
    "deep enough": (b'{"a":' + b"[" * 500 + b"]" * 500 + b"}", r"not JSON \(nested more than 100"),
    "objects": (b'{"a":' * 300 + b"1" + b"}" * 300, r"not JSON \(nested more than 100"),
    "twice": (b'{"a": 1, "b": 2, "a": 3}', r"not JSON \('a' occurs more than once\)"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), r"not JSON \('utf-8' codec can't decode"),
    "BOM": (b'\xef\xbb\xbf{"a": 1}', r"not JSON \(Unexpected UTF-8 BOM"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", r"not JSON \(Exceeds the limit"),
    "half of a pair": (b'{"a": "\\uD800"}', r"not JSON \('utf-8' codec can't encode"),
    "half of a pair as a key": (b'{"\\udfff": 1}', r"not JSON \('utf-8' codec can't encode"),
    "list": (b"[1]", r"not a JSON object"),
    "null": (b"null", r"not a JSON object"),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", [*SMALL[:3], "hf_quant_config.json"])
def test_text_that_is_not_an_object(model, name, text):
    content, message = TEXTS[text]
    (model / name).write_bytes(content)
    refused(model, rf"{name}: {message}")


def test_valid_json_is_read():
    deep = 98 * b"[" + b"{}" + 98 * b"]"
    assert parse(b'{"a": [1, {"b": "\\u00e9"}], "c": null}') == {"a": [1, {"b": "é"}], "c": None}
    assert parse(b'["\\ud83d\\ude00", "\\\\ud800"]') == ["\U0001f600", "\\ud800"]
    assert parse(deep) and parse(b"3") == 3 and parse(b'"[[[["') == "[[[["


def test_a_name_that_is_not_text(model):
    """MLX's header parser rejects it with its own message."""
    raw = (BUNDLED_MODEL / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    header["\ud800"] = header.pop(next(name for name in header if "norm" in name))
    text = json.dumps(header).encode()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    refused(model, r"damaged safetensors header \('utf-8' codec can't encode character '.ud800'")


@pytest.mark.parametrize("meta", [[1], {"a": 1}, {"a": None}, {"a": {"b": "c"}}, "text", 5, True])
def test_metadata_that_does_not_map_strings_to_strings(model, meta):
    raw = (BUNDLED_MODEL / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    text = json.dumps(json.loads(raw[8:end]) | {"__metadata__": meta}).encode()
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    refused(model, r"damaged safetensors header \(__metadata__ is not an object of strings\)")


def test_files_changed_at_random(tmp_path):
    """`tests/stress/fuzz_files.py`, a few cases: `load` refuses each, or tokens stay the same."""
    cases = fuzz_files.Cases(tmp_path)
    assert {cases.run(seed) for seed in range(40)} <= {"refused", "equal", "other"}
