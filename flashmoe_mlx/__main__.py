"""`python -m flashmoe_mlx`: list the commands, or run one."""

import argparse
import importlib
import sys

from .commands import COMMANDS, add_version, as_command

PREFIX = "flashmoe-"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its help lists the commands."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m flashmoe_mlx",
        description="Run mixture-of-experts models larger than memory in MLX and mlx-lm.",
        epilog="\n".join(
            ["commands:", *(f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [name.removeprefix(PREFIX) for name in COMMANDS]
    add_version(parser)
    parser.add_argument("command", nargs="?", choices=names, metavar="command", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of that command")
    return parser


def main() -> int | None:
    """Run the command that the first argument names; without one, list all."""
    parser = build_parser()
    args = parser.parse_args()
    if args.command is None:
        return as_command("flashmoe_mlx", parser.print_help)
    module = importlib.import_module(COMMANDS[PREFIX + args.command][0])
    return module.main(args.arguments)


if __name__ == "__main__":
    sys.exit(main())
