"""A Hugging Face Hub repository at one commit: complete files and byte ranges."""

import errno
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ...errors import FlashMoEError
from ...format.headers import MAX_HEADER
from ...format.layout import EXPERT_DIR

# What mlx-lm downloads.
PATTERNS = (
    "*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model",
    "*.txt", "*.jsonl", "*.jinja",
)  # fmt: skip
WEIGHTS = ".safetensors"
CARD = "README.md"  # its front matter goes into the converted model's card
PARTIAL = ".half"  # suffix of a file whose download was killed
PIECE_BYTES = 16 << 20
FIRST_BYTES = 1 << 14  # first request for a header: most fit
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each retry
CONNECTIONS = 8  # at once
LONGEST_WAIT = 300  # seconds; the Hub's rate limits reset every five minutes
MAX_REASON = 300  # characters of a server's message
FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")
Ranges = list[tuple[int, int]]  # (begin, end) of bytes


@dataclass(frozen=True)
class RemoteFile:
    """One file: size in bytes, and SHA-256 or, for small files, git's SHA-1."""

    name: str
    size: int
    checksum: str


@dataclass(frozen=True)
class Repo:
    """A repository at one commit."""

    name: str
    commit: str
    files: dict[str, RemoteFile]

    def cached(self, name: str) -> Path | None:
        """Return a file's path in the Hub's cache, or None."""
        from huggingface_hub import try_to_load_from_cache  # slow to import, seldom needed

        found = try_to_load_from_cache(self.name, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def download(self, name: str, folder: Path) -> Path:
        """Download a file into a folder, or complete the one there, and check its checksum.

        Raises:
            FlashMoEError: the Hub does not deliver the file, or delivers other bytes.
            OSError: the disk is full.
        """
        return self._retry(name, partial(self._download, name, folder))

    def _download(self, name: str, folder: Path) -> Path:
        from huggingface_hub import HfApi

        path, begun = folder / name, folder / (name + PARTIAL)
        if begun.exists():
            with open(begun, "ab") as file:
                while piece := self._range(name, file.tell(), PIECE_BYTES):
                    file.write(piece)
            os.replace(begun, path)
        elif not path.exists():
            HfApi().hf_hub_download(self.name, name, revision=self.commit, local_dir=folder)
        expected, found = self.files[name], checksum_of(path, len(self.files[name].checksum))
        if found != expected.checksum:
            size = path.stat().st_size
            path.unlink()
            raise OSError(
                f"received {size:,} bytes with checksum {found[:12]}, expected "
                f"{expected.size:,} with {expected.checksum[:12]}"
            )
        return path

    def download_ranges(self, name: str, folder: Path, ranges: Ranges) -> Path:
        """Download parts of a file into a sparse one at their places, unless it is there.

        Raises:
            FlashMoEError: the Hub does not deliver them.
            OSError: the disk is full.
        """
        path, begun = folder / name, folder / (name + PARTIAL)
        if path.exists():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        pieces = [
            (start, min(PIECE_BYTES, last - start))
            for first, last in ranges
            for start in range(first, last, PIECE_BYTES)
        ]
        with open(begun, "wb") as file, ThreadPoolExecutor(CONNECTIONS) as pool:
            file.truncate(self.files[name].size)

            def fetch(piece: tuple[int, int]) -> None:
                data, start = memoryview(self.read(name, *piece)), piece[0]
                while data:
                    done = os.pwrite(file.fileno(), data, start)
                    data, start = data[done:], start + done

            try:
                list(pool.map(fetch, pieces))
            finally:
                pool.shutdown(cancel_futures=True)
            os.fsync(file.fileno())  # a name in the folder means that all of it is there
        os.replace(begun, path)
        return path

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """Read a byte range of a file; it is shorter than `nbytes` only at the file's end."""
        return self._retry(name, partial(self._range, name, start, nbytes))

    def _range(self, name: str, start: int, nbytes: int) -> bytes:
        from huggingface_hub import HfApi, constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        nbytes = min(nbytes, self.files[name].size - start)
        if nbytes <= 0:
            return b""
        url = hf_hub_url(self.name, name, revision=self.commit, endpoint=HfApi().endpoint)
        span = {"Range": f"bytes={start}-{start + nbytes - 1}", "Accept-Encoding": "identity"}
        headers, timeout = build_hf_headers() | span, constants.HF_HUB_DOWNLOAD_TIMEOUT
        content = bytearray()
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=timeout, max_retries=0
        ) as response:
            hf_raise_for_status(response)
            skip = start if response.status_code == 200 else 0  # the server ignores ranges
            for chunk in response.iter_bytes():
                content += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(content) >= nbytes:
                    break
        if len(content) < nbytes:
            raise OSError(f"received {len(content)} bytes, expected {nbytes}")
        return bytes(content[:nbytes])

    def header(self, name: str) -> bytes:
        """Read the header of a safetensors file, with the eight bytes of its length."""
        first = self.read(name, 0, FIRST_BYTES)
        end = 8 + min(int.from_bytes(first[:8], "little"), MAX_HEADER)
        return first[:end] if end <= len(first) else self.read(name, 0, end)

    def _retry(self, name: str, call: Callable[[], T]) -> T:
        try:
            return retry(f"{self.name}: {name}", call)
        except Exception as error:  # a dozen kinds: network, names, permissions, disk
            for cause in filter(_is_full, causes(error)):
                raise cause from error
            raise FlashMoEError(
                f"{self.name}: the Hugging Face Hub did not deliver {name} of commit "
                f"{self.commit} ({reason(error)}). Check the network."
            ) from error


