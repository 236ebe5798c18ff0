"""Compiled functions that others call by address, for numba.

numba copies each function that is called into its callers and optimizes it again there, inlined
or not. What is called by address is compiled once, for all of them.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .bounds import jit


class Apart:
    """A function of fixed types that is compiled when its address is asked for."""

    def __init__(self, signature: Any, function: Callable[..., None], **options: Any) -> None:
        """Take a signature that returns nothing, and numba's options."""
        self._signature = signature
        self._function: Any = jit(**options)(function)

    @cached_property
    def address(self) -> int:
        """Compile the function, or load it from numba's cache; return where it starts."""
        made = self._function.get_compile_result(self._signature)
        return int(made.library.get_pointer_to_function(made.fndesc.llvm_func_name))


def caller(signature: Any) -> Callable[..., None]:
    """Make a function `(address, arguments)` for numba that calls one of this signature."""
    kinds = signature.args

    def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
        kind = context.call_conv.get_function_type(types.void, kinds)
        callee = builder.inttoptr(args[0], kind.as_pointer())
        rest = cgutils.unpack_tuple(builder, args[1], len(kinds))
        status, _ = context.call_conv.call_function(builder, callee, types.void, kinds, rest)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    @intrinsic
    def call(_context: Any, address: Any, arguments: Any) -> tuple[Any, Callable[..., Any]]:
        return types.void(types.intp, types.Tuple(kinds)), codegen

    return call
