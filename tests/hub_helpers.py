"""A checkpoint as on the Hub, the server that has it, and what its conversion looks like."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from convert_helpers import (
    Weights,
    contents,
    make_config,
    save,
    write_tokenizer,
)
from hub_server import HubServer, commit
from huggingface_hub import constants

from flashmoe_mlx.convert.source import hub

MANIFEST = "model_experts/manifest.json"
JOURNAL = "model_experts/unfinished.json"
NAME = "owner/chain"
FEW = 20_000  # bytes of the client's metadata and of the journal


def _layer(name: str) -> int:
    match = re.search(r"layers\.(\d+)", name)
    return int(match[1]) if match else -("embed" in name)


def save_chain(directory: Path, weights: Weights, limit: int) -> Path:
    """Write a checkpoint whose layers follow one another through its files, as on the Hub."""
    save(directory, make_config(), {})
    (directory / "model.safetensors").unlink()
    parts: list[Weights] = [{}]
    for name, value in sorted(weights.items(), key=lambda item: (_layer(item[0]), item[0])):
        if parts[-1] and value.nbytes + sum(part.nbytes for part in parts[-1].values()) > limit:
            parts.append({})
        parts[-1][name] = value
    index = {}
    for number, part in enumerate(parts, 1):
        file = f"model.safetensors-{number:05d}-of-{len(parts):05d}.safetensors"
        mx.save_safetensors(str(directory / file), part, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text)
    write_tokenizer(directory)
    return directory


@contextlib.contextmanager
def serving(root: Path, cache: Path) -> Iterator[HubServer]:
    """A server that this process's client uses as the Hub."""
    with HubServer() as server, pytest.MonkeyPatch.context() as monkeypatch:
        server.add(NAME, root / "chain")
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for key, value in {
            "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, key, value)
        monkeypatch.setattr(hub, "WAITS", (0.0,) * 3)
        yield server


def assert_same(root: Path, out: Path) -> None:
    """Equal to the conversion of the directory except for its name."""
    made, whole = contents(out), contents(root / "whole")
    assert made.pop("README.md") == hub_card(whole.pop("README.md"))
    old, new = (json.loads(c.pop(MANIFEST)) for c in (whole, made))
    assert made == whole
    assert new.pop("source") == {"repo": NAME, "revision": commit("a")} and old.pop("source")
    assert new.pop("manifest_checksum") and old.pop("manifest_checksum")
    assert new == old


def hub_card(card: bytes) -> bytes:
    """The card of a directory's conversion, changed to that of the same checkpoint on the Hub."""
    link = f"[{NAME}](https://huggingface.co/{NAME}) in a form"
    text = card.decode().replace("\nchain in a form", f"\n{link}")
    text = text.replace("made from | chain", f"made from | {NAME} at {commit('a')}")
    text = text.replace("--hf-path chain", f"--hf-path {NAME} --revision {commit('a')}")
    return text.replace("---\n", f"---\nbase_model: {NAME}\n", 1).encode()


def on_disk(folder: Path) -> int:
    """Bytes of all files below a folder, while files are created and deleted."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total
