"""Qwen3.5 MoE: gated attention, GatedDeltaNet, and experts that stream. Names as in mlx-lm.

Shapes: B batch, T tokens, H hidden size, V vocabulary; heads as in `custom_kernels.reference`.
"""

from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import (
    create_attention_mask,
    create_ssm_mask,
)
from mlx_lm.models.cache import ArraysCache, KVCache
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
from ...custom_kernels.device import keep_pace, tokens_at_once
from ...custom_kernels.gated_delta.layer import gated_delta_layer
from ...custom_kernels.gated_delta.weights import Heads, MixerWeights
from ...custom_kernels.linear.linear import join, joined, linear
from ...custom_kernels.traced import Traced
from ...store.store import ExpertStore
from ..cache_checks import Attending, Recurrent, check_caches
from ..streamed import StreamedModule
from .args import ModelArgs
from .moe import SparseMoeBlock
from .sanitize import sanitize


class Attention(nn.Module):
    """Full attention with q/k norm, partial RoPE and a sigmoid output gate."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the projections; q_proj also yields the gate."""
        super().__init__()
        self._step, self._fused_step = Traced(), Traced()
        self._fused_keys = 0
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
        self._keeps = Attending(self.kv_heads, self.head_dim)

    def __call__(
        self, h: mx.array, norm: nn.RMSNorm, mask: Any = None, cache: Any = None
    ) -> mx.array:
        """Return h + attention(norm(h)), `[B, T, H]`, adding T keys and values to the cache."""
        if h.shape[1] == 1 and mask is None and type(cache) is KVCache:
            traced, keys = self._fused_step.ready(h), cache.offset + 1
            if (traced and keys <= self._fused_keys) or self._fuses(h, keys):
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
            self._step.trace(h, (self, norm), before, after)
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
        """Return `[B, heads, T, D]`: the queries' attention to what the cache returned."""
        return attention(queries, keys, values, self.head_dim**-0.5, mask, cache)

    def _after(self, h: mx.array, y: mx.array, gate: mx.array) -> mx.array:
        """Return h + the output projection of the gated attention `[B, heads, T, D]`."""
        batch, tokens, _ = h.shape
        y = y.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)
        y = y * mx.sigmoid(gate.reshape(batch, tokens, -1))
        return linear(y, self.o_proj, residual=h)[0]

    def _fuses(self, h: mx.array, keys: int) -> bool:
        """Find out whether a step with so many keys, and maybe more, goes through our kernels."""
        case = deciding_case(self._heads, h, keys)
        if case is None or case == self._refused:
            return False
        norms = self.q_norm, self.k_norm
        fuses = (
            self._heads.supported()
            and self.rope.scale == 1
            and all(n.weight.dtype == h.dtype and n.eps == self.q_norm.eps for n in norms)
            and join((self.q_proj, self.k_proj, self.v_proj)) is not None
            and prefers_custom(case)
        )
        self._fused_keys, self._refused = (case.keys, None) if fuses else (0, case)
        return fuses

    def _run_fused(self, h: mx.array, norm: nn.RMSNorm, cache: KVCache, traced: bool) -> mx.array:
        """Do what `__call__` does for one token, in few launches."""
        steps = partial(self._before_fused, norm), self._after_fused
        before, after = self._fused_step.functions if traced else steps
        queries, keys, values, projected = before(h, integer(cache.offset))
        cache.update_and_fetch(keys, values)
        y = after(h, queries, projected, cache.keys, cache.values, integer(cache.offset))
        if not traced:
            self._fused_step.trace(h, (self, norm), before, after)
        return y

    def _before_fused(
        self, norm: nn.RMSNorm, h: mx.array, offset: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """Return queries, keys, values and the joined projection, whose gates are used later."""
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
        """Return h + the output projection of the gated attention to the whole cache's buffers."""
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
        self._keeps = Recurrent((taps - 1, width), (heads.values, heads.value_dim, heads.key_dim))
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

        cache[0] is the convolution's past, cache[1] the delta state.
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
                self._step.trace(h, (self, norm), partial(self._run, norm))
        if cache is not None:
            cache[0], cache[1] = past, state
            cache.advance(tokens)
        return y

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
        weights = MixerWeights(
            self._heads,
            self.conv1d.weight,
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            self.norm.eps,
        )
        return gated_delta_layer(
            h, norm, self._inputs(), self.out_proj, weights, past, state, mask, ends
        )


def _forget_padding(caches: list[Any]) -> None:
    """Drop the left padding of GatedDeltaNet caches once it lies behind every row.

    mlx-lm gives a batch such padding, of zeros, and counts it down with every token. Only the first
    layer's is ever looked at, so that the others' graphs would grow until the batch is over; and
    what comes with a mask takes the slower way.
    """
    padded = [c for c in caches if isinstance(c, ArraysCache) and c.left_padding is not None]
    if padded and bool(mx.all(mx.concatenate([c.left_padding for c in padded]) <= 0)):
        for cache in padded:
            cache.left_padding = None


class DecoderLayer(nn.Module):
    """Mixer (linear or full attention), then mixture of experts, each with its residual."""

    def __init__(self, args: ModelArgs, layer: int, store: ExpertStore | None) -> None:
        """Make layer number `layer`."""
        super().__init__()
        self.is_linear = args.is_linear(layer)
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(args)
        else:
            self.self_attn = Attention(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = SparseMoeBlock(args, layer, store)

    def __call__(
        self, h: mx.array, mask: Any = None, cache: Any = None, rows: mx.array | None = None
    ) -> mx.array:
        """Map the residual stream `[B, T, H]` to `[B, T, H]`; `rows` `[B, T]`: not padding."""
        h = self._mix(h, mask, cache)
        return self.mlp(h, self.post_attention_layernorm, rows)

    @property
    def mixer(self) -> "Attention | GatedDeltaNet":
        """The layer's attention, of either kind."""
        return self.linear_attn if self.is_linear else self.self_attn

    def _mix(self, h: mx.array, mask: Any, cache: Any) -> mx.array:
        """Run attention or GatedDeltaNet, on a CPU a part of a prompt at a time.

        What they make of 2,048 tokens takes 300 MB at 35B size, which a bank has more use for.
        """
        mixer = self.mixer
        tokens, padded = h.shape[1], isinstance(mask, mx.array)
        at_once = tokens_at_once(h)
        if at_once is None or tokens <= at_once or padded or cache is None:
            return mixer(h, self.input_layernorm, mask, cache)
        parts = list(mx.split(h, range(at_once, tokens, at_once), axis=1))
        for index, part in enumerate(parts):
            causal = mask if part.shape[1] > 1 else None
            parts[index] = mixer(part, self.input_layernorm, causal, cache)
            mx.eval(parts[index])
        return mx.concatenate(parts, axis=1)


class Decoder(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, args: ModelArgs, store: ExpertStore | None) -> None:
        """Make all layers."""
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args, i, store) for i in range(args.num_hidden_layers)]
        self._keeps = [layer.mixer._keeps for layer in self.layers]
        self._lookahead = store.lookahead if store else None
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def check_caches(self, caches: list[Any], rows: int) -> None:
        """Compare caches with the layers, for a prompt of so many rows.

        Raises:
            FlashMoEError: one does not fit its layer.
        """
        check_caches(caches, self._keeps, self.embed_tokens(mx.zeros((rows, 1), mx.int32)))

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Map token ids `[B, T]` (or embeddings `[B, T, H]`) to hidden states `[B, T, H]`."""
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        caches: list[Any] = cache if cache is not None else [None] * len(self.layers)
        check_caches(caches, self._keeps, h)
        _forget_padding(caches)
        masks: dict[bool, Any] = {}
        lookahead = self._lookahead if h.shape[1] == 1 else None
        prefetches = lookahead is not None and lookahead.begin()
        for number, (layer, c) in enumerate(zip(self.layers, caches, strict=True)):
            if prefetches and number:
                layer.mlp.prefetch(h, layer.post_attention_layernorm)
            if layer.is_linear not in masks:
                make_mask = create_ssm_mask if layer.is_linear else create_attention_mask
                masks[layer.is_linear] = make_mask(h, c)
            before, h = h, layer(h, masks[layer.is_linear], c, masks.get(True))
            if h.shape[1] > 1:
                keep_pace(before, h)
        if lookahead is not None:
            lookahead.end()
        return self.norm(h)


class LanguageModel(nn.Module):
    """Decoder and output head."""

    def __init__(self, args: ModelArgs, store: ExpertStore | None) -> None:
        """Make the decoder; with tied embeddings there is no head of its own."""
        super().__init__()
        self.model = Decoder(args, store)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Map token ids `[B, T]` to logits `[B, T, V]`."""
        h = self.model(inputs, cache, input_embeddings)
        if "lm_head" not in self:
            return self.model.embed_tokens.as_linear(h)
        # Callers often drop a prompt's logits, so only a step's are worth computing at once.
        return linear(h, self.lm_head)[0] if h.shape[1] == 1 else self.lm_head(h)


