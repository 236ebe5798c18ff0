"""Faults of one of two ranks at random moments: all ranks end, name the cause, give no wrong token.

    python tests/stress/rank_faults.py [--times 50] [--seed 0] [--way shard|pipeline]

Exits with 1 if a rank outlives the others by a minute, ends well, or answered otherwise.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
sys.path.insert(0, str(DISTRIBUTED))

from ranks import start  # noqa: E402

from flashmoe_mlx.loader import BUNDLED_MODEL  # noqa: E402

TIMEOUT, LONGEST = 10, 60  # seconds: of the watchdog, and for all ranks to end
CAUSES = {
    "EIO": "Input/output error",
    "SIGKILL": "another rank ended|rank . ended|lost",
    "SIGSTOP": "was silent for|took more than|another rank ended|rank . ended|lost",
}


def run(way: str, fault: str, victim: int, chance: random.Random) -> str:
    """Let a fault hit a rank; return what went wrong, or nothing."""
    reads = str(chance.randrange(1, 1500)) if fault == "EIO" else "0"
    commands = [[DISTRIBUTED / "fail.py", BUNDLED_MODEL, way, n] for n in ("0", reads)]
    first, last = commands if victim else reversed(commands)
    variables = {"FLASHMOE_COLLECTIVE_TIMEOUT": str(TIMEOUT)}
    with tempfile.TemporaryDirectory() as folder:
        ranks = start(Path(folder), 2, first, [variables, variables], last=last)
        try:
            if fault != "EIO":
                ranks[victim].stdout.readline()
                time.sleep(chance.uniform(0, 6))
                ranks[victim].send_signal(getattr(signal, fault))
            return judge(fault, ranks, victim)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


def judge(fault: str, ranks: list[subprocess.Popen], victim: int) -> str:
    """Wait for the end of both ranks; return what went wrong, or nothing."""
    answers = set()
    for number in (1 - victim, victim):
        if fault == "SIGSTOP" and number == victim:
            ranks[number].send_signal(signal.SIGCONT)
        try:
            text = ranks[number].communicate(timeout=LONGEST)[0]
        except subprocess.TimeoutExpired:
            return f"rank {number} did not end"
        if ranks[number].returncode == 0:
            return f"rank {number} ended well"
        if not re.search(CAUSES[fault], text) and not (fault == "SIGKILL" and number == victim):
            return f"rank {number} named no cause: {text[-300:]}"
        answers |= {line for line in text.splitlines() if line.startswith("ANSWER")}
    return "" if len(answers) <= 1 else f"{len(answers)} different answers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--way", choices=["shard", "pipeline"], default="shard")
    args = parser.parse_args()
    chance, failed = random.Random(args.seed), 0
    for fault in CAUSES:
        wrong = [w for n in range(args.times) if (w := run(args.way, fault, n % 2, chance))]
        print(f"{args.way}, {fault}: {args.times - len(wrong)} of {args.times}", *wrong, flush=True)
        failed += len(wrong)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
