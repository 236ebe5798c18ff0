"""Direct and buffered reads of a source: the same bytes, and the same errors."""

import os
import random
from types import SimpleNamespace

import pytest

from flashmoe_mlx.convert.source import read
from flashmoe_mlx.convert.source.read import PAGE, Reader
from flashmoe_mlx.convert.write.execute import ExpertSteps
from flashmoe_mlx.errors import FlashMoEError

SIZE = 5 * PAGE + 100


@pytest.fixture(params=["buffered", "direct"])
def mode(request, monkeypatch):
    """Descriptors of direct reads refuse anything but whole pages here."""
    direct = request.param == "direct"
    opened, real = [], os.preadv

    def open_source(path):
        opened.append(os.open(path, os.O_RDONLY))
        return opened[-1], direct

    def preadv(file, buffers, offset, *flags):
        if direct and file in opened:
            (buffer,) = buffers
            place = read.np.frombuffer(buffer, read.np.uint8).ctypes.data
            assert not (place | len(buffer) | offset) % PAGE
        return real(file, buffers, offset, *flags)

    monkeypatch.setattr(read, "_open_source", open_source)
    monkeypatch.setattr(os, "preadv", preadv)


def test_any_range(mode, tmp_path):
    content = random.Random(0).randbytes(SIZE)
    path = tmp_path / "source"
    path.write_bytes(content)
    ranges = [(0, SIZE), (0, PAGE), (PAGE, PAGE), (8, 10), (PAGE - 1, 2), (PAGE, 10), (SIZE - 1, 1)]
    with Reader() as reader:
        for offset, nbytes in ranges:
            assert bytes(reader.read(path, offset, nbytes)) == content[offset : offset + nbytes]
        for offset, nbytes in [(0, SIZE + 1), (SIZE, 1), (5 * PAGE, PAGE), (SIZE + PAGE, 4)]:
            with pytest.raises(FlashMoEError, match=r"source: ends at byte \d+, but its header"):
                reader.read(path, offset, nbytes)


def test_the_page_cache_is_used_where_it_has_the_file(tmp_path):
    path = tmp_path / "source"
    path.write_bytes(bytes(SIZE))  # which leaves it in the page cache
    descriptor, direct = read._open_source(path)
    os.close(descriptor)
    assert not direct


def test_batches_have_consecutive_experts(monkeypatch):
    steps = ExpertSteps.__new__(ExpertSteps)
    steps._plan = SimpleNamespace(numbers=range(10))
    steps._inputs = None
    monkeypatch.setattr(ExpertSteps, "_float_bytes", lambda self: 20 << 20)
    assert steps.batches([0, 1, 2, 5, 6, 9]) == [[0, 1], [2], [5, 6], [9]]
    monkeypatch.setattr(ExpertSteps, "_float_bytes", lambda self: 100 << 20)
    assert steps.batches([3, 4]) == [[3], [4]]
