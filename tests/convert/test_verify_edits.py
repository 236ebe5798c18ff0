"""Verification allows for what users edit, and finds every other change and kind of file."""

import json
import os
import re
from pathlib import Path

import pytest
from convert_helpers import flip
from verify_helpers import CARD, DATA, LAYER, MANIFEST, found

from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.verify import repair, verify
from flashmoe_mlx.errors import FlashMoEError

SETTINGS = {
    "expert_cache": "4GiB", "io_threads": 4, "io_mode": "direct", "experts_per_token": 1,
    "stats": True, "verify": True, "lookahead": "off", "sharding": "exact", "rank_weights": "2,1",
    "collective_timeout": 30,
}  # fmt: skip


def edit(out: Path, change, indent: int | None = 4) -> None:
    path = out / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config, indent=indent))


def test_the_documented_settings_are_those_of_the_package():
    page = (Path(__file__).parents[2] / "docs/reference/format.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if "settings may be added by hand" in line]
    listed = row.split("settings may be added by hand: ")[1]
    assert set(re.findall(r"`(\w+)`", listed)) == verify.SETTINGS == set(SETTINGS)


@pytest.mark.parametrize("names", [["expert_cache"], ["verify", "lookahead"], list(SETTINGS)])
@pytest.mark.parametrize("indent", [4, 2, None])
def test_settings_added_to_config_json_are_no_difference(names, indent, out, capsys):
    edit(out, lambda c: c["flashmoe"].update((n, SETTINGS[n]) for n in names), indent)
    assert main(["verify", str(out)]) == 0
    assert capsys.readouterr().out == (
        f"{out}: every byte is as it was written, except settings added to config.json.\n"
    )


def test_an_edited_card_is_no_difference(out):
    (out / CARD).write_text("My model.")
    assert main(["verify", str(out)]) == 0


OTHER_CHANGES = {
    "another entry": lambda c: c.update(experts=4),
    "a changed entry": lambda c: c.update(model_file="other.py"),
    "no entry": lambda c: c.pop("quantization"),
    "no entry of ours": lambda c: c.pop("flashmoe"),
    "an unknown setting": lambda c: c["flashmoe"].update(speed=2),
    "another version": lambda c: c["flashmoe"].update(format_version=2),
    "a setting elsewhere": lambda c: c.update(io_threads=8),
    "ours is a list": lambda c: c.update(flashmoe=["io_threads"]),
}


@pytest.mark.parametrize("setting", [{}, {"io_threads": 4}])
@pytest.mark.parametrize("change", OTHER_CHANGES)
def test_other_changes_to_config_json_are_found(change, setting, out):
    edit(out, lambda c: (c["flashmoe"].update(setting), OTHER_CHANGES[change](c)))
    assert [line.split(":")[0] for line in found(out)] == ["config.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, None])
def test_a_config_json_that_cannot_be_read_is_found(content, out):
    path = out / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert [line.split(":")[0] for line in found(out)] == ["config.json"]


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", LAYER, MANIFEST]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_not_a_regular_file_is_named_and_not_opened(name, kind, out):
    """Opening a pipe would block for ever; a device has no end."""
    path = out / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    if name == MANIFEST:
        with pytest.raises(FlashMoEError, match=r"manifest.json: .*"):
            verify.verify(out)
    else:
        assert found(out) == [f"{name}: not a regular file"]


@pytest.mark.parametrize("name", ["tokenizer.json", "flashmoe_model.py"])
def test_changes_to_other_small_files_are_found(name, out):
    """They are the source's, byte for byte."""
    with open(out / name, "a") as file:
        file.write("\n")
    assert [line.split(":")[0] for line in found(out)] == [name]


def test_a_damaged_expert_is_found_beside_settings(root, out):
    edit(out, lambda c: c["flashmoe"].update(SETTINGS))
    flip(out / LAYER, DATA + 5)
    assert [line.split(":")[0] for line in found(out)] == [LAYER]
    assert repair.repair(out, verify.verify(out), root / "hf") == []
    assert json.loads((out / "config.json").read_text())["flashmoe"]["io_threads"] == 4
