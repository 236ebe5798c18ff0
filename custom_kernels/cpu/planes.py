"""Activations as integers, split into planes of few bits that the processor multiplies with codes.

Three planes of 8 bits where it multiplies bytes (VNNI), else two of 15 bits in 16.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import F32, I32, constant, load, splat

FEATURES = get_host_cpu_features()
CUT = 32  # columns split at a time: the smallest group
VECTOR_BYTES = 64 if FEATURES.get("avx512bw") else 32
LANES = VECTOR_BYTES // 4  # float32 in a vector; groups in a block of columns
VNNI = bool(FEATURES.get("avx512vnni") and FEATURES.get("avx512vl"))
WORD, PLANES, PLANE_BITS = (8, 3, 8) if VNNI else (16, 2, 15)  # a plane's number fits a word
I_WORD = ir.IntType(WORD)
TOTAL_BITS = 23 if VNNI else 29  # of an activation, without sign


@intrinsic(prefer_literal=True)
def split_columns(
    _context: Any, bits: Any, x: Any, inverse: Any, planes: Any, words: Any
) -> tuple[Any, Callable[..., Any]] | None:
    """Split 32 activations, as integers, into planes; return the integers' sum as int64.

    Args:
        bits: of the weights, a compile-time constant; a word holds WORD / bits codes.
        x: address of `[32]` float32.
        inverse: factor that makes them integers of at most TOTAL_BITS bits.
        planes: address of the highest plane's word for the first code of the first word. Code p of
            word w goes to `[p * words + w]`, the next plane `WORD / bits * words` after it.
        words: words per vector.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None
    phases = WORD // bits.literal_value
    lanes = CUT // phases
    whole, part = ir.VectorType(I32, CUT), ir.VectorType(I32, lanes)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        _, x, inverse, planes, words = args
        vector = ir.VectorType(F32, CUT)
        x = load(builder, builder.inttoptr(x, F32.as_pointer()), vector, 4)
        scaled = builder.fmul(x, splat(builder, inverse, vector))
        kind = ir.FunctionType(vector, [vector])
        rint = cgutils.get_or_insert_function(builder.module, kind, f"llvm.rint.v{CUT}f32")
        value = builder.fptosi(builder.call(rint, [scaled]), whole)
        out = builder.inttoptr(planes, I_WORD.as_pointer())
        kind = ir.FunctionType(I32, [whole])
        add = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.vector.reduce.add.v{CUT}i32"
        )
        total = words.type(0)
        for plane in reversed(range(PLANES)):
            here = value
            if plane:  # leave what a word cannot hold to the planes above
                half = constant(whole, 1 << (PLANE_BITS - 1))
                value = builder.ashr(builder.add(value, half), constant(whole, PLANE_BITS))
                here = builder.sub(here, builder.shl(value, constant(whole, PLANE_BITS)))
            for phase in range(phases):
                places = ir.Constant(part, [phase + phases * i for i in range(lanes)])
                few = builder.shuffle_vector(here, here, places)
                few = builder.trunc(few, ir.VectorType(I_WORD, lanes))
                place = builder.mul(words, words.type(plane * phases + phase))
                target = builder.bitcast(builder.gep(out, [place]), few.type.as_pointer())
                builder.store(few, target).align = 1
            sum_here = builder.sext(builder.call(add, [here]), words.type)
            shift = words.type(PLANE_BITS * (PLANES - 1 - plane))
            total = builder.add(total, builder.shl(sum_here, shift))
        return total

    arguments = bits, types.intp, types.float32, types.intp, types.intp
    return types.int64(*arguments), codegen
