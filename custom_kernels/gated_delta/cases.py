"""Kernel cases of GatedDeltaNet, and the ops that these kernels replace."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from .. import reference
from ..case import DTYPES
from .naive import convolved, gated_delta, split, split_heads
from .prepare import gated_norm, prepare
from .scan import scan
from .step import step
from .weights import Heads, MixerWeights

EPS = 1e-6


def prepare_by_ops(
    projected: mx.array, weights: MixerWeights, past: mx.array, mask: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Compute `prepare` by MLX's own ops, in the dtypes given: q, k, v, g and beta."""
    qkv, _, b, a = split(projected, weights.heads)
    if mask is not None:
        qkv = mx.where(mask[..., None], qkv, 0)
    q, k, v = convolved(mx.concatenate([past, qkv], axis=1), weights)
    rate = mx.exp(weights.a_log.astype(mx.float32))
    g = mx.exp(-rate * nn.softplus(a + weights.dt_bias))
    return q, k, v, g, mx.sigmoid(b)


def norm_by_ops(y: mx.array, projected: mx.array, weights: MixerWeights) -> mx.array:
    """Compute `gated_norm` by MLX's own ops."""
    z = split(projected, weights.heads)[1].reshape(y.shape)
    y = mx.fast.rms_norm(y, weights.norm, weights.norm_eps).astype(mx.float32)
    y = nn.silu(z.astype(mx.float32)) * y
    return y.astype(projected.dtype).flatten(-2)


