"""Stock `mlx_lm.server` in a separate process: start, request over HTTP, read its usage."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ATTEMPTS = 3


@dataclass(frozen=True)
class Usage:
    """The resources that a process uses, from Linux's /proc."""

    rss: float  # MiB
    descriptors: int
    threads: int
    cpu: float  # seconds since its start
    read: int  # bytes since its start, from disks or from the page cache


class StockServer:
    """A server that runs during a `with` block.

    Args:
        model: a directory that stock mlx-lm runs
        log: file for the server's output
        flags: additional flags of `mlx_lm.server`
        settings: environment variables
        program: arguments of Python instead of `-m mlx_lm server`
    """

    patience = 600.0  # seconds to wait for the next piece of an answer

    def __init__(
        self,
        model: Path,
        log: Path,
        flags: Sequence[str] = (),
        settings: dict[str, str] | None = None,
        program: Sequence[str] = ("-m", "mlx_lm", "server"),
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, *program, "--model", str(model), "--trust-remote-code",
                   "--port", str(self.port), *flags]  # fmt: skip
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | (settings or {})
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # mlx.launch polls a closed one without pause
                stdout=out,
                stderr=out,
                env=environment,
            )

    def __enter__(self) -> Self:
        """Wait until the server answers.

        Raises:
            SystemExit: the server ended; the message is its log.
        """
        while self.health() is None:
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text())
            time.sleep(0.05)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process if it still runs."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def health(self) -> int | None:
        """Return the status of /health, or None if the server does not answer."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status
            except OSError:
                return None

    @contextmanager
    def _post(self, body: dict[str, Any], path: str) -> Iterator[http.client.HTTPResponse]:
        """Send a request; like the openai client, retry if the connection was not accepted.

        The server's backlog holds five new connections, and the system resets any others.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.patience)
        header = {"Content-Type": "application/json"}
        with closing(connection):
            for left in reversed(range(ATTEMPTS)):
                try:
                    connection.request("POST", f"/v1/{path}", json.dumps(body), header)
                    response = connection.getresponse()
                    break
                except ConnectionResetError as error:
                    connection.close()
                    if not left or isinstance(error, http.client.RemoteDisconnected):
                        raise
                    time.sleep(0.5)
            yield response

    def ask(self, body: dict[str, Any], path: str = "chat/completions") -> dict[str, Any]:
        """Return the reply to a request, as JSON values."""
        with self._post(body, path) as response:
            return json.load(response)

    def stream(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a chat; closing the iterator closes the connection."""
        with self._post(body | {"stream": True}, "chat/completions") as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])

    def usage(self) -> Usage:
        """Return the current usage."""
        folder = Path("/proc") / str(self.process.pid)
        status = dict(
            line.split(":", 1) for line in (folder / "status").read_text().splitlines()
        )  # fmt: skip
        times = (folder / "stat").read_text().rpartition(")")[2].split()
        return Usage(
            rss=int(status["VmRSS"].split()[0]) / 1024,
            descriptors=len(os.listdir(folder / "fd")),
            threads=int(status["Threads"]),
            cpu=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
            read=int((folder / "io").read_text().split()[1]),
        )


def answer(reply: dict[str, Any]) -> tuple[str, list[tuple[str, Any]], str]:
    """Return a reply's text, its tool calls (name and arguments), and its finish reason."""
    choice = reply["choices"][0]
    message = choice["message"]
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls") or []
    ]
    return message.get("content") or "", calls, choice["finish_reason"]


def assembled(chunks: Iterator[dict[str, Any]]) -> tuple[str, list[tuple[str, Any]], str]:
    """Return the same as `answer` for a stream of chunks; join fragments by their index."""
    text, names, arguments, reason = "", {}, {}, ""
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            text += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                place, function = call["index"], call["function"]
                names[place] = names.get(place, "") + (function.get("name") or "")
                arguments[place] = arguments.get(place, "") + (function.get("arguments") or "")
            reason = choice.get("finish_reason") or reason
    return text, [(names[i], json.loads(arguments[i])) for i in sorted(names)], reason
