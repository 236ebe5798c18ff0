"""Find clang, and compile text to shared objects that are cached between runs.

clang and lld come from the `ziglang` package, not from the host.
"""

import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import mlx

from .errors import BenchError

HERE = Path(__file__).parent
KERNELS = "mlx/backend/metal/kernels"
CPU_FLAGS = {"avx2", "f16c", "fma"}
TARGET = ("-target", "x86_64-linux-gnu", "-march=x86-64-v3", "-fPIC", "-nostdinc")
HEADERS = f'#include <metal_stdlib>\n#include "{KERNELS}/utils.h"\n'
LIBC = ("x86-linux-gnu", "generic-glibc", "x86-linux-any", "any-linux-any")
WARNINGS = (
    "implicit-float-conversion",
    "double-promotion",
    "uninitialized",
    "sometimes-uninitialized",
    "return-type",
    "shift-count-overflow",
    "vla",
)


@dataclass(frozen=True)
class Build:
    """Compiler flags of one kind of build."""

    name: str
    flags: tuple[str, ...]


# clang type-checks address spaces 1, 2, 3; x86 ignores them. Uninitialized locals hold a pattern
# in one build and zero in another; `order` compares the two. Floats are the same with and without
# optimization. The stack protector catches a lane that overruns its own array, which would
# otherwise return to a random address.
PLAIN = ("-DBENCH_SPACES=1", "-fstack-protector-strong")
QUICK = Build("quick", (*PLAIN, "-O0", "-ftrivial-auto-var-init=pattern"))
FAST = Build("fast", (*PLAIN, "-O1", "-ftrivial-auto-var-init=pattern"))
ZERO = Build("zero", (*PLAIN, "-O0", "-ftrivial-auto-var-init=zero"))
# The thread-sanitizer pass skips other address spaces and accesses wider than 16 bytes: so use no
# address spaces and no vectorizer.
CHECKED = Build(
    "checked",
    (
        "-DBENCH_SPACES=0",
        "-O1",
        "-fno-vectorize",
        "-fno-slp-vectorize",
        "-ftrivial-auto-var-init=pattern",
        "-fsanitize=thread,undefined,float-cast-overflow,local-bounds",
        "-fno-sanitize=function,vptr",
        "-mllvm",
        "-tsan-instrument-func-entry-exit=0",
        "-mllvm",
        "-tsan-instrument-read-before-write=1",
    ),
)


def could_run() -> bool:
    """Return whether this platform can run the bench."""
    return platform.system() == "Linux" and platform.machine() == "x86_64"


@cache
def missing() -> str | None:
    """Return why this machine cannot run kernels, or None."""
    if not could_run():
        return "the Metal bench runs on x86-64 Linux only"
    if importlib.util.find_spec("ziglang") is None:
        return "the Metal bench needs clang: pip install ziglang"
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    if not flags >= CPU_FLAGS:
        return f"the Metal bench needs a CPU with {', '.join(sorted(CPU_FLAGS - flags))}"
    return None


@cache
def _zig() -> Path:
    if reason := missing():
        raise BenchError("bench", reason)
    spec = importlib.util.find_spec("ziglang")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@cache
def _cache_dir() -> Path:
    path = Path(tempfile.gettempdir()) / f"metal-cpu-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise BenchError("bench", f"{path} belongs to another user: remove it or set TMPDIR")
    return path


@cache
def mlx_include() -> Path:
    """Return the directory of the mlx wheel's headers."""
    for base in mlx.__path__:
        if (Path(base) / "include" / KERNELS).is_dir():
            return Path(base) / "include"
    raise BenchError("bench", f"no {KERNELS} among the files of the installed mlx")


