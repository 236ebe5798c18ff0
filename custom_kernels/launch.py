"""Launches `.metal` kernels: on Apple GPUs as they stand, on NVIDIA through `cuda_prelude.cuh`."""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import mlx.core as mx

# On CUDA MLX keeps arrays of up to 8 bytes in the host's memory, also what a kernel writes; each
# threadgroup that looks into one waits for the bus. So what kernels read has four elements.
LEAST_ELEMENTS = 4
SIMD = 32  # lanes that step together: a simdgroup on Metal, a warp on CUDA
Shape = tuple[int, ...]
Triple = tuple[int, int, int]


def available() -> bool:
    """Say whether this machine has a GPU that these kernels run on."""
    return mx.metal.is_available() or mx.cuda.is_available()


def is_cuda() -> bool:
    """Say whether the GPU is NVIDIA's; launch geometries differ."""
    return mx.cuda.is_available()


def rounds_products(x: mx.array) -> bool:
    """Say whether the GPU multiplies matrices of x's dtype in fewer bits: NVIDIA's, in TF32."""
    return is_cuda() and x.dtype == mx.float32


@functools.cache
def scalar(value: float) -> mx.array:
    """Return `[LEAST_ELEMENTS]` float32, all of one value, made once."""
    return settled(mx.full(LEAST_ELEMENTS, value, dtype=mx.float32))


def settled(array: mx.array) -> mx.array:
    """Return a copy that the GPU has made in its own memory; what the host makes lies in both."""
    copy = mx.concatenate([array, array])[: array.shape[0]]
    mx.eval(copy)  # for any thread
    return copy


@functools.cache
def read_text(file: str) -> str:
    """Return a kernel file without comments and indentation.

    MLX copies and hashes the text at every launch, so each byte of it costs time.
    """
    text = resources.files(__package__).joinpath(file).read_text()
    lines = (re.sub(r"\s*//.*", "", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _include(file: str) -> str:
    """Return text that makes CUDA's compiler read the file itself: less to copy at a launch.

    The digest makes MLX compile again when the file changes. MLX passes an input's shape if it
    sees its name in the text, so names of shapes are repeated.
    """
    text = read_text(file)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    names = sorted(set(re.findall(r"\w+_(?:shape|strides|ndim)\b", text)))
    path = resources.files(__package__).joinpath(file)
    return f'#include "{path}"\n// {" ".join([digest, *names])}\n'


@functools.cache
def _build(make: Callable[..., Any], kernel: "Kernel") -> Callable[..., Any]:
    cuda = make is mx.fast.cuda_kernel
    text = _include if cuda else read_text
    headers = ("cuda_prelude.cuh", *kernel.headers) if cuda else kernel.headers
    return make(
        name="flashmoe_" + kernel.name.replace("/", "_"),
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=text(f"{kernel.name}.metal"),
        header="\n".join(map(text, headers)),
    )


@dataclass(frozen=True)
class Kernel:
    """A kernel whose body is `<name>.metal`, a path from this folder.

    Attributes:
        name: of the file.
        inputs: parameter names of the inputs.
        outputs: parameter names of the outputs.
        headers: files with functions that the body calls.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[tuple[Shape, mx.Dtype]],
        groups: Triple,
        lanes: int,
        **constants: int | bool | mx.Dtype,
    ) -> list[mx.array]:
        """Launch it.

        Args:
            inputs: arrays, made row-contiguous if they are not.
            outputs: (shape, dtype) of each.
            groups: threadgroups in x, y and z.
            lanes: lanes of a threadgroup, a multiple of 32.
            constants: compile-time constants of the text; each combination is compiled once.
        """
        make = mx.fast.metal_kernel if mx.metal.is_available() else mx.fast.cuda_kernel
        return _build(make, self)(
            inputs=list(inputs),
            template=list(constants.items()),
            grid=(groups[0] * lanes, groups[1], groups[2]),
            threadgroup=(lanes, 1, 1),
            output_shapes=[shape for shape, _ in outputs],
            output_dtypes=[dtype for _, dtype in outputs],
        )