def prepare_reference(
    projected: mx.array, weights: MixerWeights, past: mx.array, mask: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Compute `prepare` in float32, in plain ops: q, k, v, g and beta."""
    tokens = projected.shape[1]
    qkv, _, b, a = (t.astype(mx.float32) for t in split(projected, weights.heads))
    if mask is not None:
        qkv = mx.where(mask[..., None], qkv, 0)
    window = mx.concatenate([past.astype(mx.float32), qkv], axis=1)
    conv = weights.conv.astype(mx.float32)[..., 0]
    taps = [window[:, tap : tap + tokens] * conv[:, tap] for tap in range(conv.shape[1])]
    qkv = sum(taps[1:], taps[0])
    q, k, v = split_heads(qkv * mx.sigmoid(qkv), weights.heads)
    q, k = (t * mx.rsqrt(mx.square(t).sum(-1, keepdims=True) + weights.qk_eps) for t in (q, k))
    rate = mx.exp(weights.a_log.astype(mx.float32))
    g = mx.exp(-rate * mx.logaddexp(a + weights.dt_bias.astype(mx.float32), 0.0))
    return q * weights.heads.key_dim**-0.5, k, v, g, mx.sigmoid(b)


def norm_reference(y: mx.array, projected: mx.array, weights: MixerWeights) -> mx.array:
    """Compute `gated_norm` in float32, in plain ops."""
    y = y.astype(mx.float32)
    z = split(projected, weights.heads)[1].reshape(y.shape).astype(mx.float32)
    y = y * mx.rsqrt(mx.square(y).mean(-1, keepdims=True) + weights.norm_eps)
    return (y * weights.norm.astype(mx.float32) * z * mx.sigmoid(z)).flatten(-2)


@dataclass(frozen=True)
class _MixerCase:
    """Shared by the cases: sizes, and inputs from the projections on.

    Attributes:
        key_heads: Hk.
        value_heads: Hv.
        key_dim: Dk.
        value_dim: Dv.
        dtype: of activations.
        weight_dtype: of the convolution, dt_bias and norm; A_log is float32.
        batch: B.
        tokens: T.
        taps: of the convolution.
        masked: each row but the first starts with padding.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    weight_dtype: str = "bfloat16"
    batch: int = 1
    tokens: int = 1
    taps: int = 4
    masked: bool = False

    @cached_property
    def _heads(self) -> Heads:
        return Heads(self.key_heads, self.value_heads, self.key_dim, self.value_dim)

    @property
    def _values(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def _channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self._values

    @property
    def _state_shape(self) -> tuple[int, ...]:
        return self.batch, self.value_heads, self.value_dim, self.key_dim

    def _mixer_inputs(self, seed: int) -> list[mx.array]:
        """Make projected, past, then the weights: conv, a_log, dt_bias, norm."""
        keys = iter(mx.random.split(mx.random.key(seed), 6))
        dtype, weight_dtype = DTYPES[self.dtype], DTYPES[self.weight_dtype]
        width = self._channels + self._values + 2 * self.value_heads
        projected = mx.random.normal((self.batch, self.tokens, width), key=next(keys))
        past = mx.random.normal((self.batch, self.taps - 1, self._channels), key=next(keys))
        conv = mx.random.normal((self._channels, self.taps, 1), key=next(keys)) / 2
        a_log = mx.log(mx.random.uniform(1, 16, (self.value_heads,), key=next(keys)))
        # As in trained models, most heads forget little of the state per token.
        dt_bias = mx.random.uniform(-7, 0, (self.value_heads,), key=next(keys))
        norm = 1 + mx.random.normal((self.value_dim,), key=next(keys)) / 4
        return [
            projected.astype(dtype),
            past.astype(dtype),
            conv.astype(weight_dtype),
            a_log,
            dt_bias.astype(weight_dtype),
            norm.astype(weight_dtype),
        ]

    def _masks(self) -> list[mx.array]:
        starts = 2 * mx.arange(self.batch)[:, None]
        return [mx.arange(self.tokens) >= starts] if self.masked else []

    def _weights(self, arrays: Sequence[mx.array]) -> MixerWeights:
        conv, a_log, dt_bias, norm = arrays
        return MixerWeights(self._heads, conv, a_log, dt_bias, norm, EPS, EPS)


@dataclass(frozen=True)
class GatedDeltaStepCase(_MixerCase):
    """`step` at one shape; see `case.KernelCase`."""

    op: ClassVar[str] = "gated_delta_step"

    @property
    def nbytes(self) -> int:
        """Bytes of the state and the past, read and written, and of projections and weights."""
        state = 2 * 4 * self._values * self.key_dim
        row = self._channels * (2 * self.taps - 1) + 2 * self._values
        weights = self._channels * self.taps * DTYPES[self.weight_dtype].size
        return self.batch * (state + row * DTYPES[self.dtype].size) + weights

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make projected, past, conv, a_log, dt_bias, norm, state."""
        key = mx.random.key(seed + 1)
        arrays = [*self._mixer_inputs(seed), mx.random.normal(self._state_shape, key=key)]
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        projected, past, *weights, state = inputs
        return list(step(projected, self._weights(weights), past, state))

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by MLX's own ops."""
        projected, past, *arrays, state = inputs
        weights = self._weights(arrays)
        y, state = gated_delta(*prepare_by_ops(projected, weights, past), state)
        return [norm_by_ops(y, projected, weights), self._next_past(projected, past), state]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        projected, past, *arrays, state = inputs
        weights = self._weights(arrays)
        y, state = reference.gated_delta(*prepare_reference(projected, weights, past), state)
        return [norm_reference(y, projected, weights), self._next_past(projected, past), state]

    def _next_past(self, projected: mx.array, past: mx.array) -> mx.array:
        qkv = split(projected, self._heads)[0]
        return mx.contiguous(mx.concatenate([past, qkv], axis=1)[:, 1:])


@dataclass(frozen=True)
class GatedDeltaScanCase(_MixerCase):
    """`scan` at one shape; see `case.KernelCase`."""

    op: ClassVar[str] = "gated_delta_scan"

    @property
    def nbytes(self) -> int:
        """Bytes of q, k, v, y, g and beta, and of the state, read and written."""
        state = 2 * 4 * self._values * self.key_dim
        size = DTYPES[self.dtype].size
        token = (self._channels + self._values) * size + self.value_heads * (4 + size)
        return self.batch * (state + self.tokens * token)

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make q, k, v, g, beta, state, and the mask if any."""
        projected, past, *weights = self._mixer_inputs(seed)
        q, k, v, g, beta = prepare_reference(projected, self._weights(weights), past)
        dtype = DTYPES[self.dtype]
        state = mx.random.normal(self._state_shape, key=mx.random.key(seed + 1))
        arrays = [*(t.astype(dtype) for t in (q, k, v)), g, beta.astype(dtype), state]
        arrays += self._masks()
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        q, k, v, g, beta, state, *masks = inputs
        return list(scan(q, k, v, g, beta, state, masks[0] if masks else None))

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute token by token by MLX's own ops."""
        return list(gated_delta(*inputs))

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        return list(reference.gated_delta(*inputs))


@dataclass(frozen=True)
class GatedDeltaPrepareCase(_MixerCase):
    """`prepare` at one shape; see `case.KernelCase`."""

    op: ClassVar[str] = "gated_delta_prepare"

    @property
    def nbytes(self) -> int:
        """Bytes of qkv, read and written, of a and b, and of g and beta."""
        size = DTYPES[self.dtype].size
        return self.batch * self.tokens * (2 * self._channels + self.value_heads * 4) * size

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make projected, past, conv, a_log, dt_bias, norm, and the mask if any."""
        arrays = [*self._mixer_inputs(seed), *self._masks()]
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        return list(prepare(*self._arguments(inputs)))

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by MLX's own ops."""
        q, k, v, g, beta = prepare_by_ops(*self._arguments(inputs))
        return [*(t.astype(DTYPES[self.dtype]) for t in (q, k, v)), g, beta]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        return list(prepare_reference(*self._arguments(inputs)))

    def _arguments(
        self, inputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, MixerWeights, mx.array, mx.array | None]:
        mask = inputs[6] if self.masked else None
        return inputs[0], self._weights(inputs[2:6]), inputs[1], mask


@dataclass(frozen=True)
class GatedDeltaNormCase(_MixerCase):
    """`gated_norm` at one shape; see `case.KernelCase`."""

    op: ClassVar[str] = "gated_delta_norm"

    @property
    def nbytes(self) -> int:
        """Bytes of y, z and the output."""
        return 3 * self.batch * self.tokens * self._values * DTYPES[self.dtype].size

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make y, projected, conv, a_log, dt_bias, norm."""
        projected, _, *weights = self._mixer_inputs(seed)
        shape = self.batch, self.tokens, self.value_heads, self.value_dim
        y = mx.random.normal(shape, key=mx.random.key(seed + 1)).astype(DTYPES[self.dtype])
        arrays = [y, projected, *weights]
        mx.eval(arrays)
        return arrays

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        y, projected, *weights = inputs
        return [gated_norm(y, projected, self._weights(weights))]

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by MLX's own ops."""
        y, projected, *weights = inputs
        return [norm_by_ops(y, projected, self._weights(weights))]

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        y, projected, *weights = inputs
        return [norm_reference(y, projected, self._weights(weights))]
