"""mlx-lm's own GatedDeltaNet layers, scanned by this package's kernels.

Without Metal, mlx-lm loops over a prompt's tokens in Python. Its function for that is replaced by
one that chooses: this package's models, while they compute, take our kernels; all others, stock's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx
from mlx_lm.models import gated_delta as stock

from ..custom_kernels.gated_delta.rule import rule_by_cpu, rule_by_gpu
from ..custom_kernels.op import Op

rule = Op(stock.gated_delta_ops)
rule.register(rule_by_cpu)
rule.register(rule_by_gpu)
_ours = ContextVar("ours", default=False)


def _chosen(*inputs: mx.array) -> tuple[mx.array, mx.array]:
    return rule(*inputs) if _ours.get() else rule.naive(*inputs)


stock.gated_delta_ops = _chosen


@contextmanager
def own_rule() -> Iterator[None]:
    """Compute mlx-lm's GatedDeltaNet layers by this package's kernels, in this thread."""
    before = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(before)
