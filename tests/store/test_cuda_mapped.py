"""Loads by the GPU itself, with a fake GPU that copies only when something is evaluated."""

import ctypes
import os
import threading
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from store_helpers import RECORD, contents, make_store, record
from test_cuda_memory import LateDriver, put_banks_on, rows_of

from flashmoe_mlx.custom_kernels import reference
from flashmoe_mlx.custom_kernels.cuda.slots import NONE, Table
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.store.cuda import mapped, resident
from flashmoe_mlx.store.cuda.mapped import MappedFiles
from flashmoe_mlx.store.cuda.resident import map_files
from flashmoe_mlx.store.sizing import CachePlan, IoPlan

X = mx.zeros((1, 8))


class FakeGpu(LateDriver):
    """The two kernels in host memory; their copies are delayed until an evaluation."""

    def __init__(self):
        super().__init__()
        self.waiting, self.copied, self.after = [], 0, []

    def choose(self, table, ids, after, slots, half_life):
        self.after.append(after)
        slot_of, demand, places, tasks = reference.choose_slots(*table[:2], ids, slots, half_life)
        counted = [len(set(ids.reshape(-1).tolist())), int((np.array(tasks)[:, 0] != NONE).sum())]
        counts = table.counts + mx.array([*counted, 0, 0])
        mx.eval(counts)  # as one kernel computes all outputs
        return Table(slot_of, demand, counts), places, tasks

    def copy_late(self, tasks, slots, fields, clock):
        for expert, slot in np.array(tasks).astype(np.int64).tolist():
            for source, stride, place, nbytes in fields.tolist() if expert != NONE else ():
                self.waiting.append((place + slot * nbytes, source + expert * stride, nbytes))
        return slots + 0

    def catch_up(self):
        for copy in self.waiting:
            ctypes.memmove(*copy)
        self.copied += len(self.waiting)
        self.waiting = []

    def eval(self, *arrays):
        self.catch_up()
        mx.eval(*arrays)


@pytest.fixture
def gpu(monkeypatch):
    """Put slots on a GPU that can read files."""
    gpu = put_banks_on(FakeGpu(), monkeypatch)
    monkeypatch.setattr(resident, "gpu_rows", rows_of)
    monkeypatch.setattr(resident, "_driver", lambda: gpu)
    monkeypatch.setattr(resident, "_copy", gpu.copy_late)
    monkeypatch.setattr(resident, "choose_slots", gpu.choose)
    seen = SimpleNamespace(**{name: getattr(mx, name) for name in dir(mx)})
    seen.eval, seen.compile = gpu.eval, lambda function: function
    monkeypatch.setattr(resident, "mx", seen)
    resident._load.cache_clear()
    yield gpu
    resident._load.cache_clear()


def ids_of(*experts: int) -> mx.array:
    return mx.array([experts], dtype=mx.uint32)


def load(store, gpu, layer: int, *experts: int) -> list[int]:
    """Load experts, and compare the bytes in their slots."""
    slots = store.load_by_device(layer, ids_of(*experts), X).reshape(-1).tolist()
    gpu.catch_up()
    for expert, slot in zip(experts, slots, strict=True):
        assert contents(store, layer, slot) == record(layer, expert)
    return slots


@pytest.mark.parametrize("scattered", [False, True])
def test_the_gpu_loads_what_a_step_requests(tmp_path, gpu, scattered):
    store = make_store(tmp_path, slots=3, scattered=scattered)
    gpu.copied = 0
    assert len(gpu.pinned) == 2  # files
    for layer, *experts in ((0, 2, 0, 1), (1, 4), (0, 3, 2), (0, 2, 2, 3), (1, 1, 4, 0)):
        load(store, gpu, layer, *experts)
    assert store.stats.asked == 11 and store.stats.hits == 11 - 7
    assert store.stats.bytes_read == 7 * RECORD and gpu.copied == 7 * 9 and not gpu.copies
    assert store.stats.asked == 11  # not counted twice
    store.close()
    assert not gpu.pinned and store.stats.asked == 11


