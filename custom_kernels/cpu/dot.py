"""Integer dot products of quantized weight rows and activation rows, for decode by numba.

Activations are integers in planes (see `planes`), so that codes stay integers. A group's sum is
exact; only the sum over groups rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .planes import (
    FEATURES,
    I_WORD,
    LANES,
    PLANE_BITS,
    PLANES,
    VECTOR_BYTES,
    VNNI,
    WORD,
)
from .simd import (
    F32,
    I8,
    I32,
    constant,
    load,
    multiply_add,
    pointer_at,
    prefetch,
    splat,
    sum_of_lanes,
)

MAX_ROWS = 8  # activation rows per block
TILE = 4 if VECTOR_BYTES == 64 else 2  # weight rows at once
AHEAD = 4096  # bytes of codes that one row prefetches: further than the processor does
# Bytes of a vector, and the instruction that multiplies it: LLVM does not select these itself.
_BYTES = {16: "avx512.vpdpbusd.128", 32: "avx512.vpdpbusd.256", 64: "avx512.vpdpbusd.512"}
_PAIRS = {
    feature: (size, name)
    for feature, size, name in (
        ("sse2", 16, "sse2.pmadd.wd"),
        ("avx2", 32, "avx2.pmadd.wd"),
        ("avx512bw", 64, "avx512.pmaddw.d.512"),
    )
}
MULTIPLY = _BYTES if VNNI else dict(x for f, x in _PAIRS.items() if FEATURES.get(f))


def span_of(bits: int, group_size: int) -> int:
    """Return the number of groups in one vector of codes, at least 1."""
    return max(1, VECTOR_BYTES * 8 // (group_size * bits))


def _multiply(builder: Any, total: Any, codes: Any, x: Any) -> Any:
    """Add products of neighboring words to int32 lanes: total + sum of 32 / WORD products."""
    wide = total.type
    if (size := 4 * wide.count) in MULTIPLY:
        words = ir.VectorType(I32, wide.count) if VNNI else codes.type
        kind = ir.FunctionType(wide, [wide, words, words] if VNNI else [words, words])
        name = f"llvm.x86.{MULTIPLY[size]}"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        pair = [builder.bitcast(v, words) for v in (codes, x)]
        if VNNI:
            return builder.call(function, [total, *pair])
        return builder.add(total, builder.call(function, pair))
    near = 32 // WORD
    for first in range(near):
        places = ir.Constant(wide, [near * i + first for i in range(wide.count)])
        code, value = (builder.shuffle_vector(v, v, places) for v in (codes, x))
        product = builder.mul(builder.zext(code, wide), builder.sext(value, wide))
        total = builder.add(total, product)
    return total


def _decode(builder: Any, pointer: Any, form: "_Form") -> list[list[Any]]:
    """Load one step of codes: per vector of bytes, one vector of words per phase."""
    words, vectors = form.words, []
    for first in range(0, form.step_bytes, form.size):
        packed, parts = load(builder, builder.gep(pointer, [I32(first)]), words, 1), []
        for phase in range(form.phases):
            code = builder.lshr(packed, constant(words, phase * form.bits)) if phase else packed
            if phase < form.phases - 1:
                code = builder.and_(code, constant(words, (1 << form.bits) - 1))
            parts.append(code)
        vectors.append(parts)
    return vectors


def _step(builder: Any, decoded: list[list[Any]], planes: Any, form: "_Form") -> Any:
    """Multiply one step of unpacked codes by the activations at `planes`: a vector of sums."""
    zero = constant(ir.VectorType(I32, form.floats.count), 0)
    sums, total = [], zero
    for plane in range(PLANES):
        if plane and form.separate(plane):
            sums.append(total)
            total = zero
        elif plane:
            total = builder.shl(total, constant(total.type, PLANE_BITS))
        for part, phases in enumerate(decoded):
            for phase, code in enumerate(phases):
                offset = ((part * PLANES + plane) * form.phases + phase) * form.words.count
                x = load(builder, builder.gep(planes, [I32(offset)]), form.words, 1)
                total = _multiply(builder, total, code, x)
    low = builder.sitofp(total, form.floats)
    if not sums:
        return low
    power = constant(form.floats, float(1 << PLANE_BITS))
    return multiply_add(builder, builder.sitofp(sums[0], form.floats), power, low)


@dataclass(frozen=True)
class _Form:
    """Vector layout of a format.

    Attributes:
        bits: 2, 4 or 8.
        group: columns per group.
        span: groups per step of the inner loop.
    """

    bits: int
    group: int
    span: int

    @property
    def step_bytes(self) -> int:
        """Bytes of codes per step."""
        return self.group * self.bits // 8 * self.span

    @property
    def size(self) -> int:
        """Bytes of a vector."""
        return min(self.step_bytes, VECTOR_BYTES)

    @property
    def phases(self) -> int:
        """Codes in a word."""
        return WORD // self.bits

    @property
    def words(self) -> ir.VectorType:
        """A vector of codes."""
        return ir.VectorType(I_WORD, self.size * 8 // WORD)

    @property
    def floats(self) -> ir.VectorType:
        """A vector of sums."""
        return ir.VectorType(F32, self.size // 4)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record per step."""
        return self.group * self.span * PLANES * WORD // 8

    def separate(self, plane: int) -> bool:
        """Say whether int32 sums of higher planes cannot also hold this plane's."""
        return plane == PLANES - 1 and (not VNNI or self.bits == 8)


