"""Make a random-weight Qwen3.5 MoE checkpoint of true shape, for benchmarks and memory tests.

    python tools/make_synthetic.py --geometry 35b --layers 8 --out DIR

`--format mlx` writes what `mlx_lm.convert -q` would: stacked quantised experts, a quantised trunk,
and 8-bit routers. `--format hf` writes the bfloat16 layout of the Hugging Face Hub: fused experts,
norms stored as w for 1 + w, conv1d `[C, 1, 4]`. Both come with a byte-level tokenizer, so that
stock `mlx_lm.generate` runs on either.

Weights are random, of variance 1 / columns, so activations stay finite and the text is nonsense.
Every tensor is generated in blocks straight into its file: memory does not grow with the model,
and the same seed gives the same bytes whatever the shard size.
"""

import argparse
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe_mlx.bench.synthetic import END_OF_TURN, LEAST_VOCABULARY, text_config, write_tokenizer
from flashmoe_mlx.models.qwen3_5.geometry import GEOMETRIES

GIB = 1 << 30
BLOCK = 1 << 20  # elements generated at a time
FULL_ATTENTION_INTERVAL = 4
CONV_KERNEL = 4
ITEM_SIZE = {"U32": 4, "BF16": 2, "F32": 4}

Blocks = Callable[[np.random.Generator, int], np.ndarray]