def test_host_and_gpu_continue_from_each_others_table(tmp_path, gpu):
    store = make_store(tmp_path, slots=3)
    load(store, gpu, 0, 0, 1, 2)
    load(store, gpu, 0, 2, 1)
    slots = store.fetch(0, [1, 4])  # by the host; 0 is the least used
    assert [contents(store, 0, slot) for slot in slots] == [record(0, 1), record(0, 4)]
    assert store.stats.bytes_read == 4 * RECORD
    assert load(store, gpu, 0, 4, 1, 2)[:2] == slots[::-1]
    assert store.stats.bytes_read == 4 * RECORD
    load(store, gpu, 0, 7)
    assert 7 not in store.banks[0].resident(range(10))  # the host's table is older
    store.cancel_prefetch(0, [1])
    assert 7 in store.banks[0].resident(range(10))
    store.close()


def test_requests_of_the_host_wait_for_loads_of_the_gpu(tmp_path, gpu):
    store = make_store(tmp_path, slots=3)
    store.load_by_device(0, ids_of(0, 1, 2), X)
    assert gpu.waiting
    slots = store.request(0, [5, 6]).wait()
    assert not gpu.waiting  # late copies would overwrite 5 and 6
    assert [contents(store, 0, slot) for slot in slots] == [record(0, 5), record(0, 6)]
    store.close()


def test_a_load_waits_for_consumers_of_the_slots(tmp_path, gpu):
    store = make_store(tmp_path, slots=3)
    del gpu.after[:]
    first = store.load_by_device(0, ids_of(0, 1, 2), X)
    y = mx.zeros((1, 8))
    store.hold(y, 0)
    store.load_by_device(0, ids_of(3), X)
    third = store.load_by_device(0, ids_of(4), X)  # the slots of 3 have no consumer
    assert gpu.after[0] is X and gpu.after[1] is y
    assert gpu.after[2] is not X and gpu.after[2].tolist() != third.tolist()
    assert first.tolist() == [[0, 1, 2]]
    read = mx.zeros(1)
    store.fetch(0, [4])
    store.hold(read, 0)
    assert [held.array for held in store._consumers] == [read]
    store.load_by_device(0, ids_of(5), X)
    assert not store._consumers and gpu.after[-1] is X
    store.close()


def test_the_host_loads_if_slots_are_too_few_or_in_use(tmp_path, gpu):
    store = make_store(tmp_path, slots=3)
    assert store.load_by_device(0, ids_of(0, 1, 2, 3), X) is None
    pending = store.request(0, [1, 2])
    pending.wait()
    assert store.load_by_device(0, ids_of(4), X) is None
    pending.release()
    load(store, gpu, 0, 4, 1)
    store.close()
    with pytest.raises(FlashMoEError, match="closed"):
        store.load_by_device(0, ids_of(4), X)


def test_the_table_of_an_ended_thread_is_empty(tmp_path, gpu, monkeypatch):
    """MLX evaluates a thread's work in that thread only."""
    store = make_store(tmp_path, slots=3)
    load(store, gpu, 0, 1, 2)
    assert store.stats.asked == 2
    store.load_by_device(0, ids_of(3), X)
    there = resident.mx

    def no_stream(*arrays):
        monkeypatch.setattr(there, "eval", gpu.eval)
        raise RuntimeError("There is no Stream(gpu, 1) in current thread.")

    monkeypatch.setattr(there, "eval", no_stream)
    gpu.waiting = []
    (slot,) = store.fetch(0, [3])
    assert contents(store, 0, slot) == record(0, 3)
    assert store.banks[0].resident(range(10)) == [3]
    load(store, gpu, 0, 3, 1)
    assert store.stats.bytes_read == (2 + 1 + 1) * RECORD and store.stats.asked == 2 + 1 + 2
    store.close()


def test_counters_of_another_thread_are_added_later(tmp_path, gpu, monkeypatch):
    store = make_store(tmp_path, slots=3)
    load(store, gpu, 0, 1, 2)
    there, stack = resident.mx, mx.stack

    def no_stream(arrays):
        raise RuntimeError("There is no Stream(gpu, 1) in current thread.")

    monkeypatch.setattr(there, "stack", no_stream)
    assert store.stats.asked == 0
    monkeypatch.setattr(there, "stack", stack)
    assert store.stats.asked == 2
    store.close()


