"""Run a compiled kernel: guard its arrays, call the runtime once, raise its report."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import BenchError
from .lines import line_of
from .recording import Array, Launch, array_bytes
from .toolchain import runtime_library
from .translate import parameters

U32, U64 = ctypes.c_uint32, ctypes.c_uint64
ORDERS = ("forward", "reversed", "random")
TIMEOUT = 20


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("size", U64),
        ("name", ctypes.c_char_p),
        ("writable", U32),
        ("initialized", U32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("module_start", ctypes.c_void_p),
        ("module_end", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(_Buffer)),
        *((name, U32) for name in ("buffer_count", "order", "seed", "checked", "fill")),
        ("at_end", U32),
        ("timeout", U32),
        ("grid", U32 * 3),
        ("group", U32 * 3),
    )


class _Report(ctypes.Structure):
    _fields_ = (
        ("failed", U32),
        ("line", U32),
        ("pc", U64),
        ("kind", ctypes.c_char * 32),
        ("text", ctypes.c_char * 1024),
    )


@dataclass(frozen=True)
class Conditions:
    """Conditions that vary between runs of a launch."""

    checked: bool = False
    at_end: bool = True  # arrays end at a guard page, else start after one
    order: str = "forward"
    fill: int = 0xFF  # of outputs and threadgroup memory
    seed: int = 1


@cache
def _runtime() -> ctypes.CDLL:
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(runtime_library()), mode=ctypes.RTLD_GLOBAL)
    library.bench_map.restype = ctypes.c_void_p
    library.bench_map.argtypes = [U64, U32]
    library.bench_unmap.argtypes = [ctypes.c_void_p, U64]
    library.bench_protect.argtypes = [ctypes.c_void_p, U64]
    library.bench_run.argtypes = [ctypes.POINTER(_Launch), ctypes.POINTER(_Report)]
    return library


@cache
def _kernel(path: Path) -> tuple[int, int, int]:
    """Load a kernel; return the addresses of its entry, its start and its end."""
    _runtime()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BenchError(
            "bench", f"the kernel calls a function that the bench lacks: {error}"
        ) from None
    bounds = (ctypes.c_void_p * 2)()
    library.bench_module(bounds)
    entry = ctypes.cast(library.bench_entry, ctypes.c_void_p).value
    return entry or 0, bounds[0] or 0, bounds[1] or 0


def _shape_buffers(array: Array, flags: tuple[bool, ...]) -> Iterator[bytes]:
    if not array.shape:
        return
    if flags[0]:
        yield np.array(array.shape, np.int32).tobytes()
    if flags[1]:
        yield np.array(array.strides, np.int64).tobytes()
    if flags[2]:
        yield np.array(len(array.shape), np.int32).tobytes()


def _inputs(launch: Launch) -> Iterator[bytes]:
    for array, flags in zip(launch.inputs, launch.shape_flags, strict=True):
        yield array.data
        yield from _shape_buffers(array, flags)


def _outputs(launch: Launch, fill: int) -> Iterator[bytes]:
    for output in launch.outputs:
        if launch.init_value is None:
            yield bytes([fill]) * output.nbytes
        else:
            yield array_bytes(mx.full(output.shape, launch.init_value, output.dtype)).data


@contextmanager
def _buffers(launch: Launch, how: Conditions) -> Iterator["ctypes.Array[_Buffer]"]:
    """Copy every argument into guarded memory, inputs read-only."""
    runtime, inputs = _runtime(), list(_inputs(launch))
    contents = inputs + list(_outputs(launch, how.fill))
    names = [p["name"].encode() for p in parameters(launch) if p["attribute"].startswith("buffer")]
    if len(names) != len(contents):
        raise BenchError("record", f"{len(contents)} arrays for the parameters {names}")
    buffers = (_Buffer * len(contents))()
    for i, (name, data) in enumerate(zip(names, contents, strict=True)):
        address = runtime.bench_map(len(data), how.at_end)
        if not address:
            raise BenchError("bench", f"no memory for {name!r}: {len(data)} bytes")
        ctypes.memmove(address, data, len(data))
        output = i >= len(inputs)
        known = not output or launch.init_value is not None
        buffers[i] = _Buffer(address, len(data), name, output, known)
        if not output:
            runtime.bench_protect(address, len(data))
    try:
        yield buffers
    finally:
        for buffer in buffers:
            runtime.bench_unmap(buffer.address, buffer.size)


def _raise(report: _Report, launch: Launch, library: Path, start: int) -> None:
    line = report.line or (line_of(library, report.pc - start - 1) if report.pc else 0)
    lines = launch.source.split("\n")
    place = f"\n  line {line}: {lines[line - 1].strip()}" if 0 < line <= len(lines) else ""
    message = report.text.decode(errors="replace") + place
    raise BenchError(report.kind.decode(), f"{launch.name}: {message}")


def _check_limits(launch: Launch) -> None:
    lanes = int(np.prod(launch.threadgroup))
    if min(*launch.grid, *launch.threadgroup) < 1 or lanes > 1024:
        geometry = f"grid {launch.grid}, threadgroup {launch.threadgroup}"
        raise BenchError("limits", f"{launch.name}: {geometry}; Metal takes 1 to 1024 lanes")


def run(launch: Launch, library: Path, how: Conditions) -> list[bytes]:
    """Run a launch once and return the bytes of its outputs.

    Raises:
        BenchError: the first error, with the kernel's line.
    """
    _check_limits(launch)
    entry, start, end = _kernel(library)
    with _buffers(launch, how) as buffers:
        wanted = _Launch(entry, start, end, buffers, len(buffers), ORDERS.index(how.order))
        wanted.seed, wanted.checked, wanted.fill = how.seed, how.checked, how.fill
        wanted.at_end, wanted.timeout = how.at_end, TIMEOUT
        wanted.grid, wanted.group = launch.grid, launch.threadgroup
        report = _Report()
        _runtime().bench_run(ctypes.byref(wanted), ctypes.byref(report))
        if report.failed:
            _raise(report, launch, library, start)
        outputs = buffers[len(buffers) - len(launch.outputs) :]
        return [ctypes.string_at(b.address, b.size) for b in outputs]
