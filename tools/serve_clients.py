"""Measure stock `mlx_lm.server` with one client and with several clients; experts stream.

    python tools/serve_clients.py DIR [--clients 8] [--tokens 32] [--expert-cache 500MiB]

Each client requests one completion of its own prompt: first one after another, then, with a new
server, all at once. Prints tokens/s, the speedup, the reads, and whether the answers are equal;
exits with 1 if they differ.
"""

import argparse
import re
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stock_server import StockServer

PROMPT = "Number {}: list what a library needs, and say why it needs it."


def ask(server: StockServer, client: int, tokens: int) -> tuple[str, int]:
    """Return a completion's text and its number of tokens."""
    body = {"prompt": PROMPT.format(client), "max_tokens": tokens, "temperature": 0}
    answer = server.ask(body, "completions")
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


def measure(args: argparse.Namespace, at_once: int) -> tuple[list[str], float, str]:
    """Return the answers, tokens/s, and the server's expert reads."""
    settings = {"FLASHMOE_EXPERT_CACHE": args.expert_cache, "FLASHMOE_STATS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with StockServer(args.model, log, settings=settings) as server:
            ask(server, -1, 2)  # compiles kernels
            start = time.perf_counter()
            with ThreadPoolExecutor(at_once) as pool:
                work = [pool.submit(ask, server, n, args.tokens) for n in range(args.clients)]
                answers = [job.result() for job in work]
            seconds = time.perf_counter() - start
            server.process.send_signal(signal.SIGINT)  # the server prints its reads on exit
            server.process.wait(60)
        found = re.findall(r"Experts: (.* reads)", log.read_text())
    texts, tokens = zip(*answers, strict=True)
    return list(texts), sum(tokens) / seconds, found[-1] if found else "unknown"


def main() -> int:
    """Measure both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory that stock mlx-lm runs")
    parser.add_argument("--clients", type=int, default=8, help="number of clients (default: 8)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per answer (default: 32)")
    parser.add_argument("--expert-cache", default="auto", help="memory for experts (default: auto)")
    args = parser.parse_args()
    alone, slow, read_alone = measure(args, 1)
    together, fast, read_together = measure(args, args.clients)
    print(f"one after another: {slow:.2f} tokens/s; {read_alone}")
    print(f"{args.clients} at once: {fast:.2f} tokens/s, {fast / slow:.2f}x; {read_together}")
    print("answers equal" if alone == together else "ANSWERS DIFFER")
    return int(alone != together)


if __name__ == "__main__":
    sys.exit(main())
