"""Kernels compiled by NVRTC, once per machine: their code is kept on disk.

`mx.fast.cuda_kernel` compiles each kernel again in every process, which takes seconds because its
headers are large. The library is the one that MLX has loaded.
"""

import contextlib
import ctypes
import functools
import hashlib
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...errors import FlashMoEError
from ..kept import cache_dir, write_whole

TYPES = {
    mx.bfloat16: "bfloat16_t", mx.float16: "half", mx.float32: "float", mx.bool_: "bool",
    mx.uint8: "uint8_t", mx.uint16: "ushort", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
    mx.int32: "int", mx.int64: "int64_t",
}  # fmt: skip
OPTIONS = "--std=c++17", "--device-as-default-execution-space"
FUNCTION, RUNS = "flashmoe_function", "flashmoe_runs"  # names in the text
SHAPE = re.compile(r"\b(\w+)_shape\b")
Input = tuple[str, mx.Dtype, int, bool]  # name, dtype, dimensions, whether they are passed
Output = tuple[str, mx.Dtype]
MULTIPLIER, SEED, ALL = 0xC6A4A7935BD1E995, 0xC70F6907, (1 << 64) - 1  # of `hash_of`
Constant = tuple[str, int | bool | mx.Dtype]


class Compiled:
    """A kernel's machine code, loaded into the GPU once.

    MLX hashes a kernel's whole code at every launch, to find what it has loaded: 5 us for 12 KB.
    Once it is loaded, launches pass eight bytes with the same hash.
    """

    def __init__(
        self, name: str, code: bytes, inputs: Sequence[Input], outputs: Sequence[Output]
    ) -> None:
        """Take a function's name, by which MLX tells kernels apart, and a cubin."""
        self._name, self._code, self._short = name, code, same_hash(code)
        self._inputs, self._outputs, self._loaded = inputs, outputs, False

    def __call__(self, inputs: list[mx.array], geometry: dict[str, Any]) -> list[mx.array]:
        """Launch it; `geometry` has the grid and the outputs."""
        if not self._loaded:
            self._load()
        shapes = [size for (*_, shaped), x in zip(self._inputs, inputs, strict=True) if shaped
                  for size in x.shape]  # fmt: skip
        code = self._short if self._loaded else self._code
        return self._launch(code, inputs, [*shapes, 1], geometry)

    def _launch(
        self, code: bytes, inputs: list[mx.array], scalars: list[int], geometry: dict[str, Any]
    ) -> list[mx.array]:
        return mx.fast.precompiled_cuda_kernel(
            name=self._name,
            compiled_source=code,
            inputs=inputs,
            scalars=scalars,
            ensure_row_contiguous=True,
            **geometry,
        )

    def _load(self) -> None:
        """Load the code by a launch that returns at once, then try the eight bytes."""
        count = sum(dimensions for _, _, dimensions, shaped in self._inputs if shaped)
        geometry = {
            "output_shapes": [(1,)] * len(self._outputs),
            "output_dtypes": [dtype for _, dtype in self._outputs],
            "grid": (1, 1, 1),
            "threadgroup": (1, 1, 1),
        }
        try:
            for code in (self._code, self._short):
                inputs = [mx.zeros(1, dtype) for _, dtype, *_ in self._inputs]
                mx.eval(self._launch(code, inputs, [0] * (count + 1), geometry))
            self._loaded = True
        except (RuntimeError, ValueError):  # inside a trace, or another MLX: each launch loads
            pass


def _mixed(value: int) -> int:
    return value ^ value >> 47


def hash_of(data: bytes) -> int:
    """Return `std::hash` of a string on Linux: MurmurHash64A, by Austin Appleby."""
    value, whole = SEED ^ len(data) * MULTIPLIER & ALL, len(data) & ~7
    for (word,) in struct.iter_unpack("<Q", data[:whole]):
        value = (value ^ _mixed(word * MULTIPLIER & ALL) * MULTIPLIER) * MULTIPLIER & ALL
    if len(data) > whole:
        value = (value ^ int.from_bytes(data[whole:], "little")) * MULTIPLIER & ALL
    return _mixed(_mixed(value) * MULTIPLIER & ALL)


