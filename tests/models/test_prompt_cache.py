"""Prompt caches of other models, damaged ones, and files that request code are refused."""

import contextlib
import copy
import json

import fuzz_caches
import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
    save_prompt_cache,
)

from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.bench.synthetic import Recipe, checkpoint
from flashmoe_mlx.cli.generate import main
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.models.prompt_cache import check_fits, read_prompt_cache

PROMPT = mx.array([[3, 141, 59, 26, 5]])
LINEAR, FULL = 0, 3  # one layer of each kind


@pytest.fixture(scope="module")
def model():
    with load(BUNDLED_MODEL)[0] as model:
        yield model


@pytest.fixture
def cache(model):
    cache = make_prompt_cache(model)
    mx.eval(model(PROMPT, cache=cache))
    return copy.deepcopy(cache)  # as from a file: the model has not seen it


def arrays(layer):
    """Return a change of one array of a GatedDeltaNet cache: `arrays(layer)(place, change)`."""

    def make(place, change):
        def act(cache):
            cache[layer].cache[place] = change(cache[layer].cache[place])

        return act

    return make


LINEAR_CASES = {
    "one head of the state": arrays(LINEAR)(1, lambda s: s[:, :1]),
    "more heads": arrays(LINEAR)(1, lambda s: mx.concatenate([s, s], axis=1)),
    "4 keys of the state": arrays(LINEAR)(1, lambda s: s[..., :4]),
    "fewer values": arrays(LINEAR)(1, lambda s: s[:, :, :4]),
    "a flat state": arrays(LINEAR)(1, lambda s: s.reshape(-1)),
    "an empty state": arrays(LINEAR)(1, lambda s: s[:0]),
    "an integer state": arrays(LINEAR)(1, lambda s: s.astype(mx.int32)),
    "a complex state": arrays(LINEAR)(1, lambda s: s.astype(mx.complex64)),
    "a state that is text": arrays(LINEAR)(1, lambda s: "state"),
    "two rows of state": arrays(LINEAR)(1, lambda s: mx.concatenate([s, s])),
    "a past of 1": arrays(LINEAR)(0, lambda p: p[:, :1]),
    "a past of 0": arrays(LINEAR)(0, lambda p: p[:, :0]),
    "a past of 4": arrays(LINEAR)(0, lambda p: mx.concatenate([p, p[:, :1]], axis=1)),
    "fewer channels": arrays(LINEAR)(0, lambda p: p[..., :8]),
    "no past": arrays(LINEAR)(0, lambda p: None),
    "no state": arrays(LINEAR)(1, lambda s: None),
    "an integer past": arrays(LINEAR)(0, lambda p: p.astype(mx.uint32)),
    "past and state swapped": lambda c: c[LINEAR].cache.reverse(),
    "three arrays": lambda c: c[LINEAR].cache.append(mx.zeros(1)),
    "no arrays": lambda c: c[LINEAR].cache.clear(),
    "padding of two rows": lambda c: setattr(c[LINEAR], "left_padding", mx.array([0, 0])),
    "lengths of floats": lambda c: setattr(c[LINEAR], "lengths", mx.array([1.0])),
    "keys and values": lambda c: c.__setitem__(LINEAR, KVCache()),
}


def keys(**changes):
    """Return a change of a key/value cache: keys, values or both, or an attribute's value."""

    def act(cache):
        for name, change in changes.items():
            value = change(getattr(cache[FULL], name)) if callable(change) else change
            setattr(cache[FULL], name, value)

    return act


FULL_CASES = {
    "fewer heads": keys(keys=lambda k: k[:, :1], values=lambda v: v[:, :1]),
    "smaller heads": keys(keys=lambda k: k[..., :8], values=lambda v: v[..., :8]),
    "fewer values than keys": keys(values=lambda v: v[:, :, :4]),
    "keys alone": keys(values=None),
    "values of another dtype": keys(values=lambda v: v.astype(mx.int8)),
    "flat keys": keys(keys=lambda k: k.reshape(-1)),
    "a past of two rows": keys(
        keys=lambda k: mx.concatenate([k, k]), values=lambda v: mx.concatenate([v, v])
    ),
    "an offset behind the end": keys(offset=257),
    "an offset below zero": keys(offset=-1),
    "a broken offset": keys(offset=2.5),
    "an array's place": lambda c: c.__setitem__(FULL, ArraysCache(2)),
    "no cache at all": lambda c: c.__setitem__(FULL, object()),
}


