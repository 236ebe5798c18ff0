"""Write tests/fixtures/transformers: a tiny random Qwen3.5 MoE, and the outputs of transformers.

This tool needs torch, and flashmoe-mlx does not: run it in a separate environment.

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    python tools/make_reference.py

Weights are rounded to bfloat16 once, so the checkpoint stores them exactly and every difference
from the stored float32 logits comes from arithmetic.
"""

import platform
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

FIXTURE = Path(__file__).parents[1] / "tests" / "fixtures" / "transformers"
NEW_TOKENS = 48

# Sizes that code could confuse differ: value heads are narrower than key heads, and the shared
# expert is wider than the routed ones.
CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "vocab_size": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
    },
}


def random_model() -> Qwen3_5MoeForCausalLM:
    """Build the model; choose parameters so that a wrong use of any of them changes the output."""
    torch.manual_seed(0)
    config = Qwen3_5MoeTextConfig(**CONFIG)
    model = Qwen3_5MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_values(name, parameter.shape).to(torch.bfloat16))
    return model


def random_values(name: str, shape: torch.Size) -> torch.Tensor:
    """Return random values for one parameter, according to its role."""
    noise = torch.randn(shape)
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(0.05, 4).log()
    if name.endswith("dt_bias"):
        return noise
    if name.endswith("linear_attn.norm.weight"):  # the gated norm multiplies by w
        return 1 + 0.3 * noise
    if name.endswith("norm.weight") or len(shape) == 1:  # other norms multiply by 1 + w
        return 0.3 * noise
    if name.endswith("embed_tokens.weight"):
        return noise
    if name.endswith("conv1d.weight"):
        return 0.5 * noise
    spread = noise / shape[-1] ** 0.5
    # Decisive routing: rounding must not swap the third expert for the fourth.
    return 3 * spread if name.endswith("mlp.gate.weight") else 1.5 * spread


def logits(model: Qwen3_5MoeForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Return float32 logits `[batch, length, vocab]`, without a cache."""
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()


def greedy(model: Qwen3_5MoeForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Return `NEW_TOKENS` greedy tokens; reject a prompt whose two largest logits nearly tie."""
    sequence = tokens
    for _ in range(NEW_TOKENS):
        row = logits(model, sequence)[:, -1]
        top = np.sort(row, axis=-1)
        if (gap := float((top[:, -1] - top[:, -2]).min())) < 5e-3:
            raise SystemExit(f"the two best tokens are {gap} apart: choose another seed")
        sequence = np.concatenate([sequence, row.argmax(-1)[:, None]], axis=1)
    with torch.no_grad():  # the same with transformers' own cache
        cached = model.generate(
            torch.from_numpy(tokens), max_new_tokens=NEW_TOKENS, do_sample=False
        ).numpy()
    if not np.array_equal(cached, sequence):
        raise SystemExit("transformers disagrees with itself with and without a cache")
    return sequence[:, tokens.shape[1] :]


def main() -> None:
    """Write the checkpoint, the expected results and the package versions."""
    FIXTURE.mkdir(parents=True, exist_ok=True)
    random_model().to(torch.bfloat16).save_pretrained(FIXTURE)
    (FIXTURE / "generation_config.json").unlink()
    model = Qwen3_5MoeForCausalLM.from_pretrained(FIXTURE, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    vocab = CONFIG["vocab_size"]
    expected: dict[str, np.ndarray] = {}
    for name, shape in {"one": (1, 1), "short": (1, 17), "long": (1, 70), "batch": (2, 9)}.items():
        prompt = rng.integers(0, vocab, shape)
        out = logits(model, prompt)
        expected[f"{name}_prompt"] = prompt.astype(np.int32)
        expected[f"{name}_logits"] = out[:, -1:] if name == "long" else out
    prompt = expected["short_prompt"].astype(np.int64)
    expected["greedy"] = greedy(model, prompt).astype(np.int32)
    np.savez_compressed(FIXTURE / "expected.npz", **expected)
    (FIXTURE / "README.md").write_text(readme())


def readme() -> str:
    """Return the fixture's README: its content, and the command that writes it."""
    with safe_open(FIXTURE / "model.safetensors", "np") as file:
        keys = sorted(file.keys())
    expert = next(key for key in keys if ".mlp.experts." in key)
    versions = f"torch=={torch.__version__.split('+')[0]} transformers=={transformers.__version__}"
    return f"""# A reference from transformers

A random `Qwen3_5MoeForCausalLM` of four layers, written by `save_pretrained` in bfloat16, and the
float32 logits and greedy tokens that transformers computes from it on a CPU.

* `model.safetensors`, `config.json`: the checkpoint, {len(keys)} tensors. transformers writes one
  tensor per expert, such as `{expert}`, where the
  checkpoints on the Hub have fused ones.
* `expected.npz`: `NAME_prompt` and `NAME_logits` for the prompts one, short, long (last position
  only) and batch; `greedy`: the {NEW_TOKENS} tokens that follow the short prompt.

To make it again, with Python {platform.python_version()}:

    pip install {versions} safetensors numpy=={np.__version__}
    python tools/make_reference.py
"""


if __name__ == "__main__":
    main()
