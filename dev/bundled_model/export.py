"""Turn the trained shards into the bundled MLX checkpoint (affine 8-bit, group size 64).

    python export.py --trained FOLDER --tokenizer FOLDER --out ../../flashmoe_mlx/bundled

The result is what `mlx_lm.convert -q --q-bits 8 --q-group-size 64` makes of the trained weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
from mlx_lm.convert import convert

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LARGEST = 20_500_000  # bytes of the whole folder


def text_config(trained: Path, tokenizer: Path) -> dict[str, object]:
    """The config of a published text-only checkpoint."""
    config = json.loads((trained / "config.json").read_text())
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in vocabulary}
    end, stop = ids["<|endoftext|>"], ids["<|im_end|>"]
    config.update(model_type="qwen3_5_moe_text", eos_token_id=[stop, end], pad_token_id=end)
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "eos_token_id": [stop, end],
        "pad_token_id": end,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "text_config": {**config, "dtype": "bfloat16"},
    }


def stage(trained: Path, tokenizer: Path, folder: Path) -> None:
    """A Hugging Face folder that mlx_lm.convert reads."""
    weights: dict[str, mx.array] = {}
    for shard in sorted(trained.glob("trained-*.safetensors")):
        weights.update(mx.load(str(shard)))
    if not weights:
        raise FileNotFoundError(f"no trained-*.safetensors in {trained}: run train.py first")
    named = {k.replace("model.", "model.language_model.", 1): v for k, v in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), named, metadata={"format": "pt"})
    config = text_config(trained, tokenizer)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {
        "do_sample": False,
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, folder / name)


def main() -> None:
    """Stage, convert, copy, check the size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained", type=Path, required=True, help="output of train.py")
    parser.add_argument("--tokenizer", type=Path, required=True, help="output of tokenizer.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source, made = Path(scratch) / "hf", Path(scratch) / "mlx"
        source.mkdir()
        stage(args.trained, args.tokenizer, source)
        convert(str(source), str(made), quantize=True, q_bits=8, q_group_size=64)
        args.out.mkdir(parents=True, exist_ok=True)
        for path in made.iterdir():
            if path.name != "README.md":
                shutil.copy(path, args.out / path.name)
        for name in TOKENIZER:  # as trained, not as transformers writes them back
            shutil.copy(args.tokenizer / name, args.out / name)
    sizes = {path.name: path.stat().st_size for path in sorted(args.out.iterdir())}
    for name, size in sizes.items():
        print(f"{size:12,}  {name}")
    print(f"{sum(sizes.values()):12,}  in all")
    if sum(sizes.values()) > LARGEST:
        raise ValueError(
            f"{args.out} holds {sum(sizes.values()):,} bytes, more than {LARGEST:,}: "
            "train with fewer experts"
        )


if __name__ == "__main__":
    main()