@pytest.mark.parametrize("case", [*LINEAR_CASES, *FULL_CASES])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_cache_that_does_not_fit_is_refused_by_layer(model, cache, case, tokens):
    (LINEAR_CASES | FULL_CASES)[case](cache)
    layer = LINEAR if case in LINEAR_CASES else FULL
    with pytest.raises(FlashMoEError, match=rf"prompt cache of layer {layer} .*Give a prompt c"):
        mx.eval(model(PROMPT[:, :tokens], cache=cache))


def test_another_number_of_layers_is_refused(model, cache):
    with pytest.raises(FlashMoEError, match="has 3 layers, but the model has 4"):
        model(PROMPT, cache=cache[:3])


def test_another_batch_size_is_refused(model, cache):
    with pytest.raises(FlashMoEError, match=r"\[2, "):
        model(mx.array([[1], [2]]), cache=cache)


@pytest.mark.parametrize("change", [
    lambda c: setattr(c, "bits", 4),
    lambda c: setattr(c, "group_size", 48),
    lambda c: setattr(c, "keys", c.keys[:2]),
    lambda c: setattr(c, "keys", [c.keys[0].astype(mx.uint8), *c.keys[1:]]),
    lambda c: setattr(c, "values", [c.values[0], c.values[1][..., :0], c.values[2]]),
    lambda c: setattr(c, "offset", 10**6),
])  # fmt: skip
def test_a_quantized_cache_that_does_not_fit_is_refused(model, cache, change):
    cache[FULL] = cache[FULL].to_quantized(group_size=32, bits=8)
    mx.eval(model(PROMPT, cache=cache))
    cache = copy.deepcopy(cache)
    change(cache[FULL])
    with pytest.raises(FlashMoEError, match=f"prompt cache of layer {FULL} has "):
        model(PROMPT, cache=cache)


def test_every_fitting_cache_of_mlx_lm_is_accepted(model):
    for made in (
        KVCache(),
        RotatingKVCache(max_size=64),
        QuantizedKVCache(group_size=32),
        BatchKVCache([0]),
    ):
        cache = make_prompt_cache(model)
        cache[FULL] = made
        logits = [model(PROMPT, cache=cache)[:, -1], model(PROMPT[:, :1], cache=cache)[:, -1]]
        assert mx.isfinite(mx.concatenate(logits)).all().item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_16_bit_caches_are_widened(model, cache, dtype):
    """A machine that computes in 16 bits saves them; one in float32 continues from them."""
    narrow, wide = make_prompt_cache(model), make_prompt_cache(model)
    for layer, (a, b) in enumerate(zip(narrow, wide, strict=True)):
        if layer == FULL:
            a.keys, a.values = cache[layer].keys.astype(dtype), cache[layer].values.astype(dtype)
            b.keys, b.values = a.keys.astype(mx.float32), a.values.astype(mx.float32)
            a.offset = b.offset = cache[layer].offset
        else:
            a.cache = [x.astype(dtype) for x in cache[layer].cache]
            b.cache = [x.astype(mx.float32) for x in a.cache]
    for tokens in (1, 5, 1):
        one, other = (model(PROMPT[:, :tokens], cache=c) for c in (narrow, wide))
        assert mx.array_equal(one, other).item()


def saved(path, cache, **metadata):
    """Save a cache as mlx_lm.cache_prompt does."""
    save_prompt_cache(str(path), cache, {"model": str(BUNDLED_MODEL)} | metadata)
    return str(path)


def altered(path, **entries):
    """Change entries of a saved cache's metadata, or drop those that are None."""
    tensors, metadata = mx.load(path, return_metadata=True)
    kept = {name: text for name, text in (metadata | entries).items() if text is not None}
    mx.save_safetensors(path, tensors, kept)
    return path


