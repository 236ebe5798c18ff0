"""Two ranks in two network namespaces, with TCP between them; needs root, and `ip`.

    python tests/stress/two_networks.py [--times 50] [--at-once 2] [--seed 0]

First, `exact` equals one process to the bit: 64 tokens and their logits. Then the link between the
two is cut at a random moment, and both must end, and name the cause, within the watchdog's time.
"""

import argparse
import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
sys.path[:0] = [str(DISTRIBUTED.parent), str(DISTRIBUTED)]

import mlx.core as mx  # noqa: E402
from families import make  # noqa: E402
from ranks import FAMILIES, finish, start  # noqa: E402

from flashmoe_mlx.loader import BUNDLED_MODEL  # noqa: E402

TIMEOUT, LATE = 6, 3  # seconds: of the watchdog, and until its thread looks again on a busy machine
PATIENCE = 120  # seconds, until both have answered
CAUSE = re.compile("rank . was silent for|took more than|another rank ended|rank . ended")
numbers = count()


@contextlib.contextmanager
def namespaces() -> Iterator[list[tuple[str, str]]]:
    """Make two namespaces with a link between them; yield the name and address of each."""
    number = next(numbers)
    found = [(f"flashmoe-{number}-{side}", f"10.83.{number}.{side + 1}") for side in (0, 1)]
    try:
        for name, _ in found:
            ip("netns", "add", name)
        (one, _), (other, _) = found
        ip("-n", one, "link", "add", "to", "type", "veth", "peer", "name", "to", "netns", other)
        for name, address in found:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "to")
            ip("-n", name, "link", "set", "to", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield found
    finally:
        for name, _ in found:
            subprocess.run(["ip", "netns", "del", name], check=False)


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True)


def compare(folder: Path) -> list[str]:
    """Return the answers of two ranks that differ from one process's."""
    shutil.copytree(BUNDLED_MODEL, folder / "bundled")
    for family in FAMILIES:
        (folder / family).mkdir()
        make(family, folder / family, {})
    directories = [folder / name for name in ("bundled", *FAMILIES)]
    script = DISTRIBUTED / "answer.py"
    env = {"FLASHMOE_KERNELS": "stock"}
    jobs = {way: [f"{way}:{directory}" for directory in directories] for way in ("alone", "exact")}
    printed = finish(start(folder, 1, [script, folder, *jobs["alone"]], [env]))
    with namespaces() as found:
        command = [script, folder, *jobs["exact"]]
        printed += finish(start(folder, 2, command, [env, env], namespaces=found))
    different = []
    for name in [d.name for d in directories]:
        files = [folder / f"{name}.{way}.safetensors" for way in ("alone.0", "exact.0", "exact.1")]
        if not all(file.exists() for file in files):
            return printed
        alone, *ranks = (mx.load(str(file)) for file in files)
        asked = [
            json.loads((folder / f"{name}.{way}.json").read_text())["asked"]
            for way in ("alone.0", "exact.0", "exact.1")
        ]
        print(f"{name}: {alone['300'].shape[1]} steps; experts asked: {asked}", flush=True)
        different += [
            f"{name}, rank {rank}, {key}: not equal to one process"
            for rank, answers in enumerate(ranks)
            for key in alone
            if not mx.array_equal(answers[key], alone[key])
        ]
    return different


def cut(chance: random.Random) -> tuple[str, float]:
    """Cut a link during an answer; return what went wrong, or nothing, and seconds to the end."""
    env = {"FLASHMOE_COLLECTIVE_TIMEOUT": str(TIMEOUT), "FLASHMOE_SHARDING": "exact"}
    with tempfile.TemporaryDirectory() as folder, namespaces() as found:
        command = [DISTRIBUTED / "fail.py", BUNDLED_MODEL, "shard", 0]
        ranks = start(Path(folder), 2, command, [env, env], namespaces=found)
        texts: list[list[str]] = [[], []]
        readers = [
            threading.Thread(target=text.extend, args=(rank.stdout,))
            for rank, text in zip(ranks, texts, strict=True)
        ]
        for reader in readers:
            reader.start()
        try:
            until = time.monotonic() + PATIENCE
            while not all(any(line == "ANSWER\n" for line in text) for text in texts):
                if time.monotonic() > until:
                    return f"no answer: {texts}", 0.0
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 4))
            ip("-n", found[chance.randrange(2)][0], "link", "set", "to", "down")
            begun = time.monotonic()
            for rank in ranks:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    rank.wait(max(0.0, begun + TIMEOUT + LATE - time.monotonic()))
            seconds = time.monotonic() - begun
        finally:
            still = [number for number, rank in enumerate(ranks) if rank.poll() is None]
            for rank in ranks:
                rank.kill()
            for reader in readers:
                reader.join()
    printed = ["".join(text) for text in texts]
    if still:
        return f"ranks {still} did not end in {TIMEOUT + LATE} s: {printed}", seconds
    if not all(CAUSE.search(text) for text in printed) or not all(r.returncode for r in ranks):
        return f"no cause, or a good end: {[text[-500:] for text in printed]}", seconds
    return "", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="cuts")
    parser.add_argument("--at-once", type=int, default=2, help="cuts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = compare(Path(folder))
    print("exact:", *(wrong or ["equal to one process"]), sep="\n  ", flush=True)
    with ThreadPoolExecutor(args.at_once) as pool:
        chances = [random.Random(args.seed + number) for number in range(args.times)]
        ends = list(pool.map(cut, chances))
    wrong += (failed := [text for text, _ in ends if text])
    print(f"cut: {args.times - len(failed)} of {args.times} as they should be; ended in at most "
          f"{max(seconds for _, seconds in ends):.1f} s", *failed, sep="\n  ")  # fmt: skip
    sys.exit(len(wrong) > 0)


if __name__ == "__main__":
    main()
