"""Repair, and one rank of several: only the bytes that they need come from the Hub."""

import json
import re
import shutil
from pathlib import Path

import pytest
from convert_helpers import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    contents,
    flip,
    fused,
    make_config,
    make_weights,
    spell,
)
from hub_helpers import FEW, MANIFEST, NAME, save_chain
from hub_server import Fault

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.source import hub, shards
from flashmoe_mlx.convert.source.shards import FOLDER
from flashmoe_mlx.convert.write import output

# --- repair --------------------------------------------------------------------------------------


def test_repair_fetches_only_what_differs(root, server, files, sizes, tmp_path):
    out = shutil.copytree(root / "whole", tmp_path / "out")
    layer = out / "model_experts/layer_02.safetensors"
    flip(layer, layer.stat().st_size - 100)
    command = ["verify", str(out), "--repair", "--hf-path"]
    server.faults[files[4]] = [Fault("status", 503)]
    assert main([*command, NAME]) == 0
    assert contents(out) == contents(root / "whole")
    record = 3 * 2 * 128 * 64
    assert sum(server.sent[name] for name in files) <= len(files) * hub.FIRST_BYTES + record
    assert contents(tmp_path / "cache") == {}
    flip(out / "model.safetensors", 9000)
    assert main([*command, NAME]) == 0
    assert contents(out) == contents(root / "whole")


def test_repair_is_refused_other_bytes(root, server, tmp_path, capsys):
    out = shutil.copytree(root / "whole", tmp_path / "out")
    weights = spell(fused(make_weights(make_config(), seed=8)), "model.language_model.")
    server.add("owner/other", save_chain(tmp_path / "other", weights, 900_000))
    layer = out / "model_experts/layer_02.safetensors"
    flip(layer, layer.stat().st_size - 100)
    assert main(["verify", str(out), "--repair", "--hf-path", "owner/other"]) == 2
    assert "owner/other: gives model_experts/layer_02.safetensors" in capsys.readouterr().err


# --- one rank of several -------------------------------------------------------------------------

RANK = {"quantize": True, "ranks": 2, "rank": 1}
OTHERS = LAYERS * EXPERTS // 2 * 3 * INTERMEDIATE * HIDDEN * 2  # bytes of another rank's experts


def without_source(out: Path) -> dict[str, bytes]:
    """Contents apart from where they came from."""
    found = {name: data for name, data in contents(out).items() if name != "README.md"}
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["source"], manifest["manifest_checksum"]
    return found | {MANIFEST: json.dumps(manifest).encode()}


@pytest.mark.parametrize("gap", [1, shards.GAP_BYTES])
def test_a_rank_fetches_only_its_experts(root, server, files, sizes, tmp_path, monkeypatch, gap):
    """Unless its gaps cost more requests than they save bytes, as in these small files."""
    monkeypatch.setattr(shards, "GAP_BYTES", gap)
    monkeypatch.setattr(hub, "PIECE_BYTES", 50_000)
    convert(root / "chain", tmp_path / "local", **RANK)
    server.faults[files[2]] = [Fault("drop", 9), Fault("drop", 9)]  # the header, and a range
    convert(NAME, tmp_path / "out", **RANK)
    assert without_source(tmp_path / "out") == without_source(tmp_path / "local")
    assert not (tmp_path / "out" / FOLDER).exists()
    headers = sum(min(hub.FIRST_BYTES, size) for size in sizes.values())
    left_out = sum(sizes.values()) + headers - sum(server.sent[name] for name in files)
    assert left_out == pytest.approx(OTHERS if gap == 1 else 0, abs=FEW)


def test_a_rank_resumes_with_the_ranges_on_disk(root, server, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "GAP_BYTES", 1)
    real, out, steps = output.write_weights, tmp_path / "out", []

    def write_weights(*arguments):
        steps.append(arguments)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_weights", write_weights)
        with pytest.raises(KeyboardInterrupt):
            convert(NAME, out, **RANK)
    held = {path.name for path in (out / FOLDER).glob("*.safetensors")}
    assert held
    server.reset()
    convert(NAME, out, **RANK, dry_run=True)
    fetched = re.search(r"to fetch +\d+ files, ([\d,]+) bytes", capsys.readouterr().out)
    looked = sum(server.sent[name] for name in files)
    server.reset()
    (begun,) = (name for name in files[-2:-1] if name not in held)
    (out / FOLDER / f"{begun}.half").write_bytes(b"the begin of a killed download")
    convert(NAME, out, **RANK)
    assert sum(server.sent[name] for name in files) - looked == int(fetched[1].replace(",", ""))
    assert all(server.sent[name] <= hub.FIRST_BYTES for name in held)
    convert(root / "chain", tmp_path / "local", **RANK)
    assert without_source(out) == without_source(tmp_path / "local")
