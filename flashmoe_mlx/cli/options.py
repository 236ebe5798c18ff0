"""Checks of `flashmoe-generate`'s options, before it loads a model."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError
from ..settings import check_variables

LARGEST_SEED = 2**64 - 1
PROBABILITY = "Give a probability from 0 to 1"
# By option: a test of the value, and the remedy that the error names.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda n: n == -1 or n >= 1, "Give 1 or more, or -1 for no limit"),
    "temp": (lambda x: 0 <= x < math.inf, "Give 0 (the likeliest token) or more"),
    "top_p": (lambda x: 0 <= x <= 1, PROBABILITY),
    "min_p": (lambda x: 0 <= x <= 1, PROBABILITY),
    "top_k": (lambda n: n >= 0, "Give 1 or more tokens, or 0 for all"),
    "xtc_probability": (lambda x: 0 <= x <= 1, PROBABILITY),
    "xtc_threshold": (lambda x: 0 <= x <= 0.5, "Give a probability from 0 to 0.5"),
    "min_tokens_to_keep": (lambda n: n >= 1, "Give 1 or more"),
    "seed": (lambda n: 0 <= n <= LARGEST_SEED, f"Give a whole number from 0 to {LARGEST_SEED}"),
    "max_kv_size": (lambda n: n >= 8, "Give 8 or more tokens, or leave it out to keep all"),
    "prefill_step_size": (lambda n: n >= 1, "Give 1 or more tokens"),
    "kv_bits": (lambda n: n in (2, 3, 4, 5, 6, 8), "Give 2, 3, 4, 5, 6 or 8"),
    "kv_group_size": (lambda n: n in (32, 64, 128), "Give 32, 64 or 128"),
    "quantized_kv_start": (lambda n: n >= 0, "Give 0 or more tokens"),
}
UNSUPPORTED = ("draft_model", "image", "quantize_activations")


def within(
    flag: str, parse: Callable[[str], Any], valid: Callable[[Any], bool], remedy: str
) -> Callable[[str], Any]:
    """Return a `type=` for argparse: values that `parse` returns and for which `valid` holds.

    Its ArgumentError names the flag, the value and the remedy.
    """

    def checked(text: str) -> Any:
        value = parse(text)
        if not valid(value):
            raise argparse.ArgumentError(None, f"{flag} {value} is out of range. {remedy}.")
        return value

    checked.__name__ = parse.__name__  # argparse quotes it if `parse` fails
    return checked


def check_ranges(parser: argparse.ArgumentParser) -> None:
    """Make mlx_lm.generate's parser reject values outside RANGES."""
    for action in parser._actions:
        if action.dest in RANGES:
            assert callable(action.type)
            action.type = within(action.option_strings[0], action.type, *RANGES[action.dest])


def check_options(args: argparse.Namespace) -> None:
    """Reject options that would fail later or have no effect.

    Raises:
        FlashMoEError: an option is invalid or unsupported.
    """
    check_variables()
    for name in ("prompt", "system_prompt", "prefill_response", "chat_template_config"):
        as_text(f"--{name.replace('_', '-')}", getattr(args, name) or "")
    for token in args.extra_eos_token:
        as_text("--extra-eos-token", token)
    for name in UNSUPPORTED:
        if getattr(args, name):
            flag = name.replace("_", "-")
            raise FlashMoEError(f"--{flag} is not supported for streamed models; leave it out.")
    if args.model == "":
        raise FlashMoEError("--model is empty. Give a directory, or a name on the Hub.")
    for name in ("adapter_config.json", "adapters.safetensors") if args.adapter_path else ():
        if not Path(args.adapter_path, name).is_file():
            raise FlashMoEError(
                f"--adapter-path {args.adapter_path}: has no {name}. "
                "Give a directory that mlx_lm.lora wrote."
            )
    for name in ("kv_bits", "prompt_cache_file") if args.max_kv_size is not None else ():
        if getattr(args, name) is not None:
            raise FlashMoEError(
                f"--max-kv-size {args.max_kv_size} cannot be combined with "
                f"--{name.replace('_', '-')}. Leave one of them out."
            )
    if args.stats_json is not None and not (folder := args.stats_json.absolute().parent).is_dir():
        raise FlashMoEError(f"--stats-json {args.stats_json}: {folder} is not a directory.")
    chat_options(args.chat_template_config)


def as_text(flag: str, text: str) -> str:
    """Return a text from the command line or standard input.

    Raises:
        FlashMoEError: its bytes are not UTF-8; Python stores these as lone surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) & 0xFF
        raise FlashMoEError(
            f"{flag}: byte 0x{byte:02x} after {error.start} characters is not UTF-8. Give UTF-8."
        ) from error
    return text


def chat_options(text: str | None) -> dict[str, Any]:
    """Parse `--chat-template-config`: keywords for the chat template.

    Raises:
        FlashMoEError: it is not a JSON object.
    """
    example = '{"enable_thinking": false}'
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise FlashMoEError(
            f"--chat-template-config {text}: not JSON ({error}). Give an object such as {example}."
        ) from error
    if not isinstance(options, dict):
        raise FlashMoEError(
            f"--chat-template-config {text}: not an object. Give one such as {example}."
        )
    return options
