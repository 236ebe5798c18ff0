"""The options of `flashmoe-bench`. Imports no MLX, so that --help answers at once."""

import argparse
import importlib
from pathlib import Path
from typing import Any

from ..commands import add_version
from ..custom_kernels.kept import cache_dir
from ..models.families import SHAPES
from ..models.qwen3_5.args import PREFILL_CHUNK
from ..models.qwen3_5.geometry import GEOMETRIES
from ..requirements import check_mlx
from ..settings import LOOKAHEAD, check_variables

RECORDS = (1_769_472, 7_077_888)  # bytes of a 4-bit expert of 35B-A3B and of 397B-A17B
DTYPES = ("float32", "bfloat16", "float16")
COLD = "drop the experts from the page cache before each run"
LESS_MEMORY = """To measure with less memory than the machine has, start the command in a cgroup:

    systemd-run --scope -p MemoryMax=2G -p MemorySwapMax=0 flashmoe-bench decode --cold
or, with cgroup version 1, as root:
    g=/sys/fs/cgroup/memory/bench; mkdir $g; echo 2G > $g/memory.limit_in_bytes
    sh -c "echo \\$\\$ > $g/cgroup.procs; exec flashmoe-bench decode --cold"
Also give --cold: the group is not charged for pages that other processes read into the page cache.
"""

Commands: Any = "argparse._SubParsersAction[argparse.ArgumentParser]"


def default_dir() -> Path:
    """Return the default directory of the checkpoints with random weights."""
    return cache_dir() / "synthetic"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser, with one subcommand per measurement."""
    parser = argparse.ArgumentParser(
        prog="flashmoe-bench",
        description="Measure kernels, throughput or the disk: prints the conditions and a table.",
        epilog=_where(),
    )
    add_version(parser)
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    _kernels(commands)
    _decode(commands)
    _prefill(commands)
    _batch(commands)
    _io(commands)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; its module is imported only now."""
    check_variables()
    check_mlx()
    module = importlib.import_module(f".{args.module}", __package__)
    return int(module.run(args))


def _where() -> str:
    return (
        "decode, prefill and batch write checkpoints of random weights, some GB each, to "
        f"{default_dir()} or --dir, and keep them for the next run. To delete them: "
        f"rm -r {default_dir()}"
    )


def _command(commands: Any, name: str, module: str, text: str, **more: Any) -> Any:
    """Add a subcommand, with the option that all have."""
    parser = commands.add_parser(name, help=text, description=text, **more)
    parser.set_defaults(what=name, module=module)
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write all figures as one line of JSON to FILE, or to stdout without FILE",
    )  # fmt: skip
    return parser


def _kernels(commands: Any) -> None:
    text = "Time each kernel against stock MLX and against the memory bandwidth's limit."
    add, usual = (
        _command(commands, "kernels", "kernels", text).add_argument,
        ["35b", "122b", "397b"],
    )
    text = "models whose shapes to use (default: 35b 122b 397b)"
    add("--geometry", nargs="+", choices=SHAPES, default=usual, help=text)
    add("--op", nargs="+", help="only these ops, such as dequant_matvec (default: all)")
    text = "bits per weight (default: 4 2)"
    add("--bits", nargs="+", type=int, default=[4, 2], help=text)
    text = "experts per token (default: 4 8 10)"
    add("--top-k", nargs="+", type=int, default=[4, 8, 10], help=text)
    text = "dtype of activations (default: bfloat16 on a GPU, float32 on a CPU)"
    add("--dtype", choices=DTYPES, help=text)
    add("--calls", type=int, help="calls per chain (default: 64 on a GPU, 8 on a CPU)")
    add("--runs", type=int, default=5, help="chains per op; prints the median (default: 5)")


