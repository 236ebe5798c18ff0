"""Tiny random Qwen3.5 MoE checkpoints, in every published naming."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.convert import convert as stock_convert
from mlx_lm.models import qwen3_5_moe
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flashmoe_mlx.cli.stock import stacked_experts
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.layout import open_layout

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, VOCABULARY = 128, 64, 8, 4, 96
LAYER_BYTES = EXPERTS * 3 * INTERMEDIATE * HIDDEN * 9 // 16  # in 4 bits

TEXT_CONFIG = {
    "model_type": "qwen3_5_moe_text", "hidden_size": HIDDEN, "intermediate_size": 64,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "vocab_size": VOCABULARY, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 48,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "num_experts": EXPERTS,
    "num_experts_per_tok": 2, "moe_intermediate_size": INTERMEDIATE,
    "shared_expert_intermediate_size": 64, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
    },
}  # fmt: skip

Weights = dict[str, mx.array]


def make_config(**text: Any) -> dict[str, Any]:
    return {"model_type": "qwen3_5_moe", "text_config": copy.deepcopy(TEXT_CONFIG) | text}


def make_weights(config: dict[str, Any], dtype: mx.Dtype = mx.bfloat16, seed: int = 7) -> Weights:
    """Random weights with mlx-lm's names, but Hugging Face's norms and convolutions."""
    mx.random.seed(seed)
    args = qwen3_5_moe.ModelArgs.from_dict(copy.deepcopy(config))
    shapes = {k: v.shape for k, v in tree_flatten(qwen3_5_moe.Model(args).parameters())}
    weights = {k: (mx.random.normal(s) * 0.1).astype(dtype) for k, s in sorted(shapes.items())}
    for name, value in weights.items():
        if name.endswith("A_log"):
            weights[name] = value.astype(mx.float32)
        if "conv1d" in name:
            weights[name] = value.moveaxis(1, 2)
    return weights


def fused(weights: Weights) -> Weights:
    """Return the Hub's experts: gate_up_proj `[E, 2I, H]` and down_proj `[E, H, I]`."""
    result = {k: v for k, v in weights.items() if "switch_mlp" not in k}
    for name in weights:
        if name.endswith("switch_mlp.up_proj.weight"):
            stem = name.removesuffix("switch_mlp.up_proj.weight")
            halves = [weights[f"{stem}switch_mlp.{p}_proj.weight"] for p in ("gate", "up")]
            result[f"{stem}experts.gate_up_proj"] = mx.concatenate(halves, axis=1)
            result[f"{stem}experts.down_proj"] = weights[f"{stem}switch_mlp.down_proj.weight"]
    return result


def separate(weights: Weights) -> Weights:
    """Return one tensor per expert and projection."""
    result = {}
    for name, value in weights.items():
        stem, middle, rest = name.partition("switch_mlp.")
        if middle:
            result |= {f"{stem}experts.{e}.{rest}": value[e] for e in range(value.shape[0])}
        else:
            result[name] = value
    return result


def spell(weights: Weights, prefix: str) -> Weights:
    """Replace the prefix `language_model.model.` with another published one."""

    def rename(name: str) -> str:
        name = name.replace("language_model.lm_head", "lm_head")
        return name.replace("language_model.model.", prefix)

    return {rename(name): value for name, value in weights.items()}


def extras() -> Weights:
    """Tensors that text generation does not use, with similar names."""
    return {
        "model.visual.blocks.0.norm1.weight": mx.ones((16,), mx.bfloat16),
        "mtp.layers.0.mlp.experts.gate_up_proj": mx.ones((EXPERTS, 2, 2), mx.bfloat16),
        "mtp.norm.weight": mx.ones((HIDDEN,), mx.bfloat16),
    }


def write_tokenizer(directory: Path) -> None:
    words = {f"w{n}": n for n in range(VOCABULARY - 2)}
    words |= {"<|endoftext|>": VOCABULARY - 2, "<|im_end|>": VOCABULARY - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="<|im_end|>"
    )
    tokenizer.save_pretrained(directory)


def save(directory: Path, config: dict[str, Any], weights: Weights, shards: int = 1) -> Path:
    """Write a checkpoint and a tokenizer; tensors that belong together are in different files."""
    names = sorted(weights)
    write_weights(directory, config, weights, [names[n::shards] for n in range(shards)])
    write_tokenizer(directory)
    return directory


