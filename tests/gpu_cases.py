"""Kernel calls with the results to expect, run on the Metal bench in either vendor's geometry."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from kernel_helpers import complains, plant
from metal_cpu import MODES, metal_on_cpu

from flashmoe_mlx.custom_kernels import autotune, launch, reference
from flashmoe_mlx.custom_kernels.case import DTYPES, random_quantized
from flashmoe_mlx.custom_kernels.experts import decode as experts
from flashmoe_mlx.custom_kernels.experts.router import route
from flashmoe_mlx.custom_kernels.linear import matvec
from flashmoe_mlx.custom_kernels.linear.matvec import dequant_matvec
from flashmoe_mlx.custom_kernels.weights import QuantizedMatrix

ULPS = 16 * 2**-23  # of the largest output: sums of float32 in another order
EPS = 0.5  # of norms; large enough to matter
FAST = ("fast", "checked")
dtype_cases = pytest.mark.parametrize("dtype", DTYPES)
bits_cases = pytest.mark.parametrize("bits", matvec.BITS)
group_cases = pytest.mark.parametrize("group_size", matvec.GROUP_SIZES)
both = pytest.mark.parametrize("geometry", ["apple", "nvidia"], indirect=True)
nvidia = pytest.mark.parametrize("geometry", ["nvidia"], indirect=True)


def launch_as(name: str, monkeypatch) -> None:
    """Launch with this vendor's geometry and the CUDA prelude's form of codes."""
    for module in (matvec, experts):
        monkeypatch.setattr(module, "is_cuda", lambda: name == "nvidia")
    if name == "nvidia":
        read = launch.read_text
        codes = read("cuda_prelude.cuh").partition("#define CODE_VALUE")
        texts = {"affine.metal": "".join(codes[1:]) + "\n" + read("affine.metal")}
        monkeypatch.setattr(launch, "read_text", lambda file: texts.get(file) or read(file))


@dataclass
class BenchCase:
    """A kernel call, the expected outputs, and stock MLX's outputs."""

    custom: Callable[[], list[mx.array]]
    expected: list[mx.array]
    stocks: list[mx.array] | None = None


def case_of(case) -> BenchCase:
    inputs = case.inputs()
    return BenchCase(lambda: case.custom(*inputs), case.reference(*inputs), case.stock(*inputs))


def verify(outputs, expected, stocks=None) -> None:
    """Allow one rounding to the output's dtype beside the sums, and no more than twice stock's."""
    for index, (output, exact) in enumerate(zip(outputs, expected, strict=True)):
        assert output.shape == exact.shape
        found, right = (np.array(x.astype(mx.float32), np.float64) for x in (output, exact))
        size = np.abs(right)
        rounding = mx.finfo(output.dtype).eps / 2
        # Not `error > limit`, which is False for NaN.
        assert (np.abs(found - right) <= rounding * size + ULPS * size.max()).all()
        if stocks is not None:
            assert autotune._error(output, exact) <= autotune._limit(stocks[index], exact)


def check(bench_case: BenchCase, modes=tuple(MODES)) -> None:
    """Run a kernel in the bench's modes; raise AssertionError if a result is off."""
    for mode in modes:
        with metal_on_cpu(mode) as session:
            outputs = bench_case.custom()
        assert session.launches, mode
        verify(outputs, bench_case.expected, bench_case.stocks)


def caught(bench_case: BenchCase, monkeypatch, file, old, new) -> bool:
    """Return whether an edit of a kernel's text fails the bench or the comparison."""
    plant(monkeypatch, file, old, new)
    return complains(lambda: check(bench_case, FAST))


def random(*shape, dtype="float32") -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(DTYPES[dtype])


def matrix(*shape, bits=4, group_size=32, dtype="bfloat16", seed=0) -> QuantizedMatrix:
    key = mx.random.key(sum(shape) + seed)
    arrays = random_quantized(key, shape, bits, group_size, DTYPES[dtype])
    return QuantizedMatrix(*arrays, bits, group_size)


def dense(b: QuantizedMatrix) -> mx.array:
    return reference.dequantize(b.codes, b.scales, b.biases, b.bits)


