"""Small layers of the CPU kernels, with sizes that a test may get wrong."""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from flashmoe_mlx.custom_kernels.cpu.gated_delta_step import DeltaBlock
from flashmoe_mlx.custom_kernels.cpu.moe import MoeBlock
from flashmoe_mlx.custom_kernels.gated_delta.weights import Heads, MixerWeights
from flashmoe_mlx.custom_kernels.weights import QuantizedMatrix

HEADS, HIDDEN, TAPS = Heads(2, 4, 48, 32), 128, 4
CHANNELS, VALUES = 2 * 2 * 48 + 4 * 32, 4 * 32
F32 = np.float32


STATE, PAST = (2, 4, 32, 48), (2, TAPS - 1, CHANNELS)


def matrix(*shape, bits=4, group_size=32) -> QuantizedMatrix:
    weight = mx.random.normal(shape, key=mx.random.key(sum(shape)))
    return QuantizedMatrix(*mx.quantize(weight, group_size, bits), bits, group_size)


def mixer_weights(**other) -> MixerWeights:
    arrays = mx.zeros((CHANNELS, TAPS, 1)), mx.zeros(4), mx.zeros(4), mx.zeros(32)
    return replace(MixerWeights(HEADS, *arrays, 1e-6), **other)


def delta_block(
    heights=(CHANNELS, VALUES, 4, 4), out=(HIDDEN, VALUES), norm=HIDDEN, **weights
) -> DeltaBlock:
    inputs = [matrix(n, HIDDEN) for n in heights]
    return DeltaBlock(inputs, matrix(*out), (np.ones(norm, F32), 1e-6), mixer_weights(**weights))


def at_once(ids):
    yield np.arange(ids.size), ids.reshape(-1)


SIZES = {
    "router": (8, HIDDEN), "switch": (1, HIDDEN), "shared_gate": (64, HIDDEN),
    "shared_up": (64, HIDDEN), "shared_down": (HIDDEN, 64),
    "gate": (8, 32, HIDDEN), "up": (8, 32, HIDDEN), "down": (8, HIDDEN, 32),
}  # fmt: skip


def moe_block(top_k=3, norm=HIDDEN, **wrong) -> MoeBlock:
    made = [matrix(*shape) for shape in (SIZES | wrong).values()]
    return MoeBlock(*made[:2], made[2:5], made[5:], (np.ones(norm, F32), 1e-6), top_k, True)
