"""One quantised weight row times one activation row, in integers, for numba: what decoding does.

Activations become 30-bit integers, scaled per group of columns and cut into two halves of 16
bits. One multiply-add instruction then takes twice as many weights as in float32, and no code is
converted to a float. A group's sum is exact; only the sum over the groups rounds.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashmoe_mlx.custom_kernels.simd import (
    F32,
    I32,
    constant,
    load,
    multiply_add,
    reduce_add,
    splat,
)

I16 = ir.IntType(16)
_FEATURES = get_host_cpu_features()
CUT = 32  # columns that are cut at a time: the smallest group
VECTOR_BYTES = 64 if _FEATURES.get("avx512bw") else 32
# LLVM does not find these instructions by itself; it does merge them with the addition (VNNI).
_PAIRS = {
    "sse2": (8, "llvm.x86.sse2.pmadd.wd"),
    "avx2": (16, "llvm.x86.avx2.pmadd.wd"),
    "avx512bw": (32, "llvm.x86.avx512.pmaddw.d.512"),
}
MULTIPLY_PAIRS = dict(pair for feature, pair in _PAIRS.items() if _FEATURES.get(feature))
HALF_BITS = 15  # an activation is high * 2^15 + low


def span_of(bits: int, group_size: int) -> int:
    """Return how many groups one vector of codes spans; 1 if a group fills it."""
    return max(1, VECTOR_BYTES * 8 // (group_size * bits))


def _pairs(builder: Any, a: Any, b: Any) -> Any:
    """Multiply 16-bit integers and add neighbours: `[n]` int16 twice to `[n / 2]` int32."""
    half = a.type.count // 2
    wide = ir.VectorType(I32, half)
    if a.type.count in MULTIPLY_PAIRS:
        kind = ir.FunctionType(wide, [a.type, a.type])
        name = MULTIPLY_PAIRS[a.type.count]
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b])

    def every_second(vector: Any, first: int) -> Any:
        places = ir.Constant(wide, [2 * i + first for i in range(half)])
        return builder.sext(builder.shuffle_vector(vector, vector, places), wide)

    products = [builder.mul(every_second(a, i), every_second(b, i)) for i in (0, 1)]
    return builder.add(*products)


def _group_sums(
    builder: Any, codes: list[Any], planes: Any, bits: int, words: ir.VectorType
) -> tuple[Any, Any]:
    """Dot vectors of codes with the low and with the high halves that lie at `planes`."""
    phases, size, totals = 16 // bits, words.count, []
    for plane in range(2):
        total = None
        for part, packed in enumerate(codes):
            for phase in range(phases):
                code = builder.lshr(packed, constant(words, phase * bits)) if phase else packed
                if phase < phases - 1:
                    code = builder.and_(code, constant(words, (1 << bits) - 1))
                offset = ((part * 2 + plane) * phases + phase) * size
                x = load(builder, builder.gep(planes, [I32(offset)]), words, 2)
                product = _pairs(builder, code, x)
                total = product if total is None else builder.add(total, product)
        totals.append(total)
    return totals[0], totals[1]


def _scales(builder: Any, pointer: Any, span: int, lanes: int) -> Any:
    """Load one scale per group and repeat each over its group's lanes."""
    few = load(builder, pointer, ir.VectorType(F32, span), 4)
    places = [lane * span // lanes for lane in range(lanes)]
    return builder.shuffle_vector(few, few, ir.Constant(ir.VectorType(I32, lanes), places))


def _dot(
    builder: Any, bits: int, group_bytes: int, span: int, steps: Any,
    codes: Any, scales: Any, planes: Any,
) -> Any:  # fmt: skip
    """Add up `steps` times `span` groups; pointers to bytes, float32 and int16."""
    size = min(group_bytes * span, VECTOR_BYTES)
    words = ir.VectorType(I16, size // 2)
    floats = ir.VectorType(F32, size // 4)
    sum_place = cgutils.alloca_once(builder, floats)
    builder.store(constant(floats, 0.0), sum_place)
    step_bytes = group_bytes * span
    with cgutils.for_range(builder, steps) as loop:

        def at(pointer: Any, stride: int) -> Any:
            return builder.gep(pointer, [builder.mul(loop.index, steps.type(stride))])

        here = at(codes, step_bytes)
        packed = [
            load(builder, builder.gep(here, [I32(first)]), words, 1)
            for first in range(0, step_bytes, size)
        ]
        x = at(planes, step_bytes * 8 // bits * 2)
        low, high = (
            builder.sitofp(t, floats) for t in _group_sums(builder, packed, x, bits, words)
        )
        both = multiply_add(builder, high, constant(floats, float(1 << HALF_BITS)), low)
        scale = _scales(builder, at(scales, span), span, floats.count)
        builder.store(multiply_add(builder, both, scale, builder.load(sum_place)), sum_place)
    return reduce_add(builder, builder.load(sum_place))


@intrinsic(prefer_literal=True)
def dot_row(
    _context: Any, bits: Any, group: Any, codes: Any, scales: Any, planes: Any, groups: Any
) -> tuple[Any, Callable[..., Any]] | None:
    """Return sum over groups of scale * (sum over the group of code * x), as float32.

    `bits` and `group` are compile-time constants.

    Args:
        bits: 2, 4 or 8.
        group: columns per group.
        codes: address of `[groups * group * bits / 8]` bytes.
        scales: address of `[groups]` float32, the weights' scales times the activations'.
        planes: address of `[2 * groups * group]` int16, in the order that `cut` makes.
        groups: groups per row.
    """
    if not all(isinstance(t, types.IntegerLiteral) for t in (bits, group)):
        return None
    width, columns = bits.literal_value, group.literal_value
    group_bytes, span = columns * width // 8, span_of(width, columns)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        groups = args[5]
        pointers = [
            builder.inttoptr(address, kind.as_pointer())
            for address, kind in zip(args[2:5], (ir.IntType(8), F32, I16), strict=True)
        ]
        steps = builder.sdiv(groups, groups.type(span))
        total = _dot(builder, width, group_bytes, span, steps, *pointers)
        if span == 1:
            return total
        # A row that does not fill the last vector ends in single groups.
        done = builder.mul(steps, groups.type(span))
        strides = group_bytes, 1, 2 * columns
        rest = [
            builder.gep(p, [builder.mul(done, groups.type(s))])
            for p, s in zip(pointers, strides, strict=True)
        ]
        left = builder.sub(groups, done)
        return builder.fadd(total, _dot(builder, width, group_bytes, 1, left, *rest))

    kinds = types.intp, types.intp, types.intp, types.intp
    return types.float32(bits, group, *kinds), codegen


@intrinsic(prefer_literal=True)
def cut_columns(
    _context: Any, bits: Any, x: Any, inverse: Any, planes: Any, words: Any
) -> tuple[Any, Callable[..., Any]] | None:
    """Cut 32 activations, as integers, into halves; return the sum of the integers as int64.

    Args:
        bits: of the weights, a compile-time constant. A 16-bit word of them has 16 / bits codes.
        x: address of `[32]` float32.
        inverse: what makes them integers of at most 30 bits.
        planes: address where the first word's low half of its first code goes, int16. Number p of
            word w goes to `[p * words + w]`, its high half `16 / bits * words` further on.
        words: words per vector.
    """
    if not isinstance(bits, types.IntegerLiteral):
        return None
    phases = 16 // bits.literal_value
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
        high = builder.ashr(
            builder.add(value, constant(whole, 1 << (HALF_BITS - 1))), constant(whole, HALF_BITS)
        )
        low = builder.sub(value, builder.shl(high, constant(whole, HALF_BITS)))
        out = builder.inttoptr(planes, I16.as_pointer())
        for plane, half in enumerate((low, high)):
            for phase in range(phases):
                places = ir.Constant(part, [phase + phases * i for i in range(lanes)])
                few = builder.trunc(
                    builder.shuffle_vector(half, half, places), ir.VectorType(I16, lanes)
                )
                place = builder.mul(words, words.type(plane * phases + phase))
                target = builder.gep(out, [place])
                target = builder.bitcast(target, few.type.as_pointer())
                builder.store(few, target).align = 2
        kind = ir.FunctionType(I32, [whole])
        add = cgutils.get_or_insert_function(
            builder.module, kind, f"llvm.vector.reduce.add.v{CUT}i32"
        )
        sums = [builder.sext(builder.call(add, [half]), words.type) for half in (low, high)]
        return builder.add(builder.shl(sums[1], words.type(HALF_BITS)), sums[0])

    arguments = bits, types.intp, types.float32, types.intp, types.intp
    return types.int64(*arguments), codegen
