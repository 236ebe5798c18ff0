"""A GatedDeltaNet layer for one token per row, on a CPU, from hidden states to hidden states."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import prange

from ..gated_delta.weights import Heads, MixerWeights
from ..shapes import expect
from ..weights import QuantizedMatrix, Shared
from .arrays import ALL, Array, compiled, copy, serial, sigmoid, silu, use_threads
from .decode import UNIT_OF_WORK, UNITS, Arrays, Group, Norm, add_job, run_jobs
from .gated_delta import convolve_head
from .records import HEIGHT, new_records, record_size, write_record, write_records

QKV, Z, STRENGTH, SHIFT, OUT = range(5)  # indices of the matrices
F32 = np.dtype(np.float32)


@serial
def _rule_step(
    state: Array, q: Array, k: Array, v: Array, decay: float, strength: float, y: Array,
    after: Array,
) -> None:  # fmt: skip
    """Take one step of the gated delta rule: states `[Dv, Dk]` before and `after`, y `[Dv]`."""
    for d in range(v.size):
        row, changed = state[d], after[d]
        known, out = np.float32(0), np.float32(0)
        for i in range(k.size):
            known += row[i] * k[i]
        change = (v[d] - decay * known) * strength
        for i in range(k.size):
            new = decay * row[i] + change * k[i]
            out += new * q[i]
            changed[i] = new
        y[d] = out


@serial
def _gated_norm(y: Array, z: Array, weight: Array, eps: float) -> None:
    square = np.float32(0)
    for value in y:
        square += value * value
    factor = np.float32(1) / np.sqrt(square / np.float32(y.size) + np.float32(eps))
    for i in range(y.size):
        y[i] = y[i] * factor * weight[i] * silu(z[i])


@serial
def _head(
    head: int, past: Array, projected: Any, weights: Arrays, state: Array, y: Array, after: Array
) -> None:
    """Compute one value head between the projections: states `[Hv, Dv, Dk]`, y `[Dv]`."""
    now, z, strength, shift = projected
    conv, a_log, dt_bias, norm, eps = weights
    value_heads, value_dim, key_dim = state.shape
    key_heads = (conv.shape[1] - value_heads * value_dim) // (2 * key_dim)
    key_head = head // (value_heads // key_heads)
    q, k, v = np.empty(key_dim, np.float32), np.empty(key_dim, np.float32), np.empty_like(y)
    square = convolve_head(past, now, conv, key_head * key_dim, q)
    q *= np.float32(1) / np.sqrt((square + eps[1]) * np.float32(key_dim))
    square = convolve_head(past, now, conv, (key_heads + key_head) * key_dim, k)
    k *= np.float32(1) / np.sqrt(square + eps[1])
    convolve_head(past, now, conv, 2 * key_heads * key_dim + head * value_dim, v)
    shifted = shift + dt_bias[head]
    softplus = max(shifted, np.float32(0)) + np.log1p(np.exp(-abs(shifted)))
    decay = np.exp(-np.exp(a_log[head]) * softplus)
    _rule_step(state[head], q, k, v, decay, sigmoid(strength), y, after[head])
    _gated_norm(y, z, norm, eps[0])


@compiled
def _heads(
    out: Array, places: Array, weights: Arrays, before: Arrays, after: Arrays, y: Array
) -> None:
    """Compute all value heads from the projections `out`, whose parts start at `places`."""
    (past, state), (_, new_state) = before, after
    conv, a_log, dt_bias, norm, eps = weights
    (batch, width), heads, channels = y.shape, state.shape[1], conv.shape[1]
    value_dim = width // heads
    for unit in prange(batch * heads):
        b, head = unit // heads, unit % heads
        here = head * value_dim
        z = places[Z] + b * width + here
        now, gate = out[b * channels : (b + 1) * channels], out[z : z + value_dim]
        projected = (now, gate, out[places[STRENGTH] + unit], out[places[SHIFT] + unit])
        fixed = (conv, a_log, dt_bias, norm, eps)
        _head(
            head, past[b], projected, fixed, state[b], y[b, here : here + value_dim], new_state[b]
        )


@serial
def _step(
    run: int, h: Array, in_norm: Norm, group: Arrays, weights: Arrays, before: Arrays,
    after: Arrays, result: Array,
) -> None:  # fmt: skip
    (in_weight, in_eps), (matrices, forms, form_of) = in_norm, group
    conv, past, new_past = weights[0], before[0], after[0]
    batch, width = h.shape[0], matrices[Z, HEIGHT]
    records = new_records(forms.size * batch, record_size(matrices, forms))
    write_records(h, in_weight, in_eps, matrices, forms, records)
    jobs, places = np.zeros((6, UNITS + 1), np.int64), np.zeros(5, np.int64)
    units, rows = 0, np.arange(batch)
    for n in range(OUT):
        job = (n, -1, 0, form_of[n] * batch, 0, 0, batch, places[n])
        units = add_job(jobs, n, matrices, job)
        places[n + 1] = places[n] + batch * matrices[n, HEIGHT]
    out = np.empty(places[OUT], np.float32)
    run_jobs(run, units, jobs, matrices, records, rows, rows, out)

    channels, y = conv.shape[1], np.empty((batch, width), np.float32)
    _heads(out, places, weights, before, after, y)
    last = np.array([OUT])
    records = new_records(batch, record_size(matrices, last))
    for b in range(batch):
        for tap in range(1, past.shape[1]):
            copy(past[b, tap], new_past[b, tap - 1])
        copy(out[b * channels : (b + 1) * channels], new_past[b, -1])
        write_record(y[b], matrices[OUT], records[b])
    jobs[:] = 0
    units = add_job(jobs, 0, matrices, (OUT, -1, 0, 0, 0, 0, batch, 0))
    run_jobs(run, units, jobs, matrices, records, rows, rows, result)
    result += h.reshape(-1)


class DeltaBlock(Shared):
    """A GatedDeltaNet layer, with the norm before it and the residual around it."""

    def __init__(
        self,
        inputs: Sequence[QuantizedMatrix],
        out: QuantizedMatrix,
        in_norm: Norm,
        weights: MixerWeights,
    ) -> None:
        """Take the layer's weights.

        Args:
            inputs: the four projections to q, k and v; to z; to b; and to a: `[..., H]` each.
            out: `[H, Hv Dv]`.
            in_norm: `[H]` float32 weight and epsilon of the RMS norm before the layer.
            weights: all but the projections.
        """
        self._inputs, self._all = Group(*inputs), Group(*inputs, out)
        self._in_norm = in_norm
        weights.check()
        heads = weights.heads
        self._past = weights.conv.shape[1] - 1, weights.channels
        self._state = heads.values, heads.value_dim, heads.key_dim
        self._check_projections(heads)
        self._matrices = self._all.numbers, self._inputs.forms, self._inputs.form_of
        tensors = weights.conv.squeeze(-1).T, weights.a_log, weights.dt_bias, weights.norm
        conv, a_log, dt_bias, norm = (
            np.ascontiguousarray(np.array(t), np.float32) for t in tensors
        )
        eps = np.array([weights.norm_eps, weights.qk_eps], np.float32)
        self._weights = conv, a_log, dt_bias, norm, eps

    def _check_projections(self, heads: Heads) -> None:
        """Compare the projections' shapes with the heads."""
        hidden, values = self._in_norm[0].size, heads.values * heads.value_dim
        heights = self._past[1], values, heads.values, heads.values
        shapes = [(height, hidden) for height in heights]
        for name, matrix, shape in zip(
            ("q, k and v", "z", "b", "a", "output"),
            self._all.matrices,
            [*shapes, (hidden, values)],
            strict=True,
        ):
            expect(f"the projection of a GatedDeltaNet layer to {name}", matrix, shape)

    def __call__(
        self, h: Array, past: Array, state: Array, new_past: Array, new_state: Array
    ) -> Array:
        """Map hidden states `[rows, H]` float32 to `h + layer(norm(h))`, `[rows, H]`.

        Args:
            h: `[rows, H]`.
            past: `[rows, taps - 1, channels]`, the convolution's last inputs.
            state: `[rows, Hv, Dv, Dk]`.
            new_past: receives the new `past`.
            new_state: receives the new state; must not overlap `state`.
        """
        batch = len(h)
        expect("hidden states", h, (batch, self._in_norm[0].size), F32)
        for inputs, delta in ((past, state), (new_past, new_state)):
            expect("a GatedDeltaNet layer's past inputs", inputs, (batch, *self._past), F32)
            expect("a GatedDeltaNet layer's state", delta, (batch, *self._state), F32)
        self._all.check_addresses()
        result = np.empty(h.size, np.float32)
        use_threads(ALL)
        _step(
            UNIT_OF_WORK.address, h, self._in_norm, self._matrices, self._weights,
            (past, state), (new_past, new_state), result,
        )  # fmt: skip
        return result.reshape(h.shape)
