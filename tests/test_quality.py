"""`tools/quality.py`: its held-out data, and the meaning of its figures."""

import numpy as np
import pytest
import quality

from flashmoe_mlx import load


@pytest.fixture(scope="module")
def opened():
    model, tokenizer = load(quality.BUNDLED_MODEL, tokenizer_config=quality.TRUST)
    yield model, tokenizer
    model.close()


def small(text, windows=1, chats=1):
    return quality.Text(
        [w[:33] for w in text.windows[:windows]], [c[:40] for c in text.chats[:chats]]
    )


def test_calibration_contains_no_held_out_text(opened):
    text = quality.calibration_text(opened[1])
    held = quality.HELD_OUT.read_text()
    assert not quality.runs(text) & quality.runs(held)
    assert len(quality.runs(held)) > 10_000
    cases = quality.read_cases(quality.DATA / "heldout.jsonl", None, 1000)
    asked = [m["content"] for case in cases for m in case["messages"] if m["role"] == "user"]
    assert len(asked) >= 250 and not [question for question in asked if question in text]


def test_runs_are_twelve_words_each():
    assert quality.runs("One, two " + "three " * 9 + "four") == {
        ("one", "two", *["three"] * 9, "four")
    }
    assert quality.runs("too short") == set()


def test_figures_against_plain_sums(opened):
    text = small(quality.held_out(opened[1]))
    found = list(quality.distributions(opened[0], text))
    assert [len(rows) for rows in found] == [32, 40]
    assert np.allclose(np.exp(found[0]).sum(-1), 1, atol=1e-4)
    same = quality.compare(opened[0], text, found)
    assert same["KL, text"] == same["KL, dialogues"] == 0
    losses = [-found[0][i][token] for i, token in enumerate(text.windows[0][1:])]
    assert same["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    flat = [np.full_like(rows, -np.log(4096)) for rows in found]  # sum of p (log p - log q)
    expected = -np.log(4096) - found[1].mean()
    assert quality.compare(opened[0], text, flat)["KL, dialogues"] == pytest.approx(
        expected, rel=1e-4
    )


def test_answers_are_judged_one_by_one(opened):
    found = quality.shares(*opened, 2)
    names = "tool calls: right function", "tool calls: exact", "JSON: valid", "JSON: exact"
    assert set(found) == set(names)
    assert found["tool calls: exact"] == 1 and found["JSON: valid"] >= found["JSON: exact"] > 0


def test_a_variant_with_fewer_experts_is_measured(opened, tmp_path):
    text = small(quality.held_out(opened[1]))
    master = list(quality.distributions(opened[0], text))
    options = {"q_bits": 2, "q_method": "min-max"}
    path = quality.variant(options, tmp_path)
    assert path == quality.variant(options, tmp_path)
    rows = [quality.measure(path, top_k, text, master, 0) for top_k in (4, 2)]
    assert [row["K"] for row in rows] == [4, 2]
    assert [row["MB"] for row in rows] == [
        pytest.approx(4 * 100 * 3 * 192 * 64 * 2.5 / 8 / 1e6)
    ] * 2
    assert 0 < rows[0]["KL, text"] < rows[1]["KL, text"]
