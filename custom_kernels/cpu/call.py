"""Compiled functions that numba code calls by address.

numba copies each called function into its callers and optimizes it again there, even if it is not
inlined. A function called by address is compiled once for all callers.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .bounds import jit


class FunctionByAddress:
    """A function of fixed types, compiled on first use of its address."""

    def __init__(self, signature: Any, function: Callable[..., None], **options: Any) -> None:
        """Take a signature that returns void, and numba's options."""
        self._signature = signature
        self._function: Any = jit(**options)(function)

    @cached_property
    def address(self) -> int:
        """Compile the function, or load it from numba's cache; return its address."""
        made = self._function.get_compile_result(self._signature)
        return int(made.library.get_pointer_to_function(made.fndesc.llvm_func_name))


def caller(signature: Any) -> Callable[..., None]:
    """Make a numba function `(address, arguments)` that calls a function of this signature."""
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
