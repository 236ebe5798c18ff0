"""`flashmoe-bench`: measure and print the conditions and a table, and JSON on request."""

import sys

from ..commands import as_command
from .arguments import build_parser, run


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit with 0, 1 if a kernel is wrong, 2 on bad input."""
    sys.exit(as_command("flashmoe-bench", lambda: run(build_parser().parse_args(argv))))


if __name__ == "__main__":
    main()
