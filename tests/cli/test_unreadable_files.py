"""A file that cannot be read is called unreadable, neither missing nor damaged."""

import builtins
import errno
import io
import os
from pathlib import Path

import pytest
from hostile_helpers import copy_bundled

from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.cli import plan
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.convert import cli, convert
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.format.headers import read_header
from flashmoe_mlx.format.json_file import read_json
from flashmoe_mlx.format.model_files import check_small_files
from flashmoe_mlx.loader import BUNDLED_MODEL


@pytest.fixture
def model(tmp_path) -> Path:
    return copy_bundled(tmp_path / "model")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "packed"
    convert(BUNDLED_MODEL, path)
    return path


class Failing(io.BytesIO):
    """A file whose reads fail."""

    def read(self, *arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def fail(monkeypatch, path: Path, reads: int, number: int = errno.EIO) -> None:
    """Let the nth opening of a file fail: in a read (EIO), or at once."""
    opened = []
    real = builtins.open

    def fake(file, *arguments, **options):
        if Path(file) == path:
            opened.append(file)
            if len(opened) >= reads and number == errno.EIO:
                return Failing()
            if len(opened) >= reads:
                raise OSError(number, os.strerror(number), str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", fake)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("reads", [1, 2])
def test_an_unreadable_config_is_called_unreadable(packed, reads, number, monkeypatch, capsys):
    """The doctor reports it at the first and at a later read, neither as missing nor as damaged."""
    fail(monkeypatch, packed / "config.json", reads, number)
    problems = "\n".join(examine(packed).problems)
    assert f"config.json: unreadable ({os.strerror(number)}). Check" in problems
    assert "no config.json" not in problems and "damaged" not in problems
    if reads == 1:
        with pytest.raises(SystemExit) as ended:
            plan.main(["--model", str(packed), "--machine", "m3-max-48"])
        assert ended.value.code == 2 and "config.json: unreadable (" in capsys.readouterr().err
        assert cli.main(["--hf-path", str(packed), "--mlx-path", str(packed / "out")]) == 2
        assert "config.json: unreadable (" in capsys.readouterr().err


@pytest.mark.parametrize("reads", [1, 2])
def test_an_unreadable_manifest_is_called_unreadable(packed, reads, monkeypatch, capsys):
    manifest = packed / "model_experts/manifest.json"
    with monkeypatch.context() as patch:
        fail(patch, manifest, reads)
        with pytest.raises(FlashMoEError, match=r"manifest\.json: unreadable \(Input/output error"):
            verify(packed)
    fail(monkeypatch, manifest, reads)
    assert cli.main(["verify", str(packed)]) == 2
    assert "manifest.json: unreadable (Input/output error)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "model_experts/layer_01.safetensors"])
def test_an_unreadable_header_is_called_unreadable(packed, name, monkeypatch):
    fail(monkeypatch, packed / name, 1)
    with pytest.raises(FlashMoEError, match=r"safetensors: unreadable \(Input/output error\)"):
        read_header(packed / name)
    assert any("unreadable (Input" in problem for problem in examine(packed).problems)


@pytest.mark.parametrize("call", ["stat", "listdir"])
def test_a_folder_that_may_not_be_entered(model, call, monkeypatch):
    """Root may enter every folder, so the test replaces the system call."""
    real = getattr(os, call)

    def denied(path, *arguments, **options):
        if str(path).startswith(str(model)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, denied)
    with pytest.raises(
        FlashMoEError, match=r"model: unreadable \(Permission denied\)|config.json: "
    ):
        load(model)
    with pytest.raises(FlashMoEError, match=r"unreadable \(Permission denied\)"):
        check_small_files(model)


def test_verify_names_what_it_cannot_read(packed, monkeypatch):
    """The other files are still compared."""
    real = os.stat
    hidden = packed / "tokenizer.json"

    def denied(path, *arguments, **options):
        if str(path) == str(hidden):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", denied)
    assert [str(p) for p in verify(packed)] == ["tokenizer.json: unreadable (Permission denied)"]


def test_a_missing_file_is_not_an_unreadable_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "x.json", "Mend it.")
    with pytest.raises(FlashMoEError, match=r"x\.safetensors: missing"):
        read_header(tmp_path / "x.safetensors")
    with pytest.raises(FlashMoEError, match=r"no config\.json\. Give the directory of a model"):
        load(tmp_path)
