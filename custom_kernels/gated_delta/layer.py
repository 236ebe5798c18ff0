"""A GatedDeltaNet layer: norm, projections, the mixer between them, and the residual."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from ..cpu.entry import cpu_steps
from ..device import on_gpu
from ..linear.linear import joined, linear
from ..op import Op
from .by_gpu import mix_joined
from .naive import Result, mix
from .weights import MixerState, MixerWeights


@Op
def gated_delta_layer(
    h: mx.array,
    norm: nn.RMSNorm,
    inputs: Sequence[nn.Module],
    out: nn.Module,
    weights: MixerWeights,
    before: MixerState,
) -> Result:
    """Run a layer: h + out(mix(inputs(norm(h)))).

    Args:
        h: `[B, T, H]`.
        norm: the norm before the layer.
        inputs: the projections to q, k and v; to z; to b; and to a.
        out: the output projection.
        weights: all but the projections.
        before: state before the tokens.

    Returns:
        `[B, T, H]`, the new `past` and the new `state`.
    """
    qkv, z, b, a = linear(h, *inputs, norm=norm)
    y, past, state = mix(qkv, z, b, a, weights, before)
    return linear(y, out, residual=h)[0], past, state


@gated_delta_layer.register
def _by_gpu(
    h: mx.array,
    norm: nn.RMSNorm,
    inputs: Sequence[nn.Module],
    out: nn.Module,
    weights: MixerWeights,
    before: MixerState,
) -> Result | None:
    if not on_gpu(h):
        return None
    y, past, state = mix_joined(joined(h, *inputs, norm=norm), weights, before)
    return linear(y, out, residual=h)[0], past, state


@gated_delta_layer.register
def _step_by_cpu(
    h: mx.array,
    norm: nn.RMSNorm,
    inputs: Sequence[nn.Module],
    out: nn.Module,
    weights: MixerWeights,
    before: MixerState,
) -> Result | None:
    past, state, mask, ends = before
    if past is None or mask is not None or ends is not None or not (steps := cpu_steps(h)):
        return None
    return steps.delta_step(h, inputs, out, norm, weights, past, state)