@dataclass(frozen=True)
class Spec:
    """One tensor of the checkpoint, and what makes its blocks."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Blocks

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, nearest even, as uint16 bit patterns."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def random_codes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return `count` random uint32: quantised codes of any width, uniformly spread."""
    return rng.integers(0, 1 << 64, (count + 1) // 2, np.uint64).view(np.uint32)[:count]


def normals(rng: np.random.Generator, count: int, mean: float, sigma: float) -> np.ndarray:
    """Return `count` bfloat16 normals."""
    return to_bf16(mean + sigma * rng.standard_normal(count, np.float32))


@cache
def normal_runs(sigma: float) -> np.ndarray:
    """Return 65,536 runs of four bfloat16 normals, each run as one uint64.

    A random 16-bit number picks a run: ten times as fast as drawing each normal, and as random as
    a benchmark needs.
    """
    return normals(np.random.default_rng(1), 4 << 16, 0, sigma).view(np.uint64)


def fast_normals(rng: np.random.Generator, count: int, sigma: float) -> np.ndarray:
    """Return `count` bfloat16 normals of mean zero from the table."""
    picks = random_codes(rng, -(-count // 8)).view(np.uint16)
    return normal_runs(sigma)[picks].view(np.uint16)[:count]


def affine_blocks(columns: int, bits: int, part: str) -> Blocks:
    """Return a source of scales or biases that give weights a variance of 1 / columns.

    Uniform codes of b bits have the variance (4^b - 1) / 12. Each group's scale differs by up to
    20 per cent, so that a kernel which takes a neighbour's scale is found out.
    """
    scale = 1 / math.sqrt(columns * (4**bits - 1) / 12)
    table = to_bf16(scale * np.linspace(0.8, 1.2, 256, dtype=np.float32))
    if part == "biases":  # the middle code stands for zero; take the scales as they were rounded
        table = to_bf16((table.astype(np.uint32) << 16).view(np.float32) * (1 - 2**bits) / 2)

    def blocks(rng: np.random.Generator, count: int) -> np.ndarray:
        return table[random_codes(rng, -(-count // 4)).view(np.uint8)[:count]]

    return blocks


def decay_blocks(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return A_log: the logarithm of a decay rate, from slow heads to fast ones."""
    return np.log(rng.uniform(0.01, 8, count)).astype(np.float32)


class Checkpoint:
    """Lists the tensors of one model, in either format, without making them."""

    def __init__(self, geometry: str, layers: int, vocab: int, bits: int, group: int, fmt: str):
        """Plan a checkpoint; `layers` and `vocab` override the geometry's true counts."""
        self.name, self.geometry = geometry, GEOMETRIES[geometry]
        self.layers, self.vocab = layers, vocab
        self.bits, self.group, self.hf = bits, group, fmt == "hf"
        self.interval = min(FULL_ATTENTION_INTERVAL, layers)
        self.quantised_apart: dict[str, dict[str, int]] = {}
        self.root = "model.language_model" if self.hf else "language_model.model"

    def specs(self) -> Iterator[Spec]:
        """Yield every tensor, in the order of the layers."""
        hidden = self.geometry.hidden_size
        yield from self.linear(f"{self.root}.embed_tokens", (self.vocab, hidden))
        for layer in range(self.layers):
            prefix = f"{self.root}.layers.{layer}"
            yield self.norm(f"{prefix}.input_layernorm", hidden)
            yield self.norm(f"{prefix}.post_attention_layernorm", hidden)
            full = (layer + 1) % self.interval == 0
            yield from self.attention(prefix) if full else self.gated_delta_net(prefix)
            yield from self.experts(f"{prefix}.mlp")
        yield self.norm(f"{self.root}.norm", hidden)
        head = "lm_head" if self.hf else "language_model.lm_head"
        yield from self.linear(head, (self.vocab, hidden))

    def linear(self, module: str, shape: tuple[int, ...]) -> Iterator[Spec]:
        """Yield a projection `[..., out, in]`: one bfloat16 tensor, or three quantised ones."""
        columns = shape[-1]
        if self.hf:
            name = module if len(shape) == 3 else f"{module}.weight"
            sigma = 1 / math.sqrt(columns)
            yield Spec(name, "BF16", shape, partial(fast_normals, sigma=sigma))
            return
        bits, group = self.bits, self.group
        if module.endswith(("mlp.gate", "shared_expert_gate")):  # as mlx-lm's predicate says
            bits, group = 8, 64
            self.quantised_apart[module] = {"group_size": group, "bits": bits}
        if columns % group:
            raise ValueError(f"{module}: {columns} columns do not divide by group size {group}")
        packed, groups = (*shape[:-1], columns * bits // 32), (*shape[:-1], columns // group)
        yield Spec(f"{module}.weight", "U32", packed, random_codes)
        for part in ("scales", "biases"):
            yield Spec(f"{module}.{part}", "BF16", groups, affine_blocks(columns, bits, part))

    def plain(self, name: str, shape: tuple[int, ...], mean: float, sigma: float) -> Spec:
        """Return a small unquantised tensor of bfloat16 normals."""
        return Spec(name, "BF16", shape, partial(normals, mean=mean, sigma=sigma))

    def norm(self, module: str, size: int) -> Spec:
        """Return an RMSNorm weight, which Hugging Face stores less one."""
        return self.plain(f"{module}.weight", (size,), 0 if self.hf else 1, 0.1)

    def attention(self, layer: str) -> Iterator[Spec]:
        """Yield full attention; q_proj holds queries and the output gate."""
        g, prefix = self.geometry, f"{layer}.self_attn"
        hidden, width = g.hidden_size, g.num_attention_heads * g.head_dim
        yield from self.linear(f"{prefix}.q_proj", (2 * width, hidden))
        yield from self.linear(f"{prefix}.k_proj", (g.num_key_value_heads * g.head_dim, hidden))
        yield from self.linear(f"{prefix}.v_proj", (g.num_key_value_heads * g.head_dim, hidden))
        yield from self.linear(f"{prefix}.o_proj", (hidden, width))
        yield self.norm(f"{prefix}.q_norm", g.head_dim)
        yield self.norm(f"{prefix}.k_norm", g.head_dim)

    def gated_delta_net(self, layer: str) -> Iterator[Spec]:
        """Yield linear attention; its gated norm is stored as it is in both formats."""
        g, prefix = self.geometry, f"{layer}.linear_attn"
        hidden, heads = g.hidden_size, g.linear_num_value_heads
        width = heads * g.linear_value_head_dim
        channels = 2 * g.linear_num_key_heads * g.linear_key_head_dim + width
        yield from self.linear(f"{prefix}.in_proj_qkv", (channels, hidden))
        yield from self.linear(f"{prefix}.in_proj_z", (width, hidden))
        yield from self.linear(f"{prefix}.in_proj_b", (heads, hidden))
        yield from self.linear(f"{prefix}.in_proj_a", (heads, hidden))
        conv = (channels, 1, CONV_KERNEL) if self.hf else (channels, CONV_KERNEL, 1)
        yield self.plain(f"{prefix}.conv1d.weight", conv, 0, 0.5)
        yield Spec(f"{prefix}.A_log", "F32", (heads,), decay_blocks)
        yield self.plain(f"{prefix}.dt_bias", (heads,), 0, 1)
        yield self.plain(f"{prefix}.norm.weight", (g.linear_value_head_dim,), 1, 0.1)
        yield from self.linear(f"{prefix}.out_proj", (hidden, width))

    def experts(self, mlp: str) -> Iterator[Spec]:
        """Yield the router, the shared expert and the routed experts."""
        g = self.geometry
        count, hidden, inner = g.num_experts, g.hidden_size, g.moe_intermediate_size
        yield from self.linear(f"{mlp}.gate", (count, hidden))
        yield from self.linear(f"{mlp}.shared_expert_gate", (1, hidden))
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (hidden, inner) if name == "down_proj" else (inner, hidden)
            yield from self.linear(f"{mlp}.shared_expert.{name}", shape)
            if not self.hf:
                yield from self.linear(f"{mlp}.switch_mlp.{name}", (count, *shape))
        if self.hf:
            yield from self.linear(f"{mlp}.experts.gate_up_proj", (count, 2 * inner, hidden))
            yield from self.linear(f"{mlp}.experts.down_proj", (count, hidden, inner))

    def config(self) -> dict[str, Any]:
        """Return config.json; call it after `specs` has been walked."""
        kinds = ["linear_attention"] * (self.interval - 1) + ["full_attention"]
        text = text_config(self.name, self.layers, self.vocab)
        text["layer_types"] = [kinds[i % self.interval] for i in range(self.layers)]
        config: dict[str, Any] = {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
            "text_config": text, "tie_word_embeddings": False, "eos_token_id": END_OF_TURN,
        }  # fmt: skip
        if not self.hf:
            shared = {"group_size": self.group, "bits": self.bits, "mode": "affine"}
            config["quantization"] = {**shared, **self.quantised_apart}
            config["quantization_config"] = config["quantization"]
        return config


def split_shards(specs: list[Spec], max_shard: int) -> list[list[Spec]]:
    """Cut the tensors into files of at most `max_shard` bytes, or of one larger tensor."""
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def write_shard(path: Path, specs: list[Spec], seed: int, fmt: str) -> None:
    """Write one safetensors file, a block at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt" if fmt == "hf" else "mlx"}}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        place = {"data_offsets": [begin, end]}
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, **place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            # One seed for scales and biases, so that each bias belongs to its scale.
            name = spec.name.replace(".biases", ".scales")
            rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
            count = math.prod(spec.shape)
            for start in range(0, count, BLOCK):
                block = spec.blocks(rng, min(BLOCK, count - start))
                data = memoryview(block.data).cast("B")
                while data:
                    data = data[file.write(data) :]


def make_synthetic(
    out: Path,
    geometry: str,
    layers: int,
    vocab: int = 32768,
    bits: int = 4,
    group_size: int = 64,
    fmt: str = "mlx",
    seed: int = 0,
    max_shard: int = GIB,
) -> int:
    """Write a checkpoint into `out` and return its tensors' bytes."""
    known = bits in (2, 3, 4, 5, 6, 8) and fmt in ("mlx", "hf")
    if not known or layers < 2 or vocab < LEAST_VOCABULARY:
        raise ValueError(f"cannot make {layers} layers, vocabulary {vocab}, {bits} bits, {fmt!r}")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.safetensors")):
        raise FileExistsError(f"{out} holds a checkpoint already; give an empty directory")
    plan = Checkpoint(geometry, layers, vocab, bits, group_size, fmt)
    shards = split_shards(list(plan.specs()), max_shard)
    weight_map: dict[str, str] = {}
    for index, specs in enumerate(shards, 1):
        name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        write_shard(out / name, specs, seed, fmt)
        weight_map |= {spec.name: name for spec in specs}
    total = sum(spec.nbytes for specs in shards for spec in specs)
    index_json = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))
    (out / "config.json").write_text(json.dumps(plan.config(), indent=2))
    write_tokenizer(out)
    return total


def parse_size(text: str) -> int:
    """Read "1GiB", "500MiB" or plain bytes."""
    for exponent, unit in enumerate(("KiB", "MiB", "GiB"), 1):
        if text.endswith(unit):
            return int(text.removesuffix(unit)) << (10 * exponent)
    return int(text)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, required=True)
    parser.add_argument("--layers", type=int, help="default: as many as the true model has")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--format", dest="fmt", choices=("mlx", "hf"), default="mlx")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-shard", type=parse_size, default=GIB, metavar="SIZE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.layers = args.layers or GEOMETRIES[args.geometry].num_hidden_layers
    start = time.perf_counter()
    total = make_synthetic(**vars(args))
    seconds = time.perf_counter() - start
    print(f"{args.out}: {total:,} bytes in {seconds:.1f} s ({total / seconds / 1e9:.2f} GB/s)")


if __name__ == "__main__":
    main()
