"""`flashmoe-generate`: mlx_lm.generate's flags, plus those that control streaming."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import setup_arg_parser
from mlx_lm.models.cache import QuantizedKVCache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..commands import as_command
from ..errors import FlashMoEError
from ..loader import BUNDLED_MODEL, load
from ..models.patch import vocabulary
from ..models.prompt_cache import check_fits, read_prompt_cache
from ..profile.plot import check_plot
from ..profile.stats import RunStats
from ..store.memory import peak_bytes
from .live import Live
from .options import UNSUPPORTED, chat_options, check_options, check_ranges

IF_MEMORY_IS_SHORT = "Give a smaller --expert-cache, --prefill-step-size or --max-kv-size."


def build_parser() -> argparse.ArgumentParser:
    """Return mlx_lm.generate's parser with the streaming flags added."""
    parser = setup_arg_parser()
    parser.prog = "flashmoe-generate"
    parser.description = "Generate text with a Qwen3.5 MoE model whose experts stream from disk."
    check_ranges(parser)
    add = parser.add_argument_group("streaming").add_argument
    text = "Memory for the experts of all layers: 512MiB, 4GiB or auto (default: auto)"
    add("--expert-cache", help=text)
    add("--io-threads", help="Threads that read from disk (default: 8)")
    text = "Read through the page cache (buffered), bypass it (direct), or auto (default)"
    add("--io-mode", help=text)
    text = "Prefetch experts: on, off, or auto (default), which times both (CPU only)"
    add("--lookahead", help=text)
    text = "Top-k to use instead of the checkpoint's own (default: its own)"
    add("--experts-per-token", help=text)
    text = "Compare every expert with its checksum after each read (converted models)"
    add("--verify-reads", action="store_true", help=text)
    text = "Also print the time of each phase and layer (slower: parts cannot overlap)"
    add("--stats", action="store_true", help=text)
    add("--stats-json", type=Path, metavar="FILE", help="Write the same figures and more as JSON")
    text = "Plot the layers' times and hit rates, and tokens per second over time"
    add("--plot", type=Path, metavar="FILE.png", help=text)
    text = "Show tokens per second, the disk's GB/s and the hit rate during generation"
    add("--live", action="store_true", help=text)
    for action in parser._actions:
        if action.dest in (*UNSUPPORTED, "num_draft_tokens"):
            action.help = argparse.SUPPRESS
        if action.dest == "model":
            action.help = "A model directory or Hugging Face repo (default: the bundled model)"
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit with 2 on bad input, 130 on Ctrl-C."""

    def work() -> None:
        run(build_parser().parse_args(argv))

    if code := as_command("flashmoe-generate", work, IF_MEMORY_IS_SHORT):
        sys.exit(code)


def run(args: argparse.Namespace) -> None:
    """Load the model, print the text token by token, then the figures."""
    check_options(args)
    check_plot(args.plot)
    if args.seed is not None:
        mx.random.seed(args.seed)
    cache, metadata = open_prompt_cache(args)
    model, tokenizer = open_model(args, metadata)
    if cache is not None:
        check_fits(args.prompt_cache_file, cache, model)
    add_eos_tokens(tokenizer, args.extra_eos_token)
    prompt = encode_prompt(args, tokenizer, cached=cache is not None)
    if not prompt:
        raise FlashMoEError("--prompt is empty and no chat template applies. Give some text.")
    responses = stream_generate(
        model, tokenizer, prompt,
        max_tokens=args.max_tokens, sampler=sampler(args, tokenizer),
        prefill_step_size=args.prefill_step_size, prompt_cache=cache, max_kv_size=args.max_kv_size,
        kv_bits=args.kv_bits, kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
    )  # fmt: skip
    stats = RunStats(model) if args.stats or args.stats_json or args.plot else None
    live = Live(model.expert_stats()) if args.live else None
    with stats.watching() if stats else nullcontext(), live.shown() if live else nullcontext():
        response = print_text(model, responses, stats, live)
    print()
    if args.verbose and response is not None:
        print("=" * 10)
        report(model, response)
    if stats and args.stats:
        stats.print()
    if stats and args.stats_json:
        stats.save(args.stats_json)
    if stats and args.plot:
        stats.plot(args.plot)


def open_model(args: argparse.Namespace, metadata: dict[str, Any]) -> tuple[Any, TokenizerWrapper]:
    """Load the model and tokenizer that the flags name, or else the prompt cache's metadata."""
    trust = {"trust_remote_code": True} if args.trust_remote_code else {}
    model, tokenizer = load(
        args.model or metadata.get("model") or BUNDLED_MODEL,
        expert_cache=args.expert_cache, io_threads=args.io_threads, io_mode=args.io_mode,
        verify=args.verify_reads or None, lookahead=args.lookahead,
        experts_per_token=args.experts_per_token, adapter_path=args.adapter_path,
        tokenizer_config=metadata.get("tokenizer_config", {}) | trust,
    )  # fmt: skip
    if (tokens := vocabulary(model.args)) and args.top_k >= tokens:
        raise FlashMoEError(f"--top-k {args.top_k}: the model has {tokens} tokens. Give fewer.")
    return model, tokenizer


def sampler(args: argparse.Namespace, tokenizer: TokenizerWrapper) -> Any:
    """Return the sampler that the flags describe."""
    return make_sampler(
        args.temp, args.top_p, args.min_p, args.min_tokens_to_keep, args.top_k,
        xtc_probability=args.xtc_probability, xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )  # fmt: skip


def print_text(
    model: Any, responses: Iterator[Any], stats: RunStats | None, live: Live | None
) -> Any:
    """Print each response's text, and return the last response."""
    response = None
    for response in responses:
        print(response.text, end="", flush=True)
        if stats:
            stats.note(response.prompt_tokens)
        if live:
            live.update(model.expert_stats)
    return response


def add_eos_tokens(tokenizer: TokenizerWrapper, tokens: list[str]) -> None:
    """Add tokens that end the text.

    Raises:
        FlashMoEError: the tokenizer lacks one of them.
    """
    for token in tokens:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as error:
            raise FlashMoEError(
                f"--extra-eos-token {token!r}: not in the model's vocabulary. Give a token of "
                "tokenizer.json, or its number."
            ) from error


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
    args: argparse.Namespace, tokenizer: TokenizerWrapper, *, cached: bool
) -> list[int]:
    """Apply the chat template as mlx_lm.generate does, and return token ids.

    With a prompt cache, encode only the text that follows the cached prefix.
    """
    prompt = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    prompt = _read_stdin() if prompt == "-" else prompt
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


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise FlashMoEError(
            f"--prompt -: standard input is not text ({error}). Give UTF-8."
        ) from error


def report(model: Any, response: Any) -> None:
    """Print speed, expert reads and memory, in mlx_lm.generate's format."""
    print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
    tokens, speed = response.generation_tokens, response.generation_tps
    print(f"Generation: {tokens} tokens, {speed:.3f} tokens-per-sec")
    print(model.expert_stats())
    print(model.expert_cache())
    print(f"Peak memory: {peak_bytes() / 2**20:.0f} MiB resident")


if __name__ == "__main__":
    main()