def find_repo(name: str, revision: str | None) -> Repo:
    """Ask the Hub for a repository's commit and files; raises the client's own exceptions."""
    from huggingface_hub import HfApi, constants

    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT  # the client has no default
    ask = partial(HfApi().model_info, name, revision=revision, files_metadata=True, timeout=limit)
    info = retry(name, ask, 2)
    if not info.sha:
        raise OSError("the answer has no commit")
    files = {file.name: file for file in map(_remote_file, info.siblings or ()) if file}
    return Repo(name, info.sha, files)


def _remote_file(file: Any) -> RemoteFile | None:
    """Return one entry of the Hub's list, or None if no conversion reads that file."""
    *folder, name = file.rfilename.split("/")
    patterns = {(): (*PATTERNS, CARD), (EXPERT_DIR,): ("*.json", "*" + WEIGHTS)}
    if not any(fnmatch(name, pattern) for pattern in patterns.get(tuple(folder), ())):
        return None
    checksum = file.lfs.sha256 if file.lfs else file.blob_id
    if type(file.size) is not int or len(checksum or "") not in (40, 64):
        raise OSError(f"the answer has no size and checksum of {file.rfilename}")
    return RemoteFile(file.rfilename, file.size, checksum)


def checksum_of(path: Path, digits: int) -> str:
    """Return a file's SHA-256 (64 digits), or git's SHA-1 of it (40)."""
    with open(path, "rb") as file:
        if digits == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def retry(what: str, call: Callable[[], T], retries: int | None = None) -> T:
    """Call until it succeeds, with at most `retries` retries (default: one per entry of WAITS).

    The client's own retries forget a download's progress and stop after seconds.
    """
    for wait in WAITS[:retries]:
        try:
            return call()
        except Exception as error:
            if _is_final(error):
                raise
            wait = max(wait, _retry_after(error))
            tqdm.write(f"{what}: {reason(error)}; retrying in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
    return call()


def _retry_after(error: Exception) -> float:
    """Return the seconds that a busy server (429, 503) asks clients to wait, or 0."""
    for cause in causes(error):
        headers = getattr(getattr(cause, "response", None), "headers", None) or {}
        limits = re.findall(r"\bt=(\d+)", headers.get("RateLimit", ""))
        texts = (headers.get("Retry-After", ""), *limits)
        if seconds := [int(text) for text in texts if re.fullmatch(r"\d{1,9}", text)]:
            return float(min(max(seconds), LONGEST_WAIT))
    return 0.0


def _is_final(error: Exception) -> bool:
    """Whether another attempt would fail the same way: a refusal, a full disk, offline mode."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    for cause in causes(error):
        status = status_of(cause)
        refused = 400 <= status < 500 and status not in (408, 429)
        if (
            refused
            or _is_full(cause)
            or isinstance(cause, OfflineModeIsEnabled | HFValidationError)
        ):
            return True
    return False


def status_of(error: BaseException) -> int:
    """Return the HTTP status of an error, or 0."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in FULL


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then its chain of causes."""
    while error:
        yield error
        error = error.__cause__


def reason(error: BaseException) -> str:
    """Return the first line of an error's root cause, printable and bounded."""
    *_, first = causes(error)
    line = (str(first).splitlines() or [type(first).__name__])[0]
    return "".join(c if c.isprintable() else "?" for c in line[:MAX_REASON])
