"""Faults of a running `mlx_lm.server`: SIGTERM in mid-answer, and a disk that fails.

    python tests/stress/fault_server.py MODEL [--times 100] [--seed 0]

MODEL is a directory that flashmoe-convert wrote. Each round starts the stock server in a process of
its own, and asks it over HTTP, streamed. What came until then must be the beginning of what the
server answers undisturbed. Exit code 1 if a row of the table is not as it should be.

* SIGTERM: the process ends by it, and at once.
* EIO, a request with a seed: the answer breaks off, the server's log names file and reason, and the
  same request made again is answered whole.
* EIO, requests that are batched: the same, but stock mlx-lm's thread that generates has died;
  /health says 503 from then on, and whoever supervises the server has to start it again.
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

# The stock server with one difference: after SIGUSR1 the nth read fails; n is in a file.
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
    """What became of one fault, so many times; `usable` counts what the row promises after it."""

    name: str
    injected: int = 0
    named: int = 0
    wrong: int = 0
    usable: int = 0

    def __str__(self) -> str:
        """One line for people."""
        return (
            f"{self.name:36} {self.injected:8} {self.named:8} {self.wrong:6} {self.usable:7}"
            f"{'' if self.well else '  WRONG'}"
        )

    @property
    def well(self) -> bool:
        """Say whether nothing is to be complained of."""
        return self.injected == self.named == self.usable > 0 and not self.wrong


class Server(StockServer):
    """A server with an expert cache of 9 of 100 experts, whose reads can be made to fail."""

    def __init__(self, model: Path, work: Path) -> None:
        self.note = work / "reads"
        super().__init__(
            model,
            work / "log",
            settings={"FLASHMOE_EXPERT_CACHE": "1440000", "FLASHMOE_LOOKAHEAD": "off"},
            program=("-c", SERVER, str(self.note)),
        )

    def pieces(self, **more: Any) -> Iterator[str]:
        """Yield an answer's pieces as they come, however the connection ends."""
        with suppress(OSError, http.client.HTTPException):
            for chunk in self.stream(QUESTION | ASKED | more):
                yield chunk["choices"][0]["delta"].get("content") or ""

    def fail_at(self, read: int) -> None:
        """Have the read fail that comes so many reads from now."""
        self.note.write_text(str(read))
        self.process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)

    def end(self) -> int:
        """End it by SIGTERM, if it runs, and return its exit code."""
        self.process.terminate()
        return self.process.wait(timeout=10)


def terminated(model: Path, work: Path, clean: str, row: Row, rng: random.Random) -> None:
    """End a server in mid-answer."""
    with Server(model, work) as server:
        pieces, when = "", rng.randrange(8)
        for number, piece in enumerate(server.pieces()):
            pieces += piece
            if number == when:
                row.injected += 1
                row.named += server.end() == -signal.SIGTERM
        row.wrong += not clean.startswith(pieces)
        if server.process.poll() is not None:
            row.usable += server.health() is None  # port is free


def failed_alone(server: Server, clean: str, row: Row, rng: random.Random) -> None:
    """Have a read fail in a request that the server serves by itself."""
    before = server.log.stat().st_size
    server.fail_at(rng.randrange(100))
    pieces = clean
    while pieces == clean:  # its moment may come in the next one
        pieces = "".join(server.pieces(seed=1))
    row.injected += 1
    row.named += bool(re.search(NAMED, server.log.read_text()[before:]))
    row.wrong += not clean.startswith(pieces)
    row.usable += "".join(server.pieces(seed=1)) == clean and server.health() == 200


def failed_batch(server: Server, clean: str, row: Row, rng: random.Random) -> None:
    """Have a read fail in a batch, and end the server."""
    server.fail_at(rng.randrange(60))
    pieces = "".join(server.pieces())
    row.injected += 1
    row.named += bool(re.search(NAMED, server.log.read_text()))
    row.wrong += not clean.startswith(pieces)
    row.usable += server.health() == 503 and server.end() == -signal.SIGTERM


def clean_answers(model: Path, work: Path) -> tuple[str, str]:
    """Return what an undisturbed server answers: in a batch, and by itself."""
    with Server(model, work) as server:
        return "".join(server.pieces()), "".join(server.pieces(seed=1))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory that flashmoe-convert wrote")
    parser.add_argument("--times", type=int, default=100, help="of each fault (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    rows = [Row("SIGTERM in mid-answer"), Row("EIO, a request with a seed"), Row("EIO in a batch")]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        batch, alone = clean_answers(args.model, work)
        print(f"{'fault':36} {'injected':>8} {'as named':>8} {'wrong':>6} {'usable':>7}")
        for _ in range(2 * args.times):  # an answer that ends before its moment does not count
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
    sys.exit(not all(row.well for row in rows))


if __name__ == "__main__":
    main()
