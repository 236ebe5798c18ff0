"""From router logits to experts: softmax, top-k and renormalization."""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import reference
from ..autotune import prefers_custom
from ..case import DTYPES, NAMES
from ..cpu.entry import cpu_steps
from ..device import on_gpu
from ..launch import SIMD, Kernel
from ..op import Op
from ..shapes import expect_count

MAX_TOP_K = SIMD
_kernel = Kernel("experts/router", ("logits",), ("ids", "weights"))


def route(
    logits: mx.array, top_k: int, *, renormalize: bool, shared: bool
) -> tuple[mx.array, mx.array]:
    """Select each token's experts, by the GPU kernel.

    Args:
        logits: `[..., experts]`, or `[..., experts + 1]` with `shared`.
        top_k: experts per token, at most MAX_TOP_K.
        renormalize: make the selected weights sum to 1.
        shared: the last logit is the gate of the shared expert.

    Returns:
        ids `[..., K]` uint32, best first; and weights `[..., K]` float32, or `[..., K + 1]` with
        the shared expert's weight sigmoid(gate) last.
    """
    *lead, width = logits.shape
    tokens = logits.size // width
    expect_count("experts per token", top_k, min(MAX_TOP_K, width - shared))
    ids, weights = _kernel(
        [logits],
        [((*lead, top_k), mx.uint32), ((*lead, top_k + shared), mx.float32)],
        (tokens, 1, 1),
        SIMD,
        T=logits.dtype,
        EXPERTS=width - shared,
        K=top_k,
        RENORMALISE=renormalize,
        SHARED=shared,
    )
    return ids, weights


def route_by_mlx(
    logits: mx.array, top_k: int, *, renormalize: bool, shared: bool
) -> tuple[mx.array, mx.array]:
    """Compute `route` by MLX's own ops, as in mlx-lm; ids come in any order."""
    scores = mx.softmax(logits[..., :-1] if shared else logits, axis=-1, precise=True)
    ids = mx.argpartition(scores, kth=-top_k, axis=-1)[..., -top_k:]
    weights = mx.take_along_axis(scores, ids, axis=-1)
    if renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    if shared:
        weights = mx.concatenate([weights, mx.sigmoid(logits[..., -1:])], axis=-1)
    return ids, weights


@Op
def choose_experts(logits: mx.array, top_k: int, renormalize: bool) -> tuple[mx.array, mx.array]:
    """Select each token's experts: from logits `[..., experts]` to ids and weights `[..., K]`."""
    return route_by_mlx(logits, top_k, renormalize=renormalize, shared=False)


@choose_experts.register
def _choose_by_gpu(
    logits: mx.array, top_k: int, renormalize: bool
) -> tuple[mx.array, mx.array] | None:
    if not on_gpu(logits) or top_k > MAX_TOP_K:
        return None
    if not prefers_custom(RouterCase(logits.shape[-1], top_k, NAMES[logits.dtype])):
        return None
    return route(logits, top_k, renormalize=renormalize, shared=False)


@Op
def router_logits(h: mx.array, router: nn.Module, norm: nn.RMSNorm) -> np.ndarray | None:
    """Return a router's logits of norm(h), `[B, experts]`; None if that would block on a GPU.

    Args:
        h: `[B, 1, H]`.
        router: to one logit per expert.
        norm: the norm before it.
    """
    return None


@router_logits.register
def _logits_by_cpu(h: mx.array, router: nn.Module, norm: nn.RMSNorm) -> np.ndarray | None:
    steps = cpu_steps(h)
    return steps.router_logits(h, router, norm) if steps else None


@dataclass(frozen=True)
class RouterCase:
    """`route` at one shape: each expert's weight, 0 if not selected. See `case.KernelCase`."""

    op: ClassVar[str] = "router"
    experts: int
    top_k: int
    dtype: str
    tokens: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of logits, ids and weights."""
        per_token = (self.experts + 1) * DTYPES[self.dtype].size + 8 * self.top_k + 4
        return self.tokens * per_token

    def inputs(self, seed: int = 0) -> list[mx.array]:
        """Make logits without ties, so that the selection is unique in every dtype."""
        keys = mx.random.split(mx.random.key(seed), self.tokens + 1)
        order = mx.stack([mx.random.permutation(self.experts, key=k) for k in keys[1:]])
        logits = (order.astype(mx.float32) - self.experts / 2) / 32
        gate = mx.random.normal((self.tokens, 1), key=keys[0])
        logits = mx.concatenate([logits, gate], axis=-1).astype(DTYPES[self.dtype])
        mx.eval(logits)
        return [logits]

    def custom(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by our kernel."""
        return self._spread(*route(inputs[0], self.top_k, renormalize=True, shared=True))

    def stock(self, *inputs: mx.array) -> list[mx.array]:
        """Compute by MLX's own ops."""
        return self._spread(*route_by_mlx(inputs[0], self.top_k, renormalize=True, shared=True))

    def reference(self, *inputs: mx.array) -> list[mx.array]:
        """Compute in float32."""
        logits = inputs[0].astype(mx.float32)
        return [reference.route(logits[:, :-1], self.top_k), mx.sigmoid(logits[:, -1:])]

    def _spread(self, ids: mx.array, weights: mx.array) -> list[mx.array]:
        """Return each expert's weight `[N, experts]`, 0 if not selected, and the shared one's."""
        chosen = ids[..., None] == mx.arange(self.experts, dtype=ids.dtype)
        routed = (chosen * weights[:, :-1, None]).sum(axis=1)
        return [routed, weights[:, -1:]]
