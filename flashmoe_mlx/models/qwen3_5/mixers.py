"""Token mixers: full attention and GatedDeltaNet, named as in mlx-lm."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.models.rope_utils import initialize_rope

from ...custom_kernels.attention.prompt import attention
from ...custom_kernels.attention.step import (
    AttentionHeads,
    AttentionStepCase,
    attend,
    deciding_case,
    integer,
    prepare,
)
from ...custom_kernels.autotune import prefers_custom
from ...custom_kernels.cpu.entry import cpu_steps
from ...custom_kernels.gated_delta.layer import gated_delta_layer
from ...custom_kernels.gated_delta.weights import Heads, MixerState, MixerWeights
from ...custom_kernels.linear.linear import join, joined, linear
from ...custom_kernels.traced import Traced
from ...custom_kernels.weights import remembered
from ..cache_checks import DeltaCacheSpec, KeyValueSpec
from .args import ModelArgs

Step = Callable[..., tuple[mx.array, mx.array, mx.array]]


class Attention(nn.Module):
    """Full attention with q/k norm, partial RoPE and a sigmoid output gate."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the projections; q_proj also yields the gate."""
        super().__init__()
        self._step, self._fused_step = Traced(), Traced()
        self.fused_keys = 0  # up to which our kernels run a step
        self._refused: AttentionStepCase | None = None
        self.heads, self.kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.head_dim, bias = args.head_dim, args.attention_bias
        width = self.heads * self.head_dim
        self.q_proj = nn.Linear(args.hidden_size, 2 * width, bias=bias)
        self.k_proj = nn.Linear(args.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(args.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(width, args.hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=args.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=args.rms_norm_eps)
        rope = args.rope_parameters
        self.rope = initialize_rope(
            int(self.head_dim * rope["partial_rotary_factor"]),
            base=rope["rope_theta"],
            traditional=False,
            scaling_config=rope,
            max_position_embeddings=args.max_position_embeddings,
        )
        turned = self.rope.dims if type(self.rope) is nn.RoPE else 0
        self._heads = AttentionHeads(self.heads, self.kv_heads, self.head_dim, turned)
        self._cache_spec = KeyValueSpec(self.kv_heads, self.head_dim)

    def __call__(
        self, h: mx.array, norm: nn.RMSNorm, mask: Any = None, cache: Any = None
    ) -> mx.array:
        """Return h + attention(norm(h)), `[B, T, H]`, adding T keys and values to the cache."""
        if h.shape[1] == 1 and mask is None and type(cache) is KVCache:
            if (y := self._step_by_cpu(h, norm, cache)) is not None:
                return y
            traced, keys = self._fused_step.ready(h), cache.offset + 1
            if (traced and keys <= self.fused_keys) or self._fuses(h, keys):
                return self._run_fused(h, norm, cache, traced)
        traced = h.shape[1] == 1 and self._step.ready(h)
        before, after = (
            self._step.functions if traced else (partial(self._before, norm), self._after)
        )
        queries, keys, values, gate = before(h)
        offset = cache.offset if cache is not None else 0
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        y = self._attend(queries, keys, values, mask, cache)
        y = after(h, y, gate)
        if h.shape[1] == 1 and not traced:
            self._step.trace((h,), (self, norm), before, after)
        return y

    def _before(
        self, norm: nn.RMSNorm, h: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return queries, keys and values `[B, heads, T, D]` before RoPE, and the output gate."""
        batch, tokens, _ = h.shape
        queries, keys, values = linear(h, self.q_proj, self.k_proj, self.v_proj, norm=norm)
        queries, gate = mx.split(queries.reshape(batch, tokens, self.heads, -1), 2, axis=-1)
        keys = keys.reshape(batch, tokens, self.kv_heads, -1)
        values = values.reshape(batch, tokens, self.kv_heads, -1)
        queries = self.q_norm(queries).transpose(0, 2, 1, 3)
        keys = self.k_norm(keys).transpose(0, 2, 1, 3)
        return queries, keys, values.transpose(0, 2, 1, 3), gate

    def _attend(self, queries: mx.array, keys: Any, values: Any, mask: Any, cache: Any) -> mx.array:
        """Return attention to the cache's keys and values, `[B, heads, T, D]`."""
        return attention(queries, keys, values, self.head_dim**-0.5, mask, cache)

    def _after(self, h: mx.array, y: mx.array, gate: mx.array) -> mx.array:
        """Return h + the output projection of the gated attention `[B, heads, T, D]`."""
        batch, tokens, _ = h.shape
        y = y.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)
        y = y * mx.sigmoid(gate.reshape(batch, tokens, -1))
        return linear(y, self.o_proj, residual=h)[0]

    def _step_by_cpu(self, h: mx.array, norm: nn.RMSNorm, cache: KVCache) -> mx.array | None:
        """Run `__call__` for one token per row on a CPU, or return None."""
        if not self._has_plain_rope() or (steps := cpu_steps(h)) is None:
            return None
        inputs, norms = (self.q_proj, self.k_proj, self.v_proj), (self.q_norm, self.k_norm)
        base = self.rope.base
        y: mx.array | None = steps.attention_step(
            h, inputs, self.o_proj, norm, norms, self._heads, base, cache
        )
        return y

    def _has_plain_rope(self) -> bool:
        """Say whether RoPE is the plain one that our kernels compute."""
        return self._heads.supported() and self.rope.scale == 1

    def _fuses(self, h: mx.array, keys: int) -> bool:
        """Say whether our kernels run a step with this many keys, and remember the answer."""
        case = deciding_case(self._heads, h, keys)
        if case is None or case == self._refused:
            return False
        norms = self.q_norm, self.k_norm
        fuses = (
            self._has_plain_rope()
            and all(n.weight.dtype == h.dtype and n.eps == self.q_norm.eps for n in norms)
            and join((self.q_proj, self.k_proj, self.v_proj)) is not None
            and prefers_custom(case)
        )
        self.fused_keys, self._refused = (case.keys, None) if fuses else (0, case)
        return fuses

    def _run_fused(self, h: mx.array, norm: nn.RMSNorm, cache: KVCache, traced: bool) -> mx.array:
        """Run `__call__` for one token, in few launches."""
        steps = partial(self._before_fused, norm), self._after_fused
        before, after = self._fused_step.functions if traced else steps
        queries, keys, values, projected = before(h, integer(cache.offset))
        cache.update_and_fetch(keys, values)
        y = after(h, queries, projected, cache.keys, cache.values, integer(cache.offset))
        if not traced:
            self._fused_step.trace((h,), (self, norm), before, after)
        return y

    def traced(self, h: mx.array, keys: int) -> Step | None:
        """Return the traced step for `[B, 1, H]` and this many keys, None if there is none.

        It takes h, keys, values, the token's position and the number of keys (see `integer`), and
        returns the new h, keys and values.
        """
        if keys > self.fused_keys or not self._fused_step.ready(h):
            return None
        before, after = self._fused_step.functions

        def step(
            h: mx.array, keys: mx.array, values: mx.array, offset: mx.array, length: mx.array
        ) -> tuple[mx.array, mx.array, mx.array]:
            queries, *rows, projected = before(h, offset)
            keys, values = (
                mx.put_along_axis(x, mx.broadcast_to(offset[:1], row.shape), row, axis=2)
                for x, row in zip((keys, values), rows, strict=True)
            )
            return after(h, queries, projected, keys, values, length), keys, values

        return step

    def _before_fused(
        self, norm: nn.RMSNorm, h: mx.array, offset: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return queries, keys, values and the joined projection, which also holds the gates."""
        projected = joined(h, self.q_proj, self.k_proj, self.v_proj, norm=norm)
        norms = self.q_norm.weight, self.k_norm.weight
        queries, keys = prepare(
            projected, self._heads, norms, self.q_norm.eps, self.rope.base, offset
        )
        values = projected[..., -self.kv_heads * self.head_dim :].reshape(keys.shape)
        return queries, keys, values, projected

    def _after_fused(
        self,
        h: mx.array,
        queries: mx.array,
        projected: mx.array,
        keys: mx.array,
        values: mx.array,
        length: mx.array,
    ) -> mx.array:
        """Return h + the output projection of the gated attention over the cache's buffers."""
        y = attend(queries, projected, self._heads, keys, values, length)
        return linear(y, self.o_proj, residual=h)[0]


class GatedDeltaNet(nn.Module):
    """Linear attention: short causal convolution, gated delta rule, gated norm."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the projections and the depthwise convolution over q, k and v."""
        super().__init__()
        self._step = Traced()
        heads = self._heads = Heads(
            args.linear_num_key_heads,
            args.linear_num_value_heads,
            args.linear_key_head_dim,
            args.linear_value_head_dim,
        )
        values = heads.values * heads.value_dim
        width = 2 * heads.keys * heads.key_dim + values
        taps = args.linear_conv_kernel_dim
        self._cache_spec = DeltaCacheSpec(
            (taps - 1, width), (heads.values, heads.value_dim, heads.key_dim)
        )
        self.conv1d = nn.Conv1d(width, width, taps, groups=width, bias=False)
        self.in_proj_qkv = nn.Linear(args.hidden_size, width, bias=False)
        self.in_proj_z = nn.Linear(args.hidden_size, values, bias=False)
        self.in_proj_b = nn.Linear(args.hidden_size, heads.values, bias=False)
        self.in_proj_a = nn.Linear(args.hidden_size, heads.values, bias=False)
        self.dt_bias = mx.ones(heads.values)
        self.A_log = mx.log(mx.random.uniform(low=1, high=16, shape=(heads.values,)))
        self.norm = nn.RMSNorm(heads.value_dim, eps=args.rms_norm_eps)
        self.out_proj = nn.Linear(values, args.hidden_size, bias=False)

    def __call__(
        self, h: mx.array, norm: nn.RMSNorm, mask: mx.array | None = None, cache: Any = None
    ) -> mx.array:
        """Return h + mixer(norm(h)), `[B, T, H]`.

        cache[0] holds the convolution's past inputs, cache[1] the delta state.
        """
        tokens = h.shape[1]
        past, state = (None, None) if cache is None else (cache[0], cache[1])
        # Rows of a right-padded batch end at different places.
        padded = cache is not None and cache.lengths is not None
        ends = mx.clip(cache.lengths, 0, tokens) if padded else None
        is_step = tokens == 1 and mask is None and ends is None and past is not None
        if is_step and self._step.ready(h):
            y, past, state = self._step.functions[0](h, past, state)
        else:
            y, past, state = self._run(norm, h, past, state, mask, ends)
            if is_step:
                self._step.trace((h,), (self, norm), partial(self._run, norm))
        if cache is not None:
            cache[0], cache[1] = past, state
            cache.advance(tokens)
        return y

    def traced(self, h: mx.array, keys: int) -> Step | None:
        """Return the traced step for `[B, 1, H]`, None if there is none.

        It takes h, the convolution's past and the state, and returns the new ones.
        """
        if not self._step.ready(h):
            return None
        run = self._step.functions[0]
        return lambda h, past, state, *_: run(h, past, state)

    def _inputs(self) -> tuple[nn.Module, ...]:
        return self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a

    def _run(
        self,
        norm: nn.RMSNorm,
        h: mx.array,
        past: mx.array | None,
        state: mx.array | None,
        mask: mx.array | None = None,
        ends: mx.array | None = None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Return h + mixer(norm(h)) and the new past and state."""
        before = MixerState(past, state, mask, ends)
        return gated_delta_layer(h, norm, self._inputs(), self.out_proj, self._weights(), before)

    def _weights(self) -> MixerWeights:
        """Return all weights but the projections."""

        def arrays() -> tuple[mx.array, mx.array, mx.array, mx.array]:
            return self.conv1d.weight, self.A_log, self.dt_bias, self.norm.weight

        def make() -> MixerWeights:
            return MixerWeights(self._heads, *arrays(), self.norm.eps)

        found = remembered(self, "_mixer_weights", arrays, make)
        assert found
        return found