def same_hash(data: bytes) -> bytes:
    """Return eight bytes whose hash is that of `data`: every step of the hash has an inverse."""
    back = pow(MULTIPLIER, -1, 1 << 64)
    value = _mixed(_mixed(hash_of(data)) * back & ALL) * back & ALL
    value ^= SEED ^ 8 * MULTIPLIER & ALL
    return struct.pack("<Q", _mixed(value * back & ALL) * back & ALL)


@functools.cache
def kernel(
    name: str,
    text: Callable[[], tuple[str, str]],
    inputs: tuple[tuple[str, mx.Dtype, int], ...],
    outputs: tuple[Output, ...],
    constants: tuple[Constant, ...],
    views: tuple[str, ...],
) -> Compiled:
    """Compile a kernel, or read it from disk.

    Args:
        name: what it does.
        text: returns the definitions before it, and its body.
        inputs: name, dtype and dimensions of each array.
        outputs: name and dtype of each.
        constants: compile-time constants.
        views: declarations of further inputs.

    Raises:
        FlashMoEError: NVRTC refuses the text.
    """
    before, body = text()
    used = set(SHAPE.findall(body))
    arrays = [(*each, each[0] in used) for each in inputs]
    whole = _source(before, body, arrays, outputs, constants, views)
    digest = hashlib.sha256(f"{whole}{OPTIONS}{_target()}".encode()).hexdigest()[:24]
    function = f"flashmoe_{name}_{digest}"
    code = _code(digest, whole.replace(FUNCTION, function))
    return Compiled(function, code, arrays, outputs)


def _source(
    before: str,
    body: str,
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    constants: Sequence[Constant],
    views: Sequence[str],
) -> str:
    parameters = [f"const {TYPES[dtype]}* {name}" for name, dtype, *_ in inputs]
    parameters += [f"{TYPES[dtype]}* {name}" for name, dtype in outputs]
    lines = [f"if (!{RUNS}) return;"]
    for name, _, dimensions, shaped in inputs:
        if not shaped:
            continue
        sizes = [f"{name}_size_{axis}" for axis in range(dimensions)]
        parameters += [f"int {size}" for size in sizes]
        lines.append(f"const int {name}_shape[] = {{{', '.join(sizes)}}};")
    for name, value in constants:
        if isinstance(value, mx.Dtype):
            lines.append(f"using {name} = {TYPES[value]};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"constexpr {kind} {name} = {str(value).lower()};")
    parameters.append(f"int {RUNS}")
    opening = f'extern "C" __global__ void {FUNCTION}({", ".join(parameters)}) {{'
    return "\n".join([before, opening, *lines, *views, body, "}\n"])


def _code(digest: str, text: str) -> bytes:
    """Return the machine code of a text, kept on disk behind its own digest."""
    path = cache_dir() / "cuda" / f"{digest}.cubin"
    with contextlib.suppress(OSError):
        check, code = (kept := path.read_bytes())[:32], kept[32:]
        if hashlib.sha256(code).digest() == check:
            return code
    code = compile_text(text)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, hashlib.sha256(code).digest() + code)
    return code


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the NVRTC that MLX has loaded.

    Raises:
        FlashMoEError: there is none.
    """
    for line in Path("/proc/self/maps").read_text().splitlines():
        if re.search(r"/libnvrtc\.so[.\d]*$", path := line.split()[-1]):
            return ctypes.CDLL(path)
    raise FlashMoEError("MLX has not loaded NVRTC. Install MLX for CUDA again.")


@functools.cache
def _target() -> tuple[str, int, int]:
    """Return the GPU's architecture and NVRTC's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return str(mx.device_info()["architecture"]), major.value, minor.value


def compile_text(text: str) -> bytes:
    """Return the machine code of a CUDA text for this GPU.

    Raises:
        FlashMoEError: NVRTC refuses it; with the start of its log.
    """
    library, program, size = _library(), ctypes.c_void_p(), ctypes.c_size_t()

    def check(result: int) -> None:
        if result == 0:
            return
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        reason = library.nvrtcGetErrorString(result).decode()
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value + 1)
        library.nvrtcGetProgramLog(program, log)
        raise FlashMoEError(f"NVRTC: {reason}. {log.value.decode(errors='replace')[:1000]}")

    options = [f"--gpu-architecture={_target()[0]}", *OPTIONS]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    source = ctypes.c_char_p(text.encode())
    check(library.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None))
    try:
        check(library.nvrtcCompileProgram(program, len(options), array))
        check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        check(library.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
