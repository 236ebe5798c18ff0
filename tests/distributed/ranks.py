"""Start ranks on this machine, as `mlx.launch --backend ring` does, and talk to none of them."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAMILIES = (
    "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "glm4_moe", "qwen3_next", "minimax",
    "qwen3_5_moe",
)  # fmt: skip
TESTS = Path(__file__).parents[1]  # the commands import its helpers


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def environment(folder: Path, rank: int) -> dict[str, str]:
    """Return the environment of a rank that compiles in a folder of its own."""
    (folder / f"tmp{rank}").mkdir(exist_ok=True)
    return os.environ | {"PYTHONPATH": str(TESTS), "TMPDIR": f"{folder}/tmp{rank}"}


def start(
    folder: Path,
    count: int,
    command: Sequence[Any],
    envs: Sequence[dict[str, str]] = (),
    last: Sequence[Any] = (),
    namespaces: Sequence[tuple[str, str]] = (),
) -> list[subprocess.Popen]:
    """Start a Python command in `count` ranks.

    Args:
        folder: for the host file, and for what MLX compiles, which two processes must not share.
        count: of ranks.
        command: arguments for Python.
        envs: each rank's further environment variables.
        last: arguments of the last rank, if others.
        namespaces: each rank's network namespace and its address there.
    """
    hosts = folder / "hosts.json"
    addresses = [address for _, address in namespaces] or ["127.0.0.1"] * count
    ports = zip(addresses, free_ports(count), strict=True)
    hosts.write_text(json.dumps([[f"{address}:{port}"] for address, port in ports]))
    ranks = []
    for rank in range(count):
        env = environment(folder, rank)
        if count > 1:
            env |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        env |= envs[rank] if envs else {}
        within = ["ip", "netns", "exec", namespaces[rank][0]] if namespaces else []
        process = subprocess.Popen(
            [*within, sys.executable, *map(str, last if last and rank == count - 1 else command)],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        ranks.append(process)
    return ranks


def finish(ranks: Sequence[subprocess.Popen], timeout: float = 240) -> list[str]:
    """Return what each rank printed, after its end."""
    try:
        return [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def run(folder: Path, count: int, command: Sequence[Any], **env: str) -> list[str]:
    """Run a Python command in `count` ranks, which must all succeed; return what each printed."""
    ranks = start(folder, count, command, [env] * count)
    printed = finish(ranks)
    for rank, text in zip(ranks, printed, strict=True):
        assert rank.returncode == 0, text
    return printed
