"""Direct and buffered writes of tensor files: the same bytes, and no error is lost."""

import errno
import os

import numpy as np
import pytest

from flashmoe_mlx.convert.source.read import PAGE, Reader
from flashmoe_mlx.convert.write import files

TENSORS = [("a", "F32", (1024,)), ("b", "U8", (3 * PAGE,)), ("c", "U8", (10,))]


def pages(count: int) -> memoryview:
    memory = Reader.buffer(count * PAGE)
    memory[:] = np.random.default_rng(count).integers(0, 256, memory.size, np.uint8)
    return memory.data


def write_all(path) -> bytes:
    first, second = pages(1), pages(3)
    with files.TensorFile(path, TENSORS, PAGE) as file:
        file.write("a", first)
        file.write("b", second)
        file.write("c", b"0123456789")
    content = path.read_bytes()
    assert content[PAGE:] == bytes(first) + bytes(second) + b"0123456789"
    return content


@pytest.fixture
def past(monkeypatch) -> list[int]:
    """The offsets of direct writes."""
    offsets: list[int] = []
    real = files.TensorFile._write_past
    monkeypatch.setattr(
        files.TensorFile, "_write_past",
        lambda self, view, offset: (offsets.append(offset), real(self, view, offset)),
    )  # fmt: skip
    return offsets


def test_both_ways_write_the_same(tmp_path, monkeypatch, past):
    monkeypatch.setattr(files, "_open_direct", lambda path: None)
    expected = write_all(tmp_path / "cached")
    assert past == []
    monkeypatch.setattr(files, "_open_direct", lambda path: os.open(path, os.O_WRONLY))
    assert write_all(tmp_path / "direct") == expected
    assert past == [PAGE, 2 * PAGE]


def test_only_whole_pages_are_written_directly():
    memory = pages(2)
    assert files._is_paged(memory, 0) and files._is_paged(memory[PAGE:], PAGE)
    assert not files._is_paged(memory, 8) and not files._is_paged(memory[:-1], 0)
    assert not files._is_paged(memory[8 : PAGE + 8], 0) and not files._is_paged(memory[:0], 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EINVAL])
def test_a_failed_write_is_an_error_or_retried_buffered(tmp_path, monkeypatch, number):
    """Only a disk with blocks larger than a page falls back to buffered writes."""
    direct = []
    monkeypatch.setattr(
        files, "_open_direct", lambda path: direct.append(os.open(path, os.O_WRONLY)) or direct[0]
    )
    real = os.pwrite

    def pwrite(file, data, offset):
        if file in direct:
            raise OSError(number, os.strerror(number))
        return real(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    if number == errno.EINVAL:
        write_all(tmp_path / "out")
        return
    with pytest.raises(OSError, match=os.strerror(number)):
        write_all(tmp_path / "out")
    assert not list(tmp_path.iterdir())
