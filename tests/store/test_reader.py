"""Reader threads: every byte in its place, whatever `preadv` returns, and no late writes."""

import errno
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
from store_helpers import (
    EXPERTS,
    RECORD,
    Gate,
    assert_whole,
    big_layout,
    big_store,
    contents,
    make_store,
    record,
)

from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.store import signals, slots
from flashmoe_mlx.store.io_mode import obstacle
from flashmoe_mlx.store.reader import cut, skip
from flashmoe_mlx.store.sizing import IoPlan
from flashmoe_mlx.store.store import ExpertStore

UNEQUAL = [40_000, 4_004, 1_000, 8, 12_288, 4, 30_000, 4_096, 20]  # bytes; none but two in blocks
BLOCKS = [n * 4096 for n in (8, 1, 1, 7, 2, 1, 9, 1, 1)]


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut records of some kilobytes, too."""
    monkeypatch.setattr(slots, "LEAST_PIECE", 4096)


@pytest.fixture
def ctrl_c():
    """Interrupt the main thread after some seconds, as Ctrl-C does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    main = threading.get_ident()
    yield lambda seconds: threading.Timer(
        seconds, signal.pthread_kill, (main, signal.SIGINT)
    ).start()
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("nbytes", [1, 3, 7, 100])
def test_cut_and_skip_keep_every_byte(nbytes):
    whole = np.random.default_rng(1).bytes(20)
    rows = [memoryview(whole)[a:b] for a, b in ((0, 5), (5, 6), (6, 6), (6, 17), (17, 20))]
    parts = [b"".join(part) for part in cut(rows, nbytes)]
    assert b"".join(parts) == whole
    assert {len(part) for part in parts[:-1]} <= {nbytes} and 0 < len(parts[-1]) <= nbytes
    assert b"".join(skip(rows, nbytes)) == whole[nbytes:]


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_records_in_pieces_are_whole(tmp_path, small_pieces, threads, scattered):
    layout = big_layout(tmp_path, UNEQUAL, scattered)
    store = big_store(layout, threads, slots=3)
    for experts in ([7], [2, 9], [0, 4, 3]):
        assert_whole(store, experts, store.fetch(0, experts))
    ranges = 9 if scattered else 1
    assert store.stats.bytes_read == 6 * sum(UNEQUAL)
    cut_at_all = threads > (2 if scattered else 1)  # no field is as large as half a record
    assert (store.stats.reads > 6 * ranges) == cut_at_all


@pytest.mark.parametrize("threads", [1, 5])
def test_direct_reads_are_whole(tmp_path, small_pieces, threads):
    layout = big_layout(tmp_path, BLOCKS)
    if why := obstacle(layout):
        pytest.skip(why)
    store = big_store(layout, threads, slots=3, io=IoPlan(True, "a test"))
    for experts in ([9], [0, 4, 3]):
        assert_whole(store, experts, store.fetch(0, experts))
    assert store.stats.bytes_read == 4 * sum(BLOCKS)


def test_direct_reads_detect_a_truncated_file(tmp_path):
    layout = big_layout(tmp_path, BLOCKS)
    if why := obstacle(layout):
        pytest.skip(why)
    store = big_store(layout, 2, slots=3, io=IoPlan(True, "a test"))
    size = EXPERTS * sum(BLOCKS) - 100
    os.truncate(tmp_path / "big.bin", size)
    with pytest.raises(FlashMoEError, match=rf"big\.bin: ends at byte {size}, .* load the model"):
        store.fetch(0, [9])


@pytest.mark.parametrize("scattered", [False, True])
def test_short_and_interrupted_reads_are_continued(tmp_path, small_pieces, monkeypatch, scattered):
    rng, lock, whole, calls = np.random.default_rng(2), threading.Lock(), os.preadv, []

    def preadv(descriptor, rows, offset):
        with lock:
            calls.append(offset)
            most = int(rng.integers(1, 9000))
            if len(calls) % 3 == 0:
                raise InterruptedError(errno.EINTR, "Interrupted system call")
        return whole(descriptor, next(cut(rows, most)), offset)

    monkeypatch.setattr("os.preadv", preadv)
    store = big_store(big_layout(tmp_path, UNEQUAL, scattered), 4, slots=4)
    experts = [8, 1, 5]
    assert_whole(store, experts, store.fetch(0, experts))
    assert len(calls) > 3 * store.stats.reads
    assert store.stats.bytes_read == 3 * sum(UNEQUAL)