class Model(StreamedModule):
    """A Qwen3.5 MoE language model.

    With an `ExpertStore` the routed experts stream from disk; without one they are ordinary
    parameters, as in stock mlx-lm.
    """

    def __init__(self, args: ModelArgs, store: ExpertStore | None = None) -> None:
        """Make the model; weights come later, through `sanitize` and `load_weights`."""
        super().__init__(store)
        self.args = args
        self.model_type = args.model_type
        self.language_model = LanguageModel(args, store)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Map token ids `[B, T]` to logits `[B, T, V]`.

        Raises:
            FlashMoEError: the model was closed, or its experts cannot be read.
        """
        self.check_usable()
        return self.language_model(inputs, cache, input_embeddings)

    @property
    def model(self) -> Decoder:
        """The decoder, where mlx-lm's tools look for it."""
        return self.language_model.model

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers."""
        return self.model.layers

    def make_cache(self) -> list[Any]:
        """Return an empty prompt cache of mlx-lm's own classes, one entry per layer."""
        return [ArraysCache(size=2) if layer.is_linear else KVCache() for layer in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Bring a checkpoint's tensors into this model's names and shapes."""
        return sanitize(weights, self.args, streamed=self._store is not None)

    @property
    def quant_predicate(self) -> Any:
        """Which layers mlx_lm quantizes at which width: routers and gates at 8 bits."""

        def predicate(path: str, _: nn.Module) -> bool | dict[str, int]:
            if path.endswith(("mlp.gate", "shared_expert_gate")):
                return {"group_size": 64, "bits": 8}
            return True

        return predicate

    @property
    def cast_predicate(self) -> Any:
        """Which parameters may be cast: A_log stays float32."""
        return lambda path: not path.endswith("A_log")