def _scales(builder: Any, pointer: Any, form: _Form) -> Any:
    """Load one scale per group of a step and repeat each over its group's lanes."""
    few, lanes = load(builder, pointer, ir.VectorType(F32, form.span), 4), form.floats.count
    places = [lane * form.span // lanes for lane in range(lanes)]
    return builder.shuffle_vector(few, few, ir.Constant(ir.VectorType(I32, lanes), places))


def _bias_sums(builder: Any, biases: Any, totals: Any, groups: Any) -> Any:
    """Return the sum of bias * total in LANES parts; what lies after the groups counts as 0."""
    vector, integers = ir.VectorType(F32, LANES), ir.VectorType(groups.type, LANES)
    running = cgutils.alloca_once(builder, vector)
    builder.store(constant(vector, 0.0), running)
    lane = ir.Constant(integers, list(range(LANES)))
    with cgutils.for_range_slice(builder, groups.type(0), groups, groups.type(LANES)) as (first, _):
        offset = builder.mul(first, groups.type(4))
        a, b = (
            load(builder, pointer_at(builder, address, F32, offset), vector, 4)
            for address in (biases, totals)
        )
        left = splat(builder, builder.sub(groups, first), integers)
        a = builder.select(builder.icmp_signed("<", lane, left), a, constant(vector, 0.0))
        builder.store(multiply_add(builder, a, b, builder.load(running)), running)
    return builder.load(running)


def _form_of(bits: Any, group: Any) -> _Form | None:
    """Return the layout for two compile-time constants, None before they are known."""
    if not all(isinstance(t, types.IntegerLiteral) for t in (bits, group)):
        return None
    width, columns = bits.literal_value, group.literal_value
    return _Form(width, columns, span_of(width, columns))


@intrinsic(prefer_literal=True)
def dot_rows(
    _context: Any, bits: Any, group: Any, codes: Any, scales: Any, biases: Any, record: Any,
    groups: Any, rows: Any, out: Any,
) -> tuple[Any, Callable[..., Any]] | None:  # fmt: skip
    """Multiply TILE weight rows by an activation row, but for a last partial step's groups.

    Args:
        bits: 2, 4 or 8, a compile-time constant like the next.
        group: columns per group.
        codes: address of the matrix's codes.
        scales: address of its scales, float32; LANES more must be readable.
        biases: likewise.
        record: addresses of the record's planes, factors and totals.
        groups: of a row.
        rows: first row, and last row of the matrix, which stands for rows after it.
        out: address of the matrix's results.
    """
    if (form := _form_of(bits, group)) is None:
        return None
    block = ir.VectorType(F32, LANES)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> None:
        codes, scales, biases, record, groups, rows, out = args[2:]
        planes, factors, totals = (builder.extract_value(record, i) for i in range(3))
        first, last = (builder.extract_value(rows, i) for i in range(2))
        number = groups.type

        def least(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_signed("<", a, b), a, b)

        def at(address: Any, index: Any, size: int) -> Any:
            return builder.add(address, builder.mul(index, number(size)))

        tile = [least(builder.add(first, number(w)), last) for w in range(TILE)]
        row_bytes = builder.mul(groups, number(form.bits * form.group // 8))
        code_rows = [builder.add(codes, builder.mul(row, row_bytes)) for row in tile]
        places = [builder.mul(row, groups) for row in tile]
        scratch = [cgutils.alloca_once(builder, block) for _ in tile]
        running = [cgutils.alloca_once(builder, form.floats) for _ in tile]
        for place, total in zip(places, running, strict=True):
            builder.store(_bias_sums(builder, at(biases, place, 4), totals, groups), total)
        whole = builder.sub(groups, builder.srem(groups, number(form.span)))
        with cgutils.for_range_slice(builder, number(0), whole, number(LANES)) as (start, _):
            factor = load(builder, pointer_at(builder, at(factors, start, 4), F32), block, 4)
            for place, product in zip(places, scratch, strict=True):
                here = pointer_at(builder, at(scales, builder.add(place, start), 4), F32)
                builder.store(builder.fmul(load(builder, here, block, 4), factor), product)
            before = builder.sdiv(start, number(form.span))
            steps = builder.sdiv(least(builder.sub(whole, start), number(LANES)), number(form.span))
            with cgutils.for_range(builder, steps) as loop:
                step = builder.add(before, loop.index)
                x = pointer_at(builder, at(planes, step, form.record_bytes), I_WORD)
                for row, product, total in zip(code_rows, scratch, running, strict=True):
                    here = at(row, step, form.step_bytes)
                    prefetch(builder, builder.add(here, number(AHEAD)))
                    dot = _step(
                        builder, _decode(builder, pointer_at(builder, here, I8), form), x, form
                    )
                    few = builder.bitcast(product, F32.as_pointer())
                    few = builder.gep(few, [builder.mul(loop.index, number(form.span))])
                    after = multiply_add(
                        builder, dot, _scales(builder, few, form), builder.load(total)
                    )
                    builder.store(after, total)
        for row, total in zip(tile, running, strict=True):
            sum_ = sum_of_lanes(builder, builder.load(total))
            builder.store(sum_, pointer_at(builder, at(out, row, 4), F32))

    numbers = types.intp, types.intp, types.intp, types.UniTuple(types.intp, 3), types.intp
    return types.void(bits, group, *numbers, types.UniTuple(types.intp, 2), types.intp), codegen


@intrinsic(prefer_literal=True)
def dot_block(
    _context: Any, bits: Any, group: Any, codes: Any, scales: Any, records: Any, offsets: Any,
    rows: Any, steps: Any, sums: Any,
) -> tuple[Any, Callable[..., Any]] | None:  # fmt: skip
    """Add a block of columns to the sums of a weight row times a few activation rows.

    sums[r, lane] += scale * factor[r] * (sum over the lane's columns of code * x[r]), one group
    after another as in `dot_rows`, so the result is independent of `rows` and of the block.

    Args:
        bits: 2, 4 or 8, a compile-time constant like the next.
        group: columns per group.
        codes: address of the weight row's codes at the block.
        scales: address of its scales there, LANES float32.
        records: address of `[rows]` addresses of activation records.
        offsets: bytes from a record's address to its planes and factors at the block.
        rows: at most MAX_ROWS.
        steps: of the inner loop, at most LANES groups.
        sums: address of `[rows, LANES]` float32.
    """
    if (form := _form_of(bits, group)) is None:
        return None
    block = ir.VectorType(F32, LANES)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> None:
        codes, scales, records, offsets, rows, steps, sums = args[2:]
        plane_offset, factor_offset = (builder.extract_value(offsets, i) for i in range(2))
        number = rows.type
        table = pointer_at(builder, records, number)
        scratch = cgutils.alloca_once(builder, F32, size=MAX_ROWS * LANES)
        scale = load(builder, pointer_at(builder, scales, F32), block, 4)

        def record(r: Any) -> Any:
            return builder.load(builder.gep(table, [r]))

        def product(r: Any) -> Any:
            return builder.gep(scratch, [builder.mul(r, number(LANES))])

        with cgutils.for_range(builder, rows) as loop:
            pointer = pointer_at(builder, record(loop.index), F32, factor_offset)
            value = builder.fmul(scale, load(builder, pointer, block, 4))
            target = builder.bitcast(product(loop.index), block.as_pointer())
            builder.store(value, target).align = 4
        with cgutils.for_range(builder, steps) as loop:
            offset = builder.mul(loop.index, number(form.step_bytes))
            decoded = _decode(builder, pointer_at(builder, codes, I8, offset), form)
            offset = builder.mul(loop.index, number(form.record_bytes))
            offset = builder.add(plane_offset, offset)
            with cgutils.for_range(builder, rows) as inner:
                r = inner.index
                total = pointer_at(builder, sums, form.floats, builder.mul(r, number(4 * LANES)))
                dot = _step(builder, decoded, pointer_at(builder, record(r), I_WORD, offset), form)
                place = builder.gep(product(r), [builder.mul(loop.index, number(form.span))])
                before = load(builder, total, form.floats, 4)
                after = multiply_add(builder, dot, _scales(builder, place, form), before)
                builder.store(after, total).align = 4

    pair = types.UniTuple(types.intp, 2)
    kinds = types.intp, types.intp, types.intp, pair, types.intp, types.intp, types.intp
    return types.void(bits, group, *kinds), codegen


@intrinsic(prefer_literal=True)
def dot_rest(
    _context: Any, bits: Any, group: Any, codes: Any, scales: Any, planes: Any, factors: Any,
    groups: Any,
) -> tuple[Any, Callable[..., Any]] | None:  # fmt: skip
    """Return the dot product of a row's last groups, too few to fill a vector.

    `bits` and `group` are compile-time constants, the others addresses; scales are float32.
    """
    if not all(isinstance(t, types.IntegerLiteral) for t in (bits, group)):
        return None
    form = _Form(bits.literal_value, group.literal_value, 1)

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        codes, scales, planes, factors, groups = args[2:]
        running = cgutils.alloca_once(builder, form.floats)
        builder.store(constant(form.floats, 0.0), running)
        with cgutils.for_range(builder, groups) as loop:

            def at(address: Any, kind: Any, stride: int) -> Any:
                offset = builder.mul(loop.index, groups.type(stride))
                return pointer_at(builder, address, kind, offset)

            decoded = _decode(builder, at(codes, I8, form.step_bytes), form)
            dot = _step(builder, decoded, at(planes, I_WORD, form.record_bytes), form)
            scale = builder.fmul(
                builder.load(at(scales, F32, 4)), builder.load(at(factors, F32, 4))
            )
            scale = splat(builder, scale, form.floats)
            builder.store(multiply_add(builder, dot, scale, builder.load(running)), running)
        return sum_of_lanes(builder, builder.load(running))

    return types.float32(bits, group, *[types.intp] * 5), codegen


@intrinsic
def add_lanes(_context: Any, sums: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the sum of the LANES float32 at an address."""

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        pointer = pointer_at(builder, args[0], F32)
        return sum_of_lanes(builder, load(builder, pointer, ir.VectorType(F32, LANES), 4))

    return types.float32(types.intp), codegen


@intrinsic
def start_sums(
    _context: Any, biases: Any, totals: Any, groups: Any, sums: Any
) -> tuple[Any, Callable[..., Any]]:
    """Write the biases' share of a weight row to LANES float32 at `sums`.

    `biases` and `totals`, the groups' sums of activations, are addresses of float32, of which whole
    vectors are read.
    """

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> None:
        biases, totals, groups, sums = args
        target = pointer_at(builder, sums, ir.VectorType(F32, LANES))
        builder.store(_bias_sums(builder, biases, totals, groups), target).align = 4

    return types.void(*[types.intp] * 4), codegen
