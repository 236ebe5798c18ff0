"""Decode on one machine, and on two of which each has its own disk: tokens per second.

    python tests/stress/two_disks.py [--rate 200] [--cache 600MiB] [--layers 8] [--warm-up 24]

35B geometry, random weights and tokens. Each process stands for a machine: it has a core and an
expert cache of its own, and its reads wait for a disk of `--rate` MB/s. The page cache is dropped
first, which needs root. `--warm-up` tokens fill the expert caches before the clock runs. Exits with
1 if two disks decode less than 1.6 times as fast as one.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

DISTRIBUTED = Path(__file__).parents[1] / "distributed"
sys.path.insert(0, str(DISTRIBUTED))

os.sched_setaffinity(0, {int(os.environ.get("MLX_RANK", 0))})  # before threads are started

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from ranks import finish, start  # noqa: E402

from flashmoe_mlx import load  # noqa: E402
from flashmoe_mlx.bench.model import random_tokens  # noqa: E402
from flashmoe_mlx.bench.synthetic import Recipe, checkpoint  # noqa: E402

LEAST = 1.6  # times as fast


def limit_reads(rate: float) -> None:
    """Let reads of this process take as long as on a disk of `rate` bytes a second."""
    preadv, lock, free_at = os.preadv, threading.Lock(), [0.0]

    def slow(*args):
        nbytes = preadv(*args)
        with lock:
            free_at[0] = max(free_at[0], time.monotonic()) + nbytes / rate
            wait = free_at[0] - time.monotonic()
        time.sleep(max(0.0, wait))
        return nbytes

    os.preadv = slow


def decode(path: str, rate: float, cache: str, warm_up: int, tokens: int) -> None:
    """Decode in this process or rank; print what it took."""
    model, _ = load(path, expert_cache=cache)
    limit_reads(rate)
    group = mx.distributed.init()
    if group.size() > 1:
        model.shard(group)
    prompt, seconds = make_prompt_cache(model), []
    for token in random_tokens(1000, warm_up + tokens):
        begun = time.perf_counter()
        mx.eval(model(mx.array([[token]]), cache=prompt))
        seconds.append(time.perf_counter() - begun)
    stats = model.expert_stats()
    found = {"tokens_per_second": 1 / statistics.median(seconds[warm_up:])}
    print(json.dumps(found | {"asked": stats.asked, "read": stats.bytes_read}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=200, help="MB/s of each disk")
    parser.add_argument("--cache", default="600MiB", help="expert cache of each machine")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--warm-up", type=int, default=24, help="tokens before the clock runs")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return decode(args.worker, args.rate * 1e6, args.cache, args.warm_up, args.tokens)
    path = checkpoint(Recipe("35b", args.layers, 4096, 4), None)
    command = [*sys.argv, "--worker", path]
    rates = []
    for count in (1, 2):
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        with tempfile.TemporaryDirectory() as folder:
            ranks = start(Path(folder), count, command)
            printed = finish(ranks, timeout=600)
        lines = [text.strip().splitlines()[-1] for text in printed]
        print(f"{count} disk(s):", *lines, flush=True)
        rates.append(min(json.loads(line)["tokens_per_second"] for line in lines))
    print(f"ratio {rates[1] / rates[0]:.2f}")
    sys.exit(rates[1] < LEAST * rates[0])


if __name__ == "__main__":
    main()