def _model(commands: Any, name: str, text: str) -> Any:
    """Add a subcommand that runs a model, with the options common to all three."""
    parser = _command(
        commands, name, "throughput", text, epilog=f"{_where()}\n\n{LESS_MEMORY}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--geometry", choices=GEOMETRIES, default="35b", help="shapes of this model (default: 35b)")
    add("--layers", type=int, default=8, help="number of layers (default: 8)")
    add("--vocabulary", type=int, default=32768, help="number of token ids (default: 32768)")
    add("--bits", type=int, default=4, help="bits per expert weight, 4 or 2 (default: 4)")
    add("--top-k", type=int, help="experts per token (default: the geometry's)")
    add("--expert-cache", help="memory for experts: 512MiB, 4GiB or auto (default: auto)")
    add("--io-threads", type=int, help="threads that read from disk (default: 8)")
    text = "prefetch experts before the router picks them (default: off)"
    add("--lookahead", choices=LOOKAHEAD, default="off", help=text)
    add("--runs", type=int, default=3, help="number of runs; prints the median too (default: 3)")
    add("--stock", action="store_true", help="also run stock mlx-lm on the same weights")
    where = f"directory of the checkpoints (default: {default_dir()})"
    add("--dir", type=Path, default=default_dir(), help=where)
    add("--plot", type=Path, metavar="FILE.png", help="plot the layers' times and hit rates")
    return parser


def _published(parser: Any) -> None:
    text = "also print what others published for whole models of this geometry and bits"
    parser.add_argument("--published", action="store_true", help=text)


def _decode(commands: Any) -> None:
    text = "Decode with a random-weight model of true shape; its experts stream from disk."
    parser = _model(commands, "decode", text)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode (default: 64)")
    parser.add_argument("--cold", action="store_true", help=COLD)
    text = "continue with random tokens instead of the model's (default: yes, because random "
    text += "weights repeat themselves, so that every expert becomes a hit)"
    parser.add_argument("--forced", action=argparse.BooleanOptionalAction, default=True, help=text)
    _published(parser)


def _prefill(commands: Any) -> None:
    text = "Prefill with a random-weight model of true shape; its experts stream from disk."
    parser = _model(commands, "prefill", text)
    lengths, text = [1024, 4096], "lengths of the prompts (default: 1024 4096)"
    parser.add_argument("--tokens", nargs="+", type=int, default=lengths, help=text)
    text = f"tokens per step, as mlx-lm's --prefill-step-size (default: {PREFILL_CHUNK})"
    parser.add_argument("--chunk", type=int, default=PREFILL_CHUNK, help=text)
    _published(parser)


def _batch(commands: Any) -> None:
    text = "Decode several sequences in a batch; the experts stream from disk."
    parser = _model(commands, "batch", text)
    sizes, text = [1, 2, 4, 8], "sequences per batch (default: 1 2 4 8)"
    parser.add_argument("--batch", nargs="+", type=int, default=sizes, help=text)
    text = "tokens to decode per sequence (default: 32)"
    parser.add_argument("--tokens", type=int, default=32, help=text)
    parser.add_argument("--cold", action="store_true", help=COLD)


def _io(commands: Any) -> None:
    text = "Read experts by every method that this system supports, and with the expert store."
    parser = _command(commands, "io", "io", text)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--model", help="read the experts of a model's first layer")
    where.add_argument(
        "--dir", type=Path, default=cache_dir(),
        help=f"read a temporary file in this directory (default: {cache_dir()})",
    )  # fmt: skip
    add = parser.add_argument
    sizes = f"bytes per expert in the temporary file (default: {' '.join(map(str, RECORDS))})"
    add("--record", nargs="+", type=int, default=list(RECORDS), metavar="BYTES", help=sizes)
    numbers, text = [1, 2, 4, 8, 16], "numbers of reader threads (default: 1 2 4 8 16)"
    add("--threads", nargs="+", type=int, default=numbers, help=text)
    add("--rounds", type=int, default=7, help="rounds; prints their median (default: 7)")
    add("--sample-mib", type=int, default=128, help="MiB to read per round (default: 128)")
