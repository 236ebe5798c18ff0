"""Slots in GPU memory; a driver that copies late reveals missing waits."""

import contextlib
import ctypes
import os
import threading
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from store_helpers import RECORD, assert_whole, big_layout, big_store, contents, make_store, record

from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.store import store as expert_store
from flashmoe_mlx.store.cuda import backend, mailbox, pinned
from flashmoe_mlx.store.cuda.pinned import GpuReads, GpuRow


class LateDriver:
    """A GPU with host memory that copies only when something waits for it."""

    def __init__(self):
        self.running, self.memory, self.copies, self.pinned, self.finished = {}, {}, 0, {}, 0

    def pin(self, address, nbytes):
        self.pinned[address] = nbytes
        return address

    def unpin(self, address):
        del self.pinned[address]

    def finish(self):
        self.finished += 1

    def allocate(self, nbytes):
        memory = np.full(nbytes, 0xEE, np.uint8)
        self.memory[memory.ctypes.data] = memory
        return memory.ctypes.data, memory.ctypes.data

    def free(self, address, stream):
        del self.memory[address]

    def copy(self, to, source, nbytes, stream):
        self.running.setdefault(stream, []).append((to, source, nbytes))

    def wait(self, stream):
        for copy in self.running.pop(stream, []):
            ctypes.memmove(*copy)
            self.copies += 1


def rows_of(arrays):
    """Return the addresses of arrays in host memory."""
    views = [np.frombuffer(memoryview(a).cast("B"), np.uint8) for a in arrays]
    return [GpuRow(view.ctypes.data, view.nbytes) for view in views]


def put_banks_on(driver, monkeypatch):
    """Let stores use the CUDA back-end with this driver."""
    reads = GpuReads(driver)
    monkeypatch.setattr(backend, "gpu_reads", lambda: reads)
    monkeypatch.setattr(backend, "gpu_rows", rows_of)
    monkeypatch.setattr(expert_store, "choose", backend.CudaBackend)
    return driver


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(backend.CudaBackend, "loader", lambda *_: None)
    return put_banks_on(LateDriver(), monkeypatch)


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("turn", [1, 1000, 1 << 22])
def test_experts_are_complete_in_gpu_memory(tmp_path, driver, monkeypatch, numba, turn):
    monkeypatch.setattr(GpuReads, "at_once", numba)
    monkeypatch.setattr(pinned, "CHUNK", turn)
    store = make_store(tmp_path, slots=3)
    for layer, experts in ((0, [2, 0, 1]), (1, [4]), (0, [3, 2]), (1, [1, 4, 0])):
        slots = store.fetch(layer, experts)
        for expert, slot in zip(experts, slots, strict=True):
            assert contents(store, layer, slot) == record(layer, expert)
    assert driver.copies and not driver.running
    assert store.stats.bytes_read == (store.stats.asked - store.stats.hits) * RECORD
    store.close()


