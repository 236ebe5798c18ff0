"""Streaming is exact: tokens and logits equal stock mlx-lm's with all experts in memory."""

import copy

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from shared_folders import FORMATS, text_config

from flashmoe_mlx import batch_generate, load
from flashmoe_mlx.cli import full_check
from flashmoe_mlx.format.layout import open_layout

pytestmark = pytest.mark.usefixtures("compiled")

PROMPT_LENGTHS = (1, 17, 300)
TOLERANCE = 1e-4
TOKENS = 64

TEXT = (
    "The package manager keeps a list of every file that it installs, so that a package can be "
    "removed without leaving anything behind. Before it removes one it asks which other packages "
    "depend on it, and the answer decides what happens next. "
)


def prompt_of(tokenizer, length: int) -> list[int]:
    """Return `length` tokens of English text."""
    tokens = tokenizer.encode(TEXT * 8, add_special_tokens=False)
    assert len(tokens) >= length
    return tokens[:length]


def bank_sizes(path) -> dict[str, int]:
    """Return cache sizes in bytes: exactly top-k slots, half of the experts, all of them."""
    text = text_config(path)
    experts = text["num_experts"]
    token = open_layout(path, text["num_hidden_layers"], experts).token_bytes
    return {
        "top-k": text["num_experts_per_tok"] * token,
        "half": experts // 2 * token,
        "all": experts * token,
    }


def greedy(model, prompt: list[int], cache=None, count: int = TOKENS) -> tuple[list[int], mx.array]:
    """Return greedy tokens, and the logits at every prompt position and every step."""
    cache = cache or make_prompt_cache(model)
    logits = model(mx.array([prompt]), cache=cache)
    rows, tokens = [logits[0]], []
    for _ in range(count):
        tokens.append(mx.argmax(rows[-1][-1]).item())
        rows.append(model(mx.array([tokens[-1:]]), cache=cache)[0])
    return tokens, mx.concatenate(rows)


@pytest.fixture(scope="module")
def long_output(load_stock):
    """Stock's 600 tokens after a prompt, and their logits."""
    model, tokenizer = load_stock("packed4")
    return greedy(model, prompt_of(tokenizer, 300), count=600)


@pytest.fixture(scope="module")
def expected(load_stock, stock_models, request):
    """Stock's greedy continuation of each (model, prompt length), computed once."""
    known = {}

    def compute(name: str, length: int):
        case = stock_models[name], length
        if case == (stock_models["packed4"], 300):
            tokens, logits = request.getfixturevalue("long_output")
            return tokens[:TOKENS], logits[: 300 + TOKENS]
        if case not in known:
            model, tokenizer = load_stock(name)
            known[case] = greedy(model, prompt_of(tokenizer, length))
        return known[case]

    return compute


@pytest.fixture(scope="module")
def first_logits() -> dict[tuple[str, int], mx.array]:
    """The logits of each (model, prompt length) with the first cache size."""
    return {}


BANKS = ("top-k", "half", "all")


# Linked experts are read as those of an unmodified checkpoint are.
@pytest.mark.parametrize(
    ("name", "bank"),
    [(n, b) for n in FORMATS for b in (BANKS[:1] if n == "linked" else BANKS)],
)
def test_tokens_and_logits_equal_stock(name, bank, models, expected, first_logits):
    """And logits are bitwise equal for all cache sizes."""
    size = bank_sizes(models[name])[bank]
    model, tokenizer = load(models[name], expert_cache=size)
    for length in PROMPT_LENGTHS:
        tokens, logits = greedy(model, prompt_of(tokenizer, length))
        stock_tokens, stock_logits = expected(name, length)
        assert logits.dtype == mx.float32
        assert tokens == stock_tokens
        assert mx.abs(logits - stock_logits).max().item() <= TOLERANCE
        assert mx.array_equal(logits, first_logits.setdefault((name, length), logits))
    stats = model.expert_stats()
    assert (stats.bytes_read == 0) == (bank == "all") == (stats.bytes_preloaded > 0)
    if bank == "top-k":
        assert stats.hits < 0.5 * stats.asked
    model.close()


