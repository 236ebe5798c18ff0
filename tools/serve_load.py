"""Load a server with many clients, compare the answers with one client's, and sample its memory."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from stock_server import StockServer, Usage

HELD_OUT = Path(__file__).parent / "bundled_model" / "heldout.jsonl"
MIX = {"tool": 12, "json": 14, "result": 6, "no_tool": 8}

Body = dict[str, Any]
Ask = Callable[[Body], object]


def requests(mix: dict[str, int] = MIX, most_tokens: int = 100) -> list[Body]:
    """Return different greedy requests: tool calls, JSON, tool results, plain questions.

    These are the shortest of the bundled model's held-out cases; their kinds alternate.
    """
    lines = sorted(HELD_OUT.read_text(encoding="utf-8").splitlines(), key=len)
    cases = [json.loads(line) for line in lines]
    kinds = [[case for case in cases if case["kind"] == kind][:n] for kind, n in mix.items()]
    spread = [case for group in itertools.zip_longest(*kinds) for case in group if case]
    tools = ({"tools": case["tools"]} if case["tools"] else {} for case in spread)
    return [
        {"messages": case["messages"], "temperature": 0, "max_tokens": most_tokens} | more
        for case, more in zip(spread, tools, strict=True)
    ]


@dataclass
class Sample:
    """The server's usage at one moment."""

    seconds: float
    usage: Usage


@dataclass
class Outcome:
    """The results of many requests."""

    asked: int = 0
    errors: list[str] = field(default_factory=list)
    differing: list[int] = field(default_factory=list)  # indices of requests
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)


def load(
    ask: Ask, bodies: Sequence[Body], expected: Sequence[object], clients: int, work: Iterator[int]
) -> Outcome:
    """Send requests from concurrent clients; `work` yields indices into `bodies`."""
    outcome, lock = Outcome(), threading.Lock()

    def next_index() -> int | None:
        with lock:
            return next(work, None)

    def client() -> None:
        while (index := next_index()) is not None:
            try:
                right = ask(bodies[index]) == expected[index]
            except Exception as error:  # count every kind
                outcome.errors.append(f"request {index}: {error!r}")
            else:
                if not right:
                    outcome.differing.append(index)
            with lock:
                outcome.asked += 1

    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(client) for _ in range(clients)]:
            done.result()
    outcome.seconds = time.monotonic() - start
    return outcome


def until(stop: threading.Event, count: int) -> Iterator[int]:
    """Cycle through indices 0 to count - 1 until the event is set."""
    for index in itertools.cycle(range(count)):
        if stop.is_set():
            return
        yield index


def watched_load(
    server: StockServer, ask: Ask, bodies: Sequence[Body], expected: Sequence[object],
    clients: int, seconds: float, every: float = 5.0,
) -> Outcome:  # fmt: skip
    """Load a server for `seconds`, and sample its usage."""
    stop, samples = threading.Event(), []

    def sample() -> None:
        start = time.monotonic()
        for turn in itertools.count():
            now = time.monotonic() - start
            samples.append(Sample(now, server.usage()))
            if now >= seconds:
                stop.set()
                return
            time.sleep(max(0.0, (turn + 1) * every - (time.monotonic() - start)))

    watcher = threading.Thread(target=sample)
    watcher.start()
    outcome = load(ask, bodies, expected, clients, until(stop, len(bodies)))
    watcher.join()
    outcome.samples = samples
    return outcome


def slope(samples: Sequence[Sample]) -> tuple[float, float]:
    """Return the growth of resident memory in MiB per hour by least squares, and its error.

    The error is twice the standard error, corrected for correlation between neighboring samples.
    """
    hours = np.array([s.seconds for s in samples]) / 3600
    rss = np.array([s.usage.rss for s in samples])
    line = np.polyfit(hours, rss, 1)
    residual = rss - np.polyval(line, hours)
    variance = residual @ residual / (len(samples) - 2) / ((hours - hours.mean()) ** 2).sum()
    alike = max(0.0, residual[1:] @ residual[:-1] / (residual @ residual))
    return float(line[0]), 2 * float(np.sqrt(variance * (1 + alike) / (1 - alike)))
