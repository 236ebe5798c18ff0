"""The store: what is read, what is kept, what is counted, and what a failure leaves behind."""

import copy
import pickle
import threading

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.config import CachePlan
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.expert_store import ExpertStore
from flashmoe_mlx.layout import ExpertLayout, Field, LayerLayout
from flashmoe_mlx.names import FIELDS

EXPERTS, RECORD = 10, 4 * 9


def make_store(tmp_path, slots: int, scattered: bool = False, layers: int = 2) -> ExpertStore:
    """Return a store over one file per layer; tensor f of expert e holds the number 100 e + f.

    `scattered` stores like a stock checkpoint: tensor by tensor, so an expert is nine ranges.
    """
    tensors = []
    for layer in range(layers):
        path = tmp_path / f"{layer}.bin"
        values = np.arange(EXPERTS)[:, None] * 100 + np.arange(9) + 10000 * layer
        path.write_bytes((values.T if scattered else values).astype(np.uint32).tobytes())
        tensors.append(
            LayerLayout(
                layer,
                EXPERTS,
                tuple(
                    Field(name, "U32", (1, 1), 4, path, 4 * f * EXPERTS, 4)
                    if scattered
                    else Field(name, "U32", (1, 1), 4, path, 4 * f, RECORD)
                    for f, name in enumerate(FIELDS)
                ),
            )
        )
    layout = ExpertLayout("packed", tmp_path, tuple(tensors))
    return ExpertStore(layout, CachePlan(slots, slots * RECORD * layers, "a test"), io_threads=3)


def contents(store: ExpertStore, layer: int, slot: int) -> list[int]:
    return [bank[slot, 0, 0].item() for bank in store.banks[layer].arrays]


def record(layer: int, expert: int) -> list[int]:
    return [10000 * layer + 100 * expert + f for f in range(9)]


@pytest.mark.parametrize("scattered", [False, True])
def test_slots_hold_the_experts_asked_for(tmp_path, scattered):
    store = make_store(tmp_path, slots=4, scattered=scattered)
    rng = np.random.default_rng(0)
    for _ in range(60):
        layer = int(rng.integers(2))
        experts = [int(e) for e in rng.choice(EXPERTS, size=rng.integers(1, 5), replace=False)]
        slots = store.fetch(layer, experts)
        assert len(set(slots)) == len(experts)
        for expert, slot in zip(experts, slots, strict=True):
            assert contents(store, layer, slot) == record(layer, expert)


def test_spans_are_one_range_if_packed_and_nine_if_not(tmp_path):
    assert len(make_store(tmp_path, 2).layout.layers[0].spans(7)) == 1
    assert len(make_store(tmp_path, 2, scattered=True).layout.layers[0].spans(7)) == 9


def test_least_recently_used_goes_first(tmp_path):
    store = make_store(tmp_path, slots=3)
    store.fetch(0, [1, 2, 3])
    store.fetch(0, [1])
    store.fetch(0, [4])  # drops 2, the oldest
    before = store.stats.bytes_read
    store.fetch(0, [1, 3, 4])
    assert store.stats.bytes_read == before
    store.fetch(0, [2])
    assert store.stats.bytes_read == before + RECORD


def test_experts_of_the_same_request_never_displace_each_other(tmp_path):
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
    store.hold(consumer)
    store.fetch(0, [2])
    assert consumer.item() == 2 * record(0, 1)[0]


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


def test_failed_read_names_file_and_reason(tmp_path, monkeypatch):
    store = make_store(tmp_path, slots=2)

    def broken(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", broken)
        with pytest.raises(
            FlashMoEError, match=r"0\.bin: reading an expert at byte .*Input/output"
        ):
            store.fetch(0, [3])
    assert contents(store, 0, store.fetch(0, [3])[0]) == record(0, 3)


def test_short_reads_are_continued(tmp_path, monkeypatch):
    import os

    whole = os.preadv
    monkeypatch.setattr(
        "os.preadv", lambda fd, rows, offset: whole(fd, [memoryview(rows[0])[:3]], offset)
    )
    store = make_store(tmp_path, slots=2)
    assert contents(store, 1, store.fetch(1, [6])[0]) == record(1, 6)


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


def test_copies_share_the_store_and_pickles_are_refused(tmp_path):
    store = make_store(tmp_path, slots=2)
    assert copy.deepcopy(store) is store
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(store)
