"""Run Metal kernels lane by lane on a Linux CPU; see README.md."""

from .errors import BenchError
from .modes import MODES
from .patching import BenchKernel, Session, check_kernel, metal_on_cpu
from .recording import Array, Launch, Output, record
from .requirement import require_bench

__all__ = [
    "MODES",
    "Array",
    "BenchError",
    "BenchKernel",
    "Launch",
    "Output",
    "Session",
    "check_kernel",
    "metal_on_cpu",
    "record",
    "require_bench",
]
