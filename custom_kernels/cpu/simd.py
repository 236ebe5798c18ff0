"""The inner loop of the CPU kernels, in explicit LLVM vectors, for numba.

numba's own vectorizer reaches about 0.75 of the speed: it picks narrower vectors and reduces them
once per group. LLVM lowers these vectors to AVX-512, AVX2 or NEON.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .numba_cache import make_cache_safe

make_cache_safe()

F32, I8, I32 = ir.FloatType(), ir.IntType(8), ir.IntType(32)
PERMUTE = "llvm.x86.avx512.permvar.sf.512"  # picks 16 floats of 16 by the index's low 4 bits
HAS_PERMUTE = bool(get_host_cpu_features().get("avx512f"))
MAX_LANES = 16 if HAS_PERMUTE else 8  # float32 in a vector register


def lanes_of(bits: int, group_size: int) -> int:
    """Return the number of bytes of codes that `dot_tile` takes at a time."""
    return min(MAX_LANES, group_size * bits // 8)


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    """Return a vector with `value` in all lanes."""
    return ir.Constant(vector, [value] * vector.count)


def load(builder: Any, pointer: Any, vector: ir.VectorType, align: int) -> Any:
    """Load a vector from a pointer of any type."""
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = align
    return value


def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c for vectors of float32."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fmuladd.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def splat(builder: Any, scalar: Any, vector: ir.VectorType) -> Any:
    """Return a vector with a run-time scalar in all lanes."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, one, zeros)


def pointer_at(builder: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    """Turn an address, and an offset in bytes, into a pointer."""
    address = address if offset is None else builder.add(address, offset)
    return builder.inttoptr(address, kind.as_pointer())


def prefetch(builder: Any, address: Any) -> None:
    """Load the cache line at an address, which need not exist, into the L1 cache."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(I8), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer_at(builder, address, I8), I32(0), I32(3), I32(1)])


def sum_of_lanes(builder: Any, vector: Any) -> Any:
    """Return the sum of a vector's lanes in a fixed order: add halves until one lane is left."""
    while vector.type.count > 1:
        half = vector.type.count // 2
        places = [
            ir.Constant(ir.VectorType(I32, half), list(range(i, i + half))) for i in (0, half)
        ]
        low, high = (builder.shuffle_vector(vector, vector, p) for p in places)
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, I32(0))


@intrinsic
def bfloat_to_f32(_context: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Convert the bits of a bfloat16, in a uint16, to float32."""

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], I32), I32(16)), F32)

    return types.float32(value), codegen


@intrinsic
def half_to_f32(_context: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Convert the bits of a float16, in a uint16, to float32."""

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), F32)

    return types.float32(value), codegen


@intrinsic
def no_inline(_context: Any) -> tuple[Any, Callable[..., Any]]:
    """Mark the calling function noinline: inlining it everywhere compiles for long."""

    def codegen(_: Any, builder: Any, __: Any, ___: Any) -> None:
        builder.function.attributes.add("noinline")

    return types.void(), codegen


@intrinsic
def magnitude(_context: Any, value: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the bits of |value| as int32: ordered like float32, with NaN largest."""

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.and_(builder.bitcast(args[0], I32), I32(0x7FFFFFFF))

    return types.int32(types.float32), codegen


@intrinsic
def leading_power(_context: Any, bits: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the largest power of two not above the float32 with these bits."""

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.and_(args[0], I32(0x7F800000)), F32)

    return types.float32(types.int32), codegen


@intrinsic
def power_of_two(_context: Any, exponent: Any) -> tuple[Any, Callable[..., Any]]:
    """Return 2 to the power of an int32 from -126 to 127, as float32."""

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.add(args[0], I32(127)), I32(23)), F32)

    return types.float32(types.int32), codegen


def _pointer_to(kind: Any) -> Any:
    """Make a numba function that turns an address into a pointer."""

    @intrinsic
    def pointer(_context: Any, address: Any) -> tuple[Any, Callable[..., Any]]:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.intp), codegen

    return pointer


floats, octets = _pointer_to(types.float32), _pointer_to(types.uint8)
unsigned_shorts = _pointer_to(types.uint16)


