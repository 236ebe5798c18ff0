"""mlx-lm's own model classes, with streamed experts: any family that uses its switch layers."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP
from mlx_lm.utils import _get_classes

from ..errors import FlashMoEError
from ..format.modules import ExpertModule
from ..store.store import ExpertStore
from .fast_layers import use_fast_layers
from .streamed import StreamedModule
from .switch import StreamedSwitch

SWITCHES = SwitchGLU, SwitchMLP
# The field's names for top-k, in the order in which to look for them.
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts",
    "moe_top_k", "moe_topk", "moe_k", "topk",
)  # fmt: skip
OpenStore = Callable[[Any, Sequence[ExpertModule]], ExpertStore]


def stock_classes(config: Mapping[str, Any]) -> tuple[type[nn.Module], Any]:
    """Return mlx-lm's classes (model, arguments) for a config.json.

    Raises:
        FlashMoEError: mlx-lm has no such model.
    """
    kind = config.get("model_type")
    if not (isinstance(kind, str) and kind.isidentifier() and not kind.startswith("_")):
        raise FlashMoEError(
            f"config.json: model_type = {kind!r} is not a name. Restore the checkpoint's own file."
        )
    try:
        return _get_classes(dict(config))
    except (ValueError, AttributeError) as error:
        raise FlashMoEError(
            f"config.json: model_type = {kind!r} is not a model of the installed mlx-lm. "
            "Update it: pip install -U mlx-lm."
        ) from error


def patched_classes(
    config: Mapping[str, Any], open_store: OpenStore, experts_per_token: int | None = None
) -> tuple[type[nn.Module], Any]:
    """Return (model class, arguments class) like mlx-lm's, with streamed experts.

    Args:
        config: config.json.
        open_store: opens the store of a model's arguments and expert modules.
        experts_per_token: top-k instead of the checkpoint's.
    """
    stock_model, stock_args = stock_classes(config)

    class PatchedModel(StreamedModule, stock_model):  # type: ignore[valid-type, misc]
        """mlx-lm's model; its routed experts stream from disk."""

        def __init__(self, args: Any) -> None:
            """Build mlx-lm's model, which takes no memory yet, and replace its experts."""
            if experts_per_token is not None:
                args = with_top_k(args, experts_per_token)
            stock_model.__init__(self, args)
            found = switches(self)
            modules = [describe(path, module) for path, module in found.items()]
            if not modules:
                raise FlashMoEError(
                    f"config.json: model_type = {config.get('model_type')!r} has no routed experts "
                    "(no SwitchGLU or SwitchMLP), so nothing can be streamed. Use stock mlx-lm."
                )
            self._store = open_store(args, modules)
            self._experts = tuple(f"{module.path}." for module in modules)
            numbered = enumerate(zip(found.items(), modules, strict=True))
            self.update_modules(
                tree_unflatten(
                    [
                        (path, StreamedSwitch(stock, module, layer, self._store))
                        for layer, ((path, stock), module) in numbered
                    ]
                )
            )
            if left := switches(self):
                raise FlashMoEError(f"{next(iter(left))}: cannot be replaced. Report this.")

        @functools.wraps(stock_model.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.check_usable()
            return stock_model.__call__(self, *args, **kwargs)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            """Convert names and shapes as mlx-lm does, and drop the experts' tensors."""
            assert self._store
            converted = self._store.layout.kind == "packed"  # its names are final
            if hasattr(stock_model, "sanitize") and not converted:
                weights = stock_model.sanitize(self, weights)
            return {k: v for k, v in weights.items() if not k.startswith(self._experts)}

        def load_weights(self, *args: Any, **kwargs: Any) -> nn.Module:
            """Load the trunk, and let it use this package's kernels."""
            stock_model.load_weights(self, *args, **kwargs)
            use_fast_layers(self)
            return self

    return PatchedModel, stock_args


def switches(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules of routed experts that are not streamed, by path, in order."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, SWITCHES)}
    return dict(sorted(found.items(), key=lambda item: _in_order(item[0])))


def _in_order(path: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts numbers in a path by value."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def describe(path: str, module: nn.Module) -> ExpertModule:
    """Describe a stock module that was built and has no weights yet.

    Raises:
        FlashMoEError: its class computes in another way than mlx-lm's.
    """
    if type(module) not in SWITCHES:
        raise FlashMoEError(
            f"{path}: {type(module).__name__} is a class of its own, which cannot be streamed yet."
        )
    weights = {name: x.weight for name, x in module.items() if type(x) is SwitchLinear}
    counts = {array.shape[0] for array in weights.values()}
    if len(counts) != 1:
        raise FlashMoEError(f"{path}: its projections differ in their number of experts.")
    return ExpertModule(path, {n: array.shape[1:] for n, array in weights.items()}, counts.pop())


def top_k(args: Any) -> int:
    """Return how many experts a token uses, 1 if no known name says it."""
    for holder in (args, getattr(args, "text_config", None)):
        values = holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
        for name in TOP_K:
            if type(values.get(name)) is int and values[name] > 0:
                return int(values[name])
    return 1


def with_top_k(args: Any, count: int) -> Any:
    """Return arguments with another top-k.

    Raises:
        FlashMoEError: this family's arguments have no such entry.
    """
    names = [f.name for f in fields(args)] if is_dataclass(args) else []
    for name in TOP_K:
        if name in names and type(getattr(args, name)) is int:
            return replace(args, **{name: count})
    raise FlashMoEError(
        f"experts_per_token = {count}: top-k cannot be changed for this model. Leave it out."
    )


def vocabulary(model: Any) -> int | None:
    """Return a model's vocabulary size, None if its arguments do not say it."""
    for holder in (model.args, getattr(model.args, "text_config", None)):
        values = holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
        if type(values.get("vocab_size")) is int:
            return int(values["vocab_size"])
    return None
