"""Experts being read: disk errors, concurrent requests, and consumers of slots."""

import errno
import os
import threading

import pytest
from store_helpers import contents, make_store, record

from flashmoe_mlx.errors import FlashMoEError

preadv = os.preadv


@pytest.fixture
def disk(monkeypatch):
    """Replace `preadv`."""
    return lambda answer: monkeypatch.setattr(os, "preadv", answer)


def whole(store, layer: int, experts: list[int], slots: list[int]) -> None:
    for expert, slot in zip(experts, slots, strict=True):
        assert contents(store, layer, slot) == record(layer, expert)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV])
def test_a_failing_disk_is_named_and_the_store_goes_on(tmp_path, disk, code):
    store = make_store(tmp_path, slots=3)
    store.fetch(0, [1])
    bad = record(0, 5)[0] // 100 * 36

    def fail(descriptor, rows, offset):
        if offset <= bad < offset + 36:
            raise OSError(code, os.strerror(code))
        return preadv(descriptor, rows, offset)

    disk(fail)
    for _ in range(20):
        with pytest.raises(FlashMoEError, match=rf"0\.bin.*{os.strerror(code)}"):
            store.fetch(0, [5, 6])
        whole(store, 0, [1, 6], store.fetch(0, [1, 6]))
    disk(preadv)
    whole(store, 0, [5, 6], store.fetch(0, [5, 6]))


def test_requests_of_two_layers_are_in_flight_at_once(tmp_path, disk):
    store, gate, started = make_store(tmp_path, slots=2), threading.Event(), threading.Semaphore(0)

    def slow(descriptor, rows, offset):
        started.release()
        assert gate.wait(20)
        return preadv(descriptor, rows, offset)

    disk(slow)
    first, second = store.request(0, [3]), store.request(1, [4])
    assert started.acquire(timeout=20) and started.acquire(timeout=20)
    gate.set()
    whole(store, 0, [3], first.wait())
    whole(store, 1, [4], second.wait())


def test_experts_in_flight_are_not_read_twice_and_keep_their_slots(tmp_path):
    store = make_store(tmp_path, slots=3)
    first = store.request(0, [1, 2])
    second = store.request(0, [2, 3])
    with pytest.raises(FlashMoEError, match="3 slots"):
        store.request(0, [4])
    whole(store, 0, [2, 3], second.wait())
    whole(store, 0, [1, 2], first.wait())
    assert store.stats.bytes_read == 3 * 36
    del first, second
    whole(store, 0, [4], store.fetch(0, [4]))


def test_the_reads_of_a_dropped_request_complete(tmp_path):
    store = make_store(tmp_path, slots=2)
    for expert in range(8):
        store.request(0, [expert])
        whole(store, 0, [9 - expert % 2], store.fetch(0, [9 - expert % 2]))
