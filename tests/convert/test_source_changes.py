"""A source that changes during a conversion, or between two runs, is detected and named."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from convert_helpers import contents, flip

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.write import files, output
from flashmoe_mlx.errors import FlashMoEError

MANIFEST = "model_experts/manifest.json"
WEIGHTS, SHARD = "model.safetensors", "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"

Change = Callable[[Path], None]


@pytest.fixture
def stock(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "stock", tmp_path / "stock")


def alter(path: Path) -> None:
    """One byte, in place; JSON stays JSON."""
    place = path.read_bytes().find(b",") + 1 if path.suffix == ".json" else -1
    flip(path, place % path.stat().st_size, 0x20 ^ 0x0A)


def overwrite(path: Path) -> None:
    """In place, by as many bytes."""
    alter(path)


def overwrite_in_secret(path: Path) -> None:
    """In place, with mtime set back, as `cp -p` and `rsync --inplace -t` do."""
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """By a file of the same size and mtime, renamed over it."""
    shutil.copy2(path, path.with_name("new"))
    alter(path.with_name("new"))
    os.utime(path.with_name("new"), ns=(0, path.stat().st_mtime_ns))
    path.with_name("new").replace(path)


def lengthen(path: Path) -> None:
    """By a line break, which does not change its meaning."""
    path.write_bytes(path.read_bytes() + b"\n")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def spoil(path: Path) -> None:
    """With NaN, for which the error would blame the checkpoint."""
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, change: Callable[[], None]) -> None:
    """Call `change` just before the n-th weight file is written."""
    real, steps = output.write_weights, []

    def write_weights(*arguments):
        steps.append(arguments)
        if len(steps) == number:
            change()
        return real(*arguments)

    monkeypatch.setattr(output, "write_weights", write_weights)


def refused(source: Path, out: Path, path: Path, **options: bool) -> None:
    with pytest.raises(FlashMoEError) as error:
        convert(source, out, **options)
    text = str(error.value)
    assert f"{path}: changed during the conversion (size and times were [" in text
    assert text.endswith(f"Delete {out}, and convert again once nothing writes to the source.")
    assert not (out / MANIFEST).exists()


@pytest.mark.parametrize("change", [overwrite, overwrite_in_secret, replace, truncate, Path.unlink])
def test_weights(stock, tmp_path, monkeypatch, change: Change):
    """Some experts were read before the change, and others after it."""
    at_step(monkeypatch, 3, lambda: change(stock / WEIGHTS))
    refused(stock, tmp_path / "out", stock / WEIGHTS)


def test_a_change_that_looks_like_damage(root, tmp_path, monkeypatch):
    hf = shutil.copytree(root / "hf", tmp_path / "hf")
    at_step(monkeypatch, 2, lambda: spoil(hf / SHARD))
    refused(hf, tmp_path / "out", hf / SHARD, quantize=True)


def test_weights_that_were_read_to_the_end(stock, tmp_path, monkeypatch):
    """The model card is written after all of them."""
    real = files.write_file

    def write_file(path, content):
        if path.name == "README.md":
            overwrite(stock / WEIGHTS)
        return real(path, content)

    monkeypatch.setattr(files, "write_file", write_file)
    refused(stock, tmp_path / "out", stock / WEIGHTS)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX])
def test_small_files(stock, tmp_path, monkeypatch, name):
    """Some were read for the plan, and others copied, before the change."""
    at_step(monkeypatch, 2, lambda: overwrite_in_secret(stock / name))
    refused(stock, tmp_path / "out", stock / name)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_the_source_of_links(stock, tmp_path, monkeypatch, name):
    real = output.link_file

    def link_file(path, target):
        real(path, target)
        if target.name == "tokenizer_config.json":
            overwrite_in_secret(stock / name)

    monkeypatch.setattr(output, "link_file", link_file)
    refused(stock, tmp_path / "out", stock / name, link=True)


def test_weights_that_a_link_leads_to(stock, tmp_path, monkeypatch):
    """Two files of one name, in the linked directory and behind its link, are both checked."""
    convert(stock, tmp_path / "linked", link=True)
    (tmp_path / "linked" / WEIGHTS).unlink()
    shutil.copy(stock / WEIGHTS, tmp_path / "linked" / WEIGHTS)
    at_step(monkeypatch, 3, lambda: overwrite(stock / WEIGHTS))
    refused(tmp_path / "linked", tmp_path / "out", stock / WEIGHTS)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (WEIGHTS, overwrite), (WEIGHTS, overwrite_in_secret), (WEIGHTS, replace),
        ("config.json", overwrite_in_secret), ("tokenizer.json", lengthen),
    ],
)  # fmt: skip
def test_between_two_runs(stock, tmp_path, monkeypatch, name, change: Change):
    def stop() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_step(patch, 3, stop)
        with pytest.raises(KeyboardInterrupt):
            convert(stock, tmp_path / "out")
    change(stock / name)
    with pytest.raises(FlashMoEError, match=rf"begun with another {name} \(size and times: \["):
        convert(stock, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_a_conversion_begun_before_a_change_is_not_resumed(stock, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: overwrite(stock / WEIGHTS))
        refused(stock, tmp_path / "out", stock / WEIGHTS)
    with pytest.raises(FlashMoEError, match=rf"begun with another {WEIGHTS}"):
        convert(stock, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    convert(stock, tmp_path / "out")


def test_a_source_that_is_only_read_is_the_same(root, stock, tmp_path):
    """Neither reading it nor adding an unrelated file counts as a change."""
    (stock / "notes.md").write_text("mine")
    convert(stock, tmp_path / "out")
    convert(root / "stock", tmp_path / "again")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
