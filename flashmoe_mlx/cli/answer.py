"""Load a model, print its answer token by token, then the summary."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..distributed.collectives import gather_json
from ..errors import FlashMoEError
from ..loader import BUNDLED_MODEL, find_model, load
from ..models.generation import stream_generate
from ..models.patch import vocabulary
from ..models.prompt_cache import check_fits, read_prompt_cache
from ..profile.plot import check_plot
from ..profile.stats import RunStats, TokenTimes
from ..progress import bar
from .live import Live
from .options import chat_options
from .prompt_bar import reading_prompt
from .streaming_options import streaming
from .summary import print_summary

BUNDLED_NAME = "bundled model"


def answer(args: argparse.Namespace, prompt: str) -> None:
    """Answer `prompt` as the options say; of several ranks, the first one prints."""
    group = mx.distributed.init()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if group.rank() else sys.stdout):
        answer_in_rank(args, prompt, group if group.size() > 1 else None)


def answer_in_rank(
    args: argparse.Namespace, prompt: str, group: mx.distributed.Group | None
) -> None:
    """Answer `prompt`, alone or together with the other ranks of a group."""
    check_plot(args.plot)
    if args.seed is not None or group:
        mx.random.seed(args.seed or 0)  # ranks must choose the same tokens
    cache, metadata = open_prompt_cache(args)
    path, model, tokenizer = open_model(args, metadata)
    if group:
        model.shard(group)
    if cache is not None:
        check_fits(args.prompt_cache_file, cache, model)
    add_eos_tokens(tokenizer, args.extra_eos_token)
    tokens = encode_prompt(args, prompt, tokenizer, cached=cache is not None)
    if not tokens:
        raise FlashMoEError("--prompt is empty and no chat template applies. Give some text.")
    times = TokenTimes(len(tokens))
    stats = RunStats(model, times) if args.stats or args.stats_json or args.plot else None
    live = Live(times, model.expert_stats) if args.live else None
    with stats.watching() if stats else nullcontext(), live.shown() if live else nullcontext():
        for text in texts(args, model, tokenizer, tokens, cache):
            times.note()
            print(text, end="", flush=True)
            if stats:
                stats.note()
            if live:
                live.note()
    print()
    report(args, model, times, stats, BUNDLED_NAME if path == BUNDLED_MODEL else path.name)
    if group:
        print_ranks(gather_json(group, str(model.expert_stats())))


def print_ranks(found: list[str]) -> None:
    """Print each rank's counters."""
    for rank, stats in enumerate(found):
        print(f"Rank {rank}: {stats}")


def texts(
    args: argparse.Namespace, model: Any, tokenizer: Any, tokens: list[int], cache: Any
) -> Iterator[str]:
    """Yield the text of each token, some of it empty; a bar shows the prompt's part before."""
    with reading_prompt(model, len(tokens), args.prefill_step_size) as report_chunk:
        responses = stream_generate(
            model, tokenizer, tokens,
            max_tokens=args.max_tokens, sampler=sampler(args, tokenizer),
            prefill_step_size=args.prefill_step_size, prompt_cache=cache,
            max_kv_size=args.max_kv_size, kv_bits=args.kv_bits, kv_group_size=args.kv_group_size,
            quantized_kv_start=args.quantized_kv_start, prompt_progress_callback=report_chunk,
        )  # fmt: skip
        first = next(responses)
    for response in chain([first], responses):
        yield response.text


def report(
    args: argparse.Namespace, model: Any, times: TokenTimes, stats: RunStats | None, name: str
) -> None:
    """Print the summary, and what `--stats`, `--stats-json` and `--plot` ask for."""
    if args.verbose:
        print()
        print_summary(model, times, name == BUNDLED_NAME)
    if stats and args.stats:
        stats.print()
    if stats and args.stats_json:
        stats.save(args.stats_json)
    if stats and args.plot:
        with bar(None, what="plotting"):
            stats.plot(args.plot, name)


