"""Measure the memory of an idle server after each round of requests from 16 concurrent clients.

    python tools/serve_idle.py DIR [--rounds 20] [--expert-cache auto]

Prints resident MiB, descriptors and threads after each round of 32 requests, and the slope per
1,000 requests. The server is idle between rounds, so that only lasting memory counts. Linux only.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from serve_load import load, requests
from stock_server import StockServer, answer

CLIENTS = 16


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory that flashmoe-convert wrote")
    parser.add_argument("--rounds", type=int, default=20, help="number of rounds (default: 20)")
    parser.add_argument("--expert-cache", default="auto", help="memory for experts (default: auto)")
    args = parser.parse_args()
    bodies, idle = requests(most_tokens=30)[:32], []
    settings = {"FLASHMOE_EXPERT_CACHE": args.expert_cache}
    with (
        tempfile.TemporaryDirectory() as folder,
        StockServer(args.model, Path(folder) / "log", settings=settings) as server,
    ):
        alone = [answer(server.ask(body)) for body in bodies]
        for number in range(args.rounds):
            work = iter(range(len(bodies)))
            outcome = load(lambda b: answer(server.ask(b)), bodies, alone, CLIENTS, work)
            if outcome.errors or outcome.differing:
                raise SystemExit(f"{outcome.errors[:3]} {outcome.differing}")
            time.sleep(0.5)
            usage = server.usage()
            idle.append(usage.rss)
            count = (number + 1) * len(bodies)
            held = f"{usage.descriptors} descriptors, {usage.threads} threads"
            print(f"{count:6} requests: {usage.rss:.1f} MiB, {held}", flush=True)
    thousands = np.arange(len(idle)) * len(bodies) / 1000
    print(f"slope {np.polyfit(thousands, idle, 1)[0]:+.1f} MiB per 1,000 requests")


if __name__ == "__main__":
    main()
