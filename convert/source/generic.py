"""Open a checkpoint of any mlx-lm model: its own classes name the experts and the trunk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ...errors import FlashMoEError, named
from ...format.headers import TensorInfo, checkpoint_headers
from ...format.json_file import exists
from ...format.layout import EXPERT_DIR
from ...format.modules import ExpertModule, open_modules
from ...models.patch import describe_all, stock_classes, switches, top_k
from .checkpoint import Place, Source
from .foreign import Foreign

REMEDY = "Restore the checkpoint's own files"


def open_generic(
    directory: Path, name: str, revision: str | None, config: dict[str, Any]
) -> Source:
    """Open a checkpoint of any format that mlx-lm reads, or a directory converted from one.

    Raises:
        FlashMoEError: mlx-lm has no such model, or the files are not a whole checkpoint of it.
    """
    stock_model, stock_args = stock_classes(config)
    with named(directory / "config.json", "a model that cannot be built", REMEDY):
        args = stock_args.from_dict(config)
        model = stock_model(args)
    modules = tuple(describe_all(switches(model), config))
    headers = checkpoint_headers(directory)
    layout, foreign = None, None
    if exists(directory / EXPERT_DIR) or _is_stacked(modules, headers):
        layout = open_modules(directory, modules)
    else:
        foreign = Foreign(model, modules, headers)
        config = _without_foreign_entries(config)
    converted = layout is not None and layout.kind == "packed"
    trunk = foreign.trunk if foreign else _trunk(directory, model, modules, headers, converted)
    cast = getattr(model, "cast_predicate", lambda path: True)
    return Source(
        directory, name, revision, config, top_k(args), modules, trunk, layout, {},
        lambda group_size, bits: _trunk_quant(model, modules, group_size, bits), cast, foreign,
    )  # fmt: skip


def _is_stacked(modules: tuple[ExpertModule, ...], headers: Mapping[str, Place]) -> bool:
    """Say whether the experts are where mlx-lm writes them."""
    first = modules[0]
    return all(f"{first.path}.{projection}.weight" in headers for projection in first.shapes)


def _without_foreign_entries(config: dict[str, Any]) -> dict[str, Any]:
    """Drop the source's own quantization, which mlx-lm would apply to the converted weights."""
    kept = {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}
    if isinstance(text := config.get("text_config"), dict):
        kept["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
    return kept


def _trunk(
    directory: Path,
    model: nn.Module,
    modules: tuple[ExpertModule, ...],
    headers: Mapping[str, Place],
    converted: bool,
) -> dict[str, Place]:
    """Return the resident tensors under the model's names, as mlx-lm's `sanitize` leaves them.

    Nothing is read: the arrays are lazy.
    """
    experts = tuple(prefix for module in modules for prefix in module.prefixes)
    weights: dict[str, mx.array] = {}
    for file in sorted({file for file, _ in headers.values()}):
        weights |= mx.load(str(file))  # type: ignore[arg-type]
    kept = dict(weights)
    if hasattr(model, "sanitize") and not converted:
        with named(directory, "tensors that mlx-lm cannot read", REMEDY):
            kept = model.sanitize(kept)
    names = {id(array): name for name, array in weights.items()}
    trunk = {}
    for name, array in kept.items():
        if name.startswith(experts):
            continue
        if id(array) not in names:
            raise FlashMoEError(
                f"{directory}: mlx-lm computes {name} when it loads this checkpoint, so it is not "
                "in MLX's own format. Convert it first: mlx_lm.convert."
            )
        trunk[name] = headers[names[id(array)]]
    return trunk


def _trunk_quant(
    model: nn.Module, modules: tuple[ExpertModule, ...], group_size: int, bits: int
) -> dict[str, tuple[int, int]]:
    """Return the (bits, group size) of each layer that mlx-lm would quantize, except experts."""
    predicate = getattr(model, "quant_predicate", None)
    chosen = {}
    for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        if f"{path}.".startswith(tuple(prefix for m in modules for prefix in m.prefixes)):
            continue
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % group_size:
            continue
        verdict = predicate(path, module) if predicate else True
        if isinstance(verdict, dict):
            chosen[path] = verdict.get("bits", bits), verdict.get("group_size", group_size)
        elif verdict:
            chosen[path] = bits, group_size
    return chosen


def check_generic_trunk(
    directory: Path, config: Mapping[str, Any], trunk: Mapping[str, TensorInfo]
) -> None:
    """Compare the names and shapes of a trunk with the model that config.json describes.

    Raises:
        FlashMoEError: a tensor is missing, unknown, or has another shape.
    """
    stock_model, stock_args = stock_classes(config)
    model = stock_model(stock_args.from_dict(dict(config)))
    modules = describe_all(switches(model), config)
    experts = tuple(prefix for module in modules for prefix in module.prefixes)
    entry = config.get("quantization") or {}

    def quantized(path: str, module: nn.Module) -> Any:
        if f"{path}.".startswith(experts) or not hasattr(module, "to_quantized"):
            return False
        return entry.get(path, f"{path}.scales" in trunk)

    if entry:
        with named(directory / "config.json", "a quantization that does not fit the model", REMEDY):
            nn.quantize(
                model, entry["group_size"], entry["bits"], mode=entry.get("mode", "affine"),
                class_predicate=quantized,
            )  # fmt: skip
    expected = {
        name: array.shape
        for name, array in tree_flatten(model.parameters())
        if not name.startswith(experts)
    }
    trunk = {name: info for name, info in trunk.items() if not name.startswith(experts)}
    for name in sorted(expected.keys() ^ trunk.keys()):
        state = "is missing" if name in expected else "is not in the model"
        raise FlashMoEError(f"{directory}: {name} {state} that config.json describes. {REMEDY}.")
    for name, info in trunk.items():
        if info.shape != expected[name]:
            raise FlashMoEError(
                f"{directory}: {name} is {list(info.shape)}, expected {list(expected[name])} by "
                f"config.json. {REMEDY}."
            )
