"""Qwen3.5 MoE: gated attention, GatedDeltaNet and streamed experts. Names as in mlx-lm.

Shapes: B batch, T tokens, H hidden size, V vocabulary; heads as in `custom_kernels.reference`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, create_ssm_mask
from mlx_lm.models.cache import ArraysCache, BatchKVCache, KVCache, RotatingKVCache
from mlx_lm.models.pipeline import PipelineMixin

from ...custom_kernels.cuda import ahead
from ...custom_kernels.device import keep_pace, tokens_at_once, tokens_per_row
from ...custom_kernels.experts.prefill import compile_ahead
from ...custom_kernels.linear.linear import linear
from ...distributed.expert_parallel import ExpertParallel
from ...errors import FlashMoEError
from ...store.prefetch import Lookahead
from ..cache_checks import check_caches
from ..streamed import Experts, StreamedModule
from .args import PREFILL_CHUNK, ModelArgs
from .mixers import Attention, GatedDeltaNet
from .moe import SparseMoeBlock, formats
from .sanitize import sanitize
from .step import DecodeStep

LEAST_KV_SIZE, KEPT_TOKENS = 8, 4  # KEPT_TOKENS as in mlx-lm's make_prompt_cache


def _forget_padding(caches: list[Any]) -> None:
    """Drop the left padding of GatedDeltaNet caches once every row is past it.

    mlx-lm counts a batch's padding down with every token, but reads only the first layer's: the
    other layers' graphs would grow until the batch ends. A mask also selects the slower path.
    """
    padded = [c for c in caches if isinstance(c, ArraysCache) and c.left_padding is not None]
    if padded and bool(mx.all(mx.concatenate([c.left_padding for c in padded]) <= 0)):
        for cache in padded:
            cache.left_padding = None


def _splits(mask: Any, cache: Any) -> bool:
    """Say whether a cache makes the masks of a prompt's parts.

    A RotatingKVCache's window depends on where a prompt is cut, and must be cut where stock cuts.
    """
    padded = isinstance(mask, mx.array)
    return cache is not None and (not padded or isinstance(cache, ArraysCache | BatchKVCache))


def _in_parts(h: mx.array, at_once: int, run: Callable[[mx.array, slice], mx.array]) -> mx.array:
    """Run `[B, T, H]` in parts of `at_once` tokens per row, to bound the memory of temporaries."""
    parts = []
    for start in range(0, h.shape[1], at_once):
        where = slice(start, start + at_once)
        parts.append(run(h[:, where], where))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1)


class DecoderLayer(nn.Module):
    """Mixer (linear or full attention), then mixture of experts, each with its residual."""

    def __init__(self, args: ModelArgs, layer: int, streamed: bool) -> None:
        """Make layer number `layer`."""
        super().__init__()
        self.is_linear = args.is_linear(layer)
        if self.is_linear:
            self.linear_attn = GatedDeltaNet(args)
        else:
            self.self_attn = Attention(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = SparseMoeBlock(args, layer, streamed)

    def __call__(
        self, h: mx.array, mask: Any = None, cache: Any = None, rows: mx.array | None = None
    ) -> mx.array:
        """Map the residual stream `[B, T, H]` to itself; `rows` `[B, T]` is False for padding."""
        return self._route(self._mix(h, mask, cache), rows)

    @property
    def mixer(self) -> "Attention | GatedDeltaNet":
        """The layer's attention, of either kind."""
        return self.linear_attn if self.is_linear else self.self_attn

    def _mix(self, h: mx.array, mask: Any, cache: Any) -> mx.array:
        """Run attention or GatedDeltaNet; on a CPU, a part of a prompt at a time.

        Activations of 2,048 tokens take 300 MB at 35B size, which serve better as expert cache.
        """
        tokens, at_once = h.shape[1], tokens_at_once(h)
        if at_once is None or tokens <= at_once or not _splits(mask, cache):
            return self.mixer(h, self.input_layernorm, mask, cache)
        make_mask = create_ssm_mask if self.is_linear else create_attention_mask

        def run(part: mx.array, _: slice) -> mx.array:
            return self.mixer(part, self.input_layernorm, make_mask(part, cache), cache)

        return _in_parts(h, at_once, run)

    def _route(self, h: mx.array, rows: mx.array | None) -> mx.array:
        """Run the mixture of experts; a batch's prompts in parts as large as one prompt's chunk."""
        at_once = tokens_per_row(PREFILL_CHUNK, len(h))

        def run(part: mx.array, where: slice) -> mx.array:
            real = None if rows is None else rows[:, where]
            return self.mlp(part, self.post_attention_layernorm, real)

        return _in_parts(h, at_once, run) if h.shape[1] > at_once else run(h, slice(None))


