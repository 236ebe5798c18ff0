"""Files that a card copies from by itself: a card that copies only when it is waited for."""

import ctypes
import os
from types import SimpleNamespace

import mlx.core as mx
import pytest
from store_helpers import (
    EXPERTS,
    RECORD,
    assert_whole,
    big_layout,
    big_store,
    contents,
    make_store,
    record,
)
from test_cuda_memory import LateDriver, put_banks_on, rows_of

from flashmoe_mlx import cuda_mapped
from flashmoe_mlx.config import CachePlan, IoPlan
from flashmoe_mlx.cuda_mapped import MappedFiles, map_files
from flashmoe_mlx.errors import FlashMoEError


class Card(LateDriver):
    """Its kernel copies late, too: when its result is evaluated, or all that it has is awaited."""

    def __init__(self):
        super().__init__()
        self.tasks, self.copied = [], 0

    def launch(self, tasks):
        self.tasks += tasks.tolist()
        return mx.array([1])

    def catch_up(self):
        for source, place, nbytes in self.tasks:
            ctypes.memmove(place, source, nbytes)
        self.copied += len(self.tasks)
        self.tasks = []

    def finish(self):
        super().finish()
        self.catch_up()

    def eval(self, *arrays):
        self.catch_up()
        mx.eval(*arrays)


@pytest.fixture
def card(monkeypatch):
    """Put banks on a card that can read files."""
    card = put_banks_on(Card(), monkeypatch)
    monkeypatch.setattr(cuda_mapped, "card_rows", rows_of)
    monkeypatch.setattr(cuda_mapped, "uses_cuda", lambda: True)
    monkeypatch.setattr(cuda_mapped, "_driver", lambda: card)
    monkeypatch.setattr(cuda_mapped, "_copy", card.launch)
    seen = SimpleNamespace(**{name: getattr(mx, name) for name in dir(mx)})
    seen.eval, seen.async_eval = card.eval, lambda *arrays: None
    monkeypatch.setattr(cuda_mapped, "mx", seen)
    return card


@pytest.mark.parametrize("scattered", [False, True])
def test_what_a_step_asks_for_is_copied_by_the_card(tmp_path, card, scattered):
    store = make_store(tmp_path, slots=3, scattered=scattered)
    tried, card.copied = card.copied, 0
    assert tried == 1 and len(card.locked) == 2  # files
    for layer, experts in ((0, [2, 0, 1]), (1, [4]), (0, [3, 2]), (1, [1, 4, 0])):
        slots = store.fetch(layer, experts)
        card.catch_up()
        for expert, slot in zip(experts, slots, strict=True):
            assert contents(store, layer, slot) == record(layer, expert)
    missed = store.stats.asked - store.stats.hits
    assert missed == 7 and card.copied == 9 * missed and not card.copies
    assert store.stats.bytes_read == missed * RECORD
    store.close()
    assert not card.locked


def test_waves_are_read_by_the_host_behind_the_cards_copies(tmp_path, card):
    sizes = [5 * 4096, 12, 400, 3 * 4096, 8, 8, 1 << 16, 4, 400]
    store = big_store(big_layout(tmp_path, sizes), threads=2, slots=4)
    store.fetch(0, [0, 1, 2, 3])
    late = len(card.tasks)
    slots = store.request(0, [5, 6]).wait()
    assert late == 4 * 9 and not card.tasks  # or they would land on top of 5 and 6
    assert_whole(store, [5, 6], slots)
    kept = store.banks[0].resident(range(EXPERTS))
    assert_whole(store, kept, store.fetch(0, kept))
    store.close()


def test_a_file_cut_short_is_read_by_the_host_who_names_it(tmp_path, card):
    store = make_store(tmp_path, slots=3)
    mapped, file = store._reader._mapped, store.layout.layers[1].fields[0].file
    number = store._reader._names  # descriptors
    (descriptor,) = [n for n, path in number.items() if path == file]
    os.truncate(file, 4 * RECORD + 5)
    pages, address = mapped._maps[descriptor]
    mapped._maps[descriptor] = memoryview(pages)[: 4 * RECORD + 5], address  # mapped after that
    with pytest.raises(FlashMoEError, match=f"{file.name}: ends at byte .* cut short"):
        store.fetch(1, [4, 0])
    (slot,) = store.fetch(1, [0])
    card.catch_up()
    assert contents(store, 1, slot) == record(1, 0)
    mapped._maps[descriptor] = pages, address
    store.close()


def test_another_stream_finds_all_copies_done(tmp_path, card):
    store = make_store(tmp_path, slots=3)
    store.fetch(0, [1])
    before = card.finished
    store.fetch(0, [1])
    assert card.finished == before and card.tasks
    with mx.stream(mx.new_stream(mx.cpu)):
        store.fetch(0, [1])
    assert card.finished == before + 1 and not card.tasks
    store.close()


@pytest.mark.parametrize(
    "slots, direct, memory", [(10, False, 1 << 30), (3, True, 1 << 30), (3, False, 20 * RECORD)]
)
def test_only_where_it_helps_and_memory_has_room(
    tmp_path, card, monkeypatch, slots, direct, memory
):
    store = make_store(tmp_path, slots=3)
    monkeypatch.setattr(cuda_mapped, "available_bytes", lambda: memory)
    plan = CachePlan(slots, 0, "a test", IoPlan(direct, "a test"))
    locked = dict(card.locked)
    assert map_files(store.layout, plan, {}) is None and card.locked == locked
    monkeypatch.setattr(cuda_mapped, "uses_cuda", lambda: False)
    assert map_files(store.layout, CachePlan(3, 0, "a test"), {}) is None
    store.close()


@pytest.mark.parametrize("fault", ["lock", "wrong bytes", "no compiler"])
def test_what_the_card_cannot_do_the_host_does(tmp_path, card, monkeypatch, fault):
    def locks_one(address, nbytes):
        if card.locked:
            raise FlashMoEError("CUDA's driver: cuMemHostRegister_v2 failed with error 801.")
        return LateDriver.lock(card, address, nbytes)

    def compiles_nothing(tasks):
        raise RuntimeError("nvrtc: no such option")

    if fault == "lock":
        monkeypatch.setattr(card, "lock", locks_one)
        monkeypatch.setattr(cuda_mapped, "LOCKERS", 1)
    elif fault == "wrong bytes":
        monkeypatch.setattr(card, "launch", None)
        monkeypatch.setattr(cuda_mapped, "_copy", lambda tasks: mx.array([1]))
    else:
        monkeypatch.setattr(cuda_mapped, "_copy", compiles_nothing)
    store = make_store(tmp_path, slots=3)
    assert store._reader._mapped is None and not card.locked
    (slot,) = store.fetch(1, [7])
    assert contents(store, 1, slot) == record(1, 7)
    store.close()


def test_a_file_that_cannot_be_mapped_is_named(tmp_path, card):
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(FlashMoEError, match="empty: cannot be mapped"):
        MappedFiles(card, {empty: 3})
