"""Banks that a card fills by itself: a card that copies only when it is waited for."""

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


class Card(LateDriver):
    """Its two kernels, in the host's memory; bytes come late, when something is evaluated."""

    def __init__(self):
        super().__init__()
        self.waiting, self.copied, self.earlier = [], 0, []

    def choose(self, table, ids, earlier, slots, half_life):
        self.earlier.append(earlier)
        slot_of, demand, places, tasks = reference.choose_slots(*table[:2], ids, slots, half_life)
        counted = [len(set(ids.reshape(-1).tolist())), int((np.array(tasks)[:, 0] != NONE).sum())]
        counts = table.counts + mx.array([*counted, 0, 0])
        mx.eval(counts)  # as all that one kernel makes
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
def card(monkeypatch):
    """Put banks on a card that can read files."""
    card = put_banks_on(Card(), monkeypatch)
    monkeypatch.setattr(resident, "gpu_rows", rows_of)
    monkeypatch.setattr(resident, "_driver", lambda: card)
    monkeypatch.setattr(resident, "_copy", card.copy_late)
    monkeypatch.setattr(resident, "choose_slots", card.choose)
    seen = SimpleNamespace(**{name: getattr(mx, name) for name in dir(mx)})
    seen.eval, seen.compile = card.eval, lambda function: function
    monkeypatch.setattr(resident, "mx", seen)
    resident._load.cache_clear()
    yield card
    resident._load.cache_clear()


def ids_of(*experts: int) -> mx.array:
    return mx.array([experts], dtype=mx.uint32)


def bring(store, card, layer: int, *experts: int) -> list[int]:
    """Bring experts, and compare what is in their slots then."""
    there = store.load_by_device(layer, ids_of(*experts), X)
    card.catch_up()
    for expert, slot in zip(experts, there.reshape(-1).tolist(), strict=True):
        assert contents(store, layer, slot) == record(layer, expert)
    return there.reshape(-1).tolist()


@pytest.mark.parametrize("scattered", [False, True])
def test_what_a_step_asks_for_is_brought_by_the_card(tmp_path, card, scattered):
    store = make_store(tmp_path, slots=3, scattered=scattered)
    card.copied = 0
    assert len(card.locked) == 2  # files
    for layer, *experts in ((0, 2, 0, 1), (1, 4), (0, 3, 2), (0, 2, 2, 3), (1, 1, 4, 0)):
        bring(store, card, layer, *experts)
    assert store.stats.asked == 11 and store.stats.hits == 11 - 7
    assert store.stats.bytes_read == 7 * RECORD and card.copied == 7 * 9 and not card.copies
    assert store.stats.asked == 11  # and not 22
    store.close()
    assert not card.locked and store.stats.asked == 11


def test_host_and_card_go_on_from_each_others_table(tmp_path, card):
    store = make_store(tmp_path, slots=3)
    bring(store, card, 0, 0, 1, 2)
    bring(store, card, 0, 2, 1)
    slots = store.fetch(0, [1, 4])  # by the host; 0 was wanted least
    assert [contents(store, 0, slot) for slot in slots] == [record(0, 1), record(0, 4)]
    assert store.stats.bytes_read == 4 * RECORD
    assert bring(store, card, 0, 4, 1, 2)[:2] == slots[::-1]
    assert store.stats.bytes_read == 4 * RECORD
    bring(store, card, 0, 7)
    assert 7 not in store.banks[0].resident(range(10))  # the host's is old now
    store.cancel_prefetch(0, [1])
    assert 7 in store.banks[0].resident(range(10))
    store.close()


def test_what_the_host_asks_for_waits_for_what_the_card_began(tmp_path, card):
    store = make_store(tmp_path, slots=3)
    store.load_by_device(0, ids_of(0, 1, 2), X)
    assert card.waiting
    slots = store.request(0, [5, 6]).wait()
    assert not card.waiting  # or they would land on top of 5 and 6
    assert [contents(store, 0, slot) for slot in slots] == [record(0, 5), record(0, 6)]
    store.close()


def test_nothing_is_brought_before_who_reads_the_bank_is_done(tmp_path, card):
    store = make_store(tmp_path, slots=3)
    del card.earlier[:]
    first = store.load_by_device(0, ids_of(0, 1, 2), X)
    y = mx.zeros((1, 8))
    store.hold(y, 0)
    store.load_by_device(0, ids_of(3), X)
    third = store.load_by_device(0, ids_of(4), X)  # whoever asked for 3 never used it
    assert card.earlier[0] is X and card.earlier[1] is y
    assert card.earlier[2] is not X and card.earlier[2].tolist() != third.tolist()
    assert first.tolist() == [[0, 1, 2]]
    read = mx.zeros(1)
    store.fetch(0, [4])
    store.hold(read, 0)
    assert [held.array for held in store._consumers] == [read]
    store.load_by_device(0, ids_of(5), X)
    assert not store._consumers and card.earlier[-1] is X
    store.close()


