"""Predict a model whose experts several machines share: reads of each, and sums between them.

`docs/reference/plan.md` derives the formulas.
"""

import re
from dataclasses import dataclass, replace
from math import comb
from typing import Any

from ..errors import FlashMoEError
from ..models.qwen3_5.args import PREFILL_CHUNK
from ..settings import MOST_RANKS
from .plan_model import Weights

ACTIVATION_BYTES = 2  # of one number on a GPU


@dataclass(frozen=True)
class Link:
    """What connects the machines: bytes per second, and seconds for the smallest message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machines:
    """Several equal machines, each with the trunk and an equal part of every layer's experts."""

    count: int
    link: Link

    def share(self, weights: Weights, top_k: float) -> Weights:
        """Return one machine's weights, if a token uses `top_k` of its experts per layer."""
        return replace(weights, experts=weights.experts / self.count, top_k=top_k)

    def busiest(self, weights: Weights) -> float:
        """Return how many of a token's experts the machine with most has: all wait for it.

        The mean over layers and tokens, under uniform routing.
        """
        experts, top_k = round(weights.experts), round(weights.top_k)
        sizes = [len(range(rank, experts, self.count)) for rank in range(self.count)]

        def at_most(most: int) -> float:
            """Return the probability that no machine has more."""
            ways = [1] + [0] * top_k  # to choose so many experts of the machines so far
            for size in sizes:
                ways = [
                    sum(comb(size, own) * ways[k - own] for own in range(min(most, k) + 1))
                    for k in range(top_k + 1)
                ]
            return ways[top_k] / comb(experts, top_k)

        return sum(1 - at_most(most) for most in range(top_k))

    def sum_seconds(self, nbytes: float) -> float:
        """Predict the sum over a ring of so many bytes on each machine."""
        steps = 2 * (self.count - 1)
        return steps * (self.link.latency + nbytes / self.count / self.link.bandwidth)

    def token_bytes(self, weights: Weights) -> float:
        """Return the bytes of one layer's sum: the outputs of one token's experts."""
        return weights.top_k * weights.hidden * ACTIVATION_BYTES

    def token_seconds(self, weights: Weights) -> float:
        """Predict all sums of one decoded token."""
        return weights.layers * self.sum_seconds(self.token_bytes(weights))

    def prefill_seconds(self, weights: Weights, tokens: int) -> float:
        """Predict all sums of a prompt, whose tokens' experts are added up before."""
        chunks = [min(PREFILL_CHUNK, tokens - n) for n in range(0, tokens, PREFILL_CHUNK)]
        row = weights.hidden * ACTIVATION_BYTES
        return weights.layers * sum(self.sum_seconds(chunk * row) for chunk in chunks)

    def as_dict(self, weights: Weights, bank: float) -> dict[str, Any]:
        """Return each machine's part as plain JSON values; `bank` is its expert cache."""
        return {
            "count": self.count,
            "link_bytes_per_s": self.link.bandwidth, "link_latency": self.link.latency,
            "disk_bytes": weights.trunk + weights.expert_bytes / self.count,
            "memory_bytes": weights.trunk + bank,
            "experts_per_token": weights.top_k / self.count, "busiest": self.busiest(weights),
            "sum_bytes": self.token_bytes(weights), "sum_seconds": self.token_seconds(weights),
        }  # fmt: skip


def read_machines(count: int | None, link: str | None, weights: Weights) -> Machines | None:
    """Read --machines and --link; None if neither is given.

    Raises:
        FlashMoEError: one of them is missing, or out of range.
    """
    if count is None and link is None:
        return None
    if count is None or link is None:
        raise FlashMoEError(
            "--machines and --link go together. Give the number of machines and what connects "
            "them, such as --machines 2 --link 40gbps,30us."
        )
    most = round(min(MOST_RANKS, weights.experts))
    if not 2 <= count <= most:
        raise FlashMoEError(f"--machines must be from 2 to {most}, got {count}")
    return Machines(count, _read_link(link))


def _read_link(text: str) -> Link:
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)gbps,(\d{1,6}(?:\.\d{1,6})?)(us|ms)", text)
    if match is None or not float(match[1]):
        raise FlashMoEError(
            f"--link {text[:80]} is not a bandwidth above 0 and a latency. Write both, such as "
            "40gbps,30us."
        )
    return Link(float(match[1]) * 1e9 / 8, float(match[2]) * {"us": 1e-6, "ms": 1e-3}[match[3]])


def render(machines: dict[str, Any], found: dict[str, Any]) -> str:
    """Format each machine's part as two lines of a plan."""
    n = machines["count"]
    share = 100 * machines["sum_seconds"] * found["decode_tokens_per_s"]
    return (
        f"machines {n}, each with the trunk and 1/{n} of the experts: "
        f"{machines['disk_bytes'] / 1e9:.3g} GB on disk, {machines['memory_bytes'] / 1e9:.3g} GB "
        f"in memory;\n         of a token's {found['top_k']} experts per layer each has "
        f"{machines['experts_per_token']:.3g}, the one with most, which all wait for, "
        f"{machines['busiest']:.3g}\n"
        f"link     {machines['link_bytes_per_s'] * 8 / 1e9:g} Gbit/s, "
        f"{1e6 * machines['link_latency']:g} us: {found['layers']} sums of "
        f"{machines['sum_bytes'] / 1e3:.3g} kB per token take {1e3 * machines['sum_seconds']:.3g} "
        f"ms, {share:.2g} % of its time\n"
    )
