"""Machine, versions and device, for benchmarks and bug reports.

MLX is imported on use only: `flashmoe-plan` works without it.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..store.memory import installed_bytes

PACKAGES = ("flashmoe-mlx", "mlx", "mlx-lm", "transformers", "numpy", "numba")


def facts() -> dict[str, Any]:
    """Return machine, versions and device as JSON values; memory in bytes."""
    release = platform.mac_ver()[0] if sys.platform == "darwin" else platform.release()
    return {
        "system": f"{platform.system()} {release}, {platform.machine()}",
        "cpu": cpu_name(),
        "cores": cores(),
        "memory": installed_bytes(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": device(),
    }


def versions(facts: dict[str, Any]) -> str:
    """Return the installed packages of `facts` in one line."""
    return ", ".join(f"{name} {found}" for name, found in facts["packages"].items() if found)


def describe(facts: dict[str, Any], *more: str) -> str:
    """Return system, processor and cores, and `more`, in one line; then the packages."""
    here = f"{facts['system']}, {facts['cpu']}, {facts['cores']} cores"
    return ", ".join((here, *more)) + f"\n{versions(facts)}"


def device() -> str:
    """Return MLX's default device, such as "Apple M4 Max (Metal)"."""
    from ..custom_kernels.autotune import device_name

    return device_name()


def on_gpu() -> bool:
    """Say whether MLX computes on a GPU."""
    import mlx.core as mx

    return mx.default_device() == mx.Device(mx.gpu)


def default_dtype() -> str:
    """Return the dtype of a model's activations on the default device."""
    return "bfloat16" if on_gpu() else "float32"


def version(package: str) -> str | None:
    """Return an installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """Return the system's name of the processor."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def cache_bytes() -> int:
    """Return the size of the device's last-level cache in bytes, or a safe default."""
    if on_gpu():
        return 96 << 20
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    texts = [path.read_text().strip() for path in files]
    units = {"K": 10, "M": 20}
    return max((int(x.rstrip("KM")) << units.get(x[-1:], 0) for x in texts), default=32 << 20)
