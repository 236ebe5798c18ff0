"""`max_kv_size` bounds the keys and values, with stock's tokens."""

import importlib

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import ArraysCache, RotatingKVCache

import flashmoe_mlx
from flashmoe_mlx import FlashMoEError, batch_generate, generate, load, stream_generate

SIZE, STEP, TOKENS = 24, 16, 40
TEXT = "A disk keeps what a program writes, and the program reads it when it needs it again. "
command = importlib.import_module("flashmoe_mlx.cli.generate")


@pytest.fixture(scope="module")
def loaded(models):
    model, tokenizer = load(models["packed4"], expert_cache="1MiB")
    with model:
        yield model, tokenizer


def test_tokens_equal_stock_with_rotating_caches(loaded, load_stock):
    model, tokenizer = loaded
    stock, _ = load_stock("packed4")
    prompt = tokenizer.encode(TEXT * 3)
    assert len(prompt) > 2 * SIZE
    linear = [layer.is_linear for layer in stock.layers]
    cache = [ArraysCache(2) if x else RotatingKVCache(SIZE, keep=4) for x in linear]
    options = {"max_tokens": TOKENS, "prefill_step_size": STEP}
    expected = mlx_lm.generate(stock, tokenizer, prompt, prompt_cache=cache, **options)
    bounded = generate(model, tokenizer, prompt, max_kv_size=SIZE, **options)
    assert bounded == expected
    assert bounded != generate(model, tokenizer, prompt, **options)


def test_caches_stay_within_the_size(loaded):
    model, _ = loaded
    cache = model.make_cache(max_kv_size=SIZE)
    for _ in range(3):
        model(mx.ones((1, STEP), mx.int32), cache=cache)
    model(mx.ones((1, 1), mx.int32), cache=cache)
    sizes = [entry.keys.shape[2] for entry in cache if not isinstance(entry, ArraysCache)]
    assert sizes == [SIZE] * len(sizes)
    assert len(sizes) == sum(not layer.is_linear for layer in model.layers)


def test_the_command_bounds_its_cache(monkeypatch, models, capsys):
    caches, mlx_generate = [], mlx_lm.stream_generate

    def noted(*arguments, prompt_cache, **options):
        caches.append(prompt_cache)
        return mlx_generate(*arguments, prompt_cache=prompt_cache, **options)

    monkeypatch.setattr(mlx_lm, "stream_generate", noted)
    line = [
        "Hello",
        "--model",
        str(models["packed4"]),
        "--max-tokens",
        "2",
        "--max-kv-size",
        str(SIZE),
    ]
    command.main(line)
    kinds = {type(entry) for entry in caches[0]}
    assert kinds == {ArraysCache, RotatingKVCache}
    assert {entry.max_size for entry in caches[0] if type(entry) is RotatingKVCache} == {SIZE}


def test_without_a_size_all_of_mlx_lm_stays_as_it_is(loaded):
    model, tokenizer = loaded
    options = {"prompt": TEXT, "max_tokens": 3}
    assert generate(model, tokenizer, **options) == mlx_lm.generate(model, tokenizer, **options)
    prompts = [tokenizer.encode(TEXT)]
    mine, stock = (
        module.batch_generate(model, tokenizer, prompts, max_tokens=3).texts
        for module in (flashmoe_mlx, mlx_lm)
    )
    assert mine == stock


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kv_size": 4}, r"^max_kv_size = 4 is too few\. Give 8 or more tokens\.$"),
        ({"max_kv_size": 64, "kv_bits": 4}, "^max_kv_size = 64 cannot be combined with kv_bits"),
        ({"max_kv_size": 64, "prompt_cache": []}, "cannot be combined with prompt_cache"),
    ],
)
def test_what_cannot_be_bounded_is_refused(loaded, options, message):
    with pytest.raises(FlashMoEError, match=message):
        stream_generate(*loaded, TEXT, **options)


def test_a_batch_takes_no_size(loaded):
    with pytest.raises(FlashMoEError, match="a batch in mlx-lm does not keep"):
        batch_generate(*loaded, [[1]], max_kv_size=64)
