"""The parts of a conversion's plan, derived from headers and config alone."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ...format.headers import ITEM_SIZE
from ...format.layout import layer_file
from ...format.placement import Placement
from ..source.checkpoint import Place


@dataclass(frozen=True)
class Options:
    """The user's options; None means "not given"."""

    quantize: bool = False
    bits: int | None = None
    group_size: int | None = None
    dtype: str | None = None
    method: str | None = None
    calibrate: str | None = None  # path of a text
    recipe: str | None = None  # a name in `recipes.RECIPES`
    no_remote_code: bool = False
    placement: Placement | None = None  # write the experts of one rank

    def given(self) -> dict[str, Any]:
        """Return the dict for journal and manifest, which has `placement` elsewhere.

        Older ones lack `no_remote_code`.
        """
        given = asdict(self)
        del given["placement"]
        return {k: v for k, v in given.items() if k != "no_remote_code" or v}


MIN_MAX, LEAST_SQUARES = METHODS = "min-max", "least-squares"

_FLAGS = {
    "quantize": "-q", "bits": "--q-bits", "group_size": "--q-group-size", "dtype": "--dtype",
    "method": "--q-method", "calibrate": "--calibrate", "recipe": "--quant-predicate",
    "link": "--link", "no_remote_code": "--no-remote-code",
}  # fmt: skip


def flags(options: dict[str, Any]) -> str:
    """Format an options dict as on the command line."""
    given = {_FLAGS.get(key, key): value for key, value in options.items() if value}
    return " ".join(f if value is True else f"{f} {value}" for f, value in given.items()) or "none"


@dataclass(frozen=True)
class Quant:
    """Quantization: bits per weight, weights per scale, and MLX's mode."""

    bits: int
    group_size: int
    mode: str = "affine"


class Spec(NamedTuple):
    """One tensor to write; `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@dataclass(frozen=True)
class TrunkTensor:
    """One trunk tensor: `source` becomes `outputs`, either one tensor or weight, scales, biases.

    `shift` adds 1 in the source's dtype, before the cast to `dtype`. A tensor that mlx-lm computes
    has `needs`, the files that it is computed from, and `final`, its name before quantization.
    """

    source: Place
    dtype: str
    shift: bool
    quant: Quant | None
    outputs: tuple[Spec, ...]
    needs: frozenset[Path] = frozenset()
    final: str = ""

    @property
    def files(self) -> frozenset[Path]:
        """The source files to read."""
        return self.needs or frozenset([self.source[0]])


@dataclass(frozen=True)
class TrunkFile:
    """One safetensors file of the trunk."""

    name: str
    tensors: tuple[TrunkTensor, ...]

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """Every tensor of the file, in order."""
        return tuple(spec for tensor in self.tensors for spec in tensor.outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.outputs)


@dataclass(frozen=True)
class Projection:
    """One of an expert's matrices `[rows, columns]`; `before` and `after` are None for floats.

    `extras` are tensors that are copied or cast: a bias, or a scale of the whole matrix.
    """

    name: str
    rows: int
    columns: int
    before: Quant | None
    after: Quant | None
    dtype: str  # of scales and biases, or of floats
    method: str = MIN_MAX
    extras: tuple[Spec, ...] = ()

    @property
    def copied(self) -> bool:
        """Whether the source's bytes are copied unchanged."""
        return self.before == self.after

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """Weight, scales if quantized, biases if affine, and the extras."""
        shape = self.rows, self.columns
        own: tuple[Spec, ...] = (Spec(f"{self.name}.weight", self.dtype, shape),)
        if self.after:
            own = quantized(self.name, shape, self.after, self.dtype)
        return *own, *self.extras


@dataclass(frozen=True)
class LayerPlan:
    """The expert file of one layer.

    Attributes:
        layer: its number among the layers with experts.
        numbers: the experts' ids in the model.
        projections: an expert's matrices.
        module: the path of its experts in the model.
    """

    layer: int
    numbers: range
    projections: tuple[Projection, ...]
    module: str

    @property
    def experts(self) -> int:
        """How many experts the file holds."""
        return len(self.numbers)

    @property
    def file(self) -> str:
        """File name."""
        return layer_file(self.layer)

    @property
    def record(self) -> tuple[Spec, ...]:
        """One expert's tensors, in the order of their bytes."""
        return tuple(spec for projection in self.projections for spec in projection.outputs)

    @property
    def record_bytes(self) -> int:
        """Bytes of one expert."""
        return sum(spec.nbytes for spec in self.record)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.record_bytes * self.experts

    @property
    def outputs(self) -> tuple[Spec, ...]:
        """Every tensor of the file, in order."""
        return tuple(
            spec._replace(name=f"experts.{expert}.{spec.name}")
            for expert in self.numbers
            for spec in self.record
        )


File: TypeAlias = TrunkFile | LayerPlan


@dataclass(frozen=True)
class Plan:
    """A conversion."""

    layers: tuple[LayerPlan, ...]
    trunk: tuple[TrunkFile, ...]
    config: dict[str, Any]
    remote_code: bool = True  # copy the source's Python files
    placement: Placement | None = None

    @property
    def weight_files(self) -> tuple[File, ...]:
        """The trunk's files, then the experts'."""
        return *self.trunk, *self.layers

    @property
    def expert_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def trunk_bytes(self) -> int:
        """Bytes of all trunk tensors."""
        return sum(file.nbytes for file in self.trunk)


def quantized(path: str, shape: tuple[int, ...], quant: Quant, dtype: str) -> tuple[Spec, ...]:
    """Return weight, scales and biases of a matrix or several: `shape` is `[..., rows, columns]`.

    Only affine quantization has biases.
    """
    *rows, columns = shape
    groups = (*rows, columns // quant.group_size)
    parts = ("scales", "biases") if quant.mode == "affine" else ("scales",)
    weight = Spec(f"{path}.weight", "U32", (*rows, columns * quant.bits // 32))
    return weight, *(Spec(f"{path}.{part}", dtype, groups) for part in parts)
