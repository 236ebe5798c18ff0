"""Available memory of the machine and of this process's cgroup."""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUP_FILES = (  # limit and usage, of cgroup v2 and v1
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available_bytes() -> int:
    """Return the bytes that this process may still allocate.

    Linux: `MemAvailable`, or the rest of the cgroup's limit if that is less (reclaimable page cache
    counts as free). macOS: 75 % of the installed memory.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return installed_bytes() * 3 // 4
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = [int(fields["MemAvailable"].split()[0]) * 1024]
    for base, limit, usage_name in _cgroup_limits():
        if (usage := _number(base / usage_name)) is not None:
            free.append(max(0, limit - usage + _reclaimable(base)))
    return min(free)


def installed_bytes() -> int:
    """Return the installed memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_limit() -> int | None:
    """Return the smallest memory limit of the process's cgroups in bytes, or None."""
    # cgroup v1 writes a huge number for "no limit".
    return min((limit for _, limit, _ in _cgroup_limits() if limit < 1 << 60), default=None)


def _cgroup_limits() -> Iterator[tuple[Path, int, str]]:
    """Yield a cgroup's directory, its memory limit in bytes, and the name of its usage file."""
    for base in _cgroup_dirs():
        for limit_name, usage_name in CGROUP_FILES:
            if (limit := _number(base / limit_name)) is not None:
                yield base, limit, usage_name


def _cgroup_dirs() -> list[Path]:
    """Return the process's memory cgroup and its ancestors, for cgroup v1 and v2."""
    found = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = Path("/sys/fs/cgroup")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
        else:
            continue
        here = root / path.lstrip("/")
        while here != root and here.is_relative_to(root):
            found.append(here)
            here = here.parent
        found.append(root)
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _reclaimable(cgroup: Path) -> int:
    try:
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def peak_bytes() -> int:
    """Return this process's peak resident memory, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
