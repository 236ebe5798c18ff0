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


def reduce_add(builder: Any, vector: Any) -> Any:
    """Return the sum of a vector of float32, in any order."""
    kind = ir.FunctionType(F32, [F32, vector.type])
    name = f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [ir.Constant(F32, 0.0), vector], fastmath=("fast",))


def splat(builder: Any, scalar: Any, vector: ir.VectorType) -> Any:
    """Return a vector with a run-time scalar in all lanes."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    zeros = ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, one, zeros)


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


def _unpack(builder: Any, packed: Any, bits: int) -> list[Any]:
    """Turn bytes, one per 32-bit lane, into `8 / bits` vectors of codes as float32."""
    words = packed.type
    floats = ir.VectorType(F32, words.count)
    codes: list[Any] = []
    if HAS_PERMUTE and words.count == 16 and bits < 8:
        # One table lookup per nibble replaces mask, shift and conversion of each code in it.
        kind = ir.FunctionType(floats, [floats, words])
        permute = cgutils.get_or_insert_function(builder.module, kind, PERMUTE)
        for shift in range(0, 8, 4):
            nibble = builder.lshr(packed, constant(words, shift))
            for inner in range(0, 4, bits):
                table = [float(n >> inner & (1 << bits) - 1) for n in range(16)]
                codes.append(builder.call(permute, [ir.Constant(floats, table), nibble]))
        return codes
    for phase in range(8 // bits):
        code = builder.lshr(packed, constant(words, phase * bits))
        code = builder.and_(code, constant(words, (1 << bits) - 1))
        codes.append(builder.sitofp(code, floats))
    return codes


@intrinsic(prefer_literal=True)
def dot_tile(
    _context: Any, bits: Any, group: Any, tile: Any, rows: Any, codes: Any, scales: Any, x: Any,
    groups: Any, out: Any,
) -> tuple[Any, Callable[..., Any]] | None:  # fmt: skip
    """Multiply a few quantized weight rows by a few activation rows, without the biases.

    out[w, r] = sum over groups of scale[w] * (sum over the group of code[w] * x[r]).

    `bits`, `group`, `tile` and `rows` are compile-time constants. Activations lie in order of
    use: code p of byte b meets `x[b // lanes, p, r, b % lanes]`. The order of summation is
    independent of `tile` and `rows`.

    Args:
        bits: 2, 4 or 8.
        group: columns per scale.
        tile: weight rows.
        rows: activation rows.
        codes: pointer to `[tile, groups * group * bits / 8]` bytes.
        scales: pointer to `[tile, groups]` float32.
        x: pointer to `[bytes / lanes, 8 / bits, rows, lanes]` float32.
        groups: groups per weight row.
        out: pointer to `[tile, rows]` float32.
    """
    if not all(isinstance(t, types.IntegerLiteral) for t in (bits, group, tile, rows)):
        return None
    width, columns, height, count = (t.literal_value for t in (bits, group, tile, rows))
    phases, group_bytes, lanes = 8 // width, columns * width // 8, lanes_of(width, columns)
    floats, words = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
    packed_bytes = ir.VectorType(I8, lanes)
    zero = constant(floats, 0.0)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> None:
        codes, scales, x, groups, out = args[4:]

        def number(value: int) -> ir.Constant:
            return ir.Constant(groups.type, value)

        def at(pointer: Any, offset: Any) -> Any:
            return builder.gep(pointer, [offset])

        row_bytes = builder.mul(groups, number(group_bytes))
        code_rows = [at(codes, builder.mul(row_bytes, number(w))) for w in range(height)]
        scale_rows = [at(scales, builder.mul(groups, number(w))) for w in range(height)]
        sums = [cgutils.alloca_once(builder, floats) for _ in range(height * count)]
        for total in sums:
            builder.store(zero, total)
        with cgutils.for_range(builder, groups) as loop:
            start = builder.mul(loop.index, number(group_bytes))
            here = at(x, builder.mul(start, number(phases * count)))
            partial = [zero] * (height * count)
            for first in range(0, group_bytes, lanes):
                place = builder.add(start, number(first))
                weights = []
                for row in code_rows:
                    packed = load(builder, at(row, place), packed_bytes, 1)
                    weights.append(_unpack(builder, builder.zext(packed, words), width))
                for phase in range(phases):
                    for r in range(count):
                        offset = (first * phases + phase * lanes) * count + r * lanes
                        value = load(builder, at(here, number(offset)), floats, 4)
                        for w in range(height):
                            cell = w * count + r
                            partial[cell] = multiply_add(
                                builder, weights[w][phase], value, partial[cell]
                            )
            for w, row in enumerate(scale_rows):
                scale = splat(builder, builder.load(at(row, loop.index)), floats)
                for total, part in zip(
                    sums[w * count : (w + 1) * count],
                    partial[w * count : (w + 1) * count],
                    strict=True,
                ):
                    builder.store(multiply_add(builder, part, scale, builder.load(total)), total)
        for cell, total in enumerate(sums):
            builder.store(reduce_add(builder, builder.load(total)), at(out, number(cell)))

    arguments = (bits, group, tile, rows, codes, scales, x, types.intp, out)
    return types.void(*arguments), codegen