def test_another_thread_continues_from_finished_loads(tmp_path, gpu):
    store, found = make_store(tmp_path, slots=3), []
    load(store, gpu, 0, 1, 2)
    mx.eval(store.load_by_device(0, ids_of(2, 7), X))  # its copies have not run
    table, taken = store._loader.of_layer[0], []
    take = table.take_from_host
    table.take_from_host = lambda *arrays: taken.append(not gpu.waiting) or take(*arrays)
    thread = threading.Thread(target=lambda: found.extend(load(store, gpu, 0, 7, 5)))
    thread.start()
    thread.join()
    assert len(found) == 2 and taken == [True] and store.stats.bytes_read == 4 * RECORD
    store.close()


def test_a_fork_counts_nothing(tmp_path, gpu, monkeypatch):
    store = make_store(tmp_path, slots=3)
    load(store, gpu, 0, 1, 2)
    monkeypatch.setattr(store, "_process", os.getpid() + 1)
    assert store.stats.asked == 0
    monkeypatch.undo()
    store.close()


@pytest.mark.parametrize(
    "slots, direct, memory", [(10, False, 1 << 30), (3, True, 1 << 30), (3, False, 20 * RECORD)]
)
def test_only_where_it_helps_and_memory_has_room(tmp_path, gpu, monkeypatch, slots, direct, memory):
    store = make_store(tmp_path, slots=3)
    banks = [bank.arrays for bank in store.banks]
    monkeypatch.setattr(resident, "available_bytes", lambda: memory)
    plan = CachePlan(slots, 0, "a test", IoPlan(direct, "a test"))
    pinned = dict(gpu.pinned)
    assert map_files(store.layout, plan, banks) is None and gpu.pinned == pinned
    store.close()


@pytest.mark.parametrize(
    "fault", ["pin", "wrong bytes", "wrong slots", "wrong table", "no compiler"]
)
def test_the_host_loads_if_the_gpu_fails_its_self_test(tmp_path, gpu, monkeypatch, fault):
    def pins_one(address, nbytes):
        if gpu.pinned:
            raise FlashMoEError("CUDA driver: cuMemHostRegister_v2 failed with error 801.")
        return LateDriver.pin(gpu, address, nbytes)

    def compiles_nothing(*arrays):
        raise RuntimeError("nvrtc: no such option")

    def wrong(part):
        def choose(*arguments):
            table, places, tasks = gpu.choose(*arguments)
            if part == "wrong slots":
                return table, (places + 1) % 3, tasks
            return table._replace(slot_of=mx.roll(table.slot_of, 1)), places, tasks

        return choose

    if fault == "pin":
        monkeypatch.setattr(gpu, "pin", pins_one)
        monkeypatch.setattr(mapped, "PINNERS", 1)
    elif fault == "wrong bytes":
        monkeypatch.setattr(resident, "_copy", lambda tasks, slots, *others: slots)
    elif fault == "no compiler":
        monkeypatch.setattr(resident, "_copy", compiles_nothing)
    else:
        monkeypatch.setattr(resident, "choose_slots", wrong(fault))
    store = make_store(tmp_path, slots=3)
    assert store._loader is None and not gpu.pinned
    assert store.load_by_device(1, ids_of(7), X) is None
    (slot,) = store.fetch(1, [7])
    assert contents(store, 1, slot) == record(1, 7)
    store.close()


def test_a_file_shorter_than_its_experts_is_an_error(tmp_path, gpu):
    make_store(tmp_path, slots=3).close()
    layout = make_store(tmp_path, slots=3).layout
    mapped = MappedFiles(gpu, [layout.layers[0].fields[0].file])
    field = layout.layers[0].fields[8]
    assert mapped.address(field, 10) > 0
    with pytest.raises(FlashMoEError, match=r"0\.bin: ends in the middle of an expert"):
        mapped.address(field, 11)
    mapped.close()