@pytest.mark.parametrize(
    ("code", "message"), [(errno.EIO, "Input/output error"), (errno.ENODEV, "No such device")]
)
def test_an_error_in_one_piece_fails_its_expert_only(
    tmp_path, small_pieces, monkeypatch, code, message
):
    layout = big_layout(tmp_path, UNEQUAL)
    store, size, whole = big_store(layout, 6, slots=2), sum(UNEQUAL), os.preadv
    store.banks[0].parts = lambda experts, threads: 3
    bad = [offset for *_, offset in _seams(store, expert=6)][1]

    def preadv(descriptor, rows, offset):
        if offset == bad:
            raise OSError(code, message)
        return whole(descriptor, rows, offset)

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", preadv)
        with pytest.raises(
            FlashMoEError, match=rf"big\.bin: reading an expert at byte {bad} failed \({message}\)"
        ):
            store.fetch(0, [2, 6])
        assert store.banks[0].resident([2, 6]) == [2]
        assert 6 * size <= bad < 7 * size
    assert_whole(store, [6, 2], store.fetch(0, [6, 2]))


def _seams(store, expert: int) -> list[tuple[int, int]]:
    """Return (descriptor, offset) of an expert's pieces."""
    _, pieces = store.banks[0].pieces(expert, 0, 3)
    assert len(pieces) == 3
    return [piece[:2] for piece in pieces]


def test_ctrl_c_leaves_slots_alone_until_the_last_write(tmp_path, monkeypatch, ctrl_c):
    store, gate = make_store(tmp_path, slots=2), Gate(monkeypatch)
    monkeypatch.setattr(store._reader, "help", lambda batch: None)
    ctrl_c(0.1)
    with pytest.raises(KeyboardInterrupt):
        store.fetch(0, [1, 2])
    writing = [a for _, a in store.banks[0].arriving.values() if not a.done]
    assert writing and store.banks[0].choose([3, 4], keep=()) is None
    threading.Timer(0.1, gate.opened.set).start()
    for expert, slot in zip([3, 4], store.fetch(0, [3, 4]), strict=True):
        assert contents(store, 0, slot) == record(0, expert)
    assert all(arrival.done for arrival in writing)


def test_ctrl_c_while_the_caller_reads(tmp_path, monkeypatch, ctrl_c):
    """The only reader thread is busy, so the caller reads and is interrupted meanwhile."""
    store, gate = big_store(big_layout(tmp_path, UNEQUAL), 1, slots=4), Gate(monkeypatch)
    busy = store.request(0, [1])
    while len(gate.reads) < 1:
        time.sleep(0.001)
    pending = store.request(0, [5, 6])
    ctrl_c(0.1)
    threading.Timer(0.2, gate.opened.set).start()  # no signal interrupts a read of a file
    with pytest.raises(KeyboardInterrupt):
        pending.wait()
    busy.wait()
    assert {1, 5} <= set(store.banks[0].resident(range(EXPERTS)))
    assert_whole(store, [5, 6, 7], store.fetch(0, [5, 6, 7]))


def test_the_next_request_reads_cancelled_experts_again(tmp_path, monkeypatch, ctrl_c):
    """Records have three pieces; one is being read when Ctrl-C cancels the others."""
    monkeypatch.setattr(slots, "LEAST_PIECE", 4096)
    store, gate = big_store(big_layout(tmp_path, UNEQUAL), 1, slots=4), Gate(monkeypatch)
    store.banks[0].parts = lambda experts, threads: 3
    monkeypatch.setattr(store._reader, "help", lambda batch: None)
    ctrl_c(0.1)
    with pytest.raises(KeyboardInterrupt):
        store.fetch(0, [1, 2])
    (_, first), (_, second) = (store.banks[0].arriving.get(e, (0, None)) for e in (1, 2))
    assert first.failing and second is None
    threading.Timer(0.1, gate.opened.set).start()
    assert_whole(store, [2, 1], store.fetch(0, [2, 1]))


def test_ctrl_c_at_any_moment(tmp_path, monkeypatch):
    """After one or two interrupts at any point, a store still has every byte in place."""
    store, rng = big_store(big_layout(tmp_path, UNEQUAL), 2, slots=4), random.Random(0)
    bank, left, times = store.banks[0], 0, 0
    monkeypatch.setattr(
        sys, "unraisablehook", lambda _: None
    )  # weakref callbacks are interrupted too
    monkeypatch.setattr(signals, "SIGNALS", (signal.SIGINT,))  # so that the alarm strikes anywhere

    def strike(_, frame):
        nonlocal left
        left -= 1
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-4))
        while frame and frame.f_code is not ExpertStore.fetch.__code__:
            frame = frame.f_back
        if frame and left >= 0:
            signal.raise_signal(signal.SIGINT)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGALRM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, strike)
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            experts = rng.sample(range(EXPERTS), rng.randint(1, 4))
            try:
                left = rng.randint(1, 2)
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 3e-4))
                store.fetch(0, experts)
            except KeyboardInterrupt:
                times += 1
            left = 0
            slots = store.fetch(0, experts)
            if times % 10 == 0:
                assert_whole(store, experts, slots)
            assert len(bank.resident(range(EXPERTS))) + len(bank.arriving) + len(bank._free) == 4
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert times > 10
    assert not store._reader._in_flight and not store._reader._batches