def test_more_experts_than_slots_and_a_bank_in_use_are_the_hosts(tmp_path, card):
    store = make_store(tmp_path, slots=3)
    assert store.load_by_device(0, ids_of(0, 1, 2, 3), X) is None
    pending = store.request(0, [1, 2])
    pending.wait()
    assert store.load_by_device(0, ids_of(4), X) is None
    pending.release()
    bring(store, card, 0, 4, 1)
    store.close()
    with pytest.raises(FlashMoEError, match="closed"):
        store.load_by_device(0, ids_of(4), X)


def test_a_bank_whose_thread_is_gone_is_empty(tmp_path, card, monkeypatch):
    """MLX evaluates what a thread has begun in that thread alone."""
    store = make_store(tmp_path, slots=3)
    bring(store, card, 0, 1, 2)
    assert store.stats.asked == 2
    store.load_by_device(0, ids_of(3), X)
    there = resident.mx

    def no_stream(*arrays):
        monkeypatch.setattr(there, "eval", card.eval)
        raise RuntimeError("There is no Stream(gpu, 1) in current thread.")

    monkeypatch.setattr(there, "eval", no_stream)
    card.waiting = []
    (slot,) = store.fetch(0, [3])
    assert contents(store, 0, slot) == record(0, 3)
    assert store.banks[0].resident(range(10)) == [3]
    bring(store, card, 0, 3, 1)
    assert store.stats.bytes_read == (2 + 1 + 1) * RECORD and store.stats.asked == 2 + 1 + 2
    store.close()


def test_counters_that_another_thread_has_begun_come_later(tmp_path, card, monkeypatch):
    store = make_store(tmp_path, slots=3)
    bring(store, card, 0, 1, 2)
    there, stack = resident.mx, mx.stack

    def no_stream(arrays):
        raise RuntimeError("There is no Stream(gpu, 1) in current thread.")

    monkeypatch.setattr(there, "stack", no_stream)
    assert store.stats.asked == 0
    monkeypatch.setattr(there, "stack", stack)
    assert store.stats.asked == 2
    store.close()


def test_another_thread_goes_on_from_what_is_done(tmp_path, card):
    store, found = make_store(tmp_path, slots=3), []
    bring(store, card, 0, 1, 2)
    mx.eval(store.load_by_device(0, ids_of(2, 7), X))  # the bytes are still on their way
    card_bank, taken = store._loader.of_layer[0], []
    take = card_bank.take
    card_bank.take = lambda *table: taken.append(not card.waiting) or take(*table)
    thread = threading.Thread(target=lambda: found.extend(bring(store, card, 0, 7, 5)))
    thread.start()
    thread.join()
    assert len(found) == 2 and taken == [True] and store.stats.bytes_read == 4 * RECORD
    store.close()


def test_a_fork_counts_nothing(tmp_path, card, monkeypatch):
    store = make_store(tmp_path, slots=3)
    bring(store, card, 0, 1, 2)
    monkeypatch.setattr(store, "_process", os.getpid() + 1)
    assert store.stats.asked == 0
    monkeypatch.undo()
    store.close()


@pytest.mark.parametrize(
    "slots, direct, memory", [(10, False, 1 << 30), (3, True, 1 << 30), (3, False, 20 * RECORD)]
)
def test_only_where_it_helps_and_memory_has_room(
    tmp_path, card, monkeypatch, slots, direct, memory
):
    store = make_store(tmp_path, slots=3)
    banks = [bank.arrays for bank in store.banks]
    monkeypatch.setattr(resident, "available_bytes", lambda: memory)
    plan = CachePlan(slots, 0, "a test", IoPlan(direct, "a test"))
    locked = dict(card.locked)
    assert map_files(store.layout, plan, banks) is None and card.locked == locked
    store.close()


