"""FLASHMOE_DEBUG_BOUNDS=1: CPU kernels that check every index and every range of addresses.

numba's own check does not say which index was wrong, nor where; it sees no address, and the
threads of a parallel loop drop its errors. So in this mode kernels are compiled without threads,
errors name the line and the numbers, and `within` checks what becomes an address. Without it
nothing of this is compiled.
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
        raise FlashMoEError(f"{VARIABLE} = {value!r} is no choice. Write 0 or 1.")
    return value == "1"


CHECKED = _asked()


def jit(*, parallel: bool = False, **options: Any) -> Callable[[Function], Function]:
    """Return numba's decorator for kernels of this package; all of them are compiled by it."""
    return njit(
        cache=True, nogil=True, parallel=parallel and not CHECKED, boundscheck=CHECKED, **options
    )


def _lowering() -> Any:
    """Return what numba is about to compile, found among the callers' variables."""
    frame = sys._getframe()
    while not isinstance(lower := frame.f_locals.get("self"), Lower):
        assert frame.f_back
        frame = frame.f_back
    return lower


def _fail(context: Any, builder: Any, what: str, *numbers: Any) -> None:
    """Compile an IndexError that names the kernel, its line, and numbers known when it runs."""
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
    """Do what numba's own check does, and say more."""
    bad = builder.icmp_unsigned(">=", index, size)
    with cgutils.if_unlikely(builder, bad):
        _fail(context, builder, f"index out of bounds of axis {axis}: index, size", index, size)


@intrinsic(prefer_literal=True)
def within(
    _context: Any, what: Any, first: Any, count: Any, size: Any
) -> tuple[Any, Callable[..., Any]] | None:
    """Raise IndexError, in this mode, unless `count` from number `first` on are within `size`.

    Args:
        what: a constant that names the array.
        first: number of the first one.
        count: how many.
        size: how many there are.
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
    """Raise IndexError unless bytes that a kernel finds by address lie in an array that lives."""
    offset = address - array.ctypes.data
    if not 0 <= offset <= offset + nbytes <= array.nbytes:
        raise IndexError(
            f"{name}: bytes {offset} to {offset + nbytes} of an array of {array.nbytes}"
        )


if CHECKED:
    cgutils.do_boundscheck = _check_index
    _key = FunctionCache._index_key

    def _own_key(cache: Any, *args: Any) -> Any:
        """Keep the compiled code of this mode apart from that of the other."""
        return *_key(cache, *args), VARIABLE

    FunctionCache._index_key = _own_key
