"""The store: reads, evictions, counters, and its state after a failure."""

import copy
import gc
import os
import pickle
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from store_helpers import EXPERTS, RECORD, Gate, contents, make_store, record

from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.layout import Field, LayerLayout
from flashmoe_mlx.format.names import FIELDS
from flashmoe_mlx.store.devices import choose
from flashmoe_mlx.store.host import _address
from flashmoe_mlx.store.io_mode import BLOCK
from flashmoe_mlx.store.reader import Reader
from flashmoe_mlx.store.requests import Pending
from flashmoe_mlx.store.sizing import CachePlan
from flashmoe_mlx.store.slots import SlotBank
from flashmoe_mlx.store.store import ExpertStore


@pytest.mark.parametrize("scattered", [False, True])
def test_slots_hold_the_requested_experts_and_only_misses_are_read(tmp_path, scattered):
    store = make_store(tmp_path, slots=5, scattered=scattered)
    rng = np.random.default_rng(0)
    for _ in range(60):
        layer = int(rng.integers(2))
        experts = [int(e) for e in rng.choice(EXPERTS, size=rng.integers(1, 5), replace=False)]
        slots = store.fetch(layer, experts)
        assert len(set(slots)) == len(experts)
        for expert, slot in zip(experts, slots, strict=True):
            assert contents(store, layer, slot) == record(layer, expert)
    misses = store.stats.asked - store.stats.hits
    assert 0 < misses < store.stats.asked and store.stats.bytes_read == misses * RECORD


def test_spans_are_one_range_if_packed_and_nine_if_not(tmp_path):
    assert len(make_store(tmp_path, 2).layout.layers[0].spans(7)) == 1
    assert len(make_store(tmp_path, 2, scattered=True).layout.layers[0].spans(7)) == 9


def test_the_least_used_expert_is_evicted_first(tmp_path):
    store = make_store(tmp_path, slots=3)
    store.fetch(0, [1, 2, 3])
    store.fetch(0, [1])
    store.fetch(0, [4])  # evicts 2, the oldest
    before = store.stats.bytes_read
    store.fetch(0, [1, 3, 4])
    assert store.stats.bytes_read == before
    store.fetch(0, [2])
    assert store.stats.bytes_read == before + RECORD


def test_experts_of_one_request_never_evict_each_other(tmp_path):
    store = make_store(tmp_path, slots=3)
    store.fetch(0, [1, 2, 3])
    slots = store.fetch(0, [4, 1, 5])
    for expert, slot in zip([4, 1, 5], slots, strict=True):
        assert contents(store, 0, slot) == record(0, expert)


def test_counters(tmp_path):
    store = make_store(tmp_path, slots=4, scattered=True)
    store.fetch(0, [1, 2, 3])
    store.fetch(0, [2, 3, 5])
    stats = store.stats
    assert (stats.asked, stats.hits, stats.reads) == (6, 2, 4 * 9)
    assert stats.bytes_read == 4 * RECORD
    assert stats.seconds_waited > 0
    assert stats.hit_rate == pytest.approx(1 / 3)
    assert stats.as_dict()["hit_rate"] == stats.hit_rate
    assert "6 asked, 33.3% hits" in str(stats)


def test_a_lazy_consumer_is_evaluated_before_its_slot_is_overwritten(tmp_path):
    store = make_store(tmp_path, slots=1)
    (slot,) = store.fetch(0, [1])
    consumer = store.banks[0].arrays[0][mx.array([slot])] * 2
    store.hold(consumer, 0)
    store.fetch(0, [2])
    assert consumer.item() == 2 * record(0, 1)[0]


def _overwrite(store, slot: int, value: int) -> None:
    """Write as a reader does, without MLX's knowledge."""
    memoryview(store.banks[0].arrays[0]).cast("B")[4 * slot : 4 * slot + 4] = value.to_bytes(
        4, "little"
    )


def _double(store, slot: int) -> mx.array:
    return store.banks[0].arrays[0][mx.array([slot])] * 2


def test_only_consumers_of_reassigned_slots_are_evaluated(tmp_path):
    store = make_store(tmp_path, slots=2)
    slots = store.fetch(0, [1, 2])
    oldest, newest = (_double(store, slot) for slot in slots)
    store.hold(oldest, 0, slots[:1])
    store.hold(newest, 0, slots[1:])
    assert store.fetch(0, [3]) == slots[:1]
    assert oldest.item() == 2 * record(0, 1)[0]
    _overwrite(store, slots[1], 7)
    assert newest.item() == 14  # it was not evaluated yet


