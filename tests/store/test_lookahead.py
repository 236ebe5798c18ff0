"""Prefetched experts: useful ones are in time, others unused, and tokens are the same."""

import errno
import os
import time

import mlx.core as mx
import numpy as np
import pytest
from store_helpers import EXPERTS, RECORD, Gate, contents, make_store, record

from flashmoe_mlx import load
from flashmoe_mlx.custom_kernels.cpu import block
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.store import prefetch
from flashmoe_mlx.store.prefetch import BLOCK, BLOCKS, TERM, Lookahead

RANDOM = np.random.default_rng(0).random
CACHE = 12 * 4 * 39168  # bytes for 12 of 100 experts per layer


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test advances."""
    now = [0.0]
    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: now[0])
    return now


def steps(found: Lookahead, clock, count: int, prefetching: float) -> list[bool]:
    """Take steps of 1 second, or of `prefetching` seconds with prefetch; return which had it."""
    had = []
    for _ in range(count):
        had.append(found.begin())
        clock[0] += prefetching if had[-1] else 1.0
        found.end()
    return had


@pytest.mark.parametrize("seconds, pays", [(0.9, True), (0.99, False), (1.5, False)])
def test_a_trial_sets_the_mode_for_a_term(clock, seconds, pays):
    found = Lookahead()
    trial = 2 * BLOCK * BLOCKS
    assert str(found) == "on trial"
    assert steps(found, clock, trial, seconds) == ([False] * BLOCK + [True] * BLOCK) * BLOCKS
    assert str(found) == ("on, by trial" if pays else "off, by trial")
    assert steps(found, clock, TERM, seconds) == [pays] * TERM
    assert steps(found, clock, trial, 1.9 - seconds).count(True) == trial // 2
    assert found.begin() != pays or seconds == 0.99


@pytest.mark.parametrize("mode", ["on", "off"])
def test_fixed_modes_run_no_trial(clock, mode):
    found = Lookahead(mode)
    assert steps(found, clock, 500, 7.0) == [mode == "on"] * 500 and str(found) == mode


def test_useful_prefetches_are_misses_read_early(tmp_path):
    store = make_store(tmp_path, slots=4)
    store.prefetch(0, [1, 2])
    store.cancel_prefetch(0, [2, 5])
    for expert, slot in zip([2, 5], store.fetch(0, [2, 5]), strict=True):
        assert contents(store, 0, slot) == record(0, expert)
    store.fetch(0, [2, 5])
    stats = store.stats
    assert (stats.asked, stats.hits, stats.early) == (4, 2, 1)
    assert stats.bytes_useless in (0, RECORD)  # cancelled in time, or not
    assert stats.bytes_read == (stats.asked - stats.hits) * RECORD + stats.bytes_useless
    store.close()


def test_unneeded_prefetches_that_have_not_started_are_cancelled(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    store = make_store(tmp_path, slots=8)  # three threads
    store.prefetch(0, [1, 2, 3, 4, 5, 6])
    while len(gate.reads) < 3:
        time.sleep(0.001)
    store.cancel_prefetch(0, [6])
    gate.opened.set()
    (slot,) = store.fetch(0, [6])
    assert contents(store, 0, slot) == record(0, 6)
    store._finish_reads(store.banks[0])
    assert store.stats.bytes_useless == 3 * RECORD
    assert store.stats.bytes_read == 4 * RECORD  # 1, 2, 3; and 6
    assert sorted(store.banks[0].resident(range(EXPERTS))) == [1, 2, 3, 6]
    store.close()


def test_a_prefetch_takes_only_free_slots(tmp_path):
    store = make_store(tmp_path, slots=3)
    held = store.request(0, [1, 2, 3])
    store.prefetch(0, [4])
    held.wait()
    store.prefetch(0, [4, 5])
    assert store.stats.bytes_read == 3 * RECORD and not store._prefetched.any(0)
    store.prefetch(1, [1, 2, 3, 4])  # more than the bank holds
    assert not store._prefetched.any(1)
    del held
    store.prefetch(0, [4])
    store.cancel_prefetch(0, [4])
    (slot,) = store.fetch(0, [4])
    assert contents(store, 0, slot) == record(0, 4)
    store.close()


def test_an_expert_whose_prefetch_failed_is_read_on_request(tmp_path, monkeypatch):
    store, real = make_store(tmp_path, slots=3), os.preadv

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    store.prefetch(0, [1, 2])
    for _, arrival in [*store.banks[0].arriving.values()]:
        arrival.wait()
    monkeypatch.setattr(os, "preadv", real)
    store.cancel_prefetch(0, [1])
    (slot,) = store.fetch(0, [1])
    assert contents(store, 0, slot) == record(0, 1)
    assert (store.stats.early, store.stats.hits, store.stats.bytes_read) == (0, 0, RECORD)
    store.close()


def test_a_closed_store_refuses_to_prefetch(tmp_path):
    store = make_store(tmp_path, slots=3)
    store.close()
    with pytest.raises(FlashMoEError, match="closed"):
        store.prefetch(0, [1])


def logits(model, tokens: list[int]) -> np.ndarray:
    cache, rows = model.make_cache(), []
    for token in tokens:
        rows.append(np.array(model(mx.array([[token]]), cache=cache)))
    return np.concatenate(rows)


def test_tokens_are_the_same_with_useful_and_random_prefetches(monkeypatch):
    """The bundled model without prefetch, with it, and with random prefetches."""
    tokens = [5, 900, 17, 3, 3, 256, 1000, 41] * 3
    real = block.router_logits
    found, shares = [], []
    for mode in ("off", "on", "random"):
        if mode == "random":
            monkeypatch.setattr(block, "router_logits", lambda *args: RANDOM(real(*args).shape))
        with load(BUNDLED_MODEL, expert_cache=CACHE, lookahead=mode.replace("random", "on"))[
            0
        ] as m:
            found.append(logits(m, tokens))
            stats, layout = m.expert_stats(), m._store.layout
        missed = (stats.asked - stats.hits) * layout.layers[0].record_bytes
        # The last prefetches may still be in flight.
        assert stats.bytes_read <= missed + stats.bytes_useless
        shares.append(stats.early / (stats.asked - stats.hits))
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    assert shares[0] == 0 and shares[1] > 2 * shares[2] > 0


def test_prefetch_needs_our_cpu_kernels(fresh_kernel_mode, monkeypatch):
    monkeypatch.setenv("FLASHMOE_KERNELS", "stock")
    with pytest.raises(FlashMoEError, match=r"lookahead = 'on': .* Choose auto, or off"):
        load(BUNDLED_MODEL, lookahead="on")
    with load(BUNDLED_MODEL)[0] as model:
        assert model._store.lookahead.mode == "off"
