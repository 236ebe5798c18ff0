"""The command `flashmoe-convert`."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..commands import add_version, as_command, importing
from ..errors import FlashMoEError
from ..format.placement import Placement
from ..progress import bar
from ..requirements import check_mlx
from ..settings import check_variables
from .plan.parts import METHODS
from .plan.plan import DTYPES
from .plan.ranks import outputs, placements
from .plan.recipes import RECIPES
from .source.foreign_code import REMEDY, foreign_code
from .verify.verify import summary, verify

EXIT_DIFFERENCES = 1


def parser() -> argparse.ArgumentParser:
    """Return the parser; its options are those of mlx_lm.convert, and more."""
    result = argparse.ArgumentParser(
        prog="flashmoe-convert",
        usage="flashmoe-convert --hf-path PATH [--mlx-path DIR] [options]\n"
        "       flashmoe-convert verify DIR [--repair --hf-path PATH]",
        description="Convert a checkpoint so that its experts stream from disk; or "
        "check, and repair, every byte of a converted directory: flashmoe-convert verify --help.",
    )
    add_version(result)
    add = result.add_argument
    add(
        "--hf-path", "--model", required=True, metavar="PATH",
        help="The checkpoint: a directory, or a name on the Hugging Face Hub. Hugging Face's own "
        "format or MLX's, quantized or not.",
    )  # fmt: skip
    add(
        "--mlx-path", default="mlx_model", metavar="DIR",
        help="Directory to write. It must not exist, or be the unfinished output of the same "
        "command, which then resumes.",
    )  # fmt: skip
    add(
        "-q", "--quantize", action="store_true",
        help="Quantize. Without it, a quantized source is repacked unchanged.",
    )  # fmt: skip
    add(
        "--q-bits", type=int, metavar="N",
        help="Bits per expert weight: 2, 3, 4, 5, 6 or 8 (default 4). Other weights get at least "
        "4: a 2-bit conversion has a 4-bit trunk. Routers have 8.",
    )  # fmt: skip
    add(
        "--q-group-size", type=int, metavar="N",
        help="Weights that share a scale: 32, 64 or 128 (default 64).",
    )  # fmt: skip
    add(
        "--quant-predicate", choices=RECIPES,
        help="Bits per expert matrix, instead of --q-bits: mixed_LOW_HIGH is mlx_lm's "
        "rule for down projections; mixed_2_2_4 has gate and up at 2 and down at 4; "
        "mixed_2_4_ends has the first and the last eighth of the layers at 4.",
    )  # fmt: skip
    add(
        "--q-method", choices=METHODS,
        help="How to choose the scales of experts: min-max uses each group's extremes, as "
        "mlx_lm.convert does; least-squares searches for the smallest error, is slower, and "
        "never worse (default: least-squares below 4 bits, else min-max).",
    )  # fmt: skip
    add(
        "--calibrate", metavar="FILE",
        help="Quantize each expert for its inputs in this text (UTF-8): a few thousand words of "
        "the kind that the model will be used for. Needs a quantized source, memory to run it, and "
        "hours for a large model: --dry-run says how many.",
    )  # fmt: skip
    add(
        "--dtype", choices=sorted(DTYPES),
        help="Type of tensors that are not quantized (default: the config's, or bfloat16).",
    )  # fmt: skip
    add("--revision", help="Branch, tag or commit on the Hub.")
    add(
        "--keep-source", action="store_true",
        help="Download the whole checkpoint into the Hub's cache and keep it. By default, each "
        "file is downloaded, packed and deleted in turn.",
    )  # fmt: skip
    add("--dry-run", action="store_true", help="Print what would be written, and write nothing.")
    add(
        "--link", action="store_true",
        help="Stream from a quantized MLX checkpoint in place: symlinks instead of copies.",
    )  # fmt: skip
    add(
        "--no-remote-code", action="store_true",
        help="Omit the source's Python files, and the entries in its configuration (auto_map) that "
        "make --trust-remote-code run them. By default they are copied unchanged.",
    )  # fmt: skip
    add("--ranks", type=int, metavar="N", help="Share the model among N machines: see --rank.")
    add(
        "--rank", type=int, metavar="R",
        help="With --ranks: write only the experts of machine R, counted from 0; from the "
        "Hub, only these are downloaded.",
    )  # fmt: skip
    add(
        "--split", type=int, metavar="N",
        help="Write the directories of all N machines: DIR-rank0, DIR-rank1, ...",
    )  # fmt: skip
    add(
        "--rank-weights", metavar="W,W",
        help="With --ranks or --split: each machine's share of the experts, such as 2,1 (default: "
        "equal shares).",
    )  # fmt: skip
    add(
        "--upload-repo", metavar="OWNER/NAME",
        help="Upload the finished directory to this repository of the Hub, created if necessary: "
        "the files in the manifest, and the model card. If the same command has finished before, "
        "its output is uploaded. Needs --private or --public.",
    )  # fmt: skip
    visibility = result.add_mutually_exclusive_group()
    visibility.add_argument(
        "--private", action="store_const", const=True,
        help="With --upload-repo: only you, or your organization, may see the repository.",
    )  # fmt: skip
    visibility.add_argument(
        "--public", dest="private", action="store_const", const=False,
        help="With --upload-repo: anyone can see it.",
    )  # fmt: skip
    return result


def verify_parser() -> argparse.ArgumentParser:
    """Return the parser of `flashmoe-convert verify`."""
    result = argparse.ArgumentParser(
        prog="flashmoe-convert verify",
        description="Compare every byte of a converted directory with its manifest's checksums, "
        "except README.md, the model card, and settings in config.json, which users may edit. "
        "Exit code 0: equal, 1: different, 2: the check failed.",
    )
    add = result.add_argument
    add("directory", metavar="DIR", help="A directory that flashmoe-convert wrote.")
    add("--repair", action="store_true", help="Rewrite what differs, from --hf-path.")
    add("--hf-path", "--model", metavar="PATH", help="The checkpoint that DIR was made from.")
    add("--revision", help="Its branch, tag or commit on the Hub (default: the one in DIR).")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 after a one-line error.

    `verify` returns 1 if bytes differ.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)

    def work() -> int:
        check_variables()
        if given[:1] == ["verify"]:
            return _verify(verify_parser().parse_args(given[1:]))
        return _convert(parser().parse_args(given))

    return as_command("flashmoe-convert", work)


def _verify(options: argparse.Namespace) -> int:
    directory = Path(options.directory).expanduser()
    if options.repair != (options.hf_path is not None):
        raise FlashMoEError("--repair and --hf-path SOURCE go together. Give both, or neither.")
    problems = verify(directory)
    if options.repair and problems:
        print(*problems, sep="\n")
        print(f"Files to repair: {len({problem.file for problem in problems})}.")
        check_mlx()
        from .verify.repair import repair

        problems = repair(directory, problems, options.hf_path, options.revision)
    print(*problems, summary(directory, problems), sep="\n")
    return EXIT_DIFFERENCES if problems else 0


def _convert(options: argparse.Namespace) -> int:
    with importing(), bar(None, what="starting"):
        check_mlx()
        from .publish.upload import is_finished
        from .run import convert

    try:
        convert(**vars(options))
    except KeyboardInterrupt:
        out = next(iter(_outputs(options)))
        advice = "; run the same command again to resume" if out.exists() else ""
        advice += f", or delete {out}" if advice and not is_finished(out) else ""
        raise KeyboardInterrupt(f"flashmoe-convert: interrupted{advice}") from None
    if not options.dry_run:
        print(*_done(options), sep="\n")
    return 0


def _outputs(options: argparse.Namespace) -> dict[Path, Placement | None]:
    parts = placements(options.ranks, options.rank, options.rank_weights, options.split)
    return outputs(Path(options.mlx_path).expanduser(), parts)


def _done(options: argparse.Namespace) -> list[str]:
    """Return the last lines: how to try it, with the flag only if it runs no foreign code."""
    outs, place = _outputs(options), shlex.quote(options.mlx_path)
    directory = next(iter(outs))
    code = foreign_code(directory, list(directory.iterdir()))
    notes = [f"Copied code of {options.hf_path}: {code}. {REMEDY}."] if code else []
    if options.upload_repo:
        return [f"Uploaded: https://huggingface.co/{options.upload_repo}", *notes]
    if outs[directory]:
        held = [f"{path}: the experts of {part}." for path, part in outs.items()]
        return [*held, *notes, "Done. Give every machine its own, under the same path, and start "
                "all ranks with mlx.launch."]  # fmt: skip
    if code:
        attempt = f"Try, without that flag: flashmoe-generate --model {place} -p Hello"
        return ["Done.", *notes, attempt]
    return [f"Done. Try: mlx_lm.generate --model {place} --trust-remote-code -p Hello"]


if __name__ == "__main__":
    sys.exit(main())
