"""What this machine offers to a streamed model: memory, disk, cores and GPU, in about a second.

MLX is needed for the question of the GPU only.
"""

import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from ..errors import FlashMoEError
from ..profile import machine
from ..profile.read_speed import ReadSpeed, scratch_ranges, time_reads
from ..progress import Bar
from ..store.memory import available_bytes, cgroup_limit, installed_bytes
from .plan_model import SYSTEM_BYTES, Machine
from .published import MACHINES
from .text import place

SAMPLE = 128 << 20  # bytes written to the disk, and read
OWN_BYTES = 1e9  # memory of a run besides weights: Python, MLX, activations, a KV cache
BLOCK = 64 << 20  # bytes that each core reads from memory, more than caches hold
STEPS = 3  # of `look`


@dataclass(frozen=True)
class Here:
    """This machine; bytes, and bytes per second.

    Attributes:
        cpu: name of the processor.
        cores: cores that this process may use.
        gpu: name of the GPU that MLX computes on, or None.
        gpu_memory: free bytes of the GPU's own memory, None if it shares the host's.
        memory: installed.
        available: what a run may allocate, by the system and its cgroups.
        limit: the smallest limit of the process's cgroups, or None.
        bandwidth: of memory.
        bandwidth_source: "measured", or "published" for the chip.
        folder: where models lie, or will.
        free: of the folder's disk.
        read: cold reads from that disk, or why they were not measured.
        copy: reads from the page cache, None if not measured.
    """

    cpu: str
    cores: int
    gpu: str | None
    gpu_memory: int | None
    memory: int
    available: int
    limit: int | None
    bandwidth: float
    bandwidth_source: str
    folder: Path
    free: int
    read: ReadSpeed | str
    copy: float | None

    def machine(self) -> Machine:
        """Return the machine as the prediction takes it; a disk that was not measured is infinite.

        `available` on macOS is a share of the memory, whatever other programs use: the plan's
        allowance for them applies.
        """
        mac = sys.platform == "darwin"
        memory, system = (self.memory, SYSTEM_BYTES) if mac else (self.available, OWN_BYTES)
        ssd = math.inf if isinstance(self.read, str) else self.read.bytes_per_s
        return Machine(memory, ssd, self.bandwidth, "this machine", system, self.copy)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        read = self.read if isinstance(self.read, str) else self.read.as_dict()
        return {**vars(self), "folder": str(self.folder), "read": read}


def models_folder() -> Path:
    """Return the Hub's cache, where models that are named by repository lie."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def existing(path: Path) -> Path:
    """Return a path, or its nearest parent that exists."""
    path = path.expanduser().absolute()
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))


def look(folder: Path, steps: Bar, sample: int = SAMPLE) -> Here:
    """Measure this machine; `steps` shows the STEPS. A disk that cannot be measured is no error."""
    steps.set_description("asking MLX for a GPU")
    gpu, gpu_memory = find_gpu()
    steps.update()
    steps.set_description("reading memory")
    bandwidth, source = memory_bandwidth()
    steps.update()
    steps.set_description(f"reading the disk of {place(folder)}")
    read, copy = disk_speeds(existing(folder), sample)
    steps.update()
    return Here(
        machine.cpu_name(), machine.cores(), gpu, gpu_memory, installed_bytes(), available_bytes(),
        cgroup_limit(), bandwidth, source, folder, shutil.disk_usage(existing(folder)).free,
        read, copy,
    )  # fmt: skip


def find_gpu() -> tuple[str | None, int | None]:
    """Return the name of the GPU that MLX computes on, and the free bytes of its own memory."""
    try:
        if not machine.on_gpu():
            return None, None
    except ImportError:  # without MLX, plan for the CPU
        return None, None
    from ..store.devices import choose

    return machine.device(), choose().free_bytes


def memory_bandwidth() -> tuple[float, str]:
    """Return the published bandwidth of an Apple chip, else that of reads by every core."""
    chip = machine.cpu_name().removeprefix("Apple ").lower().replace(" ", "-")
    for name, known in MACHINES.items():
        if name.rpartition("-")[0] == chip:
            return known.bandwidth, "published"
    return _measured_bandwidth(machine.cores()), "measured"


def _measured_bandwidth(threads: int) -> float:
    import numpy as np  # 80 ms

    blocks = [np.ones(BLOCK // 8, np.uint64) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(4):  # other programs only add time
            start = perf_counter()
            list(pool.map(np.max, blocks))
            best = min(best, perf_counter() - start)
    return threads * BLOCK / best


def disk_speeds(folder: Path, sample: int) -> tuple[ReadSpeed | str, float | None]:
    """Time cold reads of a temporary file in `folder`, then reads of it from the page cache.

    Returns:
        The reads, or why they failed; and bytes per second from the page cache, None on macOS,
        which keeps the file out of it.
    """
    try:
        with scratch_ranges(folder, sample) as ranges:
            cold = time_reads(ranges, f"a temporary file in {place(folder)}")
            if sys.platform == "darwin":
                return cold, None
            return cold, time_reads(ranges, "the page cache", warm=True).bytes_per_s
    except OSError as error:
        return f"not measured: {error.strerror} ({error.filename or folder})", None
    except FlashMoEError as error:
        return f"not measured: {error}", None
