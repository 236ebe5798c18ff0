"""Kernels are compiled before a model is loaded, in processes of their own, once."""

import errno

import pytest

from flashmoe_mlx import progress
from flashmoe_mlx.custom_kernels import kept
from flashmoe_mlx.custom_kernels.cpu import compile, numba_cache


@pytest.fixture
def compiled(tmp_path, monkeypatch) -> list[str]:
    """Record what `prepare` does, with a separate folder."""
    done: list[str] = []

    class Child:
        def __init__(self, command, **options):
            done.append("child")

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(progress, "_logged", set())
    monkeypatch.setattr(compile, "_marker", MARKER)
    monkeypatch.setattr(compile.subprocess, "Popen", Child)
    monkeypatch.setattr(compile, "compile_all", lambda wanted: done.append("here"))
    monkeypatch.setattr(numba_cache, "folder", lambda: tmp_path)
    return done


MARKER = compile._marker
FORMATS = {(4, 64, "bfloat16")}


def test_the_marker_lies_beside_the_code(compiled, tmp_path, capsys):
    """Deleting the code deletes the marker, and neither needs a home directory."""
    for _ in range(2):
        compile.prepare(FORMATS)
    children = ["child"] * compile.PARTS
    assert compiled == [*children, "here", "here"]
    assert capsys.readouterr().err.count("compiling kernels, first use only") == 1
    (marker,) = tmp_path.iterdir()
    marker.unlink()
    compile.prepare(FORMATS)
    assert compiled == [*children, "here", "here", *children, "here"]


@pytest.mark.parametrize("fault", [errno.EAGAIN, errno.ENOMEM, errno.EACCES, errno.ENOENT])
def test_without_another_process_it_is_compiled_here(fault, compiled, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(fault, "no process")

    monkeypatch.setattr(compile.subprocess, "Popen", refuse)
    compile.prepare(FORMATS)
    assert compiled == ["here"] and list(tmp_path.iterdir()) == []


def test_code_that_cannot_be_cached_is_compiled_once(compiled, monkeypatch, capsys):
    """Without a child process, whose work would be lost."""
    monkeypatch.setattr(numba_cache, "folder", lambda: kept.NOWHERE)
    compile.prepare(FORMATS)
    assert compiled == ["here"] and capsys.readouterr().err == ""
