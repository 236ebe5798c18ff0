"""Waves: which experts of a layer come together, and in which order."""

import mlx.core as mx
import numpy as np
import pytest
from store_helpers import EXPERTS, contents, make_store, record

from flashmoe_mlx.models.qwen3_5 import moe
from flashmoe_mlx.models.qwen3_5.moe import StreamedExperts
from flashmoe_mlx.store import store as expert_store


def layer_of(store) -> StreamedExperts:
    layer = StreamedExperts.__new__(StreamedExperts)
    layer.__dict__.update(_store=store, _layer=0, _complete=False)
    return layer


def waves_of(store, ids: list[int]) -> list[list[int]]:
    """Return the experts of each wave, having looked at their bytes while they have to be there."""
    ids, seen, waves = np.array(ids), [], []
    for places, slots in layer_of(store).waves(ids):
        waves.append(sorted(set(ids[places].tolist())))
        seen += places.tolist()
        for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
            assert contents(store, 0, slot) == record(0, int(ids[place]))
    assert sorted(seen) == list(range(len(ids)))
    return waves


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(expert_store, "FAST", float("inf"))


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(expert_store, "FAST", 0.0)


@pytest.mark.usefixtures("slow")
def test_resident_experts_come_first_and_few_missing_ones_together(tmp_path):
    store = make_store(tmp_path, slots=8)
    store.fetch(0, [1, 2, 3])
    assert not store.reads_compute
    assert waves_of(store, [5, 1, 4, 2, 0, 5, 7]) == [[1, 2], [0, 4, 5, 7]]
    store.close()


@pytest.mark.usefixtures("slow")
def test_many_missing_ones_come_in_halves(tmp_path, monkeypatch):
    monkeypatch.setattr(moe, "FEW", 2)
    store = make_store(tmp_path, slots=8)
    assert waves_of(store, [5, 4, 0, 5, 7, 5, 4]) == [[0, 7], [4, 5]]
    store.close()


@pytest.mark.usefixtures("fast")
def test_where_reading_takes_the_cores_that_compute_all_come_together(tmp_path, monkeypatch):
    store = make_store(tmp_path, slots=8)
    assert not store.reads_compute  # nothing was read yet
    store.fetch(0, [1, 2, 3])
    assert store.reads_compute
    assert waves_of(store, [5, 1, 4, 2, 0]) == [[0, 1, 2, 4, 5]]
    monkeypatch.setattr(expert_store.mx, "default_device", lambda: mx.Device(mx.gpu))
    assert not store.reads_compute
    monkeypatch.undo()
    store.close()


@pytest.mark.usefixtures("fast")
def test_more_than_the_bank_holds_come_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(moe, "FEW", 2)
    store = make_store(tmp_path, slots=4)
    waves = waves_of(store, [*range(EXPERTS), 9])
    assert all(len(wave) <= 2 for wave in waves) and waves[-1][-1] == 9
    store.close()


def test_what_was_read_long_ago_counts_less(tmp_path, monkeypatch):
    store = make_store(tmp_path, slots=3)
    store._lately = 1000.0, 1.0
    store.fetch(0, [1])
    nbytes, seconds = store._lately
    assert 980 < nbytes < 980 + 4 * 36 and 0.98 < seconds < 1.5
    store.close()
