"""Launch `.metal` kernels: unchanged on Apple GPUs, with `cuda_prelude.cuh` on NVIDIA."""

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import mlx.core as mx

from .cuda import compiled
from .packed import Part

# On CUDA MLX keeps arrays of up to 8 bytes, outputs too, in host memory, and each threadgroup that
# reads one waits for the bus. So arrays that kernels read have at least four elements.
LEAST_ELEMENTS = 4
SIMD = 32  # lanes of a simdgroup (Metal) or warp (CUDA)
TYPES = {
    mx.bfloat16: "bfloat16_t", mx.float16: "half", mx.float32: "float", mx.uint32: "uint32_t",
}  # fmt: skip
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
    """Return a kernel file without comments and indentation: MLX copies it at every launch."""
    text = resources.files(__package__).joinpath(file).read_text()
    lines = (re.sub(r"\s*//.*", "", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


@functools.cache
def _build(kernel: "Kernel", names: tuple[str, ...], views: tuple[str, ...]) -> Callable[..., Any]:
    """Return a kernel for Metal; MLX tells kernels apart by name."""
    digest = f"__{hashlib.sha256(repr(views).encode()).hexdigest()[:8]}" if views else ""
    make: Callable[..., Any] = mx.fast.metal_kernel
    return make(
        name=f"flashmoe_{kernel.name.replace('/', '_')}{digest}",
        input_names=list(names),
        output_names=list(kernel.outputs),
        source="\n".join([*views, kernel.text]),
        header="\n".join(map(read_text, kernel.headers)),
    )


def _bind(
    names: Sequence[str], inputs: Sequence[mx.array | Part]
) -> tuple[dict[str, mx.array], tuple[str, ...]]:
    """Return the arrays to bind by name, each once, and declarations of the other inputs."""
    bound: dict[str, mx.array] = {}
    known: dict[int, str] = {}
    views = []
    for name, given in zip(names, inputs, strict=True):
        array, offset = (given.buffer, given.offset) if isinstance(given, Part) else (given, None)
        holder = known.get(id(array))
        if holder is None:
            holder = known[id(array)] = name if offset is None else f"buffer{len(bound)}"
            bound[holder] = array
        if offset is not None:
            start = f"(const device uint8_t*){holder} + {offset}ul"
            views.append(f"auto {name} = (const device {TYPES[given.dtype]}*)({start});")
        elif holder != name:
            views.append(f"auto {name} = {holder};")
    return bound, tuple(views)


@dataclass(frozen=True)
class Kernel:
    """A kernel whose body is `<name>.metal`, relative to this folder, or `source`.

    Attributes:
        name: path without suffix.
        inputs: parameter names of the inputs.
        outputs: parameter names of the outputs.
        headers: files that define functions the body calls.
        source: CUDA's text, of a kernel that Apple's GPUs do not need.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    headers: tuple[str, ...] = ()
    source: str = ""

    @property
    def text(self) -> str:
        """The body."""
        return self.source or read_text(f"{self.name}.metal")

    def __call__(
        self,
        inputs: Sequence[mx.array | Part],
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
        bound, views = _bind(self.inputs, inputs)
        geometry: dict[str, Any] = {
            "output_shapes": [shape for shape, _ in outputs],
            "output_dtypes": [dtype for _, dtype in outputs],
            "grid": (groups[0] * lanes, groups[1], groups[2]),
            "threadgroup": (lanes, 1, 1),
        }
        if not is_cuda():
            make = _build(self, tuple(bound), views)
            return make(inputs=[*bound.values()], template=[*constants.items()], **geometry)
        made = compiled.kernel(
            self.name.replace("/", "_"),
            self._cuda_text,
            tuple((name, x.dtype, x.ndim) for name, x in bound.items()),
            tuple(zip(self.outputs, geometry["output_dtypes"], strict=True)),
            (*constants.items(),),
            views,
        )
        return made([*bound.values()], geometry)

    def _cuda_text(self) -> tuple[str, str]:
        """Return the definitions before the kernel, and its body."""
        headers = map(read_text, ("cuda_prelude.cuh", *self.headers))
        return "\n".join(headers), self.text
