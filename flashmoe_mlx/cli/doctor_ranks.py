"""`flashmoe-doctor --distributed`: the ranks, what differs between them, and how fast they add."""

import json
import os
import platform
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..distributed.collectives import Group, gather_json
from ..errors import FlashMoEError
from ..loader import load
from ..models.streamed import versions
from ..settings import PREFIX
from ..store.memory import available_bytes

SIZES = {4 << 10: 100, 80 << 10: 100, 8 << 20: 10}  # bytes of a sum, and how often to time it
FREE = "host", "memory"  # may differ between ranks
HOLDS = "holds"


def report(model_dir: Path | None, as_json: bool) -> int:
    """Print the findings in the first rank, and return 1 if ranks differ."""
    found = examine(model_dir)
    if mx.distributed.init().rank() == 0:
        print(json.dumps(found) if as_json else render(found))
    return 0 if found["ok"] else 1


def examine(model_dir: Path | None) -> dict[str, Any]:
    """Return what each rank is and holds, what differs, and the seconds of a sum by its bytes.

    Raises:
        FlashMoEError: this process is not one of several ranks, or they cannot share the model.
    """
    group = mx.distributed.init()
    if group.size() == 1:
        raise FlashMoEError(
            "--distributed: this is one process. Start it on all machines: mlx.launch -n 2 "
            "flashmoe-doctor --distributed, or with --hostfile."
        )
    mine = facts()
    if model_dir:
        with load(model_dir)[0] as model:
            model.shard(group)
            mine[HOLDS] = f"{model.placement()}; {model.expert_cache()}"
    ranks = gather_json(group, mine)
    keys = sorted({key for rank in ranks for key in rank} - {*FREE, HOLDS})
    differing = [key for key in keys if len({rank.get(key) for rank in ranks}) > 1]
    seconds = {nbytes: time_sum(group, nbytes, runs) for nbytes, runs in SIZES.items()}
    return {"ok": not differing, "ranks": ranks, "differing": differing, "all_sum": seconds}


def facts() -> dict[str, str]:
    """Describe this rank."""
    found = versions()
    found |= {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}
    return found | {
        "host": socket.gethostname(),
        "memory": f"{available_bytes() / 2**30:.1f} GiB available",
        "machine": f"{platform.system()} {platform.machine()}, {mx.default_device().type.name}",
    }


def time_sum(group: Group, nbytes: int, runs: int) -> float:
    """Return the median seconds of a sum over the ranks."""
    x, seconds = mx.zeros(nbytes // 4), []
    for _ in range(runs + 2):
        mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group))  # all ranks begin together
        start = time.perf_counter()
        mx.eval(mx.distributed.all_sum(x, group=group))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def render(found: dict[str, Any]) -> str:
    """Return the found as text."""
    lines = []
    for number, rank in enumerate(found["ranks"]):
        packages = ", ".join(f"{name} {rank[name]}" for name in versions())
        lines.append(
            f"Rank {number}: {rank['host']}, {rank['machine']}, {rank['memory']}; {packages}"
        )
        if HOLDS in rank:
            lines.append(f"  {rank[HOLDS]}")
    for nbytes, seconds in found["all_sum"].items():
        rate = f", {nbytes / seconds / 1e9:.2f} GB/s" if nbytes > 1 << 20 else ""
        lines.append(f"A sum of {nbytes >> 10} KiB: {seconds * 1e6:.0f} us{rate}")
    for key in found["differing"]:
        values = ", ".join(str(rank.get(key, "unset")) for rank in found["ranks"])
        lines.append(f"✗ {key} differs: {values}. Give all ranks the same.")
    if found["ok"]:
        lines.append("✓ The ranks have the same versions and settings.")
    return "\n".join(lines)