def test_a_reader_thread_can_close_its_own_store(tmp_path, monkeypatch):
    """The garbage collector runs finalizers in any thread."""
    store, whole = make_store(tmp_path, slots=2), os.preadv
    finalizer = store._finalizer

    def preadv(descriptor, rows, offset):
        if threading.current_thread() in store._reader.threads:
            finalizer()
        return whole(descriptor, rows, offset)

    monkeypatch.setattr("os.preadv", preadv)
    monkeypatch.setattr(store._reader, "help", lambda batch: None)
    store.request(0, [1])
    for thread in store._reader.threads:
        thread.join(timeout=20)
        assert not thread.is_alive()


def test_a_fork_closes_files_only(tmp_path, monkeypatch):
    store, process = make_store(tmp_path, slots=2), os.getpid()
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: process + 1)
        store.close()
    assert all(thread.is_alive() for thread in store._reader.threads)
    store._reader.close()


@pytest.mark.parametrize("reason", [SystemExit(1), MemoryError(), KeyError("odd")])
def test_any_exception_in_a_read_fails_its_expert_and_the_threads_live(
    tmp_path, monkeypatch, reason
):
    store, whole = big_store(big_layout(tmp_path, UNEQUAL), 2, slots=4), os.preadv

    def preadv(descriptor, rows, offset):
        raise reason

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", preadv)
        patch.setattr(store._reader, "help", lambda batch: None)
        for _ in range(3):
            with pytest.raises(FlashMoEError, match=type(reason).__name__):
                store.fetch(0, [1, 2])
    assert os.preadv is whole and all(thread.is_alive() for thread in store._reader.threads)
    assert_whole(store, [1, 2], store.fetch(0, [1, 2]))


def test_a_signal_handler_that_raises_while_the_caller_reads(tmp_path, monkeypatch):
    """As a timeout's does. The only reader thread is busy, so the caller reads."""
    store, gate = big_store(big_layout(tmp_path, UNEQUAL), 1, slots=4), Gate(monkeypatch)

    def late(number, frame):
        raise TimeoutError("too late")

    before = signal.signal(signal.SIGALRM, late)
    try:
        busy = store.request(0, [1])
        while len(gate.reads) < 1:
            time.sleep(0.001)
        pending = store.request(0, [5, 6])
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        threading.Timer(0.2, gate.opened.set).start()
        with pytest.raises(TimeoutError, match="too late"):
            pending.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    busy.wait()
    assert_whole(store, [5, 6, 7], store.fetch(0, [5, 6, 7]))


def test_threads_that_the_system_refuses(tmp_path, monkeypatch):
    """The threads already started end, and the files are closed."""
    layout, start = big_layout(tmp_path, UNEQUAL), threading.Thread.start
    before, files = threading.active_count(), len(os.listdir("/dev/fd"))
    started = []

    def refuse(thread):
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(FlashMoEError, match=r"io_threads = 5: the system started 3 and refuse"):
            big_store(layout, 5, slots=4)
    assert threading.active_count() == before and len(os.listdir("/dev/fd")) == files


def test_memory_that_the_system_refuses(tmp_path):
    layout = big_layout(tmp_path, UNEQUAL)
    with pytest.raises(FlashMoEError, match=r"the expert cache takes \d+ bytes, which this system"):
        big_store(layout, 1, slots=2**50)


def test_close_with_reads_in_flight(tmp_path, monkeypatch):
    store, gate = big_store(big_layout(tmp_path, UNEQUAL), 1, slots=4), Gate(monkeypatch)
    pending = store.request(0, [1, 2, 3, 4])
    while not gate.reads:
        time.sleep(0.001)
    threading.Timer(0.1, gate.opened.set).start()
    store.close()
    assert len(gate.reads) == 1
    assert not any(thread.is_alive() for thread in store._reader.threads)
    with pytest.raises(FlashMoEError, match="was cancelled"):
        pending.wait()


def test_seconds_reading_counts_overlapping_reads_once(tmp_path, monkeypatch):
    store, gate = make_store(tmp_path, slots=4), Gate(monkeypatch)
    start = time.perf_counter()
    pending = [store.request(0, [1, 2]), store.request(1, [3])]
    while len(gate.reads) < 3:
        time.sleep(0.001)
    three = time.perf_counter()
    time.sleep(0.05)
    least = time.perf_counter() - three
    gate.opened.set()
    for each in pending:
        each.wait()
    most = time.perf_counter() - start
    assert least <= store.stats.seconds_reading <= most
    time.sleep(0.05)
    before = time.perf_counter()
    store.fetch(0, [5])
    after = time.perf_counter()
    assert store.stats.seconds_reading <= most + after - before  # idle time does not count
    assert store.stats.bytes_read == 4 * RECORD
