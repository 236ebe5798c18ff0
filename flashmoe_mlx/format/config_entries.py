"""Check types and bounds of config.json entries."""

from collections.abc import Mapping
from typing import Any

from ..errors import FlashMoEError

# Far above any known model, and too small to exhaust memory.
MOST = {
    "hidden_size": 1 << 18,
    "num_hidden_layers": 1000,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "vocab_size": 1 << 24,
    "num_experts": 1 << 16,
    "num_experts_per_tok": 1 << 16,
    "moe_intermediate_size": 1 << 18,
    "shared_expert_intermediate_size": 1 << 20,
    "linear_num_value_heads": 4096,
    "linear_num_key_heads": 4096,
    "linear_key_head_dim": 1 << 14,
    "linear_value_head_dim": 1 << 14,
    "linear_conv_kernel_dim": 1024,
    "full_attention_interval": 1000,
    "head_dim": 1 << 14,
    "max_position_embeddings": 1 << 40,
}
MOST_FLOAT = 1e15  # a rope_theta is 1e4 to 1e8
MOST_NAME = 1000  # characters; Python refuses to read numbers of thousands of digits
LAYER_TYPES = ("linear_attention", "full_attention")
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (16, 32, 64, 128)
RESTORE = "Restore the checkpoint's own file."


# The names of other families for the same sizes.
MOST_OF_OTHERS = MOST | {
    "intermediate_size": 1 << 20,
    "n_layer": 1000,
    "n_layers": 1000,
    "num_layers": 1000,
    "num_local_experts": 1 << 16,
    "n_routed_experts": 1 << 16,
    "moe_num_experts": 1 << 16,
    "n_shared_experts": 1 << 10,
}


def check_bounds(config: Mapping[str, Any]) -> None:
    """Refuse sizes of any family that would exhaust memory while the model is built.

    Raises:
        FlashMoEError: naming the entry, its value and the remedy.
    """
    for holder in (config, config.get("text_config")):
        for name, value in holder.items() if isinstance(holder, Mapping) else ():
            most = MOST_OF_OTHERS.get(name)
            if most and type(value) in (int, float) and value > most:
                raise FlashMoEError(
                    f"config.json: {name} = {value!r} is more than {most}, above any known model. "
                    f"{RESTORE}"
                )


def check_entry(name: str, kind: Any, value: Any) -> None:
    """Refuse an entry of config.json with another type, or out of bounds.

    Raises:
        FlashMoEError: naming the entry, its value and the remedy.
    """
    if kind is int:
        least = 0 if name == "head_dim" else 1
        good, wanted = type(value) is int and value >= least, f"a whole number of at least {least}"
        most: float = MOST[name]
    elif kind is float:
        good, wanted = type(value) in (int, float) and value > 0, "a number above 0"
        most = MOST_FLOAT
    else:
        kinds = {bool: "true or false", str: "a string", list[str] | None: "a list"}
        good, wanted = _is_a(value, kind), kinds.get(kind, "an object")
        most = 0
    if not good:
        raise FlashMoEError(f"config.json: {name} = {value!r} is not {wanted}. {RESTORE}")
    if most and value > most:
        raise FlashMoEError(
            f"config.json: {name} = {value!r} is more than {most:.15g}, above any known model. "
            f"{RESTORE}"
        )


def _is_a(value: Any, kind: Any) -> bool:
    if kind == list[str] | None:
        return value is None or isinstance(value, list)
    return isinstance(value, dict if kind not in (bool, str) else kind)


def object_in(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an entry that is an object, empty if it is missing.

    Raises:
        FlashMoEError: it is not an object.
    """
    found = values.get(name) or {}
    check_entry(name, dict, found)
    return found


def check_quantization(entry: Mapping[str, Any]) -> None:
    """Refuse a "quantization" entry with bits or group sizes that MLX does not support.

    It holds defaults, and per layer path an object of the same form, true or false.

    Raises:
        FlashMoEError: naming the path, the value and the remedy.
    """
    own = {f"[{path!r}]": found for path, found in entry.items() if isinstance(found, Mapping)}
    longest = max(entry, key=len, default="")
    if len(longest) > MOST_NAME:
        raise FlashMoEError(
            f"config.json: quantization[{longest[:40]!r}...] is too long: {len(longest)} "
            f"characters. {RESTORE}"
        )
    for where, found in {"": entry, **own}.items():
        for key, choices in (("bits", BITS), ("group_size", GROUP_SIZES)):
            value = found.get(key)  # mlx_lm.convert --quant-predicate writes null for the default
            if value is not None and (type(value) is not int or value not in choices):
                raise FlashMoEError(
                    f"config.json: quantization{where}: {key} = {value!r} is not one of "
                    f"{', '.join(map(str, choices))}. {RESTORE}"
                )
    if entry and not {"bits", "group_size"} <= entry.keys():
        raise FlashMoEError(f"config.json: quantization lacks bits or group_size. {RESTORE}")


def check_layer_types(types: list[Any], layers: int, interval: int) -> None:
    """Refuse a list of layer types that contradicts the other entries.

    Raises:
        FlashMoEError: naming the entry and the remedy.
    """
    for layer, kind in enumerate(types):
        if kind not in LAYER_TYPES:
            raise FlashMoEError(
                f"config.json: layer_types[{layer}] = {kind!r} is not one of "
                f"{', '.join(LAYER_TYPES)}. {RESTORE}"
            )
        if (kind == "linear_attention") != ((layer + 1) % interval != 0):
            raise FlashMoEError(
                f"config.json: layer_types[{layer}] = {kind!r} contradicts "
                f"full_attention_interval = {interval}. {RESTORE}"
            )
    if len(types) != layers:
        raise FlashMoEError(
            f"config.json: layer_types lists {len(types)} layers, but num_hidden_layers = "
            f"{layers}. {RESTORE}"
        )
