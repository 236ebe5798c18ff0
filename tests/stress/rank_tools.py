"""Stock mlx_lm.server, chat and benchmark in two ranks of stock mlx.launch, also with --pipeline.

    python tests/stress/rank_tools.py [--requests 200] [--clients 16] [--tokens 24]

The server's answers to many clients, and the chat's, must equal those of one process to one client.
Exits with 1 if one differs, or a tool fails.
"""

import argparse
import itertools
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from serve_load import load, requests
from stock_server import StockServer, answer

from flashmoe_mlx.convert import convert
from flashmoe_mlx.loader import BUNDLED_MODEL

SETTINGS = {"FLASHMOE_SHARDING": "exact", "FLASHMOE_EXPERT_CACHE": "2MiB"}
WAYS = [], ["--pipeline"]
LONGEST = 300  # seconds, for one tool


def launch(tool: str) -> list[str]:
    """Return arguments of Python that start an mlx_lm tool in two ranks."""
    port = random.randrange(20000, 30000, 2)  # the next one is taken too
    options = "--backend", "ring", "-n", "2", "--starting-port", str(port)
    launcher = Path(sys.executable).with_name("mlx.launch")
    return [str(launcher), *options, "--", sys.executable, "-m", "mlx_lm", tool]


def serve(model: Path, folder: Path, args: argparse.Namespace) -> list[str]:
    """Ask one process, then two ranks; return what differs."""
    bodies, wrong = requests(most_tokens=args.tokens), []
    settings = SETTINGS | {"HF_HUB_CACHE": str(folder)}
    with StockServer(model, folder / "alone", settings=settings) as server:
        alone = [answer(server.ask(body)) for body in bodies]
    print(f"server, one process: {len({text for text, _, _ in alone})} different answers")
    for flags in WAYS:
        program = launch("server")
        log = folder / f"ranks{len(flags)}"
        with StockServer(model, log, flags, settings, program) as server:
            numbers = itertools.islice(itertools.cycle(range(len(bodies))), args.requests)
            outcome = load(lambda b: answer(server.ask(b)), bodies, alone, args.clients, numbers)
        bad = outcome.errors + [f"request {n} differs" for n in outcome.differing]
        print(f"server {flags}: {outcome.asked} requests of {args.clients} clients in "
              f"{outcome.seconds:.0f} s, {len(bad)} wrong", *bad[:5], flush=True)  # fmt: skip
        wrong += bad
    return wrong


def run(command: list[str], text: str = "") -> str:
    """Return what an mlx_lm tool prints, to an input."""
    found = subprocess.run(
        [sys.executable, *command], input=text, env=os.environ | SETTINGS, timeout=LONGEST,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return found.stdout


def chat(model: Path) -> list[str]:
    """Chat with one process, then with two ranks; return what differs."""
    options = ["--model", str(model), "--trust-remote-code", "--max-tokens", "24"]
    said = "What is a disk?\nAnd a lamp?\nq\n"
    alone = [run(["-m", "mlx_lm", "chat", *options], said)]
    print("chat, one process:", *replies(alone[0]), flush=True)
    answers = [(run([*launch("chat"), *options, *flags], said), flags) for flags in WAYS]
    for text, flags in answers:
        print(f"chat {flags}:", "equal" if replies(text) == replies(alone[0]) else text, flush=True)
    return [text for text, _ in answers if replies(text) != replies(alone[0])]


def replies(text: str) -> list[str]:
    """Return the lines of a chat's answers, without colors, prompts, rules and speeds."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x01\x02]", "", text).partition("\u203a")[2]
    lines = [line.strip("\u203a ") for line in plain.splitlines()]
    found = [line for line in lines if line and line[0] != "\u2500" and "tok/s" not in line]
    if len(found) < 3:  # two answers, and "bye"
        raise SystemExit(f"the chat did not answer: {text}")
    return found


def benchmark(model: Path) -> list[str]:
    """Run mlx-lm's benchmark in two ranks; return what failed."""
    options = ["--model", str(model), "--trust-remote-code", "-p", "128", "-g", "32"]
    failed = []
    for flags, size in itertools.product(WAYS, "12"):
        command = [*launch("benchmark"), *options, "--num-trials", "3", "-b", size, *flags]
        text = run(command)
        found = re.search("Averages: .*", text)
        print(f"benchmark {flags} -b {size}:", found[0] if found else text, flush=True)
        failed += [] if found else [text]
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "bundled"
        convert(BUNDLED_MODEL, model)
        wrong = [*chat(model), *benchmark(model), *serve(model, Path(folder), args)]
    sys.exit(len(wrong) > 0)


if __name__ == "__main__":
    main()
