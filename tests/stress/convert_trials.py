"""Trials of flashmoe-convert: kill it at any moment, damage its files, fill its disk.

    python tests/stress/convert_trials.py kill [--runs 20] [--hub] [--format hf]
    python tests/stress/convert_trials.py repair [--runs 20]
    python tests/stress/convert_trials.py flip [--times 12]
    python tests/stress/convert_trials.py full-disk [--runs 10] [--hub]

Each prints its steps and errors, and exits with 1 after an error. `full-disk` mounts a small file
system, which needs root. Linux only.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from convert_damage import CARD, damaged_everywhere, spoil
from convert_full_disk import full_disks
from convert_scenes import (
    MANIFEST_PLACE,
    Conversion,
    conversion,
    differences,
    files,
    is_whole,
    on_disk,
    pretends,
    result,
    wait_for,
    watched,
)  # fmt: skip

from flashmoe_mlx.bench.synthetic import Recipe

MODES = "time", "before", "amid", "after", "power"
Calls = list[tuple[str, float]]


def undisturbed(work: Path, made_by: Conversion) -> tuple[Path, Calls]:
    """Convert without a fault; return the directory and all system calls."""
    out, log = work / "whole", work / "calls.json"
    shutil.rmtree(out, ignore_errors=True)
    with watched(out) as most:
        code, line = result(made_by.start(out, log=str(log)))
    if code:
        raise SystemExit(f"the conversion without faults failed: {line}")
    calls: Calls = [(name, when) for name, when in json.loads(log.read_text())]
    shards = sorted(path.stat().st_size for path in made_by.source.glob("*.safetensors"))
    print(
        f"undisturbed: {on_disk(out):,} bytes in {len(files(out))} files, {len(calls)} calls "
        f"{dict(Counter(name for name, _ in calls))}; at most {most[0]:,} bytes on disk "
        f"(source: {len(shards)} shards, the two largest {sum(shards[-2:]):,} bytes)",
        flush=True,
    )
    return out, calls


def strike_of(mode: str, calls: Calls, chances: random.Random) -> dict[str, Any]:
    """Choose a system call: its kind first, because few kinds make most calls."""
    kind = "pwrite" if mode == "amid" else chances.choice(sorted({name for name, _ in calls}))
    point = chances.choice([place for place, (name, _) in enumerate(calls) if name == kind])
    if mode == "power":
        when = chances.choice(("before", "after", "amid"))
        return {"point": point, "when": when, "power": chances.randrange(1 << 30)}
    return {"point": point, "when": mode}


def killed(
    made_by: Conversion, out: Path, mode: str, calls: Calls, chances: random.Random
) -> tuple[int, str]:
    """Run the command, kill it, and return its exit code and a description."""
    if mode != "time":
        strike = strike_of(mode, calls, chances)
        what = f"{mode} call {strike['point']} {calls[strike['point']][0]}"
        return result(made_by.start(out, **strike))[0], what
    first = next((when for name, when in calls if name == "mkdir"), calls[0][1])
    delay = chances.uniform(0, calls[-1][1] - first)
    process = made_by.start(out)
    wait_for(out, process)
    time.sleep(delay)
    process.kill()
    return result(process)[0], f"after {delay:.2f} s"


def kill_and_resume(
    made_by: Conversion, whole: Path, out: Path, calls: Calls, mode: str, chances: random.Random
) -> tuple[list[str], list[str]]:
    """Kill a conversion and perhaps its resumptions, then finish it; return steps and errors."""
    shutil.rmtree(out, ignore_errors=True)
    did: list[str] = []
    wrong: list[str] = []
    for number in range(1 + chances.choice((0, 0, 1, 2))):
        code, what = killed(
            made_by, out, mode if not number else chances.choice(MODES), calls, chances
        )
        if code == -signal.SIGKILL:
            did.append(what)
        elif code:
            wrong.append(f"exit code {code} instead of going on, {what}")
        wrong += pretends(out, whole)
        if is_whole(out):
            break
    if not is_whole(out):
        code, line = result(made_by.start(out))
        wrong += [f"exit code {code}: {line}"] if code else []
    return did, wrong + [f"{name} differs at the end" for name in differences(out, whole)]


def kill(work: Path, made_by: Conversion, runs: int, seed: int) -> int:
    """Kill conversions at random moments; return the number of wrong results."""
    whole, calls = undisturbed(work, made_by)
    kills = bad = 0
    for run in range(runs):
        mode = MODES[run % len(MODES)]
        chances = random.Random(f"{seed} {run}")
        did, wrong = kill_and_resume(made_by, whole, work / "out", calls, mode, chances)
        kills, bad = kills + len(did), bad + bool(wrong)
        print(f"run {run:3}: killed {len(did)}x ({'; '.join(did)}): {_verdict(wrong)}", flush=True)
    print(f"{runs} runs, {kills} kills: {runs - bad} equal a run without faults")
    return bad


def _verdict(wrong: list[str]) -> str:
    return "WRONG: " + "; ".join(wrong) if wrong else "identical"


def repair(work: Path, made_by: Conversion, runs: int, seed: int) -> int:
    """Kill repairs of damaged directories; return the number of wrong results."""
    whole, _ = undisturbed(work, made_by)
    source = made_by.arguments[made_by.arguments.index("--hf-path") + 1]
    out, bad, kills = work / "out", 0, 0
    command = "verify", str(out), "--repair", "--hf-path", source
    for run in range(runs):
        chances = random.Random(f"{seed} {run}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(whole, out)
        for name in chances.sample([n for n in files(out) if n not in (CARD, MANIFEST_PLACE)], 5):
            spoil(out / name, chances)
        did = 0
        for _ in range(chances.choice((1, 2, 3))):
            strike = {"point": chances.randrange(100), "when": chances.choice(MODES[1:4])}
            did += result(made_by.command(*command, **strike))[0] == -signal.SIGKILL
        code, line = result(made_by.command(*command))
        wrong = [f"exit code {code}: {line}"] if code else []
        wrong += [f"{name} differs at the end" for name in differences(out, whole)]
        kills, bad = kills + did, bad + bool(wrong)
        print(f"run {run:3}: killed {did}x: {_verdict(wrong)}", flush=True)
    print(f"{runs} repairs, {kills} kills: {runs - bad} restored every byte")
    return bad


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trials = parser.add_subparsers(dest="trial", required=True)
    for name in ("kill", "repair", "flip", "full-disk"):
        add = trials.add_parser(name).add_argument
        add("--seed", type=int, default=0)
        add("--work", type=Path, help="empty working directory (default: a temporary one)")
        add("--times", type=int, default=12, help="damages of each kind per file (flip)")
        add("--runs", type=int, default=20)
        add("--hub", action="store_true", help="convert from a local Hub server")
        add(
            "--format",
            default="mlx",
            choices=("mlx", "hf"),
            help="format of the source: 4 bits or bf16",
        )
        add("--geometry", default="tiny", choices=("tiny", "35b"))
        add("--layers", type=int, default=4)
        add("--shards", type=int, default=8, help="shards of the source")
    return parser


def run(args: argparse.Namespace, work: Path) -> int:
    """Run one trial and return its number of errors."""
    recipe = Recipe(args.geometry, args.layers, 4096, 4)
    with conversion(work, recipe, args.format, args.shards, args.hub) as made_by:
        if args.trial == "flip":
            return damaged_everywhere(work, undisturbed(work, made_by)[0], args.times, args.seed)
        if args.trial == "full-disk":
            return full_disks(work, made_by, undisturbed(work, made_by)[0], args.runs, args.seed)
        return (kill if args.trial == "kill" else repair)(work, made_by, args.runs, args.seed)


def main() -> None:
    """Run the command."""
    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-trials-", dir=args.work) as work:
        bad = run(args, Path(work))
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