SETTINGS = [
    ({"eos_token": 5}, "its eos_token is '5'"),
    ({"tokenizer_type": "gpt2"}, "its tokenizer_config sets tokenizer_type"),
    ({"revision": "main", "trust_remote_code": True}, "its tokenizer_config sets revision"),
    ({"subfolder": "../.."}, "its tokenizer_config sets subfolder"),
    ([1], "its tokenizer_config is not an object"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_metadata_sets_only_the_tokenizers_eos_token(tmp_path, cache, settings, message):
    file = saved(tmp_path / "c.safetensors", cache, tokenizer_config=json.dumps(settings))
    with pytest.raises(FlashMoEError, match=message):
        read_prompt_cache(file)


def test_metadata_cannot_request_code(tmp_path, cache):
    settings = {"trust_remote_code": True, "eos_token": "<|im_end|>"}
    file = saved(tmp_path / "c.safetensors", cache, tokenizer_config=json.dumps(settings))
    _, metadata = read_prompt_cache(file)
    assert metadata == {
        "model": str(BUNDLED_MODEL), "tokenizer_config": {"eos_token": "<|im_end|>"}
    }  # fmt: skip


def test_code_of_a_model_in_a_data_file_never_runs(tmp_path, cache, capsys, monkeypatch):
    """The cache names a model with tokenizer code, and sets trust_remote_code."""
    model = checkpoint(Recipe("tiny", 4, 512, 4), tmp_path / "evil")
    ran = tmp_path / "ran"
    (model / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Evil\n"
    )
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    asked = {"trust_remote_code": True}
    file = saved(
        tmp_path / "c.safetensors", cache, model=str(model), tokenizer_config=json.dumps(asked)
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    command = ["--prompt-cache-file", file, "--prompt", "x", "--max-tokens", "1"]
    with contextlib.suppress(SystemExit):  # transformers may ignore the code, or refuse
        main(command)
    assert not ran.exists()
    with pytest.raises(SystemExit) as ended:
        main([*command, "--trust-remote-code"])
    assert ended.value.code == 2 and "give --model" in capsys.readouterr().err
    assert not ran.exists()


FILES = [
    ({"0.model": "no such directory"}, "neither a local directory nor a Hub name"),
    ({"0.model": "a/b/c"}, "neither a local directory nor a Hub name"),
    ({"0.model": None}, "cannot be read as a prompt cache"),
    ({"1.0": "load_prompt_cache"}, "a cache of class 'load_prompt_cache'"),
    ({"1.0": "CacheList"}, "a cache of class 'CacheList'"),
    ({"1.99999999": "KVCache"}, "an entry called '1.99999999'"),
    ({"3.0": "x"}, "an entry called '3.0'"),
    ({"2.1.0": "9.9"}, "cannot be read as a prompt cache"),
    ({"2.1.1": "code"}, "cannot be read as a prompt cache"),
    ({"1.3": "RotatingKVCache"}, "cannot be read as a prompt cache"),
]


@pytest.mark.parametrize(("entries", "message"), FILES)
def test_a_file_with_other_metadata_is_refused(tmp_path, cache, entries, message):
    file = altered(saved(tmp_path / "c.safetensors", cache), **entries)
    with pytest.raises(FlashMoEError, match=message):
        read_prompt_cache(file)


@pytest.mark.parametrize("name", ["99999999999.0", "0.99999999999", "x", "0.0.0.0.0"])
def test_names_that_would_create_huge_lists_are_refused(tmp_path, cache, name):
    file = saved(tmp_path / "c.safetensors", cache)
    tensors, metadata = mx.load(file, return_metadata=True)
    mx.save_safetensors(file, tensors | {name: mx.zeros(1)}, metadata)
    with pytest.raises(FlashMoEError, match="an array called"):
        read_prompt_cache(file)


def test_a_file_of_another_model_is_refused_before_the_prompt(tmp_path, model, cache):
    file = saved(tmp_path / "c.safetensors", cache)
    caches, _ = read_prompt_cache(file)
    check_fits(file, caches, model)
    with (
        load(checkpoint(Recipe("tiny", 4, 512, 4), tmp_path / "tiny"))[0] as other,
        pytest.raises(FlashMoEError, match=r"c\.safetensors: the prompt cache of layer 0 has the"),
    ):
        check_fits(file, caches, other)


def test_layers_with_different_numbers_of_tokens_are_refused(tmp_path, model):
    cache = make_prompt_cache(model)
    model(PROMPT, cache=cache)
    short = KVCache()
    short.keys, short.values, short.offset = cache[FULL].keys, cache[FULL].values, 3
    file = saved(tmp_path / "c.safetensors", [*cache, short])
    with pytest.raises(FlashMoEError, match="its layers hold 3, 5 tokens"):
        read_prompt_cache(file)


def test_randomly_changed_files_are_refused_or_equal_stock(tmp_path):
    """The first of thousands of cases in `tests/stress/fuzz_caches.py`."""
    cases = fuzz_caches.Cases(tmp_path)
    ended = [cases.run(seed) for seed in range(60)]
    assert {"refused", "equal"} == set(ended)
