"""`flashmoe-doctor`: check this machine, the kernels on it, its disk, and a model directory."""

import argparse
import json
import sys
from pathlib import Path

from ..commands import add_version, as_command
from ..models.families import SHAPES
from ..profile.read_speed import SAMPLE
from ..progress import bar
from ..requirements import check_mlx
from ..settings import check_variables


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="flashmoe-doctor",
        description="Check this machine, the kernels on it, its disk, and a model directory.",
    )
    add_version(parser)
    parser.add_argument("model_dir", nargs="?", type=Path, help="model directory to check")
    parser.add_argument("--model", type=Path, metavar="DIR", help="same as MODEL_DIR")
    parser.add_argument(
        "--full",
        action="store_true",
        help="also compare every kernel, in every format, with its float32 reference; with a "
        "model, also compare its logits with a quarter and with all of its experts in memory, "
        "compare its greedy tokens with stock mlx-lm's, and check its peak memory; takes minutes",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="under mlx.launch: compare the ranks, time their sums, and say which experts each has",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--geometry",
        choices=SHAPES,
        help="check the kernels at this model's shapes (default: MODEL_DIR's, else 35b)",
    )
    parser.add_argument(
        "--sample-mib",
        type=int,
        default=SAMPLE >> 20,
        help=f"MiB to read from the disk (default: {SAMPLE >> 20})",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit with 0, 1 if a check fails, 2 on bad input."""
    sys.exit(as_command("flashmoe-doctor", lambda: report(build_parser().parse_args(argv))))


def report(args: argparse.Namespace) -> int:
    """Print all findings, and return 1 if a check fails."""
    check_variables()
    check_mlx()
    with bar(None, what="importing MLX and mlx-lm"):  # takes seconds: --help does without
        from . import doctor_ranks
        from .doctor_checks import examine_all
        from .doctor_text import render
    if args.distributed:
        return doctor_ranks.report(args.model_dir or args.model, args.json)
    findings = examine_all(args)
    print(json.dumps(findings) if args.json else render(findings))
    return 0 if findings["ok"] else 1


if __name__ == "__main__":
    main()
