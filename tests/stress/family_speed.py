"""Decode a model of another family beside stock mlx-lm, in turns: tokens per second, medians.

    python tests/stress/family_speed.py FOLDER [--layers 8] [--tokens 64] [--runs 5] [--ways all]

`qwen3_moe` at the shape of Qwen3-30B-A3B, 4 bits, random weights and tokens: ours with all experts
in memory and with a quarter of them, and stock. bfloat16 on a GPU, float32 on a CPU. Each line is
printed as it comes.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from family_helpers import streamed
from mlx.utils import tree_map_with_path
from mlx_lm.models import qwen3_moe
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, save_model

EXPERTS, VOCABULARY, GROUP = 128, 32768, 64
QUANTIZATION = {"group_size": GROUP, "bits": 4}
CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": EXPERTS,
    "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY,
    "rope_theta": 1e6, "max_position_embeddings": 40960, "norm_topk_prob": True,
    "tie_word_embeddings": False, "quantization": QUANTIZATION,
}  # fmt: skip
EXPERT_BYTES = 3 * 2048 * 768 * 9 // 16  # of a layer
WAYS = "all", "quarter", "stock"
SPREAD = 4.6  # standard deviation of codes from 0 to 15
PROMPT, WARM_UP = 64, 8
RANDOM = np.random.default_rng(0)


def write(folder: Path, layers: int) -> Path:
    """Write a checkpoint as mlx_lm.convert does, and return its directory."""
    path = folder / f"qwen3-30b-{layers}-layers"
    if not (path / "config.json").exists():
        config = CONFIG | {"num_hidden_layers": layers}
        model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(config))
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, **QUANTIZATION)  # lazily: no weight is ever made of the first ones
        model.update(tree_map_with_path(_random, model.parameters()))
        save_model(path, model)
        (path / "config.json").write_text(json.dumps(config))
    return path


def _random(name: str, p: mx.array) -> mx.array:
    """Return weights that keep the sizes of activations."""
    if p.dtype == mx.uint32:
        return mx.array(RANDOM.integers(1 << 32, size=p.shape, dtype=np.uint32))
    if not name.endswith(("scales", "biases")):
        return mx.ones(p.shape, p.dtype)
    scale = (p.shape[-1] * GROUP) ** -0.5 / SPREAD
    return mx.full(p.shape, scale if name.endswith("scales") else -7.5 * scale, p.dtype)


def opened(way: str, path: Path) -> Any:
    """Return a model: "all" and "quarter" are ours, with so many experts in memory."""
    if way == "stock":
        model = load_model(path)[0]
    else:
        layers = json.loads((path / "config.json").read_text())["num_hidden_layers"]
        slots = EXPERTS if way == "all" else EXPERTS // 4
        model = streamed(path, expert_cache=slots * layers * EXPERT_BYTES)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    return model


def decode(model: Any, tokens: np.ndarray) -> float:
    """Return tokens per second, of given tokens."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array(tokens[None, :PROMPT]), cache=cache)[:, -1])
    start, count = 0.0, 0
    for place, token in enumerate(tokens[PROMPT:].tolist()):
        if place == WARM_UP:
            mx.synchronize()
            start = time.perf_counter()
        y = mx.argmax(model(mx.array([[token]]), cache=cache)[:, -1], axis=-1)
        mx.async_eval(y)
        count += place >= WARM_UP
    mx.synchronize()
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ways", default=",".join(WAYS))
    args = parser.parse_args()
    path = write(args.folder, args.layers)
    models = {way: opened(way, path) for way in args.ways.split(",")}
    rates: dict[str, list[float]] = {way: [] for way in models}
    for run in range(args.runs + 1):  # the first compiles
        count = PROMPT + WARM_UP + (args.tokens if run else 8)
        tokens = np.random.default_rng(run).integers(VOCABULARY, size=count)
        for way, model in models.items():
            rates[way] += [decode(model, tokens)] * bool(run)
            print(run, way, *(f"{rate:.2f}" for rate in rates[way][-1:]), flush=True)
    medians = {way: statistics.median(found) for way, found in rates.items()}
    base = medians.get("stock", 0.0)
    for way, median in medians.items():
        beside = f", {median / base:.2f} of stock" if base else ""
        print(f"{way}: {median:.2f} tokens/s{beside}", flush=True)


if __name__ == "__main__":
    main()
