"""What `flashmoe-generate` accepts, checked before a model is loaded."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError

KV_BITS = (2, 3, 4, 5, 6, 8)
KV_GROUPS = (32, 64, 128)
LARGEST_SEED = 2**64 - 1

Check = tuple[str, Callable[[Any], bool], str]  # flag, whether a value is good, what would be
CHECKS: tuple[Check, ...] = (
    ("max_tokens", lambda n: n == -1 or n >= 1, "Give 1 or more, or -1 for no limit"),
    ("temp", lambda x: 0 <= x < math.inf, "Give 0 (the likeliest token) or more"),
    ("top_p", lambda x: 0 <= x <= 1, "Give a probability from 0 to 1"),
    ("min_p", lambda x: 0 <= x <= 1, "Give a probability from 0 to 1"),
    ("top_k", lambda n: n >= 0, "Give 1 or more tokens, or 0 for all"),
    ("xtc_probability", lambda x: 0 <= x <= 1, "Give a probability from 0 to 1"),
    ("xtc_threshold", lambda x: 0 <= x <= 0.5, "Give a probability from 0 to 0.5"),
    ("min_tokens_to_keep", lambda n: n >= 1, "Give 1 or more"),
    ("seed", lambda n: 0 <= n <= LARGEST_SEED, f"Give a whole number from 0 to {LARGEST_SEED}"),
    ("max_kv_size", lambda n: n >= 8, "Give 8 or more tokens, or leave it out for all"),
    ("prefill_step_size", lambda n: n >= 1, "Give 1 or more tokens"),
    ("kv_bits", lambda n: n in KV_BITS, "Give 2, 3, 4, 5, 6 or 8"),
    ("kv_group_size", lambda n: n in KV_GROUPS, "Give 32, 64 or 128"),
    ("quantized_kv_start", lambda n: n >= 0, "Give 0 or more tokens"),
)
UNSUPPORTED = ("draft_model", "image", "quantize_activations")


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that would fail later, or be ignored.

    Raises:
        FlashMoEError: naming the flag, its value and the remedy.
    """
    for name in UNSUPPORTED:
        if getattr(args, name):
            raise FlashMoEError(
                f"{_flag(name)} is not supported for streamed models; leave it out."
            )
    for name, good, remedy in CHECKS:
        value = getattr(args, name)
        if value is not None and not good(value):
            raise FlashMoEError(f"{_flag(name)} {value} is out of range. {remedy}.")
    if args.model == "":
        raise FlashMoEError("--model is empty. Give a directory, or a name on the Hub.")
    if args.adapter_path is not None:
        _check_adapters(Path(args.adapter_path))
    if args.stats_json is not None and not (folder := args.stats_json.absolute().parent).is_dir():
        raise FlashMoEError(f"--stats-json {args.stats_json}: {folder} is not a directory.")
    chat_options(args.chat_template_config)


def chat_options(text: str | None) -> dict[str, Any]:
    """Read `--chat-template-config`: keywords for the chat template.

    Raises:
        FlashMoEError: it is not an object in JSON.
    """
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise FlashMoEError(
            f"--chat-template-config {text}: not JSON ({error}). "
            'Give an object such as {"enable_thinking": false}.'
        ) from error
    if not isinstance(options, dict):
        raise FlashMoEError(
            f"--chat-template-config {text}: not an object. "
            'Give one such as {"enable_thinking": false}.'
        )
    return options


def _check_adapters(path: Path) -> None:
    for name in ("adapter_config.json", "adapters.safetensors"):
        if not (path / name).is_file():
            raise FlashMoEError(
                f"--adapter-path {path}: no {name} there. Give a directory that mlx_lm.lora wrote."
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
