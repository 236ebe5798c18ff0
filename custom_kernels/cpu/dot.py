"""Integer dot products of quantized weight rows and activation rows, for decode by numba.

Activations become 30-bit integers, scaled per group of columns and split into two 16-bit halves.
One multiply-add instruction then takes twice as many weights as in float32, and codes stay
integers. A group's sum is exact; only the sum over groups rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import F32, I32, constant, load, multiply_add, splat

I16 = ir.IntType(16)
_FEATURES = get_host_cpu_features()
CUT = 32  # columns split at a time: the smallest group
VECTOR_BYTES = 64 if _FEATURES.get("avx512bw") else 32
# LLVM does not select these instructions itself, but merges them with the addition (VNNI).
_PAIRS = {
    "sse2": (8, "llvm.x86.sse2.pmadd.wd"),
    "avx2": (16, "llvm.x86.avx2.pmadd.wd"),
    "avx512bw": (32, "llvm.x86.avx512.pmaddw.d.512"),
}
MULTIPLY_PAIRS = dict(pair for feature, pair in _PAIRS.items() if _FEATURES.get(feature))
HALF_BITS = 15  # an activation is high * 2^15 + low
LANES = VECTOR_BYTES // 4  # float32 in a vector
STEPS = LANES  # per block of columns, so that its activations fit the L1 cache
TILE = 4  # weight rows per block
MAX_ROWS = 8  # activation rows per block


def span_of(bits: int, group_size: int) -> int:
    """Return the number of groups in one vector of codes, at least 1."""
    return max(1, VECTOR_BYTES * 8 // (group_size * bits))


def _pairs(builder: Any, a: Any, b: Any) -> Any:
    """Multiply 16-bit integers and add neighbors: `[n]` int16 twice to `[n / 2]` int32."""
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


def _decode(builder: Any, pointer: Any, form: "_Form") -> list[list[Any]]:
    """Load one step of codes: per vector of bytes, one vector of 16-bit words per phase."""
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
    totals = []
    for plane in range(2):
        total = None
        for part, phases in enumerate(decoded):
            for phase, code in enumerate(phases):
                offset = ((part * 2 + plane) * form.phases + phase) * form.words.count
                x = load(builder, builder.gep(planes, [I32(offset)]), form.words, 2)
                product = _pairs(builder, code, x)
                total = product if total is None else builder.add(total, product)
        totals.append(builder.sitofp(total, form.floats))
    power = constant(form.floats, float(1 << HALF_BITS))
    return multiply_add(builder, totals[1], power, totals[0])


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
        """Codes in a 16-bit word."""
        return 16 // self.bits

    @property
    def words(self) -> ir.VectorType:
        """A vector of codes."""
        return ir.VectorType(I16, self.size // 2)

    @property
    def floats(self) -> ir.VectorType:
        """A vector of sums."""
        return ir.VectorType(F32, self.size // 4)


def _scales(builder: Any, pointer: Any, form: _Form) -> Any:
    """Load one scale per group of a step and repeat each over its group's lanes."""
    few, lanes = load(builder, pointer, ir.VectorType(F32, form.span), 4), form.floats.count
    places = [lane * form.span // lanes for lane in range(lanes)]
    return builder.shuffle_vector(few, few, ir.Constant(ir.VectorType(I32, lanes), places))


def _pointer(builder: Any, address: Any, kind: Any, offset: Any = None) -> Any:
    """Turn an address, and an offset in bytes, into a pointer."""
    address = address if offset is None else builder.add(address, offset)
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic(prefer_literal=True)
def dot_block(
    _context: Any, bits: Any, group: Any, single: Any, codes: Any, scales: Any, records: Any,
    offsets: Any, rows: Any, steps: Any, sums: Any,
) -> tuple[Any, Callable[..., Any]] | None:  # fmt: skip
    """Add a block of columns to the sums of a weight row times a few activation rows.

    sums[r, lane] += scale * factor[r] * (sum over the lane's columns of code * x[r]), one group
    after another, so the result is independent of `rows` and of the block.

    Args:
        bits: 2, 4 or 8, a compile-time constant like the next two.
        group: columns per group.
        single: 1 for a single activation row, else 0.
        codes: address of the weight row's codes at the block.
        scales: address of its scales there, float32.
        records: address of `[rows]` addresses of activation records.
        offsets: bytes from a record's address to its integers and factors at the block.
        rows: at most MAX_ROWS.
        steps: of the inner loop, at most STEPS.
        sums: address of `[rows, LANES]` float32.
    """
    if not all(isinstance(t, types.IntegerLiteral) for t in (bits, group, single)):
        return None
    width, columns, one = bits.literal_value, group.literal_value, bool(single.literal_value)
    form = _Form(width, columns, span_of(width, columns))
    products = ir.VectorType(F32, STEPS * form.span)
    record_step = form.step_bytes * 8 // width * 4

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> None:
        codes, scales, records, offsets, rows, steps, sums = args[3:]
        plane_offset, factor_offset = (builder.extract_value(offsets, i) for i in range(2))
        number = rows.type
        table = _pointer(builder, records, number)
        only = builder.load(table) if one else None  # once: stores might alias the table
        scratch = cgutils.alloca_once(builder, F32, size=MAX_ROWS * products.count)
        scale = load(builder, _pointer(builder, scales, F32), products, 4)

        def record(r: Any) -> Any:
            return builder.load(builder.gep(table, [r])) if only is None else only

        def product(r: Any) -> Any:
            return builder.gep(scratch, [builder.mul(r, number(products.count))])

        def multiply(r: Any) -> None:
            pointer = _pointer(builder, record(r), F32, factor_offset)
            value = builder.fmul(scale, load(builder, pointer, products, 4))
            target = builder.bitcast(product(r), products.as_pointer())
            builder.store(value, target).align = 4

        def total(r: Any) -> Any:
            return _pointer(builder, sums, form.floats, builder.mul(r, number(4 * LANES)))

        def add(r: Any, step: Any, decoded: list[list[Any]], running: Any) -> None:
            offset = builder.add(plane_offset, builder.mul(step, number(record_step)))
            dot = _step(builder, decoded, _pointer(builder, record(r), I16, offset), form)
            place = builder.gep(product(r), [builder.mul(step, number(form.span))])
            before = load(builder, running, form.floats, 4)
            after = multiply_add(builder, dot, _scales(builder, place, form), before)
            builder.store(after, running).align = 4

        zero, running = number(0), cgutils.alloca_once(builder, form.floats)
        if one:
            multiply(zero)
            builder.store(load(builder, total(zero), form.floats, 4), running)
        else:
            with cgutils.for_range(builder, rows) as loop:
                multiply(loop.index)
        with cgutils.for_range(builder, steps) as loop:
            offset = builder.mul(loop.index, number(form.step_bytes))
            decoded = _decode(builder, _pointer(builder, codes, ir.IntType(8), offset), form)
            if one:
                add(zero, loop.index, decoded, running)
            else:
                with cgutils.for_range(builder, rows) as inner:
                    add(inner.index, loop.index, decoded, total(inner.index))
        if one:
            builder.store(builder.load(running), total(zero)).align = 4

    pair = types.UniTuple(types.intp, 2)
    kinds = types.intp, types.intp, types.intp, pair, types.intp, types.intp, types.intp
    return types.void(bits, group, single, *kinds), codegen


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
                return _pointer(builder, address, kind, offset)

            decoded = _decode(builder, at(codes, ir.IntType(8), form.step_bytes), form)
            dot = _step(builder, decoded, at(planes, I16, form.group * 4), form)
            scale = builder.fmul(
                builder.load(at(scales, F32, 4)), builder.load(at(factors, F32, 4))
            )
            scale = splat(builder, scale, form.floats)
            builder.store(multiply_add(builder, dot, scale, builder.load(running)), running)
        return _add_lanes(builder, builder.load(running))

    return types.float32(bits, group, *[types.intp] * 5), codegen


def _add_lanes(builder: Any, vector: Any) -> Any:
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
def add_lanes(_context: Any, sums: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the sum of the LANES float32 at an address."""

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> Any:
        pointer = _pointer(builder, args[0], F32)
        return _add_lanes(builder, load(builder, pointer, ir.VectorType(F32, LANES), 4))

    return types.float32(types.intp), codegen


@intrinsic
def start_sums(
    _context: Any, biases: Any, totals: Any, chunks: Any, sums: Any
) -> tuple[Any, Callable[..., Any]]:
    """Write the biases' share of `chunks * LANES` groups to LANES float32 at `sums`.

    `biases` and `totals`, the groups' sums of activations, are addresses of float32.
    """

    def codegen(_: Any, builder: Any, __: Any, args: Any) -> None:
        biases, totals, chunks, sums = args
        vector = ir.VectorType(F32, LANES)
        running = cgutils.alloca_once(builder, vector)
        builder.store(constant(vector, 0.0), running)
        with cgutils.for_range(builder, chunks) as loop:
            offset = builder.mul(loop.index, chunks.type(4 * LANES))
            a, b = (
                load(builder, _pointer(builder, address, F32, offset), vector, 4)
                for address in (biases, totals)
            )
            builder.store(multiply_add(builder, a, b, builder.load(running)), running)
        target = _pointer(builder, sums, vector)
        builder.store(builder.load(running), target).align = 4

    return types.void(*[types.intp] * 4), codegen


@intrinsic(prefer_literal=True)
def split_columns(
    _context: Any, bits: Any, x: Any, inverse: Any, planes: Any, words: Any
) -> tuple[Any, Callable[..., Any]] | None:
    """Split 32 activations, as integers, into halves; return the integers' sum as int64.

    Args:
        bits: of the weights, a compile-time constant; a 16-bit word holds 16 / bits codes.
        x: address of `[32]` float32.
        inverse: factor that makes them integers of at most 30 bits.
        planes: int16 address of the low half for the first code of the first word. Code p of
            word w goes to `[p * words + w]`, its high half `16 / bits * words` after it.
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
