"""Checkpoints that are not in MLX's format, converted by mlx-lm's own `sanitize`.

`sanitize` renames, splits, transposes and dequantizes a whole checkpoint at once. Here it gets the
real tensors of one expert, or of one layer's trunk, and placeholders for all others: so memory
stays small, and no family's rules are repeated. Placeholders are NaN: a result that depends on one
is refused as not finite.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ...errors import FlashMoEError, named
from ...format.headers import TensorInfo
from ...format.layout import Field, LayerLayout
from ...format.modules import PARTS, ExpertModule
from .arrays import DTYPES, as_array

Place = tuple[Path, TensorInfo]
REMEDY = "Restore the checkpoint's own files"
LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
SINGLE = re.compile(r"(?<=\.experts\.)(\d+)(?=\.)|(?<=\.moe\.mlp\.)(\d+)(?=\.)")
# The entries of a model's arguments that count experts.
COUNTS = (
    "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_moe_experts",
)  # fmt: skip
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
        counts = {n: m.num_experts for n, m in zip(self._numbers, modules, strict=True)}
        for name, place in headers.items():
            number = _number(name)
            if found := SINGLE.search(name):
                key = name[: found.start()] + "0" + name[found.end() :]
                expert = int(found[1] or found[2])
                self._single.setdefault((number, expert), []).append((key, place))
            elif _is_fused(name, place[1], counts.get(number)):
                self._fused.setdefault(number, []).append((name, place))
            else:
                self._trunk[name] = place
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
        return {name: _placeholder(name, dtype, shape) for name, dtype, shape in wanted}

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

    def expert(self, layer: int, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return one expert's final fields, lazy, from its raw tensors by key."""
        made = self._model.sanitize(self._placeholders | dict(arrays))
        return self._fields(layer, made)

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
            if (key := origin.get(id(array))) in self._trunk and key is not None:
                trunk[name] = self._trunk[key]
                continue
            files = frozenset(file for file, _ in self._of_number(_number(name)).values())
            if not files:
                raise FlashMoEError(
                    f"{name}: mlx-lm computes it from other layers. Convert the checkpoint with "
                    "mlx_lm.convert first."
                )
            info = TensorInfo(SAFETENSORS[array.dtype], array.shape, 0, array.nbytes)
            trunk[name], needs[name] = (min(files), info), files
        return trunk, needs

    def _of_number(self, number: int | None) -> dict[str, Place]:
        return {name: place for name, place in self._trunk.items() if _number(name) == number}

    def computed(self, name: str, reader: Any) -> mx.array:
        """Return a computed tensor of the trunk, lazy; its layer's tensors are read."""
        real = {
            key: as_array(reader.read(file, info.offset, info.nbytes), info.dtype, info.shape)
            for key, (file, info) in self._of_number(_number(name)).items()
            if _stem(key) == _stem(name) or not self._same_stem(name)
        }
        made = self._model.sanitize(self._placeholders | real)
        array: mx.array = made[name]
        return array

    def _same_stem(self, name: str) -> bool:
        """Say whether the source has tensors of the same module as a final one."""
        return any(_stem(key) == _stem(name) for key in self._of_number(_number(name)))


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
    return mx.full(shape, value, DTYPES[dtype])


def _count_one(model: nn.Module, counts: set[int]) -> None:
    """Let `sanitize` stack one expert per layer: change the count in the model's arguments."""
    args = getattr(model, "args", None)
    for holder in (args, getattr(args, "text_config", None)):
        for name in COUNTS:
            if isinstance(holder, dict) and holder.get(name) in counts:
                holder[name] = 1
            elif hasattr(holder, name) and getattr(holder, name) in counts:
                setattr(holder, name, 1)
