"""A sign of life from each rank to the next, beside MLX's own connections.

A rank may wait for hours in a collective: a server's ranks wait there for requests. So silence in
collectives says nothing; a stopped process, a dead host or a cut link shows here.
"""

import contextlib
import json
import os
import secrets
import select
import socket
import threading
import time
from pathlib import Path

from ..errors import FlashMoEError
from .collectives import Group, gather_json

BEAT, GOODBYE = b".", b"!"
CONNECT, LISTEN = 30, 0.05  # seconds
WORD = 32  # bytes that only the ranks know


class Heartbeat:
    """Beats to the next rank, and listens to the one before."""

    def __init__(self, group: Group, address: str) -> None:
        """Connect with both neighbours; all ranks of the group must do so.

        Args:
            group: the ranks.
            address: of this machine, as the others reach it.

        Raises:
            FlashMoEError: a neighbour cannot be reached, or does not call in time.
        """
        listener = socket.create_server((address, 0), family=_family(address))
        word = secrets.token_hex(WORD // 2)
        places = gather_json(group, [*listener.getsockname()[:2], word])
        *place, other_word = places[(group.rank() + 1) % group.size()]
        try:
            self._to = socket.create_connection(tuple(place), CONNECT)
            self._to.sendall(other_word.encode())
            self._from = _accept(listener, word)
        except OSError as error:
            raise FlashMoEError(
                f"rank {group.rank()} of {group.size()}: no connection from {address} to the next "
                f"rank at {place[0]}:{place[1]}, or from the one before ({error}). Another rank "
                "ended, or a firewall is between them: any port must be open."
            ) from error
        self._from.setblocking(False)
        self._to.setblocking(False)
        self.before = (group.rank() - 1) % group.size()
        self._heard, self._over, self._lock = time.monotonic(), False, threading.Lock()

    def beat(self, seconds: float) -> None:
        """Send a sign of life, and listen for some seconds."""
        self._send(BEAT)
        if self._over or self._listen(seconds):
            time.sleep(seconds)

    def leave(self, seconds: float) -> None:
        """Say goodbye, and wait some seconds for that of the rank before."""
        self._send(GOODBYE)
        end = time.monotonic() + seconds
        while not self._over and self.silence() < float("inf") and time.monotonic() < end:
            self._listen(LISTEN)

    def _listen(self, seconds: float) -> bool:
        """Wait for something from the rank before; return whether it came."""
        if not select.select([self._from], [], [], seconds)[0]:
            return False
        with self._lock:
            try:
                data = self._from.recv(4096)
            except BlockingIOError:  # another thread has taken it
                return True
            except OSError:
                data = b""
            self._over = self._over or GOODBYE in data
            self._heard = time.monotonic() if data else float("-inf")
        return True

    def silence(self) -> float:
        """Return for how many seconds the rank before has been silent; infinite if it ended."""
        return 0.0 if self._over else time.monotonic() - self._heard

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # full, or closed: `silence` of the next rank tells
            self._to.send(data)


def _accept(listener: socket.socket, word: str) -> socket.socket:
    """Return the connection of the rank that knows the word, and of nobody else."""
    listener.settimeout(CONNECT)
    with listener:
        while True:
            found, _ = listener.accept()
            found.settimeout(CONNECT)
            with contextlib.suppress(OSError):
                if secrets.compare_digest(found.recv(WORD, socket.MSG_WAITALL), word.encode()):
                    return found
            found.close()


def address_of(rank: int) -> str | None:
    """Return this rank's address, as `mlx.launch` names it or rank 0's; None if it names neither.

    MLX's ring has a file of all addresses, JACCL and NCCL have that of rank 0.
    """
    if text := os.environ.get("MLX_HOSTFILE"):
        hosts = json.loads(Path(text).read_text()) if Path(text).exists() else json.loads(text)
        entry = hosts[rank][0] if isinstance(hosts[rank], list) else hosts[rank]
        return _host(str(entry))
    first = os.environ.get("MLX_JACCL_COORDINATOR")
    if not (host := _host(first) if first else os.environ.get("NCCL_HOST_IP")):
        return None
    with socket.socket(_family(host), socket.SOCK_DGRAM) as way:
        way.connect((host, 1))  # sends nothing
        return str(way.getsockname()[0])


def _host(place: str) -> str:
    """Return the host of host:port."""
    return place.rpartition(":")[0].strip("[]")


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
