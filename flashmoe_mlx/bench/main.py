"""`flashmoe-bench`: measure and print the conditions, a table, and last one JSON line."""

import argparse
import sys

from ..commands import add_version, as_command
from ..settings import check_variables
from . import io as bench_io
from . import kernels, throughput


def build_parser() -> argparse.ArgumentParser:
    """Return the parser, with one subcommand per measurement."""
    parser = argparse.ArgumentParser(prog="flashmoe-bench", description=__doc__.split("\n")[0])
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    kernels.add(commands)
    throughput.add(commands)
    bench_io.add(commands)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit with 0, 1 if a kernel is wrong, 2 on bad input."""

    def work() -> int:
        args = build_parser().parse_args(argv)
        check_variables()
        return int(args.run(args))

    sys.exit(as_command("flashmoe-bench", work))


if __name__ == "__main__":
    main()