class Decoder(PipelineMixin, nn.Module):
    """Embedding, layers and final norm; as mlx-lm's, it can run as one stage of a pipeline."""

    def __init__(self, args: ModelArgs, streamed: bool) -> None:
        """Make all layers."""
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args, i, streamed) for i in range(args.num_hidden_layers)]
        self._cache_specs = [layer.mixer._cache_spec for layer in self.layers]
        self.lookahead: Lookahead | None = None
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self._step = DecodeStep()

    def check_caches(self, caches: list[Any], rows: int) -> None:
        """Compare caches with the layers, for a batch of `rows`.

        Raises:
            FlashMoEError: a cache does not fit its layer.
        """
        check_caches(caches, self._specs, self.embed_tokens(mx.zeros((rows, 1), mx.int32)))

    @property
    def _specs(self) -> list[Any]:
        """What the caches of this stage's layers must be."""
        return self._cache_specs[self.start_idx : self.end_idx]

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Map token ids `[B, T]` (or embeddings `[B, T, H]`) to hidden states `[B, T, H]`."""
        ahead.wait()
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        layers = self.pipeline_layers
        caches: list[Any] = cache if cache is not None else [None] * len(layers)
        check_caches(caches, self._specs, h)
        _forget_padding(caches)
        alone = self.pipeline_size == 1
        if alone and (y := self._step.run(h, layers, self.norm, caches)) is not None:
            return y
        masks: dict[bool, Any] = {}
        lookahead = self.lookahead if h.shape[1] == 1 else None
        prefetches = lookahead is not None and lookahead.begin()
        h = self._received(h)
        for number, (layer, c) in enumerate(zip(layers, caches, strict=True)):
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
        return self.norm(self._sent(h, caches[-1]))

    def _received(self, h: mx.array) -> mx.array:
        """Return the hidden states of the stage before this one, which are like `h`."""
        if self.pipeline_rank == self.pipeline_size - 1:  # the first layers
            return h
        return mx.distributed.recv_like(h, self.pipeline_rank + 1)

    def _sent(self, h: mx.array, cache: Any) -> mx.array:
        """Send hidden states to the next stage; return those of the last stage."""
        if self.pipeline_size == 1:
            return h
        if self.pipeline_rank:
            h = mx.distributed.send(h, self.pipeline_rank - 1)
            if isinstance(cache, ArraysCache):  # a prompt evaluates nothing but caches
                cache[0] = mx.depends(cache[0], h)
            elif cache is not None:
                cache.keys = mx.depends(cache.keys, h)
        return mx.distributed.all_gather(h)[: len(h)]


class LanguageModel(nn.Module):
    """Decoder and output head."""

    def __init__(self, args: ModelArgs, streamed: bool) -> None:
        """Make the decoder, and an output head unless embeddings are tied."""
        super().__init__()
        self.model = Decoder(args, streamed)
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
        # Callers often drop a prompt's logits, so these stay lazy.
        return linear(h, self.lm_head)[0] if h.shape[1] == 1 else self.lm_head(h)


class Model(StreamedModule):
    """A Qwen3.5 MoE language model.

    With `Experts` the routed experts stream from disk; without them they are ordinary parameters,
    as in stock mlx-lm.
    """

    def __init__(self, args: ModelArgs, experts: Experts | None = None) -> None:
        """Make the model, before `sanitize` and `load_weights`."""
        super().__init__(experts)
        self.args = args
        self.model_type = args.model_type
        self.language_model = LanguageModel(args, streamed=experts is not None)
        self.open_if_alone()

    def _open(self, parallel: ExpertParallel | None, sharers: int = 1) -> None:
        assert self._experts
        found = formats(self._experts.layout.layers[0], self.args)
        if found:
            compile_ahead(*found)
        super()._open(parallel, sharers)
        if self._store and parallel is None:
            self.model.lookahead = self._store.lookahead

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
        x = inputs if input_embeddings is None else input_embeddings
        forward = partial(self.language_model, inputs, cache, input_embeddings)
        return self.run(forward, x, cache)

    @property
    def model(self) -> Decoder:
        """The decoder, where mlx-lm's tools look for it."""
        return self.language_model.model

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, of a pipeline those of this stage."""
        return self.model.pipeline_layers

    def make_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """Return an empty prompt cache of mlx-lm's own classes, one entry per layer.

        Args:
            max_kv_size: tokens that full attention sees at most: the first four and the latest.
                None for all. GatedDeltaNet layers have one state for all tokens.

        Raises:
            FlashMoEError: `max_kv_size` is below LEAST_KV_SIZE.
        """
        if max_kv_size is not None and max_kv_size < LEAST_KV_SIZE:
            raise FlashMoEError(
                f"max_kv_size = {max_kv_size} is too few. Give {LEAST_KV_SIZE} or more tokens."
            )

        def keys_and_values() -> KVCache | RotatingKVCache:
            return KVCache() if max_kv_size is None else RotatingKVCache(max_kv_size, KEPT_TOKENS)

        return [ArraysCache(size=2) if x.is_linear else keys_and_values() for x in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Convert a checkpoint's tensors to this model's names and shapes."""
        return sanitize(weights, self.args, streamed=self._experts is not None)

    @property
    def quant_predicate(self) -> Any:
        """Bits per layer for mlx_lm's quantization: 8 for routers and gates."""
        self.refuse_copy()

        def predicate(path: str, _: nn.Module) -> bool | dict[str, int]:
            if path.endswith(("mlp.gate", "shared_expert_gate")):
                return {"group_size": 64, "bits": 8}
            return True

        return predicate

    @property
    def cast_predicate(self) -> Any:
        """Which parameters mlx_lm may cast: all but A_log, which stays float32."""
        self.refuse_copy()
        return lambda path: not path.endswith("A_log")
