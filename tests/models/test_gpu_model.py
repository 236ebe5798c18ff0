"""A model's whole GPU path on the Metal bench against stock MLX."""

import copy
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from metal_cpu import metal_on_cpu, require_bench
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache
from test_exactness import bank_sizes

from flashmoe_mlx import load
from flashmoe_mlx.bench.synthetic import Recipe, checkpoint
from flashmoe_mlx.custom_kernels import autotune, device
from flashmoe_mlx.custom_kernels import launch as gpu
from flashmoe_mlx.custom_kernels.attention import step
from flashmoe_mlx.models.qwen3_5 import mixers
from flashmoe_mlx.models.qwen3_5.moe import StreamedExperts

require_bench()

TOLERANCE = 1e-4
LAYERS, LINEAR = 4, 3
PROMPT, STEPS = [1, 200, 3, 40, 5, 6, 77], [5, 99, 3]
ATTENTION_KERNELS = {"attention_prepare", "attention_step"}
STEP_KERNELS = ATTENTION_KERNELS | {
    "linear_dequant_matvec", "experts_router", "experts_gate_up", "experts_down_combine",
    "gated_delta_step",
}  # fmt: skip
SCAN_KERNELS = {"gated_delta_prepare", "gated_delta_scan", "gated_delta_norm"}
TILE_KERNELS = {"experts_tiles", "experts_take_rows"}
PREFILL_KERNELS = SCAN_KERNELS | TILE_KERNELS | {"experts_combine"}
banks = pytest.mark.parametrize("bank", ["top-k", "all"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return checkpoint(Recipe("tiny", LAYERS, 512, 4), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory) -> Path:
    """Verdicts on kernels, computed once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def gpu_path(cache_home, monkeypatch):
    """Use the GPU path, never the CPU's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.setenv("FLASHMOE_KERNELS", "custom")
    monkeypatch.setattr(device, "_gpu_is_default", lambda: True)
    monkeypatch.setattr(device, "_cpu_module", lambda: None)
    autotune.forget()
    gpu._build.cache_clear()
    yield
    autotune.forget()
    gpu._build.cache_clear()


@pytest.fixture
def open_model(tiny):
    """Load the model in a dtype with a cache size; close it at the end."""
    opened = []

    def open_it(bank="all", dtype=mx.float32):
        model, _ = load(tiny, expert_cache=bank_sizes(tiny)[bank])
        model.set_dtype(dtype)
        opened.append(model)
        return model

    yield open_it
    for model in opened:
        model.close()


@pytest.fixture
def by_stock(monkeypatch):
    """Run a function by MLX's own ops on the CPU."""

    def run(f, *arguments):
        with monkeypatch.context() as patch:
            patch.setenv("FLASHMOE_KERNELS", "stock")
            autotune.forget()
            found = f(*arguments)
        autotune.forget()
        return found

    return run


def decode(model, prompt=PROMPT, steps=STEPS, cache=None) -> mx.array:
    """Return the prompt's logits and each step's, `[positions, V]`."""
    cache = cache or model.make_cache()
    rows = [model(mx.array([prompt]), cache=cache)[0]] if prompt else []
    rows += [model(mx.array([[token]]), cache=cache)[0] for token in steps]
    logits = mx.concatenate(rows)
    mx.eval(logits)
    return logits


def decode_on_bench(model, *arguments) -> mx.array:
    with metal_on_cpu():
        return decode(model, *arguments)


def launched(session) -> Counter:
    """Count each kernel's launches."""
    kernels = (launch.name.split("__")[0] for launch in session.launches)
    return Counter(kernel.removeprefix("custom_kernel_flashmoe_") for kernel in kernels)


def differ(a: mx.array, b: mx.array) -> float:
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


@banks
def test_logits_equal_stock(open_model, by_stock, bank, capsys):
    right = by_stock(decode, open_model("all"))
    model = open_model(bank)
    with metal_on_cpu():
        assert differ(decode(model), right) <= TOLERANCE  # the kernels are timed here
    assert capsys.readouterr().err == ""
    with metal_on_cpu() as prefill:
        cache = model.make_cache()
        prompt = decode(model, steps=[], cache=cache)
    with metal_on_cpu() as steps:
        rest = decode(model, prompt=[], cache=cache)
    assert differ(mx.concatenate([prompt, rest]), right) <= TOLERANCE
    times = dict.fromkeys(SCAN_KERNELS, LINEAR)
    times |= dict.fromkeys(("experts_router", "experts_combine"), LAYERS)
    batches = launched(prefill)["experts_tiles"]
    assert batches == LAYERS if bank == "all" else batches > LAYERS
    assert launched(prefill) == times | dict.fromkeys(TILE_KERNELS, batches)
    # Projections in and out of each mixer, router of each layer; the head.
    times = {"gated_delta_step": LINEAR, "linear_dequant_matvec": 3 * LAYERS + 1}
    times |= dict.fromkeys(ATTENTION_KERNELS, LAYERS - LINEAR)
    assert launched(steps) == {
        kernel: len(STEPS) * times.get(kernel, LAYERS) for kernel in STEP_KERNELS
    }


def test_more_keys_than_were_timed_use_stock_ops(open_model, by_stock, monkeypatch):
    monkeypatch.setattr(step, "TRIED_KEYS", (4, len(PROMPT) + 1))
    right = by_stock(decode, open_model())
    model = open_model()
    decode_on_bench(model)
    with metal_on_cpu() as session:
        assert differ(decode(model), right) <= TOLERANCE
    assert launched(session)["attention_step"] == LAYERS - LINEAR


def test_a_step_that_stock_runs_faster_is_timed_once(open_model, by_stock, monkeypatch):
    asked = []
    monkeypatch.setattr(mixers, "prefers_custom", lambda case: bool(asked.append(case)))
    right, model = by_stock(decode, open_model()), open_model()
    assert differ(decode_on_bench(model), right) <= TOLERANCE
    assert [(case.heads, case.keys) for case in asked] == [(4, 500)]


def test_steps_while_the_cache_grows_and_shrinks(open_model, by_stock, monkeypatch):
    """Its buffers change shape between traced steps, and then hold unused keys."""
    monkeypatch.setattr(KVCache, "step", 4)

    def run(model):
        cache = model.make_cache()
        rows = [decode(model, steps=[5, 99, 3, 8, 7, 2], cache=cache)]
        cache[LAYERS - 1].trim(5)
        return mx.concatenate([*rows, decode(model, prompt=[], steps=[6, 4], cache=cache)])

    model, right = open_model(), by_stock(run, open_model())
    decode_on_bench(model)
    with metal_on_cpu() as session:
        assert differ(run(model), right) <= TOLERANCE
    assert launched(session)["attention_step"] == 8


@banks
def test_a_short_prompt_uses_the_step_kernels(open_model, by_stock, bank):
    """Unless a layer has too few slots."""
    right = by_stock(decode, open_model(), PROMPT[:3])
    model = open_model(bank)
    decode_on_bench(model, PROMPT[:3], [])
    with metal_on_cpu() as session:
        found = decode(model, PROMPT[:3], [])
    assert differ(found, right[:3]) <= TOLERANCE
    assert (launched(session)["experts_gate_up"] == LAYERS) == (bank == "all")
    assert launched(session).keys() >= SCAN_KERNELS | {"linear_dequant_matvec", "experts_router"}


@banks
def test_steps_in_bfloat16(open_model, by_stock, bank):
    """Checkpoints' dtype, in which rounding changes the router's choices."""
    right = by_stock(decode, open_model())
    stock = by_stock(decode, open_model(dtype=mx.bfloat16))
    with metal_on_cpu() as session:
        found = decode(open_model(bank, mx.bfloat16))
    assert found.dtype == mx.bfloat16
    assert differ(found, right) <= 2 * differ(stock, right)
    assert launched(session).keys() == STEP_KERNELS | PREFILL_KERNELS


def test_the_host_does_not_read_a_prompts_expert_ids_if_all_are_resident(open_model, monkeypatch):
    """The host would wait for each layer."""
    model = open_model("all")
    right = decode_on_bench(model)
    monkeypatch.setattr(StreamedExperts, "batches", None)
    with metal_on_cpu() as session:
        assert mx.array_equal(decode(model), right)
    assert launched(session)["experts_tiles"] == LAYERS


def test_without_kernels_nothing_is_launched(open_model, monkeypatch):
    monkeypatch.setenv("FLASHMOE_KERNELS", "stock")
    with metal_on_cpu() as session:
        decode(open_model())
    assert not session.launches


def batch(model, prompts, steps) -> mx.array:
    """Return the last logits of right-padded prompts and those of steps, `[B, 1 + steps, V]`."""
    cache = [
        ArraysCache(2) if layer.is_linear else BatchKVCache([0] * len(prompts))
        for layer in model.layers
    ]
    lengths, longest = [len(p) for p in prompts], max(map(len, prompts))
    padding = [longest - n for n in lengths]
    for c in cache:
        c.prepare(lengths=lengths, right_padding=padding)
    padded = mx.array([p + [0] * n for p, n in zip(prompts, padding, strict=True)])
    logits = model(padded, cache=cache)
    for c in cache:
        c.finalize()
    rows = [mx.stack([logits[i, n - 1] for i, n in enumerate(lengths)])[:, None]]
    rows += [model(mx.array(tokens)[:, None], cache=cache) for tokens in steps]
    logits = mx.concatenate(rows, axis=1)
    mx.eval(logits)
    return logits


@banks
def test_a_padded_batch_equals_single_prompts(open_model, by_stock, bank):
    prompts, steps = [PROMPT, PROMPT[2:5]], [[5, 6], [99, 1], [3, 4]]
    model, stock = open_model(bank), open_model()
    with metal_on_cpu() as session:
        together = batch(model, prompts, steps)
    assert differ(together, by_stock(batch, stock, prompts, steps)) <= TOLERANCE
    steps_kernels = {"gated_delta_step", "linear_dequant_matvec"}
    assert launched(session).keys() >= PREFILL_KERNELS | steps_kernels
    for index, prompt in enumerate(prompts):
        alone = decode_on_bench(model, prompt, [tokens[index] for tokens in steps])
        assert differ(together[index], alone[-1 - len(steps) :]) <= TOLERANCE


# ---- weights that change -------------------------------------------------------------------------


def norms(model):
    layer = model.layers[1]
    layer.input_layernorm.weight = -layer.input_layernorm.weight
    layer.post_attention_layernorm.weight = 2 * layer.post_attention_layernorm.weight
    model.layers[3].self_attn.q_norm.weight = 3 * model.layers[3].self_attn.q_norm.weight


def scales(model):
    for layer in (model.layers[0].linear_attn.in_proj_z, model.layers[2].mlp.shared_expert.up_proj):
        layer.scales, layer.biases = -2 * layer.scales, -2 * layer.biases


def codes(model):
    for layer in (model.layers[3].self_attn.k_proj, model.layers[0].mlp.gate):
        layer.weight = ~layer.weight


def bfloat16_and_back(model):
    model.set_dtype(mx.bfloat16)
    model.set_dtype(mx.float32)


@pytest.mark.parametrize("change", [
    norms, codes, bfloat16_and_back, scales,
])  # fmt: skip
def test_steps_follow_changed_weights(open_model, by_stock, change):
    model, stock = open_model(), open_model()
    decode_on_bench(model)
    change(model)
    change(stock)
    assert differ(decode_on_bench(model), by_stock(decode, stock)) <= TOLERANCE


def test_steps_follow_a_changed_dtype(open_model):
    model = open_model()
    decode_on_bench(model)
    model.set_dtype(mx.bfloat16)
    fresh = decode_on_bench(open_model(dtype=mx.bfloat16))
    found = decode_on_bench(model)
    assert found.dtype == fresh.dtype == mx.bfloat16
    assert mx.array_equal(found, fresh)


def test_a_copy_follows_its_own_weights(open_model):
    model = open_model()
    before = decode_on_bench(model)
    twin = copy.deepcopy(model)
    norms(twin)
    assert differ(decode_on_bench(twin), before) > 0.1
    assert mx.array_equal(decode_on_bench(model), before)


def prepare_by_mlx(projected, heads, norms, eps, base, offset):
    batch, queries, dim = len(projected), heads.queries, heads.dim
    both, keys, _ = mx.split(
        projected, [2 * queries * dim, (2 * queries + heads.keys) * dim], axis=-1
    )
    parts = both.reshape(batch, 1, queries, -1)[..., :dim], keys.reshape(batch, 1, -1, dim)
    queries, keys = (
        mx.fast.rope(
            mx.fast.rms_norm(x, weight, eps).transpose(0, 2, 1, 3), heads.rope_dims,
            traditional=False, base=base, scale=1.0, offset=offset[0],
        )
        for x, weight in zip(parts, norms, strict=True)
    )  # fmt: skip
    return queries[:, :, 0] * dim**-0.5, keys


def attend_by_mlx(queries, projected, heads, keys, values, length):
    batch, slots = len(projected), mx.arange(keys.shape[2])
    y = mx.fast.scaled_dot_product_attention(
        queries[:, :, None], keys, values, scale=1.0, mask=slots < length[0]
    )
    gate = projected[..., : 2 * heads.queries * heads.dim].reshape(*y.shape[:2], -1)
    return (y[:, :, 0] * mx.sigmoid(gate[..., heads.dim :])).reshape(batch, 1, -1)


def test_traced_attention_uses_the_new_offset_and_length(open_model, monkeypatch):
    """The Metal bench lacks mx.compile, so MLX's ops replace the kernels here."""
    monkeypatch.setattr(KVCache, "step", 4)
    monkeypatch.setattr(mixers, "prefers_custom", lambda case: True)
    monkeypatch.setattr(mixers, "prepare", prepare_by_mlx)
    monkeypatch.setattr(mixers, "attend", attend_by_mlx)
    layer, twin = (open_model().layers[LINEAR] for _ in range(2))
    monkeypatch.setattr(twin.self_attn, "_fuses", lambda h, keys: False)
    caches = KVCache(), KVCache()
    tokens = mx.random.normal((2, 9, layer.input_layernorm.weight.size), key=mx.random.key(1))
    for t in range(9):
        ours, right = (
            each.self_attn(tokens[:, t : t + 1], each.input_layernorm, None, cache)
            for each, cache in zip((layer, twin), caches, strict=True)
        )
        assert differ(ours, right) <= TOLERANCE
    assert layer.self_attn._fused_step.functions and not twin.self_attn._fused_step.functions
