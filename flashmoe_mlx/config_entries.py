"""Whether entries of config.json are of the types that a model needs."""

from collections.abc import Mapping
from typing import Any

from .errors import FlashMoEError


def check_entry(name: str, kind: Any, value: Any) -> None:
    """Refuse an entry of config.json that is of another type, or a size below one.

    Raises:
        FlashMoEError: naming the entry, its value and the remedy.
    """
    if kind is int:
        least = 0 if name == "head_dim" else 1
        good, wanted = type(value) is int and value >= least, f"a whole number of at least {least}"
    elif kind is float:
        good, wanted = type(value) in (int, float) and value > 0, "a number above 0"
    else:
        kinds = {bool: "true or false", str: "a string", list[str] | None: "a list"}
        good, wanted = _is_a(value, kind), kinds.get(kind, "an object")
    if not good:
        raise FlashMoEError(
            f"config.json: {name} = {value!r} is not {wanted}. Restore the checkpoint's own."
        )


def _is_a(value: Any, kind: Any) -> bool:
    if kind == list[str] | None:
        return value is None or isinstance(value, list)
    return isinstance(value, dict if kind not in (bool, str) else kind)


def object_in(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an entry that is an object, empty if it is missing.

    Raises:
        FlashMoEError: it is something else.
    """
    found = values.get(name) or {}
    check_entry(name, dict, found)
    return found
