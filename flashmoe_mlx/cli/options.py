"""`flashmoe-generate`'s options, and their checks before a model is loaded.

The flags of mlx_lm.generate are written out here, because importing mlx-lm takes seconds; a test
compares them with mlx-lm's own.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..commands import add_version
from ..errors import FlashMoEError
from ..settings import check_variables
from .streaming_options import add_streaming

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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: mlx_lm.generate's flags, those that control streaming, and reports."""
    parser = argparse.ArgumentParser(
        prog="flashmoe-generate",
        usage="%(prog)s [options] [PROMPT]",
        description="Answer a prompt with a mixture of experts that streams from disk.",
    )
    add_version(parser)
    text = "Text to answer; without one, standard input is read"
    parser.add_argument("text", nargs="?", metavar="PROMPT", help=text)
    _add_prompt(parser.add_argument_group("model and prompt"))
    _add_sampling(parser.add_argument_group("length and sampling"))
    _add_cache(parser.add_argument_group("memory of the prompt"))
    _add_reports(add_streaming(parser))
    _add_unsupported(parser)
    return parser


def _add_prompt(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", help="Model directory or Hugging Face repo (default: the bundled model)")
    add("--prompt", "-p", help="Text to answer, as PROMPT; - reads standard input")
    add("--system-prompt", help="System prompt of the chat template")
    add("--prefill-response", help="First words of the answer")
    text = "Give the model the prompt alone, without its chat template"
    add("--ignore-chat-template", action="store_true", help=text)
    text = "Use the tokenizer's default chat template"
    add("--use-default-chat-template", action="store_true", help=text)
    text = "Variables of the chat template, as JSON: '{\"enable_thinking\": false}'"
    add("--chat-template-config", metavar="JSON", help=text)
    add("--adapter-path", metavar="DIR", help="LoRA adapters to apply, as mlx_lm.lora wrote them")
    text = "Let the tokenizer run code that comes with the model"
    add("--trust-remote-code", action="store_true", help=text)
    text = "Print the summary after the text (default: True)"
    add("--verbose", type=_true, default=True, metavar="BOOL", help=text)


def number(
    group: argparse._ActionsContainer, flag: str, kind: type, default: float | None, text: str
) -> None:
    """Add an option that takes a number in its range; `text` is its help.

    argparse's error names the flag, the value and the remedy.
    """
    valid, remedy = RANGES[flag.strip("-").replace("-", "_")]

    def checked(given: str) -> Any:
        value = kind(given)
        if not valid(value):
            raise argparse.ArgumentError(None, f"{flag} {value} is out of range. {remedy}.")
        return value

    checked.__name__ = kind.__name__  # argparse quotes it if `kind` fails
    flags = (flag, "-m") if flag == "--max-tokens" else (flag,)
    metavar = "N" if kind is int else "X"
    group.add_argument(*flags, type=checked, default=default, metavar=metavar, help=text)


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = partial(number, group)
    add("--max-tokens", int, 100, "Most tokens to write; -1: no limit (default: 100)")
    text = "Further tokens that end the text"
    group.add_argument("--extra-eos-token", nargs="+", default=(), metavar="TOKEN", help=text)
    add("--temp", float, 0.0, "Temperature; 0 takes the likeliest token (default: 0)")
    text = "Sample from the likeliest tokens of this total probability (default: 1)"
    add("--top-p", float, 1.0, text)
    text = "Least probability, relative to the likeliest token's (default: 0)"
    add("--min-p", float, 0.0, text)
    add("--top-k", int, 0, "Sample from the N likeliest tokens; 0: from all (default: 0)")
    add("--xtc-probability", float, 0.0, "Probability of XTC sampling, per token (default: 0)")
    text = "Probability above which XTC may drop a token (default: 0.1)"
    add("--xtc-threshold", float, 0.1, text)
    add("--min-tokens-to-keep", int, 1, "Least tokens that --min-p keeps (default: 1)")
    add("--seed", int, None, "Seed of the random numbers")


def _add_cache(group: argparse._ArgumentGroup) -> None:
    add = partial(number, group)
    text = "Prompt cache that mlx_lm.cache_prompt wrote; the prompt continues it"
    group.add_argument("--prompt-cache-file", metavar="FILE", help=text)
    text = "Prompt tokens per step; fewer take less memory (default: 2048)"
    add("--prefill-step-size", int, 2048, text)
    add("--max-kv-size", int, None, "Most tokens whose keys and values are kept")
    text = "Quantize keys and values to this many bits (default: not at all)"
    add("--kv-bits", int, None, text)
    add("--kv-group-size", int, 64, "Group size of quantized keys and values (default: 64)")
    text = "Tokens whose keys and values stay unquantized (default: 5000)"
    add("--quantized-kv-start", int, 5000, text)


def _add_reports(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "Also print the time of each phase and layer (slower: parts cannot overlap)"
    add("--stats", action="store_true", help=text)
    add("--stats-json", type=Path, metavar="FILE", help="Write the same figures and more as JSON")
    text = "Plot the layers' times and hit rates, and tokens per second over time"
    add("--plot", type=Path, metavar="FILE.png", help=text)
    text = "Show tokens per second, the disk's GB/s and the hit rate during generation"
    add("--live", action="store_true", help=text)


def _add_unsupported(parser: argparse.ArgumentParser) -> None:
    """Add mlx-lm's flags that `check_options` refuses, so that it can say why."""
    add = parser.add_argument
    add("--image", nargs="+", default=(), help=argparse.SUPPRESS)
    add("--draft-model", help=argparse.SUPPRESS)
    add("--num-draft-tokens", type=int, default=3, help=argparse.SUPPRESS)
    add("--quantize-activations", "-qa", action="store_true", help=argparse.SUPPRESS)


def _true(text: str) -> bool:
    """Parse as mlx-lm does: everything but False and F is true."""
    return text.lower() not in ("false", "f")


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
