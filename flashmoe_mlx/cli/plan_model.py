"""Predict a streamed model's speed from reads, copies, weights and launches.

`docs/reference/plan.md` derives each formula and names the source of each constant. Sizes are in
bytes, rates in bytes per second, times in seconds. If `Machine.memory` cannot hold the trunk, one
token's experts and the system, functions raise the FlashMoEError of `free_bytes`.
"""

from dataclasses import dataclass

from ..errors import FlashMoEError
from ..models.families import Family
from ..models.qwen3_5.args import PREFILL_CHUNK, ModelArgs, check_top_k
from ..models.qwen3_5.geometry import GEOMETRIES

HIT_EXPONENT = 0.2  # an LRU cache that holds a share f of the experts hits f ** HIT_EXPONENT
COPY_SHARE = 0.07  # of memory bandwidth, when copying an expert from the page cache
KERNEL_SHARE = 0.8  # of memory bandwidth, when kernels read weights
SYSTEM_BYTES = 7.5e9  # used by the system and other programs
GPU_SHARE = 0.75  # of memory, the most that macOS gives the GPU, banks included
VOCABULARY = 248_320


@dataclass(frozen=True)
class Machine:
    """A machine: installed memory, SSD rate in random cold reads of experts, memory bandwidth.

    `system` is the memory that other programs use, `copy` the measured rate of reads from the page
    cache, None for COPY_SHARE of the bandwidth.
    """

    memory: float
    ssd: float
    bandwidth: float
    source: str
    system: float = SYSTEM_BYTES
    copy: float | None = None

    @property
    def copy_rate(self) -> float:
        """Bytes per second of reads from the page cache."""
        return self.copy or COPY_SHARE * self.bandwidth


@dataclass(frozen=True)
class Engine:
    """An implementation: its overhead per layer and token, and whether it reads while computing."""

    layer_seconds: float
    overlaps: bool = False


@dataclass(frozen=True)
class Weights:
    """A model's bytes: the trunk, the part of it that a token reads, and one expert's record.

    Of one of several machines, `experts` and `top_k` are its share. `hidden` is the width.
    """

    trunk: float
    trunk_read: float
    record: float
    layers: int
    experts: float
    top_k: float
    hidden: int

    @property
    def expert_bytes(self) -> float:
        """Bytes of all experts."""
        return self.layers * self.experts * self.record

    @property
    def token_bytes(self) -> float:
        """Bytes of the experts that one token uses."""
        return self.layers * self.top_k * self.record


@dataclass(frozen=True)
class Decode:
    """The prediction for one decoded token.

    `hits` includes hits in the bank and in the page cache. Seconds: `copied` from the page cache,
    `read` from the SSD, `computed` (reading weights from memory), `waited` (launches and waits).
    """

    bank: float
    page_cache: float
    bank_hits: float
    hits: float
    copied: float
    read: float
    computed: float
    waited: float
    seconds: float


def named_args(name: str) -> ModelArgs:
    """Return the arguments of a model in GEOMETRIES."""
    sizes = GEOMETRIES[name]._asdict()
    inner = sizes["moe_intermediate_size"]
    return ModelArgs(
        "qwen3_5_moe", vocab_size=VOCABULARY, shared_expert_intermediate_size=inner, **sizes
    )


def count_bytes(
    args: ModelArgs, bits: float, top_k: int | None = None, trunk_bits: int = 4, group: int = 64
) -> Weights:
    """Count a model's bytes: experts at `bits`, trunk at `trunk_bits`, routers at 8.

    Args:
        args: the model's sizes.
        bits: bits per weight of the routed experts.
        top_k: experts per token instead of the model's own.
        trunk_bits: bits per weight of the other matrices.
        group: number of weights that share a 16-bit scale and a 16-bit bias.

    Raises:
        FlashMoEError: top_k is larger than the number of experts.
    """
    top_k = args.num_experts_per_tok if top_k is None else top_k
    check_top_k(top_k, args.num_experts, "--top-k")
    hidden, layers = args.hidden_size, args.num_hidden_layers
    linear = sum(args.is_linear(layer) for layer in range(layers))
    matrices = linear * _linear(args) + (layers - linear) * _attention(args)
    matrices += layers * 3 * hidden * args.shared_expert_intermediate_size
    table = args.vocab_size * hidden
    read = (matrices + table) * _bytes(trunk_bits, group)
    read += layers * hidden * (args.num_experts + 1) * _bytes(8, group)
    embedding = 0 if args.tie_word_embeddings else table * _bytes(trunk_bits, group)
    record = 3 * hidden * args.moe_intermediate_size * _bytes(bits, group)
    return Weights(read + embedding, read, record, layers, args.num_experts, top_k, hidden)


def count_family(family: Family, bits: int | None = None, top_k: int | None = None) -> Weights:
    """Count the bytes of another family's model: the trunk at 4 bits, in groups of 64.

    Args:
        family: its sizes.
        bits: bits per weight of the routed experts; as published for MLX by default.
        top_k: experts per token instead of the model's own.

    Raises:
        FlashMoEError: top_k is larger than the number of experts.
    """
    top_k = family.num_experts_per_tok if top_k is None else top_k
    check_top_k(top_k, family.num_experts, "--top-k")
    weights = 3 * family.hidden_size * family.moe_intermediate_size
    record = weights * (family.expert_bits / 8 if bits is None else _bytes(bits, 64))
    trunk, read = (n * _bytes(4, 64) for n in (family.trunk, family.trunk - family.table))
    experts = family.layers, family.num_experts, top_k
    return Weights(trunk, read, record, *experts, family.hidden_size)