def test_records_of_unequal_parts_and_more_than_the_pinned_memory_holds(
    tmp_path, driver, monkeypatch
):
    sizes = [5 * 4096, 12, 400, 3 * 4096, 8, 8, 1 << 16, 4, 400]
    monkeypatch.setattr(pinned, "BUFFER", 3 * sum(sizes) // 2)
    monkeypatch.setattr(pinned, "CHUNK", sum(sizes))
    store = big_store(big_layout(tmp_path, sizes), threads=2, slots=5)
    for experts in ([4, 3, 2, 1, 0], [9], [8, 3]):
        assert_whole(store, experts, store.fetch(0, experts))
    assert max(memory.nbytes for memory in driver.memory.values()) == 3 * sum(sizes) // 2


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_record_larger_than_the_pinned_memory(tmp_path, driver, monkeypatch, spare):
    """The fake driver allocates exactly the size: a longer read would overwrite other memory."""
    sizes = [4096, 12, 400, 4096, 8, 8, 4096, 4, 400]
    monkeypatch.setattr(pinned, "BUFFER", sum(sizes) + spare)
    reads, read = [], GpuReads.read

    def watched(this, pieces):
        reads.extend(piece[2] for piece in pieces)
        return read(this, pieces)

    monkeypatch.setattr(GpuReads, "read", watched)
    store = big_store(big_layout(tmp_path, sizes), threads=2, slots=5)
    assert_whole(store, [4, 3], store.fetch(0, [4, 3]))
    assert reads == ([] if spare < 0 else 2 * [sum(sizes)])


def test_pinned_memory_is_not_written_past_its_end(driver):
    reads, row = GpuReads(driver), GpuRow(0, 100)
    half = pinned.PinnedBuffer(driver, 100)
    with pytest.raises(FlashMoEError, match="101 bytes of experts do not fit into 100"):
        reads._read_chunk(half, [(0, 0, 100, [row], None), (0, 0, 1, [row], None)])


@pytest.mark.parametrize("numba", [True, False])
def test_a_truncated_file_is_named_and_the_others_are_read(tmp_path, driver, monkeypatch, numba):
    monkeypatch.setattr(GpuReads, "at_once", numba)
    store = make_store(tmp_path, slots=3)
    file = store.layout.layers[1].fields[0].file
    os.truncate(file, store.layout.layers[1].fields[0].offset + 4 * RECORD + 5)
    with pytest.raises(FlashMoEError, match=f"{file.name}: ends at byte .* truncated"):
        store.fetch(1, [4, 0])
    (slot,) = store.fetch(1, [0])
    assert contents(store, 1, slot) == record(1, 0)
    store.close()


def test_a_driver_error_fails_the_request(tmp_path, driver, monkeypatch):
    store = make_store(tmp_path, slots=3)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise FlashMoEError("CUDA driver: cuMemcpyHtoDAsync failed with error 700.")

        patch.setattr(driver, "copy", fail)
        with pytest.raises(FlashMoEError, match="failed with error 700"):
            store.fetch(0, [1])
    (slot,) = store.fetch(0, [1])
    assert contents(store, 0, slot) == record(0, 1)
    store.close()


def test_errors_of_the_driver_are_named():
    def answer(text):
        return lambda code, pointer: setattr(pointer._obj, "value", text)

    driver = object.__new__(pinned.Driver)
    name, text = answer(b"CUDA_ERROR_NOT_SUPPORTED"), answer(b"operation not supported")
    driver._library = SimpleNamespace(cuGetErrorName=name, cuGetErrorString=text)
    driver._check("cuInit", 0)
    message = r"cuInit failed with error 801 \(CUDA_ERROR_NOT_SUPPORTED: operation not supported\)"
    with pytest.raises(FlashMoEError, match=message):
        driver._check("cuInit", 801)


def test_pinned_memory_is_freed_with_its_thread(driver):
    reads, held = GpuReads(driver), []

    def work():
        reads._thread_buffer(100)
        held.append(len(driver.memory))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert held == [1] and not driver.memory


def test_rows_are_sliced_as_memory_is():
    row = GpuRow(1000, 10)
    assert [(r.address, len(r)) for r in (row[:4], row[4:], row[2:3], row[12:])] == [
        (1000, 4), (1004, 6), (1002, 1), (1010, 0),
    ]  # fmt: skip


@pytest.fixture
def evaluate_late(monkeypatch, driver):
    """Run the two mailbox kernels when their output is evaluated."""
    monkeypatch.setattr(mailbox, "Driver", lambda: driver)
    mailbox._mailbox.cache_clear()
    waiting = []

    def words_at(address, n):
        return np.ctypeslib.as_array((ctypes.c_uint32 * n).from_address(address[0].item()))

    def to_host(inputs, outputs, groups, lanes, n):
        message, address = inputs
        words_at(address, n)[:] = np.array(message).reshape(-1)
        return [mx.array([n])]

    def to_device(inputs, outputs, groups, lanes, n):
        result = mx.zeros(outputs[0][0], dtype=mx.uint32)
        waiting.append((result, words_at(inputs[0], n)))
        return [result]

    whole = mx.eval

    def evaluate(*arrays):
        for result, there in [w for w in waiting if any(w[0] is a for a in arrays)]:
            result[...] = mx.array(there.copy()).reshape(result.shape)
        whole(*arrays)

    monkeypatch.setattr(mailbox, "_to_host", to_host)
    monkeypatch.setattr(mailbox, "_to_device", to_device)
    with contextlib.ExitStack() as stack:
        stack.callback(mailbox._mailbox.cache_clear)
        monkeypatch.setattr(mx, "eval", evaluate)
        yield evaluate


def test_a_message_stays_until_the_gpu_has_read_it(evaluate_late):
    sent = [np.arange(8, dtype=np.uint32).reshape(2, 1, 4) + i for i in range(150)]
    received = [mailbox.to_device(message) for message in sent]
    for array in received[-mailbox.OUTGOING :]:
        evaluate_late(array)
    assert [np.array(a).tolist() for a in received] == [s.tolist() for s in sent]


def test_ids_keep_their_shape(evaluate_late):
    ids = mx.array([[[5, 0, 511]]], dtype=mx.uint32)
    for value in (ids, ids + 1):
        assert mailbox.to_host(value).tolist() == np.array(value).tolist()
