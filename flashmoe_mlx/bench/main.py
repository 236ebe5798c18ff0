"""`flashmoe-bench`: measurements with their conditions; a table, then one JSON line last."""

import argparse
import sys

from ..commands import as_command
from ..custom_kernels.case import DTYPES
from ..models.qwen3_5.geometry import GEOMETRIES
from . import batch, decode, kernels, prefill
from . import io as bench_io


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: one subcommand for each thing that is measured."""
    parser = argparse.ArgumentParser(prog="flashmoe-bench", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    _add_kernels(commands)
    decode.add(commands)
    prefill.add(commands)
    batch.add(commands)
    bench_io.add(commands)
    return parser


def _add_kernels(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "Time each kernel beside stock MLX and beside what the memory's bandwidth allows."
    parser = commands.add_parser("kernels", help=text, description=text)
    parser.set_defaults(run=kernels.run)
    parser.add_argument(
        "--geometry",
        nargs="+",
        choices=GEOMETRIES,
        default=["35b", "122b", "397b"],
        help="models whose shapes to take (default: 35b 122b 397b)",
    )
    parser.add_argument(
        "--op", nargs="+", help="only these ops, such as dequant_matvec (default: all)"
    )
    parser.add_argument(
        "--bits", nargs="+", type=int, default=[4, 2], help="bits per weight (default: 4 2)"
    )
    parser.add_argument(
        "--top-k", nargs="+", type=int, default=[4, 8, 10], help="experts (default: 4 8 10)"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of activations (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--calls", type=int, help="calls in one chain (default: 64 on a GPU, 8 on a CPU)"
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="chains of each, of which the median (default: 5)"
    )


def main(argv: list[str] | None = None) -> None:
    """Run the command; exits with 0, 1 if a kernel is wrong, 2 on bad input."""

    def work() -> int:
        args = build_parser().parse_args(argv)
        return int(args.run(args))

    sys.exit(as_command("flashmoe-bench", work))


if __name__ == "__main__":
    main()
