"""The replay of recorded routing does what the package does, and its policies what they say."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from cache_policies import Belady, LeastDemand, Lru, S3Fifo
from record_routing import record
from replay_routing import Guess, Trace, policies, predict, replay
from store_helpers import make_store

from flashmoe_mlx.loader import BUNDLED_MODEL, load
from flashmoe_mlx.store import store as expert_store
from flashmoe_mlx.store.slots import HALF_LIFE, Demand

EXPERTS, LAYERS, K = 20, 2, 3


def make_trace(seed: int) -> Trace:
    """Return a prompt of 9 tokens and 60 decoded ones, some experts asked for more than others."""
    rng = np.random.default_rng(seed)
    likely = 0.9 * rng.dirichlet(np.full(EXPERTS, 0.5)) + 0.1 / EXPERTS
    draw = [
        [rng.choice(EXPERTS, K, replace=False, p=likely) for _ in range(LAYERS)] for _ in range(69)
    ]
    return Trace(f"text-{seed}", EXPERTS, 1000, np.array([9] + [1] * 60), np.array(draw, np.int16))


def missed(traces: list[Trace], slots: int, make) -> int:
    counts = replay(traces, slots, make)
    return sum(count.missed for count in counts["prompt"] + counts["decode"])


@pytest.mark.parametrize("slots", [6, 10, 15])
def test_nothing_beats_the_optimum_and_everything_fits_at_last(slots):
    traces = [make_trace(seed) for seed in range(3)]
    best = missed(traces, slots, Belady)
    for name, make in policies(EXPERTS).items():
        assert missed(traces, slots, make) >= best, name
        assert missed(traces, EXPERTS, make) == missed(traces, EXPERTS, Belady), name


def test_replay_misses_what_the_model_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_store, "FAST", float("inf"))  # reads are waited for, as in a replay
    slots, prompt, decoded = 24, 30, 40
    model, tokenizer = load(BUNDLED_MODEL, expert_cache=slots * 4 * 39168, lookahead="off")
    assert model._store.plan.slots == slots
    text = tokenizer.encode((Path(__file__).parents[1] / "README.md").read_text()[:2000])
    traces = [
        record(model, name, text[start:], prompt, decoded)
        for name, start in (("first", 0), ("second", 100))
    ]
    traces[0].save(tmp_path)
    again = Trace.load(tmp_path / "first.npz")
    assert again.experts == 100
    assert np.array_equal(again.ids, traces[0].ids)
    counts = replay(
        [again, traces[1]], slots, lambda slots, future: LeastDemand(slots, again.experts)
    )
    everything = counts["prompt"] + counts["decode"]
    stats = model.expert_stats()
    assert sum(count.used for count in everything) == stats.asked
    assert sum(count.missed for count in everything) == stats.asked - stats.hits
    model.close()


def test_guesses_of_the_router_are_recorded(tmp_path):
    model, tokenizer = load(BUNDLED_MODEL, expert_cache="1GiB")
    trace = record(model, "text", tokenizer.encode("The king said to the queen:" * 4), 10, 20)
    assert trace.ids.shape[1:] == (4, 4)
    assert trace.before.shape == trace.after.shape == (len(trace.ids), 3, 8)
    guesses = predict([trace], 10)
    after = guesses["router after the last layer's experts, best 8"]
    assert after.right / after.used > 0.5  # of 100 experts, 8 guessed blindly are right at 0.08
    model.close()


def test_a_guess_is_counted():
    guess = Guess()
    guess.score(guessed={1, 2, 3}, used={2, 3, 4}, held={3})
    assert (guess.used, guess.right, guess.missed, guess.found, guess.useless) == (3, 2, 2, 1, 1)


def one_by_one(policy, experts: list[int]) -> set[int]:
    """Ask for single experts, and return which are held."""
    for expert in experts:
        new = expert not in policy.held
        if new and len(policy.held) == policy.slots:
            policy.drop({expert})
        if new:
            policy.add(expert)
        policy.use(expert, new)
    return set(policy.held)


def test_a_scan_drives_what_is_in_demand_out_of_an_lru_bank_only():
    wanted, scan = [1, 2] * 20, [5, 6, 7, 8, 9, 10]
    assert not {1, 2} & one_by_one(Lru(4), wanted + scan)
    assert {1, 2} <= one_by_one(S3Fifo(4), wanted + scan)
    assert {1, 2} <= one_by_one(LeastDemand(4, EXPERTS), wanted + scan)


def test_a_scan_leaves_what_is_in_demand_in_the_bank(tmp_path):
    store = make_store(tmp_path, slots=4)
    for _ in range(20):
        store.fetch(0, [1, 2])
    for expert in range(3, 10):
        store.fetch(0, [expert])
    before = store.stats.bytes_read
    store.fetch(0, [1, 2])
    assert store.stats.bytes_read == before
    store.close()


def test_demand_fades():
    demand = Demand(EXPERTS)
    for _ in range(5):
        demand.count(1)
    demand.count(2)
    assert demand.ascending([1, 2, 3]) == [3, 2, 1]
    for _ in range(4 * HALF_LIFE):
        demand.count(4)
    demand.count(2)
    assert demand.ascending([1, 2, 4]) == [1, 2, 4]


def test_demand_with_a_short_half_life_is_least_recently_used():
    rng = np.random.default_rng(0)
    asked = rng.integers(0, EXPERTS, 300).tolist()
    assert one_by_one(LeastDemand(7, EXPERTS, 0.5), asked) == one_by_one(Lru(7), asked)