@pytest.mark.parametrize(
    "fault", ["lock", "wrong bytes", "wrong slots", "wrong table", "no compiler"]
)
def test_what_the_card_cannot_do_the_host_does(tmp_path, card, monkeypatch, fault):
    def locks_one(address, nbytes):
        if card.locked:
            raise FlashMoEError("CUDA's driver: cuMemHostRegister_v2 failed with error 801.")
        return LateDriver.lock(card, address, nbytes)

    def compiles_nothing(*arrays):
        raise RuntimeError("nvrtc: no such option")

    def wrong(part):
        def choose(*arguments):
            table, places, tasks = card.choose(*arguments)
            if part == "wrong slots":
                return table, (places + 1) % 3, tasks
            return table._replace(slot_of=mx.roll(table.slot_of, 1)), places, tasks

        return choose

    if fault == "lock":
        monkeypatch.setattr(card, "lock", locks_one)
        monkeypatch.setattr(mapped, "PINNERS", 1)
    elif fault == "wrong bytes":
        monkeypatch.setattr(resident, "_copy", lambda tasks, slots, *others: slots)
    elif fault == "no compiler":
        monkeypatch.setattr(resident, "_copy", compiles_nothing)
    else:
        monkeypatch.setattr(resident, "choose_slots", wrong(fault))
    store = make_store(tmp_path, slots=3)
    assert store._loader is None and not card.locked
    assert store.load_by_device(1, ids_of(7), X) is None
    (slot,) = store.fetch(1, [7])
    assert contents(store, 1, slot) == record(1, 7)
    store.close()


def test_a_file_cut_short_before_is_left_to_the_host_who_names_it(tmp_path, card):
    make_store(tmp_path, slots=3).close()
    layout = make_store(tmp_path, slots=3).layout
    mapped = MappedFiles(card, [layout.layers[0].fields[0].file])
    field = layout.layers[0].fields[8]
    assert mapped.address(field, 10) > 0
    with pytest.raises(FlashMoEError, match=r"0\.bin: ends in the middle of an expert"):
        mapped.address(field, 11)
    mapped.close()


def test_waves_of_a_prompt_are_brought_by_the_card_too(tmp_path, card):
    store = make_store(tmp_path, slots=4)
    first, second = store.request(0, [1, 3]), store.request(0, [8, 9])
    assert len(card.waiting) == 4 * 9  # nobody has waited yet
    for pending in (first, second):
        for expert, slot in zip(pending.experts, pending.wait(), strict=True):
            assert contents(store, 0, slot) == record(0, expert)
    assert store.stats.bytes_read == 4 * RECORD and store.stats.reads == 4 and not card.copies
    store.close()


def test_a_wave_that_nobody_waited_for_is_whole_before_its_slots_change_hands(tmp_path, card):
    store = make_store(tmp_path, slots=3)
    store.request(0, [1, 3]).release()
    assert store.banks[0].arriving and card.waiting
    bring(store, card, 0, 3, 5)
    assert not store.banks[0].arriving and store.stats.bytes_read == 3 * RECORD
    store.request(0, [7, 8, 9]).release()
    slots = store.fetch(0, [0, 2])
    assert [contents(store, 0, slot) for slot in slots] == [record(0, 0), record(0, 2)]
    store.close()


def test_the_card_copies_behind_what_reads_the_slots_and_the_host_does_not_wait(
    tmp_path, card, monkeypatch
):
    store, seen = make_store(tmp_path, slots=3), []
    y, other = mx.zeros(1), mx.ones(1)
    store.hold(y, 0, store.fetch(0, [0, 1]))
    store.hold(other, 1, store.fetch(1, [0]))
    depends = lambda tasks, earlier: seen.append(earlier) or tasks  # noqa: E731
    monkeypatch.setattr(resident.mx, "depends", depends)
    evaluated = []
    monkeypatch.setattr(store, "_evaluate", lambda held: evaluated.extend(held))
    store.request(0, [7, 8])
    assert len(seen) == 1 and len(seen[0]) == 1 and seen[0][0] is y and not evaluated
    assert [held.array for held in store._consumers] == [other]
    monkeypatch.undo()
    store.close()


def test_a_copy_that_fails_leaves_the_bank_as_it_was_less_what_gave_way(
    tmp_path, card, monkeypatch
):
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


def test_a_copy_that_cannot_be_begun_leaves_the_bank_as_it_was(tmp_path, card, monkeypatch):
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


def test_a_file_that_cannot_be_mapped_is_named(tmp_path, card):
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(FlashMoEError, match="empty: cannot be mapped"):
        MappedFiles(card, [empty])


def test_another_thread_begins_anew_where_the_first_has_only_begun(tmp_path, card):
    """MLX evaluates in the thread that built a graph; what may be in the bank is not known."""
    store, found = make_store(tmp_path, slots=3), []
    store.load_by_device(0, ids_of(2, 7), X)
    card.waiting = []
    thread = threading.Thread(target=lambda: found.extend(bring(store, card, 0, 7, 2)))
    thread.start()
    thread.join()
    assert len(found) == 2 and store.stats.bytes_read == 2 * RECORD
    store.close()
