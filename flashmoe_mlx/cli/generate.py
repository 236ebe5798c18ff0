"""`flashmoe-generate`: parse the options, find the prompt, then import MLX and answer."""

import argparse
import sys

from ..commands import as_command, importing, without_torch
from ..errors import FlashMoEError
from ..progress import bar
from .options import as_text, check_options
from .options import build_parser as build_parser

IF_MEMORY_IS_SHORT = "Give a smaller --expert-cache, --prefill-step-size or --max-kv-size."
GIVE_ONE = 'Give one: flashmoe-generate "What is a disk?", or --prompt'


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit with 2 on bad input, 130 on Ctrl-C."""

    def work() -> None:
        run(build_parser().parse_args(argv))

    if code := as_command("flashmoe-generate", work, IF_MEMORY_IS_SHORT):
        sys.exit(code)


def run(args: argparse.Namespace) -> None:
    """Check the options, then answer the prompt.

    Raises:
        FlashMoEError: an option or the prompt is wrong, or the model cannot be loaded.
    """
    check_options(args)
    prompt = find_prompt(args.text, args.prompt)
    with importing(), without_torch(args.trust_remote_code), bar(None, what="starting"):
        from ..requirements import check_mlx

        check_mlx()
        from .answer import answer
    answer(args, prompt)


def find_prompt(text: str | None, option: str | None) -> str:
    """Return the prompt: the argument, the option `--prompt`, or standard input.

    Raises:
        FlashMoEError: both are given, or neither and nothing comes from standard input.
    """
    if text is not None and option is not None:
        raise FlashMoEError(f"PROMPT {text!r} and --prompt {option!r} are both given. Give one.")
    given = option if text is None else text
    if given is not None and given != "-":
        return as_text("the prompt", given).replace("\\n", "\n").replace("\\t", "\t")
    if given is None and (sys.stdin is None or sys.stdin.isatty()):
        raise FlashMoEError(f"there is no prompt. {GIVE_ONE}; or chat: flashmoe-chat.")
    found = as_text("standard input", _read_stdin())
    if given is None and not found.strip():
        raise FlashMoEError(f"there is no prompt, and standard input is empty. {GIVE_ONE}.")
    return found


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise FlashMoEError(f"standard input is not text ({error}). Give UTF-8.") from error


if __name__ == "__main__":
    main()
