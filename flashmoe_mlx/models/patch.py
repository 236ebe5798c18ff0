"""mlx-lm's own model classes, with streamed experts: any family that uses its switch layers."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP
from mlx_lm.utils import _get_classes

from ..errors import FlashMoEError, named, shown
from ..format.config_entries import check_bounds
from ..format.modules import ExpertModule
from .cache_checks import REMEDY, check_classes
from .delta_rule import own_rule
from .fast_layers import use_fast_layers
from .streamed import Experts, StreamedModule
from .switch import StreamedSwitch

SAME = {"qwen3_5_moe_text": "qwen3_5_moe"}  # mlx-lm's code takes both
SWITCHES = SwitchGLU, SwitchMLP
# The field's names for top-k, in the order in which to look for them.
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts",
    "moe_top_k", "moe_topk", "moe_k", "topk",
)  # fmt: skip
FindExperts = Callable[[Any, Sequence[ExpertModule]], Experts]


def stock_classes(config: Mapping[str, Any]) -> tuple[type[nn.Module], Any]:
    """Return mlx-lm's classes (model, arguments) for a config.json.

    Raises:
        FlashMoEError: mlx-lm has no such model.
    """
    check_bounds(config)
    kind = config.get("model_type")
    if not (isinstance(kind, str) and kind.isidentifier() and not kind.startswith("_")):
        raise FlashMoEError(
            f"config.json: model_type = {shown(kind)} is not a name. Restore the checkpoint's own "
            "file."
        )
    try:
        return _get_classes(dict(config) | {"model_type": SAME.get(kind, kind)})
    except (ValueError, AttributeError) as error:
        raise FlashMoEError(
            f"config.json: model_type = {shown(kind)} is not a model of the installed mlx-lm. "
            "Update it: pip install -U mlx-lm."
        ) from error


def patched_classes(
    config: Mapping[str, Any], find_experts: FindExperts, experts_per_token: int | None = None
) -> tuple[type[nn.Module], Any]:
    """Return (model class, arguments class) like mlx-lm's, with streamed experts.

    Args:
        config: config.json.
        find_experts: returns the experts on disk for a model's arguments and expert modules.
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
            modules = describe_all(found, config)
            self._experts = find_experts(args, modules)
            self._store, self._parallel, self._opened = None, None, False
            self._prefixes = tuple(prefix for module in modules for prefix in module.prefixes)
            numbered = enumerate(zip(found.items(), modules, strict=True))
            self.update_modules(
                tree_unflatten(
                    [
                        (path, StreamedSwitch(stock, module, number))
                        for number, ((path, stock), module) in numbered
                    ]
                )
            )
            if left := switches(self):
                raise FlashMoEError(f"{next(iter(left))}: cannot be replaced. Report this.")
            self.open_if_alone()

        @functools.wraps(stock_model.__call__)
        def __call__(self, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
            forward = functools.partial(stock_model.__call__, self, inputs, *args, **kwargs)
            with own_rule():
                return self.run(forward, inputs, kwargs.get("cache"))

        def shard_trunk(self, group: mx.distributed.Group) -> None:
            """Split the trunk as mlx-lm does, by its own `shard`, and leave the experts."""
            if not hasattr(stock_model, "shard"):
                super().shard_trunk(group)
            layers = [m for m in self.modules() if isinstance(m, StreamedSwitch)]
            for layer in layers:
                for projection in layer.module.shapes:
                    layer[projection] = nn.Module()  # nothing to split; some scale the bias
                    layer[projection].bias = mx.zeros(group.size())
            stock_model.shard(self, group)
            for layer in layers:
                for projection in layer.module.shapes:
                    layer.pop(projection)
            use_fast_layers(self)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            """Convert names and shapes as mlx-lm does, and drop the experts' tensors."""
            assert self._experts
            converted = self._experts.layout.kind == "packed"  # its names are final
            if hasattr(stock_model, "sanitize") and not converted:
                weights = stock_model.sanitize(self, weights)
            return {k: v for k, v in weights.items() if not k.startswith(self._prefixes)}

        def check_caches(self, caches: Sequence[Any], rows: int) -> None:
            """Compare a prompt cache with the model, and try it on one token of each row.

            Raises:
                FlashMoEError: it does not fit.
            """
            check_classes(caches, make_prompt_cache(self))
            with named("the prompt cache", "its arrays do not fit the model", REMEDY.rstrip(".")):
                model: Any = self  # mypy knows `wraps` of functions only
                mx.eval(model(mx.zeros((rows, 1), mx.uint32), cache=copy.deepcopy(list(caches))))

        def load_weights(self, *args: Any, **kwargs: Any) -> nn.Module:
            """Load the trunk, and let it use this package's kernels."""
            stock_model.load_weights(self, *args, **kwargs)
            use_fast_layers(self)
            return self

    return PatchedModel, stock_args


def switches(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules of routed experts that are not streamed, in the layers' order."""
    found = {path: m for path, m in model.named_modules() if isinstance(m, SWITCHES)}
    return {path: found[path] for path in sorted(found, key=_by_number)}


def _by_number(path: str) -> list[tuple[int, str]]:
    """Return a key that sorts layer 10 after layer 9."""
    return [(int(name), "") if name.isdigit() else (-1, name) for name in path.split(".")]


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


def stock_modules(config: Mapping[str, Any]) -> tuple[Any, list[ExpertModule]]:
    """Return the arguments and the modules of routed experts that a config.json describes.

    Raises:
        FlashMoEError: mlx-lm cannot build it, or it has no routed experts.
    """
    model_class, args_class = stock_classes(config)
    with named("config.json", "a model that cannot be built", "Restore the checkpoint's own file"):
        args = args_class.from_dict(copy.deepcopy(dict(config)))
        found = switches(model_class(args))
    return args, describe_all(found, config)


def describe_all(found: Mapping[str, nn.Module], config: Mapping[str, Any]) -> list[ExpertModule]:
    """Describe the modules of routed experts of a model.

    Raises:
        FlashMoEError: it has none.
    """
    if not found:
        raise FlashMoEError(
            f"config.json: model_type = {config.get('model_type')!r} has no routed experts "
            "(no SwitchGLU or SwitchMLP), so nothing can be streamed. Use stock mlx-lm."
        )
    return [describe(path, module) for path, module in found.items()]


def top_k(args: Any) -> int:
    """Return how many experts a token uses at most, 1 if no known name says it."""
    for holder in (args, getattr(args, "text_config", None)):
        values = holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
        for name in TOP_K:
            found = values.get(name)
            counts = found if isinstance(found, list) else [found]  # a list has one per layer
            if all(type(count) is int for count in counts):
                return max(1, *counts)
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


def vocabulary(args: Any) -> int | None:
    """Return the vocabulary size that a model's arguments name, or None."""
    for holder in (args, getattr(args, "text_config", None)):
        values = holder if isinstance(holder, Mapping) else getattr(holder, "__dict__", {})
        if type(values.get("vocab_size")) is int:
            return int(values["vocab_size"])
    return None
