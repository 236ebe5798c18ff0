"""Conversions from the Hub, file by file: its real client, against a server on loopback."""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from convert_helpers import (
    contents,
)
from hub_helpers import FEW, MANIFEST, NAME, assert_same, on_disk
from huggingface_hub import constants, snapshot_download
from mlx_lm.convert import convert as stock_convert

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.source import hub
from flashmoe_mlx.convert.source.shards import FOLDER
from flashmoe_mlx.convert.write import output
from flashmoe_mlx.errors import FlashMoEError


def test_same_bytes_within_the_bound(root, server, sizes, tmp_path, monkeypatch):
    """Every file is downloaded once, and the disk holds the output and at most two of them."""
    out, held, total = tmp_path / "out", [], []

    def look(*arguments: object) -> None:
        held.append(on_disk(out / FOLDER))
        total.append(on_disk(out))

    def write_weights(*arguments, real=output.write_weights):
        look()
        entry = real(*arguments)
        look()
        return entry

    monkeypatch.setattr(output, "write_weights", write_weights)
    server.listener = look
    convert(NAME, out, quantize=True)
    assert_same(root, out)
    for name, size in sizes.items():
        assert size <= server.sent[name] <= size + hub.FIRST_BYTES
    *_, second, first = sorted(sizes.values())
    assert first < max(held) <= first + second + FEW
    assert max(total) <= on_disk(out) + first + second + FEW
    assert sum(sizes.values()) > 3 * (first + second)
    assert not (out / FOLDER).exists()


def test_dry_run_fetches_headers_only(root, server, files, sizes, tmp_path, capsys):
    convert(root / "chain", tmp_path / "out", quantize=True, dry_run=True)
    local = capsys.readouterr().out.splitlines()
    convert(NAME, tmp_path / "out", quantize=True, dry_run=True)
    rows = capsys.readouterr().out.splitlines()
    (fetching,) = (row for row in rows if row.startswith("to fetch"))
    rows.remove(fetching)
    assert rows[0].startswith(f"source      {NAME} (") and rows[1:-2] == local[1:-2]
    took = r"time +about \d+ s to compute on this machine, 1 s to fetch at 100 MB/s, plus disk time"
    assert re.fullmatch(took, rows[-1])
    assert fetching.startswith(f"to fetch    {len(files)} files, {sum(sizes.values()):,} bytes (")
    assert "; at once at most 2, " in fetching
    assert all(server.sent[name] <= hub.FIRST_BYTES for name in files)
    assert set(server.sent) - set(files) == {
        "config.json", "model.safetensors.index.json", "tokenizer_config.json",
    }  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_dry_run_names_code_that_it_did_not_run(root, server, files, tmp_path, capsys):
    """It names the repository's modules, and those of other repositories in its configuration."""
    source = shutil.copytree(root / "chain", tmp_path / "code")
    (source / "tokenizer_evil.py").write_text("raise SystemExit")
    (source / "processor_config.json").write_text('{"auto_map": {"A": "owner/name--evil.P"}}')
    server.add("owner/code", source)
    convert("owner/code", tmp_path / "out", quantize=True, dry_run=True)
    named = "tokenizer_evil.py, evil.py of owner/name. --trust-remote-code would run it;"
    assert f"\ncode        of owner/code: {named}" in capsys.readouterr().out
    assert all(server.sent[name] <= hub.FIRST_BYTES for name in files)
    convert("owner/code", tmp_path / "out", quantize=True, no_remote_code=True)
    assert [path.name for path in (tmp_path / "out").rglob("*.py")] == ["flashmoe_model.py"]
    assert (tmp_path / "out/processor_config.json").read_bytes() == b"{}"


@dataclass
class Usage:
    free: int


def test_room_for_the_output_and_what_is_held(root, server, tmp_path, monkeypatch, capsys):
    """With one byte too few, nothing is written."""
    convert(NAME, tmp_path / "out", quantize=True, dry_run=True)
    rows = capsys.readouterr().out
    figures = re.findall(r"at most 2, ([\d,]+) bytes|to write +([\d,]+) bytes", rows)
    needed = sum(int((a or b).replace(",", "")) for a, b in figures)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed - 1))
    with pytest.raises(FlashMoEError, match=r"needs 1.\d\d MB \(0.\d\d MB of them temporarily\)"):
        convert(NAME, tmp_path / "out", quantize=True)
    assert not (tmp_path / "out").exists()
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(needed))
    (tmp_path / "out").mkdir()  # it may be a mount point
    convert(NAME, tmp_path / "out", quantize=True)
    assert tmp_path / "out" in asked and tmp_path not in asked
    assert_same(root, tmp_path / "out")


def test_quantized_sources(root, server, tmp_path):
    """mlx-lm's output, and flashmoe-convert's, layer by layer."""
    stock_convert(str(root / "chain"), str(tmp_path / "stock"), quantize=True)
    for name, source in (("stock", tmp_path / "stock"), ("packed", root / "whole")):
        server.add(f"owner/{name}", source)
        local, out = tmp_path / f"{name}-local", tmp_path / f"{name}-out"
        convert(source, local, quantize=name == "packed", q_bits={"packed": 8}.get(name))
        convert(f"owner/{name}", out, quantize=name == "packed", q_bits={"packed": 8}.get(name))
        made, expected = contents(out), contents(local)
        for differs in (MANIFEST, "README.md"):
            assert made.pop(differs) != expected.pop(differs)
        assert made == expected


@pytest.mark.parametrize("cached", [False, True])
def test_the_model_card_comes_along(root, server, tmp_path, cached):
    """The licence in its front matter is kept. mlx-lm does not download the card to the cache."""
    shutil.copytree(root / "chain", tmp_path / "chain")
    (tmp_path / "chain/README.md").write_text("---\nlicense: mit\nbase_model: other/x\n---\n# It")
    server.add(NAME, tmp_path / "chain")
    if cached:
        snapshot_download(NAME, allow_patterns=list(hub.PATTERNS))
        server.reset()
    convert(NAME, tmp_path / "out", quantize=True)
    assert set(server.sent) == {"README.md"} or not cached
    assert server.asked["README.md"] == 1
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith(f"---\nbase_model: {NAME}\nlibrary_name: mlx\nlicense: mit\n")


def test_what_the_cache_has_is_used_and_stays(root, server, files, tmp_path, monkeypatch):
    server.add(NAME, root / "chain")
    convert(NAME, tmp_path / "kept", quantize=True, keep_source=True)
    assert_same(root, tmp_path / "kept")
    cache = tmp_path / "cache"
    before = contents(cache)
    assert {path.split("/")[-1] for path in before} >= {*files, "config.json"}
    server.reset()
    convert(NAME, tmp_path / "online", quantize=True)
    assert not server.sent
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        convert(NAME, tmp_path / "offline", quantize=True)
    for name in ("online", "offline"):
        assert_same(root, tmp_path / name)
    assert contents(cache) == before
    (snapshot,) = (path.parent for path in cache.rglob(files[2]))
    os.unlink((snapshot / files[2]).resolve())
    os.unlink(snapshot / files[2])
    before = contents(cache)
    convert(NAME, tmp_path / "partly", quantize=True)
    assert_same(root, tmp_path / "partly")
    assert contents(cache) == before
    assert [name for name in files if server.sent[name] > hub.FIRST_BYTES] == [files[2]]


def test_snapshots_of_the_real_client(root, server, tmp_path):
    """The server speaks enough of the API for the client's own download of everything."""
    path = snapshot_download(NAME)
    assert contents(Path(path)) == contents(root / "chain")