def open_model(
    args: argparse.Namespace, metadata: dict[str, Any]
) -> tuple[Path, Any, TokenizerWrapper]:
    """Load the model and tokenizer that the flags name, or else the prompt cache's metadata."""
    trust = {"trust_remote_code": True} if args.trust_remote_code else {}
    path = find_model(args.model or metadata.get("model") or BUNDLED_MODEL)
    with bar(None, what="loading"):
        model, tokenizer = load(
            path, **streaming(args), adapter_path=args.adapter_path,
            tokenizer_config=metadata.get("tokenizer_config", {}) | trust,
        )  # fmt: skip
    tokens = vocabulary(model.args)
    if tokens is not None and args.top_k >= tokens:
        raise FlashMoEError(f"--top-k {args.top_k}: the model has {tokens} tokens. Give fewer.")
    return path, model, tokenizer


def sampler(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> Any:
    """Return the sampler that the flags describe."""
    return make_sampler(
        args.temp, args.top_p, args.min_p, args.min_tokens_to_keep, args.top_k,
        xtc_probability=args.xtc_probability, xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )  # fmt: skip


def add_eos_tokens(tokenizer: TokenizerWrapper, tokens: list[str]) -> None:
    """Add tokens that end the text.

    Raises:
        FlashMoEError: the tokenizer lacks one of them.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        # mlx-lm takes a number, or else a token; an unknown one may stand for another.
        if not (token.isdecimal() or token in vocabulary):
            raise FlashMoEError(
                f"--extra-eos-token {token!r}: not in the model's vocabulary. Give a token of "
                "tokenizer.json, or its number."
            )
        tokenizer.add_eos_token(token)


def open_prompt_cache(args: argparse.Namespace) -> tuple[list[Any] | None, dict[str, Any]]:
    """Read `--prompt-cache-file`, if given, and check that it fits the other flags."""
    if (file := args.prompt_cache_file) is None:
        return None, {}
    cache, metadata = read_prompt_cache(file)
    if args.model not in (None, metadata["model"]):
        raise FlashMoEError(
            f"--model {args.model}: {file} was made with {metadata['model']}. "
            "Give that model, or leave --model out."
        )
    if args.model is None and args.trust_remote_code:
        raise FlashMoEError(
            f"--trust-remote-code would run code of a model that only {file} names. If you trust "
            f"that model, also give --model {metadata['model']}."
        )
    for entry in cache:
        made_with = (entry.bits, entry.group_size) if isinstance(entry, QuantizedKVCache) else None
        if made_with and made_with != (args.kv_bits or entry.bits, args.kv_group_size):
            raise FlashMoEError(
                f"--kv-bits {args.kv_bits} --kv-group-size {args.kv_group_size}: "
                f"{file} was made with {made_with[0]} and {made_with[1]}. Give these."
            )
    return cache, metadata


def encode_prompt(
    args: argparse.Namespace, prompt: str, tokenizer: TokenizerWrapper, *, cached: bool
) -> list[int]:
    """Apply the chat template as mlx_lm.generate does, and return token ids.

    With a prompt cache, encode only the text that follows the cached prefix.
    """
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return tokenizer.encode(prompt)
    options = chat_options(args.chat_template_config)
    prefill = args.prefill_response

    def render(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        if prefill is not None:
            messages.append({"role": "assistant", "content": prefill})
        return tokenizer.apply_chat_template(
            messages, tokenize=False, continue_final_message=prefill is not None,
            add_generation_prompt=prefill is None, **options,
        )  # fmt: skip

    try:
        text = render(prompt)
    except Exception as error:  # a template can raise any
        raise FlashMoEError(
            f"the chat template fails with --chat-template-config {args.chat_template_config} "
            f"({type(error).__name__}: {error}). Change it, or give --ignore-chat-template."
        ) from error
    if cached:
        text = text[render("<query>").index("<query>") :]
    return tokenizer.encode(text, add_special_tokens=False)
