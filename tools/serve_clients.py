"""Measure stock `mlx_lm.server` with one client and with several at once, experts streamed.

    python tools/serve_clients.py DIR [--clients 8] [--tokens 32] [--expert-cache 500MiB]

Each client asks for one completion of its own prompt: first one after another, then, of a
server started anew, all at once. Prints tokens/s, the speedup, what was read, and whether the
answers are equal; exit code 1 if they are not.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PROMPT = "Number {}: list what a library needs, and say why it needs it."
PATIENCE = 600  # seconds


@contextlib.contextmanager
def server(model: Path, cache: str, log: Path) -> Iterator[str]:
    """Run the server; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port),
               "--trust-remote-code", "--temp", "0"]  # fmt: skip
    settings = {**os.environ, "FLASHMOE_EXPERT_CACHE": cache, "FLASHMOE_STATS": "1"}
    with log.open("w") as out, subprocess.Popen(command, env=settings, stderr=out) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(address, process)
            yield address
        finally:
            process.send_signal(2)  # Ctrl-C, so that it says what it read
            process.wait(60)


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(PATIENCE * 5):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit("the server did not start; see its messages above")


def ask(address: str, client: int, tokens: int) -> tuple[str, int]:
    """Return a completion's text and its number of tokens."""
    body = {"prompt": PROMPT.format(client), "max_tokens": tokens, "temperature": 0.0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        answer = json.load(reply)
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


def measure(args: argparse.Namespace, at_once: int) -> tuple[list[str], float, str]:
    """Return the answers, tokens/s, and what the server read for them."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with server(args.model, args.expert_cache, log) as address:
            ask(address, -1, 2)  # kernels
            start = time.perf_counter()
            with ThreadPoolExecutor(at_once) as pool:
                work = [pool.submit(ask, address, n, args.tokens) for n in range(args.clients)]
                answers = [job.result() for job in work]
            seconds = time.perf_counter() - start
        found = re.findall(r"Experts: (.* reads)", log.read_text())
    texts, tokens = zip(*answers, strict=True)
    return list(texts), sum(tokens) / seconds, found[-1] if found else "unknown"


def main() -> int:
    """Run both, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory that stock mlx-lm runs")
    parser.add_argument("--clients", type=int, default=8, help="(default: 8)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default: 32)")
    parser.add_argument("--expert-cache", default="auto", help="(default: auto)")
    args = parser.parse_args()
    alone, slow, read_alone = measure(args, 1)
    together, fast, read_together = measure(args, args.clients)
    print(f"one after another: {slow:.2f} tokens/s; {read_alone}")
    print(f"{args.clients} at once: {fast:.2f} tokens/s, {fast / slow:.2f}x; {read_together}")
    print("answers equal" if alone == together else "ANSWERS DIFFER")
    return int(alone != together)


if __name__ == "__main__":
    sys.exit(main())
