"""`flashmoe-chat`: talk to a model in the terminal, and let it call functions of yours."""

import argparse
import sys
from functools import partial
from pathlib import Path

from ..commands import add_version, as_command, importing, without_torch
from ..progress import bar
from .options import number
from .streaming_options import add_streaming

# MLX, mlx-lm and transformers are imported when a model is loaded: --help takes no second.
NAME = "flashmoe-chat"
IF_MEMORY_IS_SHORT = "Give a smaller --expert-cache."
MOST_TOKENS = 1024


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Chat with a mixture of experts that streams from disk. Type /help for "
        "the commands. If input is a pipe, every line is a message.",
    )
    text = "A model directory or Hugging Face repo (default: the bundled model)"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=text)
    add = parser.add_argument
    add("--system-prompt", metavar="TEXT", help="What the model is told first")
    text = "Offer the public functions of this file to the model; you are asked before each call"
    add("--tools", type=Path, metavar="FILE.py", help=text)
    text = 'Options of the chat template, such as {"enable_thinking": false}'
    add("--chat-template-config", metavar="JSON", help=text)
    text = "Run the tokenizer's code that comes with the model"
    add("--trust-remote-code", action="store_true", help=text)
    _add_sampling(parser)
    add_streaming(parser)
    add_version(parser)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = partial(number, parser.add_argument_group("sampling"))
    add("--temp", float, 0.0, "Temperature (default: 0, the likeliest token)")
    add("--top-p", float, 1.0, "Sample from the likeliest tokens of this probability")
    add("--seed", int, None, "Seed of the sampling (default: a new one each time)")
    text = f"Longest answer (default: {MOST_TOKENS}; -1 for no limit)"
    add("--max-tokens", int, MOST_TOKENS, text)


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit with 2 on bad input, 130 on Ctrl-C at the prompt."""

    def work() -> None:
        args = build_parser().parse_args(argv)
        foreign = args.trust_remote_code or args.tools is not None
        with importing(), without_torch(foreign), bar(None, what="starting"):
            from ..requirements import check_mlx

            check_mlx()
            from . import chat_session
        chat_session.run(args)

    if code := as_command(NAME, work, IF_MEMORY_IS_SHORT):
        sys.exit(code)


if __name__ == "__main__":
    main()