@pytest.mark.parametrize(("lookahead", "count"), [("off", 600), ("on", 250)])
def test_a_long_output_equals_stock_and_nothing_is_read_twice(
    models, long_output, lookahead, count
):
    """With exactly top-k slots; bytes read are misses times record size."""
    cache = bank_sizes(models["packed4"])["top-k"]
    model, tokenizer = load(models["packed4"], expert_cache=cache, lookahead=lookahead)
    prompt = prompt_of(tokenizer, 300)
    tokens, logits = greedy(model, prompt, count=count)
    stock_tokens, stock_logits = long_output
    assert tokens == stock_tokens[:count]
    assert mx.abs(logits - stock_logits[: len(logits)]).max().item() <= TOLERANCE
    stats, text = model.expert_stats(), text_config(models["packed4"])
    layout = open_layout(models["packed4"], text["num_hidden_layers"], text["num_experts"])
    assert stats.asked > count * text["num_hidden_layers"] * text["num_experts_per_tok"]
    missed = (stats.asked - stats.hits) * layout.layers[0].record_bytes
    assert stats.bytes_read == missed + stats.bytes_useless
    assert (stats.early > 0) == (stats.bytes_useless > 0) == (lookahead == "on")


def test_the_full_check_detects_differences(models):
    resident, small, other = (
        load(models["packed4"], expert_cache=cache, experts_per_token=k)[0]
        for cache, k in ((None, None), (bank_sizes(models["packed4"])["top-k"], None), (None, 1))
    )
    expected = {length: full_check.logits(resident, length) for length in (1, 3, 40)}
    assert full_check.differing_runs(small, expected) == []
    _, wrong = full_check.differing_runs(other, {3: expected[3]})
    assert wrong.startswith("prompt of 3, run 2: rows [0, 1, 2, 3, 4, 5] differ, by ")


@pytest.fixture(scope="module")
def expected_texts(load_stock, stock_models):
    """Stock's continuation of a batch by each model, computed once."""
    known = {}

    def compute(name: str, prompts: list[list[int]]) -> list[str]:
        path = stock_models[name]
        if path not in known:
            known[path] = mlx_lm.batch_generate(*load_stock(name), prompts, max_tokens=TOKENS).texts
        return known[path]

    return compute


@pytest.mark.parametrize("name", FORMATS)
def test_batch_of_different_lengths(name, models, expected_texts):
    model, tokenizer = load(models[name], expert_cache=bank_sizes(models[name])["top-k"])
    prompts = [prompt_of(tokenizer, n) for n in (5, 41, 18)]
    ours = batch_generate(model, tokenizer, prompts, max_tokens=TOKENS)
    assert ours.texts == expected_texts(name, prompts)
    for prompt, text in zip(prompts, ours.texts, strict=True):
        alone = mlx_lm.generate(model, tokenizer, prompt, max_tokens=TOKENS)
        assert alone.lstrip() == text.lstrip()  # streaming drops the first token's space


@pytest.mark.parametrize("name", FORMATS)
def test_prompt_cache_survives_a_file(name, models, expected, tmp_path):
    model, tokenizer = load(models[name], expert_cache=bank_sizes(models[name])["half"])
    prompt = prompt_of(tokenizer, 300)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([prompt[:200]]), cache=cache))
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert [type(c) for c in loaded] == [type(c) for c in cache]
    tokens, logits = greedy(model, prompt[200:], loaded)
    stock_tokens, stock_logits = expected(name, 300)
    assert tokens == stock_tokens
    assert mx.abs(logits - stock_logits[200:]).max().item() <= TOLERANCE


def test_fewer_experts_per_token_equal_stock_with_that_top_k(models, stock_models):
    stock, tokenizer = mlx_lm.load(str(stock_models["packed4"]))
    stock.set_dtype(mx.float32)
    for layer in stock.layers:
        layer.mlp.top_k = 2
    model, _ = load(models["packed4"], experts_per_token=2)
    prompt = prompt_of(tokenizer, 17)
    tokens, logits = greedy(model, prompt)
    stock_tokens, stock_logits = greedy(stock, prompt)
    assert tokens == stock_tokens
    assert mx.abs(logits - stock_logits).max().item() <= TOLERANCE


def test_a_copy_of_the_model_streams_too(models):
    """Both share one store, and evict each other's experts."""
    model, tokenizer = load(models["packed4"], expert_cache=bank_sizes(models["packed4"])["top-k"])
    other = copy.deepcopy(model)
    prompts = prompt_of(tokenizer, 40)[:20], prompt_of(tokenizer, 40)[20:]
    alone = [model(mx.array([p])) for p in prompts]
    together = [model(mx.array([prompts[0]])), other(mx.array([prompts[1]]))]
    for a, b in zip(alone, together, strict=True):
        assert mx.array_equal(a, b)
