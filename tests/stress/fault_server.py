"""Inject faults into a running `mlx_lm.server`: SIGTERM during an answer, and a failing disk.

    python tests/stress/fault_server.py MODEL [--times 100] [--seed 0]

MODEL is a directory that flashmoe-convert wrote. Each round starts the stock server in a separate
process and requests a streamed answer. The text before the fault must be the beginning of the
answer without faults. Exits with 1 if a row of the table fails.

* SIGTERM: it ends the process at once.
* EIO in a request with a seed: the answer breaks off, the server's log names file and reason, and
  the server answers the same request completely afterwards.
* EIO in batched requests: the same, but stock mlx-lm's generation thread dies; from then on /health
  returns 503, and a supervisor has to restart the server.
"""

import argparse
import http.client
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from stock_server import StockServer

QUESTION = {"messages": [{"role": "user", "content": "What is a library?"}]}
ASKED = {"max_tokens": 16, "temperature": 0}
NAMED = r"layer_\d+\.safetensors: reading an expert .* \(Input/output error\)"

# The stock server, except that after SIGUSR1 the nth read fails; a file contains n.
SERVER = """
import errno, os, signal, sys
preadv, left = os.preadv, []
def failing(*args):
    if left:
        left[0] -= 1
        if left[0] < 0:
            left.clear()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
    return preadv(*args)
os.preadv = failing
note = sys.argv.pop(1)
signal.signal(signal.SIGUSR1, lambda *_: left.append(int(open(note).read())))
from mlx_lm.server import main
main()
"""


@dataclass
class Row:
    """The results of one fault; `usable` counts rounds with the right behavior afterwards."""

    name: str
    injected: int = 0
    named: int = 0
    wrong: int = 0
    usable: int = 0

    def __str__(self) -> str:
        """Return the row as one line."""
        return (
            f"{self.name:36} {self.injected:8} {self.named:8} {self.wrong:6} {self.usable:7}"
            f"{'' if self.ok else '  WRONG'}"
        )

    @property
    def ok(self) -> bool:
        """Return whether all results are as expected."""
        return self.injected == self.named == self.usable > 0 and not self.wrong


class Server(StockServer):
    """A server with an expert cache for 9 of 100 experts, whose reads can fail on request."""

    def __init__(self, model: Path, work: Path) -> None:
        self.note = work / "reads"
        super().__init__(
            model,
            work / "log",
            settings={"FLASHMOE_EXPERT_CACHE": "1440000", "FLASHMOE_LOOKAHEAD": "off"},
            program=("-c", SERVER, str(self.note)),
        )

    def pieces(self, **more: Any) -> Iterator[str]:
        """Yield an answer's pieces until the connection ends, for any reason."""
        with suppress(OSError, http.client.HTTPException):
            for chunk in self.stream(QUESTION | ASKED | more):
                yield chunk["choices"][0]["delta"].get("content") or ""

    def fail_at(self, read: int) -> None:
        """Let the read after the next `read` reads fail."""
        self.note.write_text(str(read))
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)

    def end(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.terminate()
        return self.process.wait(timeout=10)


def terminated(model: Path, work: Path, clean: str, row: Row, rng: random.Random) -> None:
    """Terminate a server during an answer."""
    with Server(model, work) as server:
        pieces, when = "", rng.randrange(8)
        for number, piece in enumerate(server.pieces()):
            pieces += piece
            if number == when:
                row.injected += 1
                row.named += server.end() == -signal.SIGTERM
        row.wrong += not clean.startswith(pieces)
        if server.process.poll() is not None:
            row.usable += server.health() is None  # the port is free


def failed_alone(server: Server, clean: str, row: Row, rng: random.Random) -> None:
    """Let a read fail in a request that the server does not batch."""
    before = server.log.stat().st_size
    server.fail_at(rng.randrange(100))
    pieces = clean
    while pieces == clean:  # the read may belong to a later request
        pieces = "".join(server.pieces(seed=1))
    row.injected += 1
    row.named += bool(re.search(NAMED, server.log.read_text()[before:]))
    row.wrong += not clean.startswith(pieces)
    row.usable += "".join(server.pieces(seed=1)) == clean and server.health() == 200


def failed_batch(server: Server, clean: str, row: Row, rng: random.Random) -> None:
    """Let a read fail in a batch, then end the server."""
    server.fail_at(rng.randrange(60))
    pieces = "".join(server.pieces())
    row.injected += 1
    row.named += bool(re.search(NAMED, server.log.read_text()))
    row.wrong += not clean.startswith(pieces)
    row.usable += server.health() == 503 and server.end() == -signal.SIGTERM


def clean_answers(model: Path, work: Path) -> tuple[str, str]:
    """Return the answers without faults: in a batch, and not batched."""
    with Server(model, work) as server:
        return "".join(server.pieces()), "".join(server.pieces(seed=1))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory that flashmoe-convert wrote")
    parser.add_argument("--times", type=int, default=100, help="times per fault (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows = [Row("SIGTERM in mid-answer"), Row("EIO, a request with a seed"), Row("EIO in a batch")]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        batch, alone = clean_answers(args.model, work)
        print(f"{'fault':36} {'injected':>8} {'as named':>8} {'wrong':>6} {'usable':>7}")
        for _ in range(2 * args.times):  # an answer that ends before its fault does not count
            if rows[0].injected < args.times:
                terminated(args.model, work, batch, rows[0], rng)
        print(rows[0], flush=True)
        with Server(args.model, work) as server:
            for _ in range(args.times):
                failed_alone(server, alone, rows[1], rng)
        print(rows[1], flush=True)
        for _ in range(args.times):
            with Server(args.model, work) as server:
                failed_batch(server, batch, rows[2], rng)
        print(rows[2])
    sys.exit(not all(row.ok for row in rows))


if __name__ == "__main__":
    main()
