"""The command `flashmoe-convert`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flashmoe_mlx.convert.plan import DTYPES
from flashmoe_mlx.convert.run import convert
from flashmoe_mlx.errors import FlashMoEError

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """Return the parser; the flags are those of mlx_lm.convert, and two more."""
    result = argparse.ArgumentParser(
        prog="flashmoe-convert",
        description="Convert a Qwen3.5 MoE checkpoint so that its experts stream from disk.",
    )
    add = result.add_argument
    add(
        "--hf-path", "--model", required=True, metavar="PATH",
        help="The checkpoint: a directory, or a name on the Hugging Face Hub. Hugging Face's own "
        "format or MLX's, quantised or not.",
    )  # fmt: skip
    add(
        "--mlx-path",
        default="mlx_model",
        metavar="DIR",
        help="Directory to write. It does not exist yet, or an interrupted run of the same command "
        "left it unfinished, which then goes on.",
    )
    add(
        "-q", "--quantize", action="store_true",
        help="Quantise. Without it, a source that is quantised already is repacked as it is.",
    )  # fmt: skip
    add(
        "--q-bits", type=int, metavar="N",
        help="Bits per expert weight: 2, 3, 4, 5, 6 or 8 (default 4). Everything else gets 4 "
        "at least: a 2-bit conversion keeps a 4-bit trunk, and routers have 8.",
    )  # fmt: skip
    add(
        "--q-group-size", type=int, metavar="N",
        help="Weights that share a scale: 32, 64 or 128 (default 64).",
    )  # fmt: skip
    add(
        "--dtype", choices=sorted(DTYPES),
        help="Type of what is not quantised (default: the config's, or bfloat16).",
    )  # fmt: skip
    add("--revision", help="Branch, tag or commit on the Hub.")
    add("--dry-run", action="store_true", help="Print what would be written, and write nothing.")
    add(
        "--link", action="store_true",
        help="Stream from a quantised MLX checkpoint where it lies: symlinks, no copies.",
    )  # fmt: skip
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 after a one-line error."""
    options = parser().parse_args(arguments)
    try:
        convert(**vars(options))
    except FlashMoEError as error:
        print(f"flashmoe-convert: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        out = options.mlx_path
        advice = f"; the same command goes on, or delete {out}" if Path(out).exists() else ""
        print(f"flashmoe-convert: interrupted{advice}", file=sys.stderr)
        return EXIT_INTERRUPTED
    if not options.dry_run:
        print(f"Done. Try: mlx_lm.generate --model {options.mlx_path} --trust-remote-code -p Hello")
    return 0


if __name__ == "__main__":
    sys.exit(main())