def save_in_order(directory: Path, config: dict[str, Any], weights: Weights, shards: int) -> None:
    """Write a checkpoint without a tokenizer, layer by layer as in published ones."""
    names, size = sorted(weights), -(-len(weights) // shards)
    write_weights(directory, config, weights, [names[n * size :][:size] for n in range(shards)])


def write_weights(
    directory: Path, config: dict[str, Any], weights: Weights, files: list[list[str]]
) -> None:
    """Write config.json, weight files, and an index if there are several."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    index = {}
    for number, names in enumerate(files, 1):
        file = "model.safetensors"
        if len(files) > 1:
            file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            index |= dict.fromkeys(names, file)
        part = {name: weights[name] for name in names}
        mx.save_safetensors(str(directory / file), part, metadata={"format": "mlx"})
    if index:
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": index}))


def load(directory: Path, pattern: str = "model*.safetensors") -> Weights:
    result: Weights = {}
    for path in sorted(directory.glob(pattern)):
        result |= mx.load(str(path))
    return result


def layer(directory: Path, number: int) -> Weights:
    """Return the tensors of a layer file that we wrote."""
    return mx.load(str(directory / f"model_experts/layer_{number:02d}.safetensors"))


def same(left: mx.array, right: mx.array) -> bool:
    """Return whether dtype, shape and every bit are equal."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = [mx.contiguous(x).reshape(-1).view(mx.uint8) for x in (left, right)]
    return bool(mx.array_equal(*flat))


def write_checkpoints(root: Path) -> Path:
    """Write a Hub-like bfloat16 checkpoint `hf`, and stock mlx-lm's 4-bit conversion `stock`."""
    config = make_config()
    weights = spell(fused(make_weights(config)), "model.language_model.") | extras()
    write_tokenizer(save(root / "hf", config, weights, shards=3))
    stock_convert(str(root / "hf"), str(root / "stock"), quantize=True)
    return root


def unpack(packed: Path, out: Path, shards: int = 1) -> Path:
    """Write a packed directory's weights as a stock checkpoint."""
    config = read(packed / "config.json")
    del config["model_file"], config["flashmoe"]
    text = config["text_config"]
    experts = stacked_experts(packed, text["num_hidden_layers"], text["num_experts"])
    save_in_order(out, config, load(packed) | experts, shards)
    ours = "config.json", "model.safetensors.index.json", "flashmoe_model.py"
    for source in packed.iterdir():
        if source.suffix in (".json", ".jinja", ".py") and source.name not in ours:
            shutil.copy(source, out)
    return out


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file below a directory, with its bytes."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def assert_not_whole(out: Path) -> None:
    """Either the manifest is missing, or everything is there."""
    if (out / "model_experts/manifest.json").exists():
        open_layout(out, LAYERS, EXPERTS)
    else:
        with pytest.raises(FlashMoEError, match=r"unfinished|no model\*.safetensors"):
            open_layout(out, LAYERS, EXPERTS)


# Reads lines "CALL OUT", and converts its checkpoint in a fork that sends itself SIGKILL at that
# system call: before it, after it, or after half of a write; an argument after the checkpoint's
# has more options as JSON. Prints the signal, or the names of the
# calls of a complete conversion. MLX computes nothing in the parent, so that forks are safe.
KILLER = """
import json, os, signal, sys, threading
from flashmoe_mlx import loader  # so that forks do not load transformers
from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.quant import min_max_cpu  # nor numba

calls, last, lock = [], 0, threading.Lock()

def strike(name, real):
    def call(*arguments, **options):
        with lock:
            mine = len(calls)
            calls.append(name)
        if mine != last:
            return real(*arguments, **options)
        try:
            if name == "pwrite":
                real(arguments[0], arguments[1][:len(arguments[1]) // 2], arguments[2])
            elif mine % 2:
                real(*arguments, **options)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    return call

os.fsync = lambda file: None  # a killed process loses no written byte
for name in ("open", "pwrite", "fsync", "replace", "mkdir", "unlink"):
    setattr(os, name, strike(name, getattr(os, name)))
for line in sys.stdin:
    first, out = line.split()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        last = int(first)
        convert(sys.argv[1], out, quantize=True, **json.loads("".join(sys.argv[2:]) or "{}"))
        os.write(writer, " ".join(calls).encode())
        os._exit(0)
    os.close(writer)
    status = os.waitpid(child, 0)[1]
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.read(reader, 1 << 16).decode())
    sys.stdout.flush()
    os.close(reader)
"""


def flip(path: Path, place: int, bits: int = 1) -> None:
    """Flip bits of one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0] ^ bits
        file.seek(place)
        file.write(bytes([byte]))