def _run(arguments: list[str], source: str | None = None) -> None:
    done = subprocess.run(arguments, input=source, capture_output=True, text=True)
    if done.returncode:
        raise BenchError("compile", done.stderr.strip()[:4000])


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@cache
def _version() -> str:
    """Return a digest of everything but the kernel's text that affects the compiler's output.

    It contains no paths, so other environments of the same user share compiled kernels.
    """
    own = sorted(p for p in HERE.rglob("*") if p.suffix in (".h", ".cpp", "") and p.is_file())
    theirs = sorted((mlx_include() / KERNELS).glob("*.h"))
    identity = f"{version('ziglang')} {(_zig() / 'zig').stat().st_size}"
    return _digest(identity, *(p.read_text() for p in [*own, *theirs]))


def _cached(key: str, suffix: str = ".so") -> Path:
    return _cache_dir() / (key + suffix)


def _shared_object(target: Path, sources: list[tuple[str, str]], flags: list[str]) -> None:
    """Compile (name, text) pairs and link them."""
    with tempfile.TemporaryDirectory(dir=_cache_dir()) as work:
        objects = []
        for name, text in sources:
            objects.append(f"{work}/{name}.o")
            command = [str(_zig() / "zig"), "clang", *TARGET, *flags, "-x", "c++", "-c", "-"]
            _run([*command, "-o", objects[-1]], text)
        linked = f"{work}/linked.so"
        wrap = "--wrap=__stack_chk_fail"  # libc's aborts the process, the runtime's ends the launch
        _run([str(_zig() / "zig"), "ld.lld", "-shared", wrap, "-o", linked, *objects])
        os.replace(linked, target)


def runtime_library() -> Path:
    """Return the compiled runtime: lanes, meeting points, memory and its checks."""
    lib = _zig() / "lib"
    flags = ["-std=c++20", "-O2", "-I", str(HERE), "-isystem", str(lib / "include")]
    for name in LIBC:
        flags += ["-isystem", str(lib / "libc/include" / name)]
    names = ("runtime", "memory", "undefined")
    target = _cached(_digest("runtime", _version()))
    if not target.exists():
        _shared_object(target, [(n, (HERE / f"{n}.cpp").read_text()) for n in names], flags)
    return target


@cache
def _plain_utils() -> Path:
    """Return a directory with MLX's utils.h, its array parameters spelled as pointers.

    clang takes no address space on an array parameter; Apple's compiler does.
    """
    text = (mlx_include() / KERNELS / "utils.h").read_text()
    text = re.sub(r"(constant const int64_t) strides\[\d\]", r"\1* strides", text)
    folder = _cache_dir() / _digest("utils", text)
    target = folder / KERNELS / "utils.h"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        os.replace(partial, target)
    return folder


def _precompiled(flags: list[str]) -> list[str]:
    """Return the flag that loads the common headers precompiled: it halves the time per kernel.

    Timestamps are left out, because another process may rewrite the same header.
    """
    flags = [*flags, "-Xclang", "-fno-pch-timestamp"]
    target = _cached(_digest("headers", _version(), *flags), ".pch")
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        command = [str(_zig() / "zig"), "clang", *TARGET, *flags, "-x", "c++-header", "-"]
        _run([*command, "-o", str(partial)], HEADERS)
        os.replace(partial, target)
    return ["-include-pch", str(target)]


def compile_kernel(text: str, build: Build, strict: bool) -> Path:
    """Compile one translated kernel; `strict` makes implicit narrowing and the like errors."""
    flags = ["-std=c++17", *build.flags, "-cl-single-precision-constant", "-ffp-contract=off"]
    flags += ["-Xclang", "-ffloat16-excess-precision=none"]
    flags += ["-Xclang", "-fbfloat16-excess-precision=none"]
    flags += ["-mllvm", "-trap-unreachable"]
    flags += ["-gline-tables-only", "-gdwarf-4", "-fno-exceptions", "-fno-rtti"]
    flags += ["-Wno-everything", *(f"-Werror={name}" for name in WARNINGS)] if strict else ["-w"]
    target = _cached(_digest(_version(), build.name, *flags, text))
    if not target.exists():
        for folder in (HERE / "include", _plain_utils(), mlx_include()):
            flags += ["-isystem", str(folder)]
        _shared_object(target, [("kernel", text)], [*flags, *_precompiled(flags)])
    return target