def normalized(x: mx.array, gain: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    return x * mx.rsqrt((x * x).mean(-1, keepdims=True) + EPS) * gain.astype(mx.float32)


def scales_of(dtype: str, group_size: int) -> str:
    """Float32 activations go with any scales, others with their own."""
    return list(DTYPES)[matvec.GROUP_SIZES.index(group_size)] if dtype == "float32" else dtype


def modes_for(dtype: str, bits: int, group_size: int) -> tuple[str, ...]:
    """Return "fast", and "checked" in a third of the formats: any two of the three meet there."""
    places = list(DTYPES).index(dtype), (2, 4, 8).index(bits), (32, 64, 128).index(group_size)
    return FAST if sum(places) % 3 == 0 else FAST[:1]


def matvec_case(columns=384, norm=True, residual=True, bits=4, dtype="bfloat16") -> BenchCase:
    weight = matrix(37, columns, bits=bits, group_size=64, dtype=dtype)
    x, gain, past = (random(*s, dtype=dtype) for s in ((3, columns), (columns,), (3, 37)))
    exact = (normalized(x, gain) if norm else x.astype(mx.float32)) @ dense(weight).T
    options = {
        "norm": (gain, mx.array([EPS])) if norm else None,
        "residual": past if residual else None,
    }
    arrays = x, weight.codes, weight.scales, weight.biases, bits
    return BenchCase(
        lambda: [dequant_matvec(*arrays, **options)],
        [exact + past.astype(mx.float32) if residual else exact],
    )


def swiglu(x: mx.array, gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(x @ gate.swapaxes(-1, -2)) * (x @ up.swapaxes(-1, -2))


def chosen(tokens: int, slots: int, top_k: int) -> mx.array:
    rng = np.random.default_rng(tokens)
    return mx.array(np.stack([rng.permutation(slots)[:top_k] for _ in range(tokens)]).astype("u4"))


def gate_up_case(norm=True, shared=True, top_k=3, bits=8, hidden=384) -> BenchCase:
    """With a shared expert of another width, group size and height."""
    inner, tokens, slots = 13, 2, top_k + 2
    gate, up = (matrix(slots, inner, hidden, bits=bits, seed=s) for s in (1, 2))
    others = tuple(matrix(27, hidden, bits=4, group_size=64, seed=s) for s in (3, 4))
    x, gain = random(tokens, hidden, dtype="bfloat16"), random(hidden, dtype="bfloat16")
    where = chosen(tokens, slots, top_k)
    rows = normalized(x, gain) if norm else x.astype(mx.float32)
    exact = swiglu(rows[:, None, None, :], dense(gate)[where], dense(up)[where]).flatten(1)
    if shared:
        exact = mx.concatenate([exact, swiglu(rows, *map(dense, others))], axis=1)
    options = others if shared else None, (gain, mx.array([EPS])) if norm else None
    return BenchCase(lambda: [experts.expert_gate_up(x, where, gate, up, *options)], [exact])


def down_case(residual=True, shared=True, top_k=3, bits=8) -> BenchCase:
    """Columns that two simdgroups share, and more of them."""
    height, inner, extra, tokens, slots = 21, 704, 1088 if shared else 0, 2, top_k + 2
    down = matrix(slots, height, inner, bits=bits)
    other = matrix(height, 1088, bits=4, group_size=64)
    where, hidden = chosen(tokens, slots, top_k), random(tokens, top_k * inner + extra)
    weights, strength = mx.softmax(random(tokens, top_k)), mx.sigmoid(random(tokens, 1))
    each = mx.concatenate([weights, strength], axis=1) if shared else weights
    past = random(tokens, height, dtype="bfloat16")
    routed = hidden[:, : top_k * inner].reshape(tokens, top_k, inner)
    exact = ((dense(down)[where] @ routed[..., None])[..., 0] * weights[..., None]).sum(1)
    if shared:
        exact = exact + strength * (hidden[:, top_k * inner :] @ dense(other).T)
    if residual:
        exact = exact + past.astype(mx.float32)
    options = other if shared else None, past if residual else None, mx.bfloat16
    return BenchCase(
        lambda: [experts.expert_down_combine(hidden, where, each, down, *options)], [exact]
    )


def router_case(renormalize=True, shared=True, experts=70, top_k=32) -> BenchCase:
    """Check the order of ids too: most logits tie, and the lower id comes first."""
    logits = mx.round(2 * random(3, experts + shared)) / 2
    logits[0, experts - 1] = 5
    scores = np.array(mx.softmax(logits[:, :experts], axis=-1))
    ids = np.argsort(-np.array(logits[:, :experts]), axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, ids, -1)
    weights /= weights.sum(-1, keepdims=True) if renormalize else 1
    right = mx.concatenate([mx.array(weights), mx.sigmoid(logits[:, experts:])], axis=1)

    def custom():
        ids, found = route(logits, top_k, renormalize=renormalize, shared=shared)
        return [ids.astype(mx.float32), found]

    return BenchCase(custom, [mx.array(ids.astype(np.float32)), right])
