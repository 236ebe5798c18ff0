"""Which experts of a layer share a batch, and in which order batches come."""

import numpy as np
import pytest
from store_helpers import EXPERTS, contents, make_store, record

from flashmoe_mlx.store import scheduler, stats
from flashmoe_mlx.store.host import UnifiedBackend
from flashmoe_mlx.store.scheduler import expert_batches


def batches_of(store, ids: list[int]) -> list[list[int]]:
    """Return the experts of each batch, after comparing their bytes."""
    ids, seen, batches = np.array(ids), [], []
    for places, slots in expert_batches(store, 0, ids):
        batches.append(sorted(set(ids[places].tolist())))
        seen += places.tolist()
        for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
            assert contents(store, 0, slot) == record(0, int(ids[place]))
    assert sorted(seen) == list(range(len(ids)))
    return batches


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(stats, "FAST", float("inf"))


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(stats, "FAST", 0.0)


@pytest.mark.usefixtures("slow")
def test_resident_experts_come_first_and_few_missing_ones_together(tmp_path):
    store = make_store(tmp_path, slots=8)
    store.fetch(0, [1, 2, 3])
    assert not store.reads_compute
    assert batches_of(store, [5, 1, 4, 2, 0, 5, 7]) == [[1, 2], [0, 4, 5, 7]]
    store.close()


@pytest.mark.usefixtures("slow")
def test_many_missing_ones_come_in_halves(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "FEW", 2)
    store = make_store(tmp_path, slots=8)
    assert batches_of(store, [5, 4, 0, 5, 7, 5, 4]) == [[0, 7], [4, 5]]
    store.close()


@pytest.mark.usefixtures("fast")
def test_where_reading_takes_the_cores_that_compute_all_come_together(tmp_path, monkeypatch):
    store = make_store(tmp_path, slots=8)
    assert not store.reads_compute  # nothing was read yet
    store.fetch(0, [1, 2, 3])
    assert store.reads_compute
    assert batches_of(store, [5, 1, 4, 2, 0]) == [[0, 1, 2, 4, 5]]
    monkeypatch.setattr(store, "backend", UnifiedBackend())
    assert not store.reads_compute
    monkeypatch.undo()
    store.close()


@pytest.mark.usefixtures("fast")
def test_more_than_the_bank_holds_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "FEW", 2)
    store = make_store(tmp_path, slots=4)
    batches = batches_of(store, [*range(EXPERTS), 9])
    assert all(len(batch) <= 2 for batch in batches) and batches[-1][-1] == 9
    store.close()


@pytest.mark.parametrize("slots", [4, EXPERTS])
def test_no_experts_are_no_batch(tmp_path, slots):
    store = make_store(tmp_path, slots=slots)
    store.fetch(0, list(range(slots)))
    assert store.banks[0].holds_all == (slots == EXPERTS)
    assert list(expert_batches(store, 0, np.zeros(0, np.int64))) == []
    store.close()


def test_what_was_read_long_ago_counts_less(tmp_path, monkeypatch):
    store = make_store(tmp_path, slots=3)
    store._rate.add(1000, 1.0)
    store.fetch(0, [1])
    nbytes, seconds = store._rate._nbytes, store._rate._seconds
    assert 980 < nbytes < 980 + 4 * 36 and 0.98 < seconds < 1.5
    store.close()
