"""FLASHMOE_DEBUG_BOUNDS=1: CPU kernels that check every index and every range of addresses.

numba's own check names neither the index nor the line, does not see addresses, and loses errors
raised in parallel loops. This mode compiles kernels without threads, names line and numbers, and
checks addresses by `within`. Without it none of these checks is compiled.
"""

import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.lowering import Lower
from numba.extending import intrinsic

from ...errors import FlashMoEError

Function = TypeVar("Function", bound=Callable[..., Any])
VARIABLE = "FLASHMOE_DEBUG_BOUNDS"


def _asked() -> bool:
    value = os.environ.get(VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise FlashMoEError(f"{VARIABLE} = {value!r} is not valid. Set it to 0 or 1.")
    return value == "1"


CHECKED = _asked()


def jit(*, parallel: bool = False, **options: Any) -> Callable[[Function], Function]:
    """Return numba's decorator, with the options that all kernels of this package share."""
    return njit(
        cache=True, nogil=True, parallel=parallel and not CHECKED, boundscheck=CHECKED, **options
    )


def _lowering() -> Any:
    """Return numba's current lowering, from a caller's local variables."""
    frame = sys._getframe()
    while not isinstance(lower := frame.f_locals.get("self"), Lower):
        assert frame.f_back
        frame = frame.f_back
    return lower


def _fail(context: Any, builder: Any, what: str, *numbers: Any) -> None:
    """Compile an IndexError that names the kernel, its line and run-time numbers."""
    lower = _lowering()
    place, name = lower.loc, lower.func_ir.func_id.func_name
    text = linecache.getline(place.filename, place.line).strip()
    where = f"{name} ({Path(place.filename).name}:{place.line}, {text}): {what}"
    kinds = [types.int64] * len(numbers)
    numbers = tuple(builder.sext(n, cgutils.intp_t) if n.type.width < 64 else n for n in numbers)
    context.call_conv.return_dynamic_user_exc(
        builder, IndexError, (where, *numbers), kinds, loc=place, func_name=name
    )


def _check_index(context: Any, builder: Any, index: Any, size: Any, axis: Any = None) -> None:
    """Replace numba's check: the error names axis, index and size."""
    bad = builder.icmp_unsigned(">=", index, size)
    with cgutils.if_unlikely(builder, bad):
        _fail(context, builder, f"index out of bounds of axis {axis}: index, size", index, size)


@intrinsic(prefer_literal=True)
def within(
    _context: Any, what: Any, first: Any, count: Any, size: Any
) -> tuple[Any, Callable[..., Any]] | None:
    """In this mode, raise IndexError unless `first` to `first + count` lies within `size`.

    Args:
        what: name of the array, a compile-time constant.
        first: first element.
        count: number of elements.
        size: elements in the array.
    """
    if not isinstance(what, types.StringLiteral):
        return None

    def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
        if CHECKED:
            _, first, count, size = args
            zero, end = first.type(0), builder.add(first, count)
            bad = builder.or_(
                builder.icmp_signed("<", first, zero), builder.icmp_signed("<", count, zero)
            )
            bad = builder.or_(bad, builder.icmp_signed(">", end, size))
            with cgutils.if_unlikely(builder, bad):
                text = f"{what.literal_value}: first, count, size"
                _fail(context, builder, text, first, count, size)
        return context.get_dummy_value()

    return types.void(what, types.intp, types.intp, types.intp), codegen


def inside(name: str, address: int, nbytes: int, array: np.ndarray) -> None:
    """Raise IndexError unless `nbytes` bytes from `address` on lie inside the array."""
    offset = address - array.ctypes.data
    if not 0 <= offset <= offset + nbytes <= array.nbytes:
        raise IndexError(
            f"{name}: bytes {offset} to {offset + nbytes} of an array of {array.nbytes}"
        )


if CHECKED:
    cgutils.do_boundscheck = _check_index
    _key = FunctionCache._index_key

    def _own_key(cache: Any, *args: Any) -> Any:
        """Cache compiled code of each mode separately."""
        return *_key(cache, *args), VARIABLE

    FunctionCache._index_key = _own_key
