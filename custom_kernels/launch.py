"""Launch `.metal` kernels: unchanged on Apple GPUs, with `cuda_prelude.cuh` on NVIDIA."""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import mlx.core as mx

# On CUDA MLX keeps arrays of up to 8 bytes, outputs too, in host memory, and each threadgroup that
# reads one waits for the bus. So arrays that kernels read have at least four elements.
LEAST_ELEMENTS = 4
SIMD = 32  # lanes of a simdgroup (Metal) or warp (CUDA)
Shape = tuple[int, ...]
Triple = tuple[int, int, int]


def available() -> bool:
    """Return whether this machine has a supported GPU."""
    return mx.metal.is_available() or mx.cuda.is_available()


def is_cuda() -> bool:
    """Return whether the GPU is NVIDIA's; launch geometries differ."""
    return mx.cuda.is_available()


def rounds_products(x: mx.array) -> bool:
    """Return whether MLX's matmul rounds x's products: NVIDIA's GPUs use TF32 for float32."""
    return is_cuda() and x.dtype == mx.float32


@functools.cache
def scalar(value: float) -> mx.array:
    """Return a cached `[LEAST_ELEMENTS]` float32 filled with `value`."""
    return settled(mx.full(LEAST_ELEMENTS, value, dtype=mx.float32))


def settled(array: mx.array) -> mx.array:
    """Return a copy in the GPU's own memory; arrays that the host makes lie in both memories."""
    copy = mx.concatenate([array, array])[: array.shape[0]]
    mx.eval(copy)  # usable from any thread
    return copy


@functools.cache
def read_text(file: str) -> str:
    """Return a kernel file without comments and indentation.

    MLX copies and hashes the text at every launch, so each byte costs time.
    """
    text = resources.files(__package__).joinpath(file).read_text()
    lines = (re.sub(r"\s*//.*", "", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _include(file: str) -> str:
    """Return an `#include` of the file for CUDA's compiler: less text to copy at each launch.

    The digest makes MLX recompile when the file changes. MLX passes an input's shape only if the
    text names it, so the comment repeats names of shapes.
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
    """A kernel whose body is `<name>.metal`, relative to this folder.

    Attributes:
        name: path without suffix.
        inputs: parameter names of the inputs.
        outputs: parameter names of the outputs.
        headers: files that define functions the body calls.
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
        """Launch the kernel.

        Args:
            inputs: arrays; MLX makes them row-contiguous.
            outputs: (shape, dtype) of each.
            groups: threadgroups in x, y and z.
            lanes: lanes per threadgroup, a multiple of 32.
            constants: compile-time constants of the text; each combination compiles once.
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
