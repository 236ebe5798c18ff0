"""How files are opened on each system, and the io_mode setting."""

import os
import sys
import types

import pytest
from store_helpers import big_layout, make_store

from flashmoe_mlx import binding, load
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.settings import StreamConfig
from flashmoe_mlx.store import io_mode
from flashmoe_mlx.store.io_mode import cached_share, obstacle, open_expert_file, plan_io, plan_load
from flashmoe_mlx.store.sizing import IoPlan, plan_cache

BLOCKS = [4096] * 9


@pytest.fixture
def macos(monkeypatch):
    """Pretend to be macOS, and return the fcntl calls."""
    calls = []
    fake = types.SimpleNamespace(fcntl=lambda *args: calls.append(args))
    monkeypatch.setitem(sys.modules, "fcntl", fake)
    monkeypatch.setattr("sys.platform", "darwin")
    for name in ("posix_fadvise", "O_DIRECT"):
        monkeypatch.delattr(os, name, raising=False)
    return calls


@pytest.mark.parametrize("direct", [False, True])
def test_macos_turns_read_ahead_off_and_the_cache_as_asked(tmp_path, macos, direct):
    (tmp_path / "file").write_bytes(b"x")
    descriptor = open_expert_file(tmp_path / "file", direct)
    assert os.read(descriptor, 9) == b"x"
    os.close(descriptor)
    assert macos == [(descriptor, 45, 0), (descriptor, 48, int(direct))]


def test_macos_keeps_its_page_cache_unless_told(tmp_path, macos):
    layout = big_layout(tmp_path, BLOCKS)
    assert plan_io("auto", layout, room=0) == IoPlan(False, "macOS")
    assert plan_io("direct", layout, room=0).direct


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="a call of Linux")
def test_linux_turns_read_ahead_off(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("os.posix_fadvise", lambda *args: calls.append(args))
    (tmp_path / "file").touch()
    descriptor = open_expert_file(tmp_path / "file", direct=False)
    os.close(descriptor)
    assert calls == [(descriptor, 0, 0, os.POSIX_FADV_RANDOM)]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs O_DIRECT")
def test_obstacles(tmp_path, monkeypatch):
    layout = big_layout(tmp_path, BLOCKS)
    with monkeypatch.context() as patch:
        patch.delattr(os, "O_DIRECT")
        assert "has no direct reads" in obstacle(layout)

    def refuse(*_, **__):
        raise OSError(22, "Invalid argument")

    opening = "flashmoe_mlx.store.io_mode.open_expert_file"
    for call, fault in (
        ("os.preadv", "does not support direct reads"),
        (opening, "cannot be opened for direct reads"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(call, refuse)
            assert f"big.bin {fault} (Invalid argument)" in obstacle(layout)
            with pytest.raises(FlashMoEError, match=r"io_mode = 'direct': .*big"):
                plan_io("direct", layout, room=0)


def test_with_direct_reads_the_slots_get_the_page_caches_memory(tmp_path):
    layout = big_layout(tmp_path, BLOCKS)
    slot = layout.token_bytes
    buffered, direct = (
        plan_cache("auto", layout, 2, 0, 12 * slot, IoPlan(direct, "a test"))
        for direct in (False, True)
    )
    assert buffered.slots == 3
    assert direct.slots > buffered.slots and direct.nbytes <= 0.7 * 12 * slot
    assert "direct reads (a test)" in str(direct) and "buffered reads" in str(buffered)


def test_the_setting(monkeypatch):
    assert StreamConfig.resolve({}).io_mode == "auto"
    monkeypatch.setenv("FLASHMOE_IO_MODE", "direct")
    assert StreamConfig.resolve({}).io_mode == "direct"
    assert StreamConfig.resolve({}, io_mode="buffered").io_mode == "buffered"
    with pytest.raises(FlashMoEError, match=r"io_mode = 'fast' is not one of auto, buffered"):
        StreamConfig.resolve({}, io_mode="fast")


@pytest.mark.parametrize(
    ("mode", "share", "direct", "reason"),
    [
        ("auto", 0.9, False, "room for 90%"),
        ("auto", 0.5, True, "room for only 50%"),
        ("buffered", 0.1, False, "as asked"),
        ("direct", 0.9, True, "as asked"),
    ],
)
def test_reads_go_past_a_page_cache_with_little_room(
    tmp_path, monkeypatch, mode, share, direct, reason
):
    monkeypatch.setattr(io_mode, "obstacle", lambda layout: None)
    monkeypatch.setattr(io_mode.sys, "platform", "linux")
    layout = make_store(tmp_path, slots=1).layout
    plan = plan_io(mode, layout, round(share * layout.total_bytes))
    assert (plan.direct, reason in plan.reason) == (direct, True)


def test_files_without_blocks_are_not_read_directly(tmp_path):
    layout = make_store(tmp_path, slots=1).layout
    assert "is not laid out in blocks" in obstacle(layout)
    assert not plan_io("auto", layout, 0).direct
    with pytest.raises(FlashMoEError, match=r"io_mode = 'direct': .*Choose buffered, or auto"):
        plan_io("direct", layout, 0)


def test_preloading_bypasses_a_page_cache_without_the_experts(tmp_path, monkeypatch):
    layout = big_layout(tmp_path, BLOCKS)
    if why := obstacle(layout):
        pytest.skip(why)
    plain, direct, shares = IoPlan(False, "room"), IoPlan(True, "no room"), [0.1, 0.9, None]
    monkeypatch.setattr(io_mode, "cached_share", lambda _: shares.pop(0))
    past = IoPlan(True, "the page cache holds 10% of the experts")
    assert plan_load("auto", layout, plain) == past
    assert plan_load("auto", layout, plain) is plan_load("auto", layout, plain) is plain
    assert plan_load("buffered", layout, plain) is plain
    assert plan_load("auto", layout, direct) is direct
    monkeypatch.setattr(io_mode, "obstacle", lambda _: "some reason")
    assert plan_load("auto", layout, plain) is plain


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs RWF_NOWAIT")
def test_the_page_cache_is_asked_what_it_holds(tmp_path, monkeypatch):
    layout = big_layout(tmp_path, [40_000] * 9)
    if (share := cached_share(layout)) is None:
        pytest.skip("this file system cannot tell")
    assert share == 1
    path = tmp_path / "big.bin"
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert [cached_share(layout) < 0.5 for _ in range(2)] == [True] * 2

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.preadv", refuse)
    assert cached_share(layout) is None


def test_compiled_kernels_are_memory_in_use(monkeypatch):
    order, prepare = [], binding.prepare
    monkeypatch.setattr(binding, "prepare", lambda *a: (order.append("kernels"), prepare(*a))[1])
    monkeypatch.setattr(binding, "available_bytes", lambda: order.append("memory") or 1 << 30)
    model, _ = load(BUNDLED_MODEL)
    model.close()
    assert order == ["kernels", "memory"]
