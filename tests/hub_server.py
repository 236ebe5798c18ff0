"""A loopback server with the part of the Hub's API that its client needs; it can fail."""

import hashlib
import json
import re
import select
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

API = re.compile(r"/api/models/([\w.-]+/[\w.-]+)(?:/(revision|tree)/(\w+))?$")
RESOLVE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/(\w+)/([\w./-]+)$")
CHUNK = 1 << 15
STALL_S = 20


def commit(letter: str) -> str:
    return letter * 40


@dataclass
class Fault:
    """A fault at the next request for a file.

    By kind, `value` is: "status": which; "drop": bytes to send before the connection is dropped;
    "stall": bytes to send before nothing more comes; "bytes", "etag": what comes in place of the
    right one; "plain": anything, and byte ranges are ignored; "busy": what a refusal with status
    429 has in its headers.
    """

    kind: str
    value: Any
    method: str = "GET"


class HubServer(ThreadingHTTPServer):
    """Serves directories as commits of repositories.

    Attributes:
        repos: directory by name and commit.
        main: commit by name.
        sent: bytes of content sent, by file.
        asked: requests for content, by file.
        faults: the next faults of each file, in order.
        outwaited: stalled connections that a client waited out (STALL_S).
        listener: called for every piece of content sent, with the file and its bytes so far.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, Path]] = {}
        self.main: dict[str, str] = {}
        self.listing: list[dict[str, Any]] = []  # entries to add to each list of files
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.outwaited = 0
        self.listener: Callable[[str, int], None] = lambda file, sent: None
        self.reset()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def reset(self) -> None:
        """Set the counters to zero."""
        self.sent: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()

    def add(self, name: str, directory: Path, letter: str = "a") -> None:
        """Serve a directory as a repository's commit, and as its main branch."""
        self.repos.setdefault(name, {})[commit(letter)] = directory
        self.main[name] = commit(letter)

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def __enter__(self) -> Self:
        return self

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: both sides drop connections on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        path = self.path.partition("?")[0]
        if match := API.match(path):
            self._list(*match.groups())
        elif match := RESOLVE.match(path):
            self._file(*match.groups(), send)
        else:
            self._refuse(404)

    def _refuse(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _fault(self, file: str, *kinds: str) -> Any:
        """Return the value of the next fault, if it is of one of these kinds."""
        due = self.server.faults[file]
        if due and due[0].kind in kinds and due[0].method == self.command:
            return due.pop(0).value
        return None

    def _directory(self, name: str, revision: str | None) -> tuple[str, Path] | None:
        if revision in (None, "main"):
            revision = self.server.main.get(name)
        directory = self.server.repos.get(name, {}).get(str(revision))
        return directory and (str(revision), directory)

    def _stall(self) -> None:
        """Send nothing until the client disconnects."""
        if not select.select([self.connection], [], [], STALL_S)[0]:
            self.server.outwaited += 1
        self.close_connection = True

    def _list(self, name: str, what: str | None, revision: str | None) -> None:
        if self._fault(name, "stall") is not None:
            return self._stall()
        if status := self._fault(name, "status"):
            return self._refuse(status)
        if not (found := self._directory(name, revision)):
            return self._refuse(404)
        files = [_entry(path, found[1]) for path in sorted(found[1].rglob("*")) if path.is_file()]
        files += self.server.listing
        content: Any = [
            {"type": "file", "path": f["rfilename"], "oid": f["blobId"]} | f for f in files
        ]
        if what != "tree":
            content = {"id": name, "modelId": name, "sha": found[0], "siblings": files}
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def _file(self, name: str, revision: str, file: str, send: bool) -> None:
        if status := self._fault(file, "status"):
            return self._refuse(status)
        if headers := self._fault(file, "busy"):
            return self._refuse(429, headers)
        if not send and self._fault(file, "stall") is not None:
            return self._stall()
        found = self._directory(name, revision)
        if not found or not (found[1] / file).is_file():
            return self._refuse(404)
        if self._fault(file, "plain"):
            del self.headers["Range"]
        content = (found[1] / file).read_bytes()
        etag = self._fault(file, "etag") or _sha256(found[1] / file)
        content = self._fault(file, "bytes") or content
        start, end = self._range(len(content))
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", found[0])
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if send:
            self.server.asked[file] += 1
            self._send(file, memoryview(content)[start:end], start)
        return None

    def _range(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
        assert match
        return int(match[1]), min(int(match[2] or size) + bool(match[2]), size)

    def _send(self, file: str, content: memoryview, start: int) -> None:
        stalled = self._fault(file, "stall")
        limit = self._fault(file, "drop") if stalled is None else stalled
        stop = len(content) if limit is None else min(limit, len(content))
        for place in range(0, stop, CHUNK):
            piece = content[place : min(place + CHUNK, stop)]
            self.wfile.write(piece)
            self.server.sent[file] += len(piece)
            self.server.listener(file, start + place + len(piece))
        if stalled is not None:
            self._stall()
        if limit is not None:
            self.close_connection = True


def _entry(path: Path, directory: Path) -> dict[str, Any]:
    """Return a file's entry in the Hub's list: SHA-256 for large files, git's SHA-1 for small."""
    name, size = path.relative_to(directory).as_posix(), path.stat().st_size
    if path.suffix == ".safetensors":
        lfs = {"sha256": _sha256(path), "oid": _sha256(path), "size": size, "pointerSize": 134}
        return {"rfilename": name, "size": size, "blobId": "0" * 40, "lfs": lfs}
    blob = hashlib.sha1(b"blob %d\0" % size + path.read_bytes()).hexdigest()
    return {"rfilename": name, "size": size, "blobId": blob}


@cache
def _sha256(path: Path) -> str:
    """The file must not change while it is served."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