def _bytes(bits: float, group: int) -> float:
    return (bits + 32 / group) / 8


def _linear(args: ModelArgs) -> int:
    """Count the weights in one GatedDeltaNet layer's matrices."""
    keys = args.linear_num_key_heads * args.linear_key_head_dim
    values = args.linear_num_value_heads * args.linear_value_head_dim
    inner = 2 * keys + 3 * values + 2 * args.linear_num_value_heads  # q, k; v, z, out; a, b
    return args.hidden_size * inner


def _attention(args: ModelArgs) -> int:
    """Count the weights in one attention layer's matrices: q and its gate, k, v, o."""
    heads = 3 * args.num_attention_heads + 2 * args.num_key_value_heads
    return args.hidden_size * heads * args.head_dim


def hit_rate(cached: float) -> float:
    """Return the hit rate of an LRU cache that holds the share `cached` of the experts."""
    return min(max(cached, 0.0), 1.0) ** HIT_EXPONENT


def free_bytes(weights: Weights, machine: Machine) -> float:
    """Return the memory left for experts in bank and page cache together.

    Raises:
        FlashMoEError: one token's experts do not fit.
    """
    free = machine.memory - machine.system - weights.trunk
    if free < weights.token_bytes:
        need = needed_bytes(weights, machine)
        raise FlashMoEError(
            f"--ram {machine.memory / 1e9:g} GB is too small: trunk, one token's experts and the "
            f"system need {need / 1e9:.1f} GB. Choose a smaller model, or fewer bits."
        )
    return free


def needed_bytes(weights: Weights, machine: Machine) -> float:
    """Return the least memory: trunk, one token's experts and the system."""
    return machine.system + weights.trunk + weights.token_bytes


def largest_bank(weights: Weights, machine: Machine) -> float:
    """Return the largest possible size of the slot banks."""
    return min(free_bytes(weights, machine), GPU_SHARE * machine.memory - weights.trunk)


def decode(weights: Weights, machine: Machine, engine: Engine, bank: float = 0.0) -> Decode:
    """Predict one decoded token in the steady state, with slot banks of `bank` bytes.

    Bank and page cache hold the same experts, so the larger of the two determines the share of
    requests that need no read from the SSD.
    """
    page_cache = max(0.0, free_bytes(weights, machine) - bank)
    bank_hits = hit_rate(bank / weights.expert_bytes)
    hits = max(bank_hits, hit_rate(page_cache / weights.expert_bytes))
    copied = weights.token_bytes * (hits - bank_hits) / machine.copy_rate
    read = weights.token_bytes * (1 - hits) / machine.ssd
    computed = (weights.trunk_read + weights.token_bytes) / (KERNEL_SHARE * machine.bandwidth)
    waited = weights.layers * engine.layer_seconds
    compute, arrive = computed + waited, copied + read
    seconds = max(compute, arrive) if engine.overlaps else compute + arrive
    return Decode(bank, page_cache, bank_hits, hits, copied, read, computed, waited, seconds)


def distinct_experts(weights: Weights, tokens: int) -> float:
    """Return how many experts of a layer a chunk uses at most, under uniform routing."""
    return weights.experts * (1 - (1 - weights.top_k / weights.experts) ** tokens)


def prefill_seconds(
    weights: Weights, machine: Machine, engine: Engine, tokens: int, bank: float = 0.0
) -> float:
    """Predict a lower bound for a prefill that reads each expert once per chunk.

    A chunk uses nearly all experts, so the share of them in memory is also the hit rate. The
    bound does not include the GPU's arithmetic.
    """
    page_cache = max(0.0, free_bytes(weights, machine) - bank)
    in_bank = min(1.0, bank / weights.expert_bytes)
    held = max(in_bank, min(1.0, page_cache / weights.expert_bytes))
    per_byte = (held - in_bank) / machine.copy_rate + (1 - held) / machine.ssd
    total = 0.0
    for start in range(0, tokens, PREFILL_CHUNK):
        touched = distinct_experts(weights, min(PREFILL_CHUNK, tokens - start))
        nbytes = weights.layers * touched * weights.record
        computed = (weights.trunk_read + nbytes) / (KERNEL_SHARE * machine.bandwidth)
        total += nbytes * per_byte + computed + weights.layers * engine.layer_seconds
    return total


def bank_sizes(weights: Weights, machine: Machine) -> list[float]:
    """Return bank sizes to compare: one token's experts, shares of the free memory, all experts."""
    free, most = free_bytes(weights, machine), largest_bank(weights, machine)
    shares = [free * share for share in (0.125, 0.25, 0.5, 0.75)]
    sizes = [s for s in (*shares, weights.expert_bytes) if weights.token_bytes < s <= most]
    return [weights.token_bytes, *(s for s in sizes if s <= weights.expert_bytes)]


def most_advised(weights: Weights, machine: Machine) -> float:
    """Return the largest bank to advise, unless all experts fit: half of the free memory."""
    return max(free_bytes(weights, machine) / 2, weights.token_bytes)


def advised(weights: Weights, machine: Machine, decodes: list[Decode]) -> Decode:
    """Return the fastest decode whose bank holds all experts or at most half of the free memory.

    In all published measurements, larger banks lost speed to memory pressure.
    """
    limit = most_advised(weights, machine)
    candidates = [d for d in decodes if d.bank <= limit or d.bank_hits == 1]
    return min(candidates, key=lambda d: d.seconds)
