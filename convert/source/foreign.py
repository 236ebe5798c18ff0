"""Checkpoints that are not in MLX's format, converted by mlx-lm's own `sanitize`.

`sanitize` renames, splits, transposes and dequantizes a whole checkpoint at once. Here it gets the
real tensors of one expert, or of one layer's trunk, and placeholders for all others: so memory
stays small, and no family's rules are repeated. Placeholders are NaN: a result that depends on one
is refused as not finite. Only block-FP8 is dequantized before `sanitize`, which takes several times
the memory, and in some families knows no FP8.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ...errors import FlashMoEError, named
from ...format.headers import TensorInfo
from ...format.layout import Field, LayerLayout
from ...format.modules import PARTS, ExpertModule
from .arrays import DTYPES, FLOATS, as_array

Place = tuple[Path, TensorInfo]
REMEDY = "Restore the checkpoint's own files"
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
SINGLE = re.compile(r"(?<=\.experts\.)(\d+)(?=\.)|(?<=\.moe\.mlp\.)(\d+)(?=\.)")
# The entries of a model's arguments that count experts.
COUNTS = (
    "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_moe_experts",
)  # fmt: skip
FP8_BLOCK, SCALES = 128, "_scale_inv"
BLOCK_BYTES = 4 << 20
SAFETENSORS = {dtype: name for name, dtype in DTYPES.items() if name not in ("F8_E4M3", "BOOL")}


class Raw(NamedTuple):
    """One tensor of one expert in the source; `key` is its name as expert 0."""

    key: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


class Foreign:
    """A checkpoint seen through mlx-lm's `sanitize`.

    Attributes:
        layouts: each layer's fields as `sanitize` makes them; their places have no meaning.
        trunk: the resident tensors by their final name; a computed one has a place with the files
            that it needs, in `needs`.
        needs: the files of each computed tensor of the trunk.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[ExpertModule], headers: Mapping[str, Place]
    ) -> None:
        """Sort the checkpoint's tensors, and look at what `sanitize` makes of them.

        Raises:
            FlashMoEError: `sanitize` cannot read them, or makes other experts than the model's.
        """
        self._model, self._modules = model, modules
        self._numbers = [_number(module.path) for module in modules]
        self._single: dict[tuple[int | None, int], list[tuple[str, Place]]] = {}
        self._fused: dict[int | None, list[tuple[str, Place]]] = {}
        self._trunk: dict[str, Place] = {}
        self._of_layer: dict[int | None, dict[str, Place]] = {}  # the trunk's, by layer
        counts = {n: m.num_experts for n, m in zip(self._numbers, modules, strict=True)}
        for name, place in headers.items():
            number = _number(name)
            if found := SINGLE.search(name):
                key = name[: found.start()] + "0" + name[found.end() :]
                expert = int(found[1] or found[2])
                if expert >= counts.get(number, expert + 1):
                    raise FlashMoEError(
                        f"{place[0]}: {name} is of expert {expert}, but config.json asks for "
                        f"{counts[number]} experts. {REMEDY}."
                    )
                self._single.setdefault((number, expert), []).append((key, place))
            elif _is_fused(name, place[1], counts.get(number)):
                self._fused.setdefault(number, []).append((name, place))
            else:
                self._trunk[name] = self._of_layer.setdefault(number, {})[name] = place
        _count_one(model, {module.num_experts for module in modules})
        self._placeholders = self._make_placeholders()
        with named("the checkpoint", "tensors that mlx-lm's sanitize cannot read", REMEDY):
            made = model.sanitize(dict(self._placeholders))
        experts = tuple(prefix for module in modules for prefix in module.prefixes)
        self.layouts = tuple(self._layout(n, made) for n in range(len(modules)))
        self.trunk, self.needs = self._split_trunk(
            {name: array for name, array in made.items() if not name.startswith(experts)}
        )

    def _make_placeholders(self) -> dict[str, mx.array]:
        """Return arrays that take no memory: of the trunk, and of one expert per layer."""
        raws = [raw for layer in range(len(self._modules)) for raw in self.raws(layer, 0)]
        trunk = [(name, info.dtype, info.shape) for name, (_, info) in self._trunk.items()]
        wanted = [*trunk, *((raw.key, raw.dtype, raw.shape) for raw in raws)]
        shapes = {name: shape for name, _, shape in wanted}
        return {
            name: _placeholder(name, "BF16" if _scale_of(name, shapes) else dtype, shape)
            for name, dtype, shape in wanted
            if not _is_scale(name, shapes)
        }

    @property
    def files(self) -> set[Path]:
        """Every file of the checkpoint."""
        groups = [self._trunk.items(), *self._single.values(), *self._fused.values()]
        return {file for group in groups for _, (file, _) in group}

    def raws(self, layer: int, expert: int) -> list[Raw]:
        """Return the source tensors of one expert; `layer` counts the layers with experts."""
        number, count = self._numbers[layer], self._modules[layer].num_experts
        found = []
        for key, (file, info) in self._single.get((number, expert), []):
            found.append(Raw(key, file, info.offset, info.nbytes, info.dtype, info.shape))
        for key, (file, info) in self._fused.get(number, []):
            step, shape = info.nbytes // count, (1, *info.shape[1:])
            found.append(Raw(key, file, info.offset + expert * step, step, info.dtype, shape))
        if not found:
            raise FlashMoEError(
                f"{self._modules[layer].path}: no tensor of expert {expert} found. Download the "
                "checkpoint's missing files; if it is complete, convert it with mlx_lm.convert."
            )
        return found

    def expert(self, layer: int, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return one expert's final fields, lazy, from its raw tensors by key; empties `arrays`."""
        fields = self._fields(layer, self._sanitized(arrays))
        wanted = {f.name: (f.shape, f.dtype) for f in self.layouts[layer].fields}
        for name in wanted.keys() | fields.keys():
            array = fields.get(name)
            found = None if array is None else (array.shape, SAFETENSORS[array.dtype])
            if found != wanted.get(name):
                raise FlashMoEError(
                    f"{self._modules[layer].path}.{name}: an expert has {found}, but the first one "
                    f"{wanted.get(name)}. {REMEDY}."
                )
        return fields

    @functools.cached_property
    def pieces(self) -> dict[str, str]:
        """Which projection each tensor of an expert becomes, by its own name; {} if they mix.

        A large expert need not be in memory at once then.
        """
        found, shapes, keys = {}, self._modules[0].shapes, [raw.key for raw in self.raws(0, 0)]
        for name in {piece_of(key) for key in keys}:
            fields = self._fields(0, self._tried(key for key in keys if piece_of(key) == name))
            known = [p for p in shapes if not mx.isnan(fields.pop(f"{p}.weight")).any()]
            found[name] = known[0] if len(known) == 1 else ""
        return found if sorted(found.values()) == sorted(shapes) else {}

    def _tried(self, keys: Iterable[str]) -> dict[str, mx.array]:
        """Return what `sanitize` makes of zeros for some tensors; what needs others is NaN."""
        some = {key: self._placeholders[key] for key in keys if key in self._placeholders}
        zeros = {key: mx.broadcast_to(mx.zeros((), a.dtype), a.shape) for key, a in some.items()}
        made: dict[str, mx.array] = self._model.sanitize(self._placeholders | zeros)
        return made

    def _fields(self, layer: int, made: Mapping[str, mx.array]) -> dict[str, mx.array]:
        prefix, mine = f"{self._modules[layer].path}.", self._modules[layer].prefixes
        fields = {k.removeprefix(prefix): v for k, v in made.items() if k.startswith(mine)}
        wanted = {f"{name}.weight" for name in self._modules[layer].shapes}
        if not wanted <= fields.keys() or any(v.shape[:1] != (1,) for v in fields.values()):
            shapes = ", ".join(f"{name} {list(v.shape)}" for name, v in fields.items()) or "nothing"
            raise FlashMoEError(
                f"{prefix[:-1]}: mlx-lm's sanitize makes {shapes} of one expert, so this "
                "checkpoint cannot be converted expert by expert. Convert it with mlx_lm.convert "
                "first."
            )
        return {name: array[0] for name, array in fields.items()}

    def _layout(self, layer: int, made: Mapping[str, mx.array]) -> LayerLayout:
        module, found = self._modules[layer], self._fields(layer, made)
        fields = []
        for name in (f"{p}.{part}" for p in module.shapes for part in PARTS):
            if name in found:
                array = found[name]
                kind = SAFETENSORS[array.dtype]
                fields.append(Field(name, kind, array.shape, array.nbytes, Path(), 0, 0))
        return LayerLayout(layer, module.num_experts, tuple(fields))

    def _split_trunk(
        self, made: Mapping[str, mx.array]
    ) -> tuple[dict[str, Place], dict[str, frozenset[Path]]]:
        """Tell tensors that are copied, perhaps under another name, from computed ones."""
        origin = {id(array): name for name, array in self._placeholders.items()}
        trunk: dict[str, Place] = {}
        needs: dict[str, frozenset[Path]] = {}
        for name, array in made.items():
            key = origin.get(id(array))
            if key in self._trunk and self._trunk[key][1].dtype == SAFETENSORS[array.dtype]:
                trunk[name] = self._trunk[key]
                continue
            files = frozenset(file for file, _ in self._of_layer.get(_number(name), {}).values())
            if not files:
                raise FlashMoEError(
                    f"{name}: mlx-lm computes it from other layers. Convert the checkpoint with "
                    "mlx_lm.convert first."
                )
            info = TensorInfo(SAFETENSORS[array.dtype], array.shape, 0, array.nbytes)
            trunk[name], needs[name] = (min(files), info), files
        return trunk, needs

    def computed(self, name: str, reader: Any) -> Iterator[mx.array]:
        """Yield a computed tensor of the trunk in blocks of rows, from real tensors.

        Block-FP8 is dequantized block by block. Other floats are computed at once from the tensors
        of their module, of one beside it, of all beside it, or of their layer: the first that
        suffice. Integers are computed from all of their layer's.
        """
        group = self._of_layer[_number(name)]
        mine = {key: place for key, place in group.items() if _stem(key) == _stem(name)}
        if step := self._rows_at_once(name, mine):
            for start in range(0, mine[name][1].shape[0], step):
                yield self._made(name, {k: _rows(reader, *p, start, step) for k, p in mine.items()})
            return
        around = f"{_stem(_stem(name))}."
        near = {key: place for key, place in group.items() if key.startswith(around)}
        beside: dict[str, dict[str, Place]] = {}
        for key, place in near.items():
            beside.setdefault(_stem(key), {})[key] = place
        floats = self.trunk[name][1].dtype in FLOATS  # integers cannot be NaN
        choices = (mine, *beside.values(), near) if floats else ()
        few = next((c for c in choices if not mx.isnan(self._tried(c)[name]).any()), group)
        real = {
            key: as_array(reader.read(file, info.offset, info.nbytes), info.dtype, info.shape)
            for key, (file, info) in few.items()
        }
        yield self._made(name, real)

    def _rows_at_once(self, name: str, mine: Mapping[str, Place]) -> int:
        """Return how many rows of a block-FP8 matrix to compute at once, 0 if it is none."""
        shapes = {key: info.shape for key, (_, info) in mine.items()}
        if not _scale_of(name, shapes) or self.trunk[name][1].shape != shapes[name]:
            return 0
        return _block_rows(shapes[name][1])

    def _made(self, name: str, real: dict[str, mx.array]) -> mx.array:
        return self._sanitized(real)[name]

    def _sanitized(self, real: dict[str, mx.array]) -> dict[str, mx.array]:
        made: dict[str, mx.array] = self._model.sanitize(self._placeholders | dequantized(real))
        return made


def dequantized(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return block-FP8 matrices in bfloat16, without their scales, and the rest; empties `arrays`.

    A large expert takes memory: each matrix is dropped once it is dequantized.
    """
    shapes = {name: array.shape for name, array in arrays.items()}
    scales = {name: arrays.pop(name) for name in shapes if _is_scale(name, shapes)}
    found = {}
    for name in list(arrays):
        array = arrays.pop(name)
        found[name] = _of_fp8(array, scales[key]) if (key := _scale_of(name, shapes)) else array
    return found


def _of_fp8(codes: mx.array, scales: mx.array) -> mx.array:
    """Dequantize a matrix as mlx-lm does, a block of rows at a time."""
    step, parts = _block_rows(codes.shape[1]), []
    for start in range(0, codes.shape[0], step):
        rows = mx.from_fp8(codes[start : start + step], dtype=mx.bfloat16)
        mine = scales[start // FP8_BLOCK : (start + step) // FP8_BLOCK]
        wide = mx.repeat(mx.repeat(mine, FP8_BLOCK, axis=1), FP8_BLOCK, axis=0)
        parts.append((rows * wide[: rows.shape[0], : rows.shape[1]]).astype(mx.bfloat16))
        mx.eval(parts)  # MLX would allocate all blocks' temporaries before it runs the first
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _block_rows(columns: int) -> int:
    return max(1, BLOCK_BYTES // (4 * columns * FP8_BLOCK)) * FP8_BLOCK


def _scale_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the name of a matrix's scales if there is one per block of FP8."""
    blocks = tuple(-(-size // FP8_BLOCK) for size in shapes.get(name, ()))
    scales = f"{name}{SCALES}"
    return scales if len(blocks) == 2 and shapes.get(scales) == blocks else None


def _is_scale(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return _scale_of(name.removesuffix(SCALES), shapes) == name


def _rows(reader: Any, file: Path, info: TensorInfo, start: int, count: int) -> mx.array:
    """Read rows of a matrix, or of its scales: one row of scales for FP8_BLOCK of the matrix."""
    if info.dtype != "F8_E4M3":
        start, count = start // FP8_BLOCK, count // FP8_BLOCK
    rows = min(count, info.shape[0] - start)
    width = info.nbytes // info.shape[0]
    data = reader.read(file, info.offset + start * width, rows * width)
    return as_array(data, info.dtype, (rows, *info.shape[1:]))


def piece_of(key: str) -> str:
    """Return the name of an expert's matrix in the source, without its path."""
    return _stem(key).rpartition(".")[2]


def _number(name: str) -> int | None:
    found = LAYER.search(name)
    return int(found[1]) if found else None


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _is_fused(name: str, info: TensorInfo, count: int | None) -> bool:
    """Say whether a tensor holds all experts of a layer, by its first dimension."""
    if count is None or info.shape[:1] != (count,) or "conv" in name:
        return False
    return len(info.shape) >= 3 or ".experts." in name


def _placeholder(name: str, dtype: str, shape: tuple[int, ...]) -> mx.array:
    if dtype not in DTYPES:
        raise FlashMoEError(f"{name} is {dtype}, which MLX cannot read. {REMEDY}.")
    value: Any = 0x7F if dtype == "F8_E4M3" else 0  # NaN in that format
    if dtype in ("BF16", "F16", "F32"):
        value = float("nan")
    return mx.broadcast_to(mx.array(value, DTYPES[dtype]), shape)  # no memory, even evaluated


def _count_one(model: nn.Module, counts: set[int]) -> None:
    """Let `sanitize` stack one expert per layer: change the count in the model's arguments."""
    args = getattr(model, "args", None)
    for holder in (args, getattr(args, "text_config", None)):
        for name in COUNTS:
            if isinstance(holder, dict) and holder.get(name) in counts:
                holder[name] = 1
            elif hasattr(holder, name) and getattr(holder, name) in counts:
                setattr(holder, name, 1)
