"""A repository of the Hugging Face Hub at one commit: its files, whole or in part."""

import errno
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
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
CARD = "README.md"  # of which the front matter goes into the card of what is made
HALF = ".half"  # after the name of a file that a killed run began to download
PIECE_BYTES = 16 << 20
FIRST_BYTES = 1 << 14  # of a file, asked for at once: most headers fit
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before another attempt
LONGEST_WAIT = 300  # seconds; the Hub counts requests in windows of five minutes
MAX_REASON = 300  # characters of what a server says
FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: size in bytes, and SHA-256 or (of a small one) git's SHA-1."""

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
        """Return where the Hub's own cache has a file, if it does."""
        from huggingface_hub import try_to_load_from_cache  # slow to import, seldom needed

        found = try_to_load_from_cache(self.name, name, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def download(self, name: str, folder: Path) -> Path:
        """Download a file into a folder, or find it there whole or half, and check every byte.

        Raises:
            FlashMoEError: the Hub does not deliver it, or delivers something else.
            OSError: the disk is full.
        """
        return self._told(name, partial(self._download, name, folder))

    def _download(self, name: str, folder: Path) -> Path:
        from huggingface_hub import HfApi

        path, half = folder / name, folder / (name + HALF)
        if half.exists():
            self._go_on(half, name)
            os.replace(half, path)
        elif not path.exists():
            HfApi().hf_hub_download(self.name, name, revision=self.commit, local_dir=folder)
        expected, found = self.files[name], checksum_of(path, len(self.files[name].checksum))
        if found != expected.checksum:
            size = path.stat().st_size
            path.unlink()
            raise OSError(
                f"{size:,} bytes of checksum {found[:12]} came, expected {expected.size:,} of "
                f"{expected.checksum[:12]}"
            )
        return path

    def _go_on(self, half: Path, name: str) -> None:
        """Append what is missing of a file."""
        with open(half, "ab") as file:
            while piece := self._read(name, file.tell(), PIECE_BYTES):
                file.write(piece)

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """Read a range of a file's bytes; fewer than asked for only at its end.

        Raises:
            FlashMoEError: the Hub does not deliver them.
        """
        return self._told(name, partial(self._read, name, start, nbytes))

    def _read(self, name: str, start: int, nbytes: int) -> bytes:
        end = min(start + nbytes, self.files[name].size)
        return self._range(name, start, end) if start < end else b""

    def _range(self, name: str, start: int, end: int) -> bytes:
        from huggingface_hub import HfApi, constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        url = hf_hub_url(self.name, name, revision=self.commit, endpoint=HfApi().endpoint)
        headers = build_hf_headers() | {
            "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity",
        }  # fmt: skip
        content = bytearray()
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with http_stream_backoff(
            "GET", url, headers=headers, timeout=timeout, max_retries=0
        ) as response:
            hf_raise_for_status(response)
            skip = start if response.status_code == 200 else 0  # it does not know ranges
            for chunk in response.iter_bytes():
                content += chunk[skip:]
                skip = max(0, skip - len(chunk))
                if len(content) >= end - start:
                    break
        if len(content) < end - start:
            raise OSError(f"{len(content)} bytes came, expected {end - start}")
        return bytes(content[: end - start])

    def header(self, name: str) -> bytes:
        """Read the header of a safetensors file, with the eight bytes of its length."""
        first = self.read(name, 0, FIRST_BYTES)
        end = 8 + min(int.from_bytes(first[:8], "little"), MAX_HEADER)
        return first[:end] if end <= len(first) else self.read(name, 0, end)

    def _told(self, name: str, act: Callable[[], T]) -> T:
        try:
            return patiently(f"{self.name}: {name}", act)
        except Exception as error:  # a dozen kinds: network, names, permissions, disk
            for cause in filter(_is_full, causes(error)):
                raise cause from error
            raise FlashMoEError(
                f"{self.name}: the Hugging Face Hub did not deliver {name} of commit "
                f"{self.commit} ({reason(error)}). Check the network."
            ) from error


def find_repo(name: str, revision: str | None) -> Repo:
    """Ask the Hub for the commit and the files of a repository.

    Raises:
        Exception: one of the client's many kinds.
    """
    from huggingface_hub import HfApi, constants

    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT  # of seconds without an answer; else there is none
    ask = partial(HfApi().model_info, name, revision=revision, files_metadata=True, timeout=limit)
    info = patiently(name, ask, WAITS[:2])
    if not info.sha:
        raise OSError("no commit came")
    files = {file.name: file for file in map(_remote_file, info.siblings or ()) if file}
    return Repo(name, info.sha, files)


def _remote_file(file: Any) -> RemoteFile | None:
    """Return one entry of the Hub's list, or None if no conversion needs that file."""
    *folder, name = file.rfilename.split("/")
    if folder not in ([], [EXPERT_DIR]) or not any(fnmatch(name, p) for p in _patterns(folder)):
        return None
    checksum = file.lfs.sha256 if file.lfs else file.blob_id
    if type(file.size) is not int or len(checksum or "") not in (40, 64):
        raise OSError(f"no size and checksum of {file.rfilename} came")
    return RemoteFile(file.rfilename, file.size, checksum)


def _patterns(folder: list[str]) -> tuple[str, ...]:
    return ("*.json", "*" + WEIGHTS) if folder else (*PATTERNS, CARD)


def checksum_of(path: Path, digits: int) -> str:
    """Return a file's SHA-256 (64 digits), or the SHA-1 that git names it by (40)."""
    with open(path, "rb") as file:
        if digits == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def patiently(what: str, act: Callable[[], T], waits: tuple[float, ...] | None = None) -> T:
    """Try something several times, unless another attempt would fail the same way."""
    for wait in WAITS if waits is None else waits:
        try:
            return act()
        except Exception as error:
            if _is_final(error):
                raise
            wait = max(wait, _asked_to_wait(error))
            tqdm.write(f"{what}: {reason(error)}; again in {wait:g} s", file=sys.stderr)
            time.sleep(wait)
    return act()


def _asked_to_wait(error: Exception) -> float:
    """Return for how many seconds a server wants to be left alone, as with 429 and 503."""
    for cause in causes(error):
        headers = getattr(getattr(cause, "response", None), "headers", None) or {}
        asked = (
            headers.get("Retry-After", ""),
            *re.findall(r"\bt=(\d+)", headers.get("RateLimit", "")),
        )
        if seconds := [int(text) for text in asked if re.fullmatch(r"\d{1,9}", text)]:
            return float(min(max(seconds), LONGEST_WAIT))
    return 0.0


def _is_final(error: Exception) -> bool:
    """Say whether the answer is "no", or there is no room, or nobody is to be asked."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    never = OfflineModeIsEnabled, HFValidationError
    return any(
        isinstance(cause, never) or _is_full(cause) or _is_refusal(cause) for cause in causes(error)
    )


def _is_refusal(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", 0)
    return 400 <= status < 500 and status not in (408, 429)


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in FULL


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from."""
    while error:
        yield error
        error = error.__cause__


def reason(error: BaseException) -> str:
    """Return the first line of what an error came from, which says most."""
    *_, first = causes(error)
    line = (str(first).splitlines() or [type(first).__name__])[0]
    return "".join(c if c.isprintable() else "?" for c in line[:MAX_REASON])
