"""A loopback server that accepts uploads like the Hub, without xet; it can fail."""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

TOKEN = "hf_token"
USER = {
    "type": "user", "name": "alice", "orgs": [{"name": "team"}],
    "auth": {"accessToken": {"role": "write"}},
}  # fmt: skip
LARGE = ".safetensors"


class UploadServer(ThreadingHTTPServer):
    """Keeps the uploaded files.

    Attributes:
        user: the owner of TOKEN.
        repos: the files of each repository, by name.
        commits: the names of the files that came together, in order.
        stored: uploaded content of large files by SHA-256, committed or not.
        puts: how often each was sent.
        refuse: status codes to answer with, by prefix of a path, one per request;
            0 drops the connection.
        licenses: those that a model card may have.
        private: whether a repository is private, by name.
        nonsense: what to answer instead, by prefix of a path:
            status, type and content; with None it never answers.
        dropped: files to accept but not keep, as with a .gitignore.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.user: dict[str, Any] = USER
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[list[str]] = []
        self.stored: dict[str, bytes] = {}
        self.puts: Counter[str] = Counter()
        self.refuse: dict[str, list[int]] = {}
        self.asked: list[str] = []
        self.private: dict[str, bool] = {}
        self.nonsense: dict[str, tuple[int, str, bytes | None]] = {}
        self.dropped: set[str] = set()
        self.ended = threading.Event()
        self.licenses = ("mit", "apache-2.0")
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: the server drops connections on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UploadServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle(b"")

    def do_POST(self) -> None:
        self._handle(self._body())

    do_PUT = do_POST

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _handle(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        for start, statuses in self.server.refuse.items():
            if path.startswith(start) and statuses:
                return self._refuse(statuses.pop(0))
        for start, (status, kind, content) in self.server.nonsense.items():
            if path.startswith(start):
                return self._confuse(status, kind, content)
        if path.startswith("/put/"):
            return self._put(path.rpartition("/")[2], body)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not known and path != "/api/validate-yaml":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        for pattern, handle in ROUTES:
            if match := re.fullmatch(pattern, path):
                return handle(self, body, *match.groups())
        return self._answer(404, {"error": "no such path"})

    def _refuse(self, status: int) -> None:
        if status:
            return self._answer(status, {"error": "not now"})
        self.close_connection = True
        return self.connection.close()

    def _confuse(self, status: int, kind: str, content: bytes | None) -> None:
        self.close_connection = True
        if content is None:
            self.server.ended.wait()
            return
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) + 99 * (kind == "truncated")))
        self.end_headers()
        self.wfile.write(content)

    def _answer(self, status: int, content: Any) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _whoami(self, body: bytes) -> None:
        self._answer(200, self.server.user)

    def _validate(self, body: bytes) -> None:
        found = re.search(r"^license: (.*)$", json.loads(body)["content"], re.M)
        if found and found[1] not in self.server.licenses:
            message = f'"license" must not be {found[1]}'
            if self.headers.get("Accept") == "text/plain":
                return self._answer(400, f"- Error: {message}")
            return self._answer(400, {"errors": [{"message": message}], "warnings": []})
        return self._answer(200, {"errors": [], "warnings": []})

    def _create(self, body: bytes) -> None:
        given = json.loads(body)
        name = "/".join(filter(None, (given.get("organization"), given["name"])))
        name = name if "/" in name else f"{self.server.user['name']}/{name}"
        status = 409 if name in self.server.repos else 200
        self.server.repos.setdefault(name, {})
        self.server.private.setdefault(name, given["visibility"] == "private")
        self._answer(status, {"url": f"{self.server.url}/{name}", "name": name})

    def _preupload(self, body: bytes, name: str) -> None:
        files = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            there = self.server.repos[name].get(path)
            mode = "lfs" if path.endswith(LARGE) else "regular"
            oid = None if there is None else _oid(there, mode)
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, name: str) -> None:
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.server.stored:
                href = f"{self.server.url}/put/{entry['oid']}"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _put(self, oid: str, body: bytes) -> None:
        self.server.puts[oid] += 1
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.stored[oid] = body
        self._answer(200, {})

    def _commit(self, body: bytes, name: str) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        self.server.repos[name] |= {k: v for k, v in files.items() if k not in self.server.dropped}
        self.server.commits.append(sorted(files))
        url = f"{self.server.url}/{name}/commit/{'c' * 40}"
        self._answer(200, {"commitUrl": url, "commitOid": "c" * 40})

    def _info(self, body: bytes, name: str) -> None:
        if name not in self.server.repos:
            return self._answer(404, {"error": "Repository not found"})
        files = [{"rfilename": file} for file in (".gitattributes", *self.server.repos[name])]
        content = {"id": name, "modelId": name, "sha": "c" * 40, "siblings": files}
        return self._answer(200, content | {"private": self.server.private[name]})


def _oid(content: bytes, mode: str) -> str:
    """The Hub's id of a file: SHA-256 of a large one, git's SHA-1 of a small one."""
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("/api/whoami-v2", _Handler._whoami),
    ("/api/validate-yaml", _Handler._validate),
    ("/api/repos/create", _Handler._create),
    (f"/api/models/{NAME}/preupload/main", _Handler._preupload),
    (f"/{NAME}.git/info/lfs/objects/batch", _Handler._batch),
    (f"/api/models/{NAME}/commit/main", _Handler._commit),
    (f"/api/models/{NAME}(?:/revision/main)?", _Handler._info),
]
