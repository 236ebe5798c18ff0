"""Convert and run a model of true shape, and hold its peak memory against what it should need.

    python tools/measure_memory.py --geometry 35b --layers 8 --expert-cache 512MiB --work DIR

Exit code 1 if converting, or generating 16 tokens, takes more than trunk + bank + 400 MB.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from make_synthetic import make_synthetic

from flashmoe_mlx.loader import trunk_tensors
from flashmoe_mlx.settings import parse_size

ALLOWANCE = 400 * 10**6
PROMPT = "The quick brown fox jumps over the lazy dog. " * 4


def peak_of(*command: str) -> int:
    """Run a command and return its peak resident memory in bytes.

    Raises:
        SystemExit: the command failed; its output is shown.
    """
    watched = [sys.executable, "-c", _WATCH, *command]
    result = subprocess.run(watched, capture_output=True, text=True, env={**os.environ})
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


_WATCH = """
import json, resource, subprocess, sys
done = subprocess.run([sys.executable, *sys.argv[1:]])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps(peak if sys.platform == "darwin" else peak * 1024))
sys.exit(done.returncode)
"""


def measure(work: Path, geometry: str, layers: int, expert_cache: str) -> dict[str, int]:
    """Make, convert and run a model under `work`.

    Returns:
        Bytes: `trunk` on disk, `bank`, the peaks of `convert` and `generate`, and their `limit`.
    """
    source, packed = work / "source", work / "packed"
    make_synthetic(source, geometry, layers)
    convert = peak_of(
        "-m", "flashmoe_mlx.convert.cli", "--hf-path", str(source), "--mlx-path", str(packed)
    )  # fmt: skip
    generate = peak_of(
        "-m", "flashmoe_mlx.cli.generate", "--model", str(packed), "--expert-cache", expert_cache,
        "--prompt", PROMPT, "--max-tokens", "16",
    )  # fmt: skip
    bank = int(parse_size(expert_cache, "--expert-cache"))
    trunk = sum(info.nbytes for info in trunk_tensors(packed).values())
    return {
        "trunk": trunk,
        "bank": bank,
        "convert": convert,
        "generate": generate,
        "limit": trunk + bank + ALLOWANCE,
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", default="35b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--expert-cache", default="512MiB")
    parser.add_argument("--work", type=Path, required=True, help="A directory to make; kept.")
    args = parser.parse_args()
    args.work.mkdir()
    result = measure(args.work, args.geometry, args.layers, args.expert_cache)
    for name, nbytes in result.items():
        print(f"{name:>8} {nbytes / 1e6:8.0f} MB")
    sys.exit(max(result["convert"], result["generate"]) > result["limit"])


if __name__ == "__main__":
    main()
