"""Kernels compiled by NVRTC, once per machine: their code is kept on disk.

`mx.fast.cuda_kernel` compiles each kernel anew in every process, for seconds, because its headers
are large. The library is the one that MLX has loaded.
"""

import contextlib
import ctypes
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ...errors import FlashMoEError
from ..kept import cache_dir, write_whole

TYPES = {
    mx.bfloat16: "bfloat16_t", mx.float16: "half", mx.float32: "float", mx.bool_: "bool",
    mx.uint8: "uint8_t", mx.uint16: "ushort", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
    mx.int32: "int", mx.int64: "int64_t",
}  # fmt: skip
OPTIONS = "--std=c++17", "--device-as-default-execution-space"
SHAPE = re.compile(r"\b(\w+)_shape\b")
Input = tuple[str, mx.Dtype, int]  # name, dtype, dimensions
Output = tuple[str, mx.Dtype]
Constant = tuple[str, int | bool | mx.Dtype]


class Compiled(NamedTuple):
    """A kernel's machine code.

    Attributes:
        name: of the function; MLX tells kernels apart by it.
        code: a cubin.
        shaped: places of the inputs whose shapes follow the arrays as scalars.
    """

    name: str
    code: bytes
    shaped: tuple[int, ...]

    def __call__(self, inputs: list[mx.array], geometry: dict[str, Any]) -> list[mx.array]:
        """Launch it; `geometry` has the grid and the outputs."""
        return mx.fast.precompiled_cuda_kernel(
            name=self.name,
            compiled_source=self.code,
            inputs=inputs,
            scalars=[size for place in self.shaped for size in inputs[place].shape],
            ensure_row_contiguous=True,
            **geometry,
        )


@functools.cache
def kernel(
    name: str,
    text: Callable[[], tuple[str, str]],
    inputs: tuple[Input, ...],
    outputs: tuple[Output, ...],
    constants: tuple[Constant, ...],
    views: tuple[str, ...],
) -> Compiled:
    """Compile a kernel, or read it from disk.

    Args:
        name: what it does.
        text: returns the definitions before it, and its body.
        inputs: of the arrays.
        outputs: of the arrays.
        constants: compile-time constants.
        views: declarations of further inputs.

    Raises:
        FlashMoEError: NVRTC refuses the text.
    """
    before, body = text()
    used = set(SHAPE.findall(body))
    shaped = tuple(place for place, (array, *_) in enumerate(inputs) if array in used)
    whole = _source(before, body, inputs, outputs, constants, views, shaped)
    digest = hashlib.sha256(f"{whole}{OPTIONS}{_target()}".encode()).hexdigest()[:24]
    function = f"flashmoe_{name}_{digest}"
    return Compiled(function, _code(digest, whole.replace(FUNCTION, function)), shaped)


FUNCTION = "FLASHMOE_FUNCTION"


def _source(
    before: str,
    body: str,
    inputs: Sequence[Input],
    outputs: Sequence[Output],
    constants: Sequence[Constant],
    views: Sequence[str],
    shaped: Sequence[int],
) -> str:
    parameters = [f"const {TYPES[dtype]}* {name}" for name, dtype, _ in inputs]
    parameters += [f"{TYPES[dtype]}* {name}" for name, dtype in outputs]
    lines = []
    for place in shaped:
        name, _, dimensions = inputs[place]
        sizes = [f"{name}_size_{axis}" for axis in range(dimensions)]
        parameters += [f"int {size}" for size in sizes]
        lines.append(f"const int {name}_shape[] = {{{', '.join(sizes)}}};")
    for name, value in constants:
        if isinstance(value, mx.Dtype):
            lines.append(f"using {name} = {TYPES[value]};")
        else:
            kind = "bool" if isinstance(value, bool) else "int"
            lines.append(f"constexpr {kind} {name} = {str(value).lower()};")
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
