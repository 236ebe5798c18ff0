"""The options that say how experts are streamed, for every command that loads a model."""

import argparse
from typing import Any


def add_streaming(parser: argparse.ArgumentParser) -> Any:
    """Add the options to a parser, and return their group."""
    group = parser.add_argument_group("streaming")
    add = group.add_argument
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
    return group


def streaming(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options as keywords of `load`."""
    return {
        "expert_cache": args.expert_cache,
        "io_threads": args.io_threads,
        "io_mode": args.io_mode,
        "lookahead": args.lookahead,
        "experts_per_token": args.experts_per_token,
        "verify": args.verify_reads or None,
    }