@intrinsic
def address(_context: Any, array: Any, index: Any) -> tuple[Any, Callable[..., Any]]:
    """Return a pointer to element `index` of a contiguous array, counted flat."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(data, [args[1]])

    return types.CPointer(array.dtype)(array, types.intp), codegen


def _codes(builder: Any, pointer: Any, bits: int) -> Any:
    """Load MAX_LANES codes, one per 32-bit lane, each with later codes in the bits above it."""
    lanes = ir.VectorType(I32, MAX_LANES)
    size = 8 if bits == 8 else min(32, MAX_LANES * bits)
    packed = ir.VectorType(ir.IntType(size), MAX_LANES * bits // size)
    words = load(builder, pointer, packed, 1)
    if size < 32:
        words = builder.zext(words, ir.VectorType(I32, packed.count))
    if bits == 8:
        return words
    places = [lane * bits // size for lane in range(MAX_LANES)]
    words = builder.shuffle_vector(words, words, ir.Constant(lanes, places))
    shifts = [lane * bits % size for lane in range(MAX_LANES)]
    return builder.lshr(words, ir.Constant(lanes, shifts))


@intrinsic(prefer_literal=True)
def dequantize_row(
    _context: Any, bits: Any, group: Any, codes: Any, scales: Any, biases: Any, groups: Any,
    out: Any,
) -> tuple[Any, Callable[..., Any]] | None:  # fmt: skip
    """Write scale * code + bias as float32 for some groups of a weight row.

    Args:
        bits: 2, 4 or 8, a compile-time constant like the next.
        group: columns per scale.
        codes: address of the first code.
        scales: address of the first scale, float32.
        biases: likewise.
        groups: number of groups.
        out: address of the results.
    """
    if not all(isinstance(t, types.IntegerLiteral) for t in (bits, group)):
        return None
    width, columns = bits.literal_value, group.literal_value
    floats, words = ir.VectorType(F32, MAX_LANES), ir.VectorType(I32, MAX_LANES)
    mask = (1 << width) - 1

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> None:
        codes, scales, biases, groups, out = args[2:]

        def at(address: Any, index: Any, size: int, kind: Any, first: int = 0) -> Any:
            offset = builder.add(builder.mul(index, index.type(size)), index.type(first))
            return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

        with cgutils.for_range(builder, groups) as loop:
            scale, bias = (
                splat(builder, builder.load(at(address, loop.index, 4, F32)), floats)
                for address in (scales, biases)
            )
            if by_table := HAS_PERMUTE and width < 8:
                # One lookup by the low 4 bits of a lane, of which a code's are the lowest.
                values = ir.Constant(floats, [float(n & mask) for n in range(16)])
                table = multiply_add(builder, values, scale, bias)
                kind = ir.FunctionType(floats, [floats, words])
                permute = cgutils.get_or_insert_function(builder.module, kind, PERMUTE)
            for first in range(0, columns, MAX_LANES):
                place = at(codes, loop.index, columns * width // 8, I8, first * width // 8)
                code = _codes(builder, place, width)
                if by_table:
                    value = builder.call(permute, [table, code])
                else:
                    code = builder.sitofp(builder.and_(code, constant(words, mask)), floats)
                    value = multiply_add(builder, code, scale, bias)
                target = at(out, loop.index, columns * 4, floats, first * 4)
                builder.store(value, target).align = 4

    return types.void(bits, group, *[types.intp] * 5), codegen


def _sums(builder: Any, vectors: list[Any]) -> Any:
    """Return a vector whose lane i is the sum of vector i, for as many vectors as lanes."""
    count = len(vectors)
    while len(vectors) > 1:
        added = []
        for a, b in zip(vectors[::2], vectors[1::2], strict=True):
            halves = [
                builder.shuffle_vector(
                    a, b, ir.Constant(ir.VectorType(I32, count), list(range(odd, 2 * count, 2)))
                )
                for odd in (0, 1)
            ]
            added.append(builder.fadd(*halves))
        vectors = added
    return vectors[0]


@intrinsic(prefer_literal=True)
def add_tile(
    _context: Any, rows: Any, weights: Any, stride: Any, x: Any, x_stride: Any, last: Any,
    steps: Any, out: Any, out_stride: Any,
) -> tuple[Any, Callable[..., Any]] | None:  # fmt: skip
    """Add products of a few activation rows and MAX_LANES / rows weight rows to `[rows, ...]`.

    Args:
        rows: activation rows, a compile-time constant.
        weights: address of the first weight row, float32.
        stride: bytes from a weight row to the next.
        x: address of the first activation row.
        x_stride: bytes from an activation row to the next.
        last: number of the last activation row, which is taken for rows after it.
        steps: MAX_LANES columns each.
        out: address of the results.
        out_stride: bytes from an activation row's results to the next one's.
    """
    if not isinstance(rows, types.IntegerLiteral):
        return None
    count = rows.literal_value
    floats, few = (ir.VectorType(F32, n) for n in (MAX_LANES, MAX_LANES // count))

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> None:
        weights, stride, x, x_stride, last, steps, out, out_stride = args[1:]
        number = steps.type

        def at(address: Any, index: Any, size: Any) -> Any:
            return builder.add(address, builder.mul(index, size))

        def vector(address: Any, step: Any) -> Any:
            place = at(address, step, number(4 * MAX_LANES))
            return load(builder, builder.inttoptr(place, floats.as_pointer()), floats, 4)

        weight_rows = [at(weights, number(w), stride) for w in range(few.count)]
        inside = [builder.icmp_signed("<", number(r), last) for r in range(count)]
        chosen = [builder.select(inside[r], number(r), last) for r in range(count)]
        x_rows = [at(x, r, x_stride) for r in chosen]
        sums = [[cgutils.alloca_once(builder, floats) for _ in weight_rows] for _ in x_rows]
        for total in (total for totals in sums for total in totals):
            builder.store(constant(floats, 0.0), total)
        with cgutils.for_range(builder, steps) as loop:
            many = [vector(row, loop.index) for row in weight_rows]
            for row, totals in zip(x_rows, sums, strict=True):
                value = vector(row, loop.index)
                for weight, total in zip(many, totals, strict=True):
                    added = multiply_add(builder, weight, value, builder.load(total))
                    builder.store(added, total)
        dots = _sums(builder, [builder.load(total) for totals in sums for total in totals])
        for r in range(count):
            places = range(r * few.count, (r + 1) * few.count)
            part = ir.Constant(ir.VectorType(I32, few.count), list(places))
            part = builder.shuffle_vector(dots, dots, part)
            place = at(out, number(r), out_stride)
            place = builder.inttoptr(place, few.as_pointer())
            builder.store(builder.fadd(load(builder, place, few, 4), part), place).align = 4

    return types.void(rows, *[types.intp] * 8), codegen