def test_a_consumer_of_one_layer_does_not_stop_another(tmp_path):
    store = make_store(tmp_path, slots=2)
    slots = store.fetch(0, [1, 2])
    consumer = _double(store, slots[0])
    store.hold(consumer, 0)
    store.fetch(1, [1, 2])
    store.fetch(1, [3, 4])
    _overwrite(store, slots[0], 7)
    assert consumer.item() == 14
    again = _double(store, slots[1])
    store.hold(again, 0)
    store.fetch(0, [3])  # without slots, all of the layer's
    assert again.item() == 2 * record(0, 2)[0]


def test_held_consumers_do_not_accumulate(tmp_path):
    store = make_store(tmp_path, slots=EXPERTS - 1)
    slots = store.fetch(0, [1, 2, 3])
    consumers = [_double(store, slot) for slot in slots]
    for slot, consumer in zip(slots, consumers, strict=True):
        store.hold(consumer, 0, [slot])
    assert len(store._consumers) == 2
    for slot in slots:
        _overwrite(store, slot, 7)
    assert [c.item() for c in consumers] == [2 * record(0, 1)[0], 14, 14]


def test_a_complete_bank_holds_no_consumers(tmp_path):
    store = make_store(tmp_path, slots=EXPERTS)
    slots = store.fetch(0, list(range(EXPERTS)))
    assert slots == list(range(EXPERTS)) and store.banks[0].holds_all
    for slots in ([1], None):  # they would accumulate
        store.hold(_double(store, 1), 0, slots)
        assert not store._consumers


def test_a_request_keeps_its_slots_until_it_is_dropped(tmp_path):
    store = make_store(tmp_path, slots=4)
    pending = store.request(0, [1, 2])
    pending.wait()
    for others in ([3, 4], [5, 6], [7]):
        store.fetch(0, others)
        for expert, slot in zip([1, 2], pending.slots, strict=True):
            assert contents(store, 0, slot) == record(0, expert)
    with pytest.raises(FlashMoEError, match=r"layer 0: 3 more experts do not fit .* of 4 slots"):
        store.fetch(0, [7, 8, 9, 0])
    del pending
    for expert, slot in zip([7, 8, 9, 0], store.fetch(0, [7, 8, 9, 0]), strict=True):
        assert contents(store, 0, slot) == record(0, expert)


def test_half_a_bank_is_read_while_the_other_is_used(tmp_path):
    store = make_store(tmp_path, slots=4)
    batches, sums = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]], []
    pending = store.request(0, batches[0])
    for following in [*batches[1:], None]:
        slots = pending.wait()
        y = store.banks[0].arrays[0][mx.array(slots)].sum()
        store.hold(y, 0, slots)
        sums.append(y)
        if following:
            pending = store.request(0, following)
    assert [y.item() for y in sums] == [sum(100 * e for e in batch) for batch in batches]


def test_a_store_of_another_process_is_refused(tmp_path, monkeypatch):
    store = make_store(tmp_path, slots=2)
    pid = store._process
    monkeypatch.setattr("os.getpid", lambda: pid + 1)
    with pytest.raises(FlashMoEError, match="loaded in another process"):
        store.fetch(0, [1])


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="GPUs align memory themselves")
def test_banks_start_at_block_boundaries_and_are_not_copied():
    bank = SlotBank(_wide_layer(), 64, {Path("x"): 0}, choose())
    assert [_address(array) % BLOCK for array in bank.arrays] == [0] * 9
    codes, scales, biases = bank.arrays[:3]
    x, chosen = mx.ones((4, 1, 512)), mx.array([5, 1, 2, 3])
    mx.eval(x, chosen)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.gather_qmm(x, codes, scales, biases, rhs_indices=chosen, transpose=True))
    assert mx.get_peak_memory() - before < codes.nbytes / 100


def _wide_layer() -> LayerLayout:
    shapes = [("U32", (512, 64), 4), ("F32", (512, 8), 4), ("F32", (512, 8), 4)] * 3
    fields = [
        Field(name, dtype, shape, shape[0] * shape[1] * size, Path("x"), 0, 0)
        for name, (dtype, shape, size) in zip(FIELDS, shapes, strict=True)
    ]
    return LayerLayout(0, 64, tuple(fields))


def test_truncated_file_is_an_error_and_the_store_stays_usable(tmp_path):
    store = make_store(tmp_path, slots=2)
    path = tmp_path / "0.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: 9 * RECORD + 8])
    for _ in range(3):
        with pytest.raises(FlashMoEError, match=r"0\.bin: ends at byte 332.*load the model again"):
            store.fetch(0, [9, 1])
    assert contents(store, 0, store.fetch(0, [1])[0]) == record(0, 1)
    path.write_bytes(whole)
    for expert, slot in zip([9, 4], store.fetch(0, [9, 4]), strict=True):
        assert contents(store, 0, slot) == record(0, expert)


