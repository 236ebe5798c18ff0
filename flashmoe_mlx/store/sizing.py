"""How many slots each layer has, and how experts are read."""

from dataclasses import dataclass, replace

from ..errors import FlashMoEError
from ..format.layout import ExpertLayout


@dataclass(frozen=True)
class IoPlan:
    """Whether reads go past the page cache (direct) or through it, and why."""

    direct: bool
    reason: str

    def __str__(self) -> str:
        """Describe the reads."""
        return f"{'direct' if self.direct else 'buffered'} reads ({self.reason})"


COMFORT = 0.7  # share of the available memory that trunk and experts take without being asked
BUFFERED = IoPlan(False, "the default")


@dataclass(frozen=True)
class CachePlan:
    """Slots per layer, their total bytes, the reason, and how experts are read."""

    slots: int
    nbytes: int
    reason: str
    io: IoPlan = BUFFERED

    def __str__(self) -> str:
        """Return one readable line."""
        return (
            f"Expert cache: {self.nbytes / 2**20:.0f} MiB, "
            f"{self.slots} experts per layer ({self.reason}); {self.io}"
        )


def requested_slots(expert_cache: int | str, layout: ExpertLayout, top_k: int) -> int | None:
    """Return the slots per layer for a size in bytes, None for "auto".

    Raises:
        FlashMoEError: the size holds fewer experts than one token needs.
    """
    if expert_cache == "auto":
        return None
    slots = min(int(expert_cache) // layout.token_bytes, layout.num_experts)
    if slots < top_k:
        raise FlashMoEError(
            f"expert_cache = {expert_cache} bytes holds {slots} experts per layer, but each "
            f"token uses {top_k}. Give at least {top_k * layout.token_bytes} bytes, or auto."
        )
    return slots


def plan_cache(
    expert_cache: int | str,
    layout: ExpertLayout,
    top_k: int,
    trunk_bytes: int,
    available: int,
    io: IoPlan = BUFFERED,
    activations: int = 0,
    apart: bool = False,
) -> CachePlan:
    """Choose how many slots each layer gets.

    `auto` keeps all experts resident if they and the trunk fit in 70 % of the available memory.
    Otherwise the slots take a quarter of the memory that the trunk leaves, because the page cache
    holds experts as well and shrinks under pressure. Direct reads bypass the page cache, so the
    slots take the rest of the 70 %, or less if a prompt chunk's activations need more.

    Args:
        expert_cache: bytes for all layers together, or "auto".
        layout: where the experts lie.
        top_k: experts per token, the least number of slots.
        trunk_bytes: bytes of resident weights.
        available: bytes that may still be allocated.
        io: how experts are read.
        activations: bytes of a prompt chunk's activations.
        apart: whether slots lie in GPU memory, which the page cache cannot use.

    Raises:
        FlashMoEError: the size holds fewer experts than one token needs, or is not available.
    """
    experts, per_slot = layout.num_experts, layout.token_bytes
    total = experts * per_slot
    smallest = CachePlan(top_k, top_k * per_slot, "the smallest bank, one token's experts", io)
    slots = requested_slots(expert_cache, layout, top_k)
    if slots is not None:
        if int(expert_cache) > available:
            raise FlashMoEError(
                f"expert_cache = {expert_cache} bytes is more than the {available} bytes of memory "
                "that are available. Give less, or auto."
            )
        why = "all experts fit in memory" if slots == experts else "as asked"
        return CachePlan(slots, slots * per_slot, why, io)
    share, why = automatic_bytes(total, trunk_bytes, available, io.direct or apart, activations)
    slots = int(share // per_slot)
    if slots <= top_k and share < total:
        return replace(smallest, reason="memory is short: " + smallest.reason)
    slots = min(slots, experts)
    return CachePlan(slots, slots * per_slot, why, io)


def automatic_bytes(
    expert_bytes: int, trunk_bytes: int, available: int, alone: bool, activations: int = 0
) -> tuple[float, str]:
    """Return the bytes that `auto` gives to the slots, and why; `alone`: without a page cache."""
    comfort = COMFORT * available - trunk_bytes
    if expert_bytes <= comfort:
        return expert_bytes, "all experts fit in memory"
    if not alone:
        return (available - trunk_bytes) * 0.25, "a quarter of the memory that the trunk leaves"
    if (rest := available - trunk_bytes - activations) < comfort:
        return rest, "what trunk and activations leave"
    return comfort, "70 % of the memory, less the trunk"