def test_the_gpu_copies_a_prompts_batches_too(tmp_path, gpu):
    store = make_store(tmp_path, slots=4)
    first, second = store.request(0, [1, 3]), store.request(0, [8, 9])
    assert len(gpu.waiting) == 4 * 9  # not waited for yet
    for pending in (first, second):
        for expert, slot in zip(pending.experts, pending.wait(), strict=True):
            assert contents(store, 0, slot) == record(0, expert)
    assert store.stats.bytes_read == 4 * RECORD and store.stats.reads == 4 and not gpu.copies
    store.close()


def test_a_dropped_batch_completes_before_its_slots_are_reused(tmp_path, gpu):
    store = make_store(tmp_path, slots=3)
    store.request(0, [1, 3]).release()
    assert store.banks[0].arriving and gpu.waiting
    load(store, gpu, 0, 3, 5)
    assert not store.banks[0].arriving and store.stats.bytes_read == 3 * RECORD
    store.request(0, [7, 8, 9]).release()
    slots = store.fetch(0, [0, 2])
    assert [contents(store, 0, slot) for slot in slots] == [record(0, 0), record(0, 2)]
    store.close()


def test_copies_wait_for_consumers_of_their_slots_and_the_host_does_not(tmp_path, gpu, monkeypatch):
    store, seen = make_store(tmp_path, slots=3), []
    y, other = mx.zeros(1), mx.ones(1)
    store.hold(y, 0, store.fetch(0, [0, 1]))
    store.hold(other, 1, store.fetch(1, [0]))
    depends = lambda tasks, after: seen.append(after) or tasks  # noqa: E731
    monkeypatch.setattr(resident.mx, "depends", depends)
    evaluated = []
    monkeypatch.setattr(store._consumers, "evaluate", evaluated.extend)
    store.request(0, [7, 8])
    assert len(seen) == 1 and len(seen[0]) == 1 and seen[0][0] is y and not evaluated
    assert [held.array for held in store._consumers] == [other]
    monkeypatch.undo()
    store.close()


def test_a_failed_copy_leaves_the_other_experts(tmp_path, gpu, monkeypatch):
    store = make_store(tmp_path, slots=3)
    slots = store.fetch(0, [0, 1])

    def fails(*arrays):
        raise RuntimeError("cudaErrorIllegalAddress")

    with monkeypatch.context() as patch:
        patch.setattr(resident.mx, "eval", fails)
        with pytest.raises(FlashMoEError, match=r"layer 0: the GPU could not copy.*IllegalAddr"):
            store.fetch(0, [5])
    assert store.banks[0].resident(range(10)) == [0, 1]
    assert store.fetch(0, [0, 1]) == slots
    (slot,) = store.fetch(0, [5])
    assert contents(store, 0, slot) == record(0, 5)
    store.close()


def test_a_copy_that_cannot_start_leaves_the_bank_unchanged(tmp_path, gpu, monkeypatch):
    store = make_store(tmp_path, slots=3)
    slots = store.fetch(0, [0, 1, 2])

    def fails(*arrays):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(resident, "_copy", fails)
        with pytest.raises(FlashMoEError, match=r"layer 0: the GPU could not copy.*out of memory"):
            store.request(0, [5])
    assert store.fetch(0, [0, 1, 2]) == slots and store.stats.bytes_read == 3 * RECORD
    store.close()


def test_a_file_that_cannot_be_mapped_is_named(tmp_path, gpu):
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(FlashMoEError, match="empty: cannot be mapped"):
        MappedFiles(gpu, [empty])


def test_another_thread_starts_empty_after_unfinished_loads(tmp_path, gpu):
    """MLX evaluates only in the thread that built a graph, so the slots' contents are unknown."""
    store, found = make_store(tmp_path, slots=3), []
    store.load_by_device(0, ids_of(2, 7), X)
    gpu.waiting = []
    thread = threading.Thread(target=lambda: found.extend(load(store, gpu, 0, 7, 2)))
    thread.start()
    thread.join()
    assert len(found) == 2 and store.stats.bytes_read == 2 * RECORD
    store.close()