def test_missing_file_is_named(tmp_path):
    layout = make_store(tmp_path, 2).layout
    (tmp_path / "1.bin").unlink()
    with pytest.raises(FlashMoEError, match=r"1\.bin: cannot be opened"):
        ExpertStore(layout, CachePlan(2, 0, "a test"))


def test_close_ends_threads_and_refuses_further_use(tmp_path):
    store = make_store(tmp_path, slots=2)
    store.fetch(0, [1, 2])
    store.close()
    store.close()
    assert not [t for t in threading.enumerate() if t in store._reader.threads]
    with pytest.raises(FlashMoEError, match="closed"):
        store.fetch(0, [3])


@pytest.mark.parametrize("scattered", [False, True])
def test_banks_with_slots_for_all_experts_are_preloaded(tmp_path, scattered):
    layout = make_store(tmp_path, 2, scattered).layout
    store = ExpertStore(layout, CachePlan(EXPERTS, 0, "a test"), 3, preload=True)
    for layer, bank in enumerate(store.banks):
        assert bank.holds_all and not bank.arriving
        for expert in range(EXPERTS):
            assert contents(store, layer, expert) == record(layer, expert)
    stats = store.stats
    assert (stats.asked, stats.reads, stats.bytes_read, stats.seconds_waited) == (0, 0, 0, 0)
    assert stats.bytes_preloaded == 2 * EXPERTS * RECORD and stats.seconds_preloading > 0
    assert str(stats).endswith(f"; {stats.preloaded}") and stats.preloaded.startswith("0.0 MB at ")
    assert store.fetch(1, [7, 3]) == [7, 3]
    assert (stats.hits, stats.bytes_read) == (2, 0)


def test_smaller_banks_are_not_preloaded(tmp_path):
    layout = make_store(tmp_path, 2).layout
    store = ExpertStore(layout, CachePlan(EXPERTS - 1, 0, "a test"), 3, preload=True)
    assert not any(bank.resident(range(EXPERTS)) for bank in store.banks)
    assert store.stats.bytes_preloaded == 0


def test_preloading_goes_by_file_order(tmp_path, monkeypatch):
    layout, whole, places = make_store(tmp_path, 2, scattered=True).layout, os.preadv, []

    def preadv(descriptor, rows, offset):
        places.append((descriptor, offset))
        return whole(descriptor, rows, offset)

    monkeypatch.setattr("os.preadv", preadv)
    monkeypatch.setattr(Reader, "help", lambda *_: None)  # one thread reads
    ExpertStore(layout, CachePlan(EXPERTS, 0, "a test"), 1, preload=True)
    assert len(places) == 2 * EXPERTS * 9 and places == sorted(places)


def _readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("flashmoe-read")]


@pytest.fixture
def nothing_left():
    """Check that a test leaves neither threads nor open files."""
    gc.collect()
    threads, files = _readers(), os.listdir("/dev/fd")
    yield
    assert _readers() == threads
    assert os.listdir("/dev/fd") == files


def test_a_read_error_while_preloading(tmp_path, nothing_left):
    store = make_store(tmp_path, 2)
    store.close()
    os.truncate(tmp_path / "1.bin", 9 * RECORD + 8)
    with pytest.raises(FlashMoEError, match=r"1\.bin: ends at byte 332"):
        ExpertStore(store.layout, CachePlan(EXPERTS, 0, "a test"), 3, preload=True)


def test_ctrl_c_while_preloading(tmp_path, monkeypatch, nothing_left):
    store = make_store(tmp_path, 2)
    store.close()
    gate = Gate(monkeypatch)

    def interrupt(*_):
        threading.Timer(0.1, gate.opened.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(Reader, "help", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ExpertStore(store.layout, CachePlan(EXPERTS, 0, "a test"), 3, preload=True)
    assert len(gate.reads) <= 3


def test_close_while_preloading(tmp_path, monkeypatch, nothing_left):
    layout, gate, wait = make_store(tmp_path, 2).layout, Gate(monkeypatch), Pending.wait

    def closing(pending):
        threading.Timer(0.1, gate.opened.set).start()
        closer = threading.Thread(target=pending._wait.__self__.close)
        closer.start()
        try:
            return wait(pending)
        finally:
            closer.join()

    monkeypatch.setattr(Pending, "wait", closing)
    with pytest.raises(FlashMoEError, match="was cancelled"):
        ExpertStore(layout, CachePlan(EXPERTS, 0, "a test"), 3, preload=True)


def test_copies_share_the_store_and_pickles_are_refused(tmp_path):
    store = make_store(tmp_path, slots=2)
    assert copy.deepcopy(store) is store
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(store)
