"""Kernels check shapes, and the FLASHMOE_DEBUG_BOUNDS mode finds every wrong index and address.

The suite runs in that mode (conftest.py); `test_kernels_without_checks` repeats some tests without.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from numba import prange, types
from store_helpers import make_store

from flashmoe_mlx.custom_kernels.attention import step as attention_step
from flashmoe_mlx.custom_kernels.cpu import arrays, attention, bounds, gated_delta, prefill
from flashmoe_mlx.custom_kernels.cpu import decode as cpu_decode
from flashmoe_mlx.custom_kernels.cpu import records as cpu_records
from flashmoe_mlx.custom_kernels.cpu.call import FunctionByAddress, caller
from flashmoe_mlx.custom_kernels.cpu.decode import Group, numbers_of, project
from flashmoe_mlx.custom_kernels.cpu.gated_delta_step import DeltaBlock
from flashmoe_mlx.custom_kernels.cpu.moe import MoeBlock
from flashmoe_mlx.custom_kernels.cpu.pread import pread_all
from flashmoe_mlx.custom_kernels.cuda import slots as expert_slots
from flashmoe_mlx.custom_kernels.experts import decode as experts
from flashmoe_mlx.custom_kernels.experts import router, tiles
from flashmoe_mlx.custom_kernels.gated_delta import prepare, scan
from flashmoe_mlx.custom_kernels.gated_delta import step as delta_step
from flashmoe_mlx.custom_kernels.gated_delta.naive import mix
from flashmoe_mlx.custom_kernels.gated_delta.weights import Heads, MixerState, MixerWeights
from flashmoe_mlx.custom_kernels.linear import dequantize, matvec
from flashmoe_mlx.custom_kernels.weights import QuantizedMatrix
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.store.reader import Arrival, Batch

# Also run without these checks, as for users: each kernel, and a whole model.
WITHOUT_CHECKS = (
    "kernels/test_cpu_decode.py",
    "kernels/test_cpu_kernels.py::test_gated_delta",
    "models/test_exactness.py::test_tokens_and_logits_equal_stock[packed4-half]",
)
HEADS, HIDDEN, TAPS = Heads(2, 4, 48, 32), 128, 4
CHANNELS, VALUES = 2 * 2 * 48 + 4 * 32, 4 * 32
F32 = np.float32


def matrix(*shape, bits=4, group_size=32) -> QuantizedMatrix:
    weight = mx.random.normal(shape, key=mx.random.key(sum(shape)))
    return QuantizedMatrix(*mx.quantize(weight, group_size, bits), bits, group_size)


def mixer_weights(**other) -> MixerWeights:
    arrays = mx.zeros((CHANNELS, TAPS, 1)), mx.zeros(4), mx.zeros(4), mx.zeros(32)
    return replace(MixerWeights(HEADS, *arrays, 1e-6), **other)


def delta_block(
    heights=(CHANNELS, VALUES, 4, 4), out=(HIDDEN, VALUES), norm=HIDDEN, **weights
) -> DeltaBlock:
    inputs = [matrix(n, HIDDEN) for n in heights]
    return DeltaBlock(inputs, matrix(*out), (np.ones(norm, F32), 1e-6), mixer_weights(**weights))


STATE, PAST = (2, 4, 32, 48), (2, TAPS - 1, CHANNELS)


@pytest.mark.parametrize("wrong", [
    {"state": (2, 1, 32, 48)},  # of 1 of 4 heads
    {"state": (2, 4, 32, 4)},  # of 4 of 48 keys
    {"state": (2, 4, 16, 48)},
    {"state": (2, 8, 32, 48)},
    {"state": (1, 4, 32, 48)},
    {"state": (2, 4, 32 * 48)},
    {"past": (2, 1, CHANNELS)},
    {"past": (2, 0, CHANNELS)},
    {"past": (2, 3, CHANNELS - 1)},
    {"past": (1, 3, CHANNELS)},
    {"new_state": (2, 4, 32, 47)},
    {"new_past": (2, 2, CHANNELS)},
    {"h": (2, HIDDEN - 32)},
    {"h": (3, HIDDEN)},
])  # fmt: skip
def test_a_step_of_gated_delta_net_names_a_wrong_shape(wrong):
    shapes = {"h": (2, HIDDEN), "past": PAST, "state": STATE, "new_past": PAST, "new_state": STATE}
    block = delta_block()
    arrays = {name: np.zeros(shape, F32) for name, shape in (shapes | wrong).items()}
    (shape,) = wrong.values()
    found = shapes["past"] if "h" in wrong else shape  # then the cache has another batch size
    sizes = str(list(shape if shape == (2, HIDDEN - 32) else found))
    with pytest.raises(FlashMoEError) as error:
        block(**arrays)
    assert sizes in str(error.value) and "but this layer takes [" in str(error.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
@pytest.mark.parametrize("which", ["state", "past"])
def test_a_step_of_gated_delta_net_names_a_wrong_dtype(which, dtype):
    arrays = {"past": np.zeros(PAST, F32), "state": np.zeros(STATE, F32)}
    arrays[which] = arrays[which].astype(dtype)
    new = np.zeros(PAST, F32), np.zeros(STATE, F32)
    with pytest.raises(FlashMoEError, match=f"{np.dtype(dtype)}, but this layer .* float32"):
        delta_block()(np.zeros((2, HIDDEN), F32), *arrays.values(), *new)


@pytest.mark.parametrize("wrong", [
    {"heights": (CHANNELS - 32, VALUES, 4, 4)},
    {"heights": (CHANNELS, VALUES - 32, 4, 4)},
    {"heights": (CHANNELS, VALUES, 1, 4)},
    {"heights": (CHANNELS, VALUES, 4, 3)},
    {"out": (HIDDEN, VALUES - 32)},
    {"out": (HIDDEN - 1, VALUES)},
    {"norm": HIDDEN - 1},
    {"conv": mx.zeros((CHANNELS - 1, TAPS, 1))},
    {"a_log": mx.zeros(3)},
    {"dt_bias": mx.zeros(1)},
    {"norm_weight": mx.zeros(31)},
    {"heads": Heads(3, 4, 32, 32)},
])  # fmt: skip
def test_weights_of_gated_delta_net_must_match(wrong):
    if "norm_weight" in wrong:
        wrong = {"norm": HIDDEN, "heads": replace(HEADS, value_dim=31)}
    with pytest.raises(FlashMoEError, match=r"but this layer takes \[|are not a multiple of"):
        delta_block(**wrong)


@pytest.mark.parametrize("device", ["our kernels", "MLX's ops"])
@pytest.mark.parametrize("wrong", [
    {"past": (2, 1, CHANNELS)},
    {"past": (2, 0, CHANNELS)},
    {"past": (2, 3, CHANNELS + 2)},
    {"past": (1, 3, CHANNELS)},
    {"state": (2, 1, 32, 48)},
    {"state": (2, 4, 48, 32)},
    {"state": (1, 4, 32, 48)},
])  # fmt: skip
def test_a_prompt_names_a_cache_of_another_model(wrong, device, monkeypatch):
    if device == "MLX's ops":
        monkeypatch.setenv("FLASHMOE_KERNELS", "stock")
    shapes = {"past": PAST, "state": STATE} | wrong
    inputs = [mx.zeros((2, 5, n)) for n in (CHANNELS, VALUES, 4, 4)]
    with pytest.raises(FlashMoEError, match=r"GatedDeltaNet layer's .*, but this layer takes \["):
        mix(*inputs, mixer_weights(), MixerState(*map(mx.zeros, shapes.values())))


@pytest.mark.parametrize("wrong", [
    {"q": (2, 5, 1, 48)},
    {"k": (2, 5, 3, 48)},
    {"k": (2, 4, 2, 48)},
    {"g": (2, 5, 3)},
    {"beta": (2, 1, 4)},
    {"state": (2, 4, 32, 4)},
    {"state": (1, 4, 32, 48)},
    {"mask": (1, 5)},
])  # fmt: skip
def test_a_scan_names_a_wrong_shape(wrong):
    shapes = {
        "q": (2, 5, 2, 48), "k": (2, 5, 2, 48), "v": (2, 5, 4, 32), "g": (2, 5, 4),
        "beta": (2, 5, 4), "state": STATE, "mask": (2, 5),
    } | wrong  # fmt: skip
    arrays = {name: np.zeros(s, np.bool_ if name == "mask" else F32) for name, s in shapes.items()}
    with pytest.raises(FlashMoEError, match=r"but this layer takes|are not a multiple of"):
        gated_delta.gated_delta(**arrays)


@pytest.mark.parametrize(("keys", "values"), [
    ((2, 3, 9, 8), (2, 3, 9, 8)),  # not a divisor of 4 query heads
    ((2, 0, 9, 8), (2, 0, 9, 8)),
    ((1, 2, 9, 8), (1, 2, 9, 8)),
    ((2, 2, 9, 4), (2, 2, 9, 8)),
    ((2, 2, 9, 8), (2, 2, 8, 8)),
    ((2, 2, 9, 8), (2, 1, 9, 8)),
    ((2, 2, 3, 8), (2, 2, 3, 8)),  # fewer keys than queries
])  # fmt: skip
def test_attention_names_keys_of_other_sizes(keys, values):
    q = mx.zeros((2, 4, 5, 8))
    with pytest.raises(FlashMoEError, match=r"but this layer takes|are not a multiple of"):
        attention.attention(q, mx.zeros(keys), mx.zeros(values), 1.0, "causal")


def at_once(ids):
    yield np.arange(ids.size), ids.reshape(-1)


SIZES = {
    "router": (8, HIDDEN), "switch": (1, HIDDEN), "shared_gate": (64, HIDDEN),
    "shared_up": (64, HIDDEN), "shared_down": (HIDDEN, 64),
    "gate": (8, 32, HIDDEN), "up": (8, 32, HIDDEN), "down": (8, HIDDEN, 32),
}  # fmt: skip


def moe_block(top_k=3, norm=HIDDEN, **wrong) -> MoeBlock:
    made = [matrix(*shape) for shape in (SIZES | wrong).values()]
    return MoeBlock(*made[:2], made[2:5], made[5:], (np.ones(norm, F32), 1e-6), top_k, True)


@pytest.mark.parametrize("wrong", [
    {"router": (8, 64)},
    {"switch": (2, HIDDEN)},
    {"shared_up": (32, HIDDEN)},
    {"shared_down": (HIDDEN, 32)},
    {"gate": (8, 32, 64)},
    {"up": (8, 31, HIDDEN)},
    {"up": (7, 32, HIDDEN)},  # too few slots
    {"down": (7, HIDDEN, 32)},
    {"down": (8, HIDDEN, 64)},
    {"down": (8, HIDDEN - 1, 32)},
    {"norm": HIDDEN - 1},
    {"top_k": 9},
    {"top_k": 0},
])  # fmt: skip
def test_weights_of_a_mixture_must_match(wrong):
    with pytest.raises(FlashMoEError, match="but this layer takes"):
        moe_block(**wrong)


@pytest.mark.parametrize("slot", [8, -1, 1 << 40])
def test_a_mixture_names_a_slot_out_of_range(slot):
    block, h = moe_block(), np.zeros((1, HIDDEN), F32)
    with pytest.raises(FlashMoEError, match=f"slots of experts: {slot} is not one of 0 to 7"):
        block(h, lambda ids: [(np.arange(ids.size), np.full(ids.size, slot))])
    with pytest.raises(FlashMoEError, match=f"places of experts: {slot} is not one of 0 to 2"):
        block(h, lambda ids: [(np.array([slot]), np.array([0]))])
    with pytest.raises(FlashMoEError, match=r"int32, but this layer takes .* int64"):
        block(h, lambda ids: [(np.arange(ids.size), np.zeros(ids.size, np.int32))])
    with pytest.raises(FlashMoEError, match=r"hidden states: \[1, 64\]"):
        block(h[:, :64], at_once)


@pytest.mark.parametrize("change", [
    lambda c, s, b: (c, s[:, :3], b),  # short scales
    lambda c, s, b: (c, s, b[:, :3]),
    lambda c, s, b: (c, s[:7], b[:7]),
    lambda c, s, b: (c[:7], s, b),
    lambda c, s, b: (c[:, :15], s, b),
    lambda c, s, b: (c.view(mx.uint8), s, b),  # U8 in place of U32
    lambda c, s, b: (c.astype(mx.float32), s, b),
    lambda c, s, b: (c, s, b.astype(mx.bfloat16)),
    lambda c, s, b: (c, mx.repeat(s, 2, axis=1), mx.repeat(b, 2, axis=1)),  # other groups
])  # fmt: skip
def test_arrays_of_a_quantized_matrix_must_match(change):
    m = matrix(8, HIDDEN)
    arrays = change(*m.arrays)
    mx.eval(arrays)
    x, wide = mx.zeros((1, HIDDEN)), QuantizedMatrix(*(a[None] for a in arrays), 4, 32)
    for use in (
        lambda: numbers_of(QuantizedMatrix(*arrays, 4, 32)),
        lambda: prefill.packed(*arrays, 4, 32),
        lambda: matvec.dequant_matvec(x, *arrays, 4),
        lambda: dequantize.dequantize_by_kernel(QuantizedMatrix(*arrays, 4, 32), mx.float32),
        lambda: experts.expert_gate_up(x, mx.zeros((1, 1), mx.uint32), wide, wide),
    ):
        with pytest.raises(FlashMoEError, match=r"but this layer takes|does not hold whole groups"):
            use()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_matrix_must_be_row_contiguous(dtype):
    m = matrix(8, HIDDEN)
    scales = mx.zeros((4, 8), dtype).T
    with pytest.raises(FlashMoEError, match=r"\[8, 4\] is not row-contiguous"):
        numbers_of(QuantizedMatrix(m.codes, scales, scales, 4, 32))


def test_products_name_activations_of_another_width():
    group, h = Group(matrix(8, HIDDEN), matrix(8, HIDDEN, bits=8)), np.zeros((2, 96), F32)
    with pytest.raises(FlashMoEError, match=r"hidden states: \[2, 96\]"):
        project(h, group)
    with pytest.raises(FlashMoEError, match=r"the norm's weight: \[96\]"):
        project(np.zeros((2, HIDDEN), F32), group, np.ones(96, F32))
    with pytest.raises(FlashMoEError, match=r"float64, but this layer takes .* float32"):
        project(np.zeros((2, HIDDEN)), group)


@pytest.mark.parametrize("slots", [[0, 3], [-1, 0], [0, 1 << 33]])
def test_a_prompts_experts_name_a_slot_out_of_range(slots):
    gate, up, down = (matrix(3, *s).packed for s in ((32, HIDDEN), (32, HIDDEN), (HIDDEN, 32)))
    x = np.zeros((2, HIDDEN), F32)
    with pytest.raises(FlashMoEError, match=r"slots of experts: .* is not one of 0 to 2"):
        prefill.mlp(x, gate, up, down, np.array(slots))
    with pytest.raises(FlashMoEError, match=r"activations: \[2, 64\]"):
        prefill.mlp(x[:, :64], gate, up, down, np.array([0, 1]))
    short = matrix(3, 24, HIDDEN).packed
    with pytest.raises(FlashMoEError, match=r"gate and up: \[2, 24\]"):
        prefill.mlp(x, gate, short, down, np.array([0, 1]))
    with pytest.raises(FlashMoEError, match=r"activations: \[2, 32\]"):
        prefill.mlp(x, gate, up, matrix(3, HIDDEN, 64).packed, np.array([0, 1]))


def zeros(*shape, dtype=mx.float32) -> mx.array:
    return mx.zeros(shape, dtype)


ATTENTION = attention_step.AttentionHeads(4, 2, 64, 16)
WIDTH, PROJECTED = ATTENTION.width, CHANNELS + VALUES + 8
SLOT = mx.zeros((1, 2), mx.uint32)
TABLE = expert_slots.Table(mx.zeros(8, mx.uint32), zeros(8), mx.zeros(4, mx.uint32))


@pytest.mark.parametrize("launch", [
    lambda: delta_step.step(zeros(2, 1, PROJECTED), mixer_weights(), zeros(*PAST),
                                  zeros(2, 1, 32, 48)),
    lambda: delta_step.step(zeros(2, 1, PROJECTED), mixer_weights(),
                                  zeros(2, 1, CHANNELS), zeros(*STATE)),
    lambda: delta_step.step(zeros(2, 1, PROJECTED - 4), mixer_weights(), zeros(*PAST),
                                  zeros(*STATE)),
    lambda: delta_step.step(zeros(2, 1, PROJECTED), mixer_weights(), zeros(*PAST),
                                  zeros(*STATE, dtype=mx.float16)),
    lambda: prepare.prepare(zeros(2, 5, PROJECTED), mixer_weights(),
                                        zeros(2, 0, CHANNELS)),
    lambda: prepare.prepare(zeros(2, 5, PROJECTED), mixer_weights(), zeros(*PAST),
                                        zeros(1, 5, dtype=mx.bool_)),
    lambda: prepare.gated_norm(zeros(2, 4, 4, 32), zeros(2, 5, PROJECTED),
                                           mixer_weights()),
    lambda: scan.scan(*[zeros(2, 5, 2, 48)] * 2, zeros(2, 5, 4, 32),
                                  *[zeros(2, 5, 4)] * 2, zeros(2, 4, 32, 4)),
    lambda: scan.scan(*[zeros(2, 5, 2, 48)] * 2, zeros(2, 5, 4, 32),
                                  *[zeros(2, 1, 4)] * 2, zeros(*STATE)),
    lambda: attention_step.prepare(zeros(2, 1, WIDTH - 1), ATTENTION, (zeros(64), zeros(64)), 1e-6,
                                   1e7, attention_step.integer(3)),
    lambda: attention_step.prepare(zeros(2, 1, WIDTH), ATTENTION, (zeros(64), zeros(32)), 1e-6,
                                   1e7, attention_step.integer(3)),
    lambda: attention_step.attend(zeros(2, 4, 64), zeros(2, 1, WIDTH), ATTENTION,
                                  *[zeros(2, 1, 256, 64)] * 2, attention_step.integer(3)),
    lambda: attention_step.attend(zeros(2, 4, 64), zeros(2, 1, WIDTH), ATTENTION,
                                  zeros(2, 2, 256, 64), zeros(2, 2, 128, 64),
                                  attention_step.integer(3)),
    lambda: router.route(zeros(1, 9), 9, renormalize=True, shared=True),
    lambda: router.route(zeros(1, 99), 33, renormalize=True, shared=True),
    lambda: matvec.dequant_matvec(zeros(1, 96), *matrix(8, HIDDEN).arrays, 4),
    lambda: matvec.dequant_matvec(zeros(1, HIDDEN), *matrix(8, HIDDEN).arrays, 4,
                                  norm=(zeros(96), zeros(4))),
    lambda: matvec.dequant_matvec(zeros(1, HIDDEN), *matrix(8, HIDDEN).arrays, 4,
                                  residual=zeros(1, 7)),
    lambda: experts.expert_gate_up(zeros(1, HIDDEN), SLOT.astype(mx.int32),
                                   *[matrix(8, 32, HIDDEN)] * 2),
    lambda: experts.expert_gate_up(zeros(1, HIDDEN), SLOT, matrix(8, 32, HIDDEN),
                                   matrix(8, 31, HIDDEN)),
    lambda: experts.expert_gate_up(zeros(1, HIDDEN), SLOT, *[matrix(8, 32, HIDDEN)] * 2,
                                   (matrix(64, HIDDEN), matrix(32, HIDDEN))),
    lambda: experts.expert_down_combine(zeros(1, 63), SLOT, zeros(1, 2), matrix(8, HIDDEN, 32)),
    lambda: experts.expert_down_combine(zeros(1, 64), SLOT, zeros(1, 3), matrix(8, HIDDEN, 32)),
    lambda: tiles.combine_by_kernel(zeros(9, 64), zeros(3, 2, dtype=mx.uint32),
                                           zeros(3, 3)),
    lambda: tiles.cut(zeros(9, dtype=mx.int32), 4, 16),
    lambda: expert_slots.choose_slots(TABLE._replace(demand=zeros(7)), SLOT, SLOT, 4, 128),
])  # fmt: skip
def test_a_launch_on_a_gpu_names_a_wrong_shape(launch):
    with pytest.raises(FlashMoEError, match="but this layer takes"):
        launch()


def test_reads_name_arrays_of_another_length():
    files, ranges = np.zeros(2, np.int32), np.zeros(2, np.int64)
    for n in range(3):
        arrays = [ranges[:1] if i == n else ranges for i in range(3)]
        with pytest.raises(FlashMoEError, match=r"reads: .*, but this layer takes"):
            pread_all(files, *arrays)


@pytest.mark.parametrize("slot", [3, -1])
def test_a_slot_out_of_range_is_named(tmp_path, slot):
    store = make_store(tmp_path, slots=3)
    with pytest.raises(FlashMoEError, match=f"slot {slot} is not one of 3"):
        store.banks[0].pieces(0, slot, 1)
    store.close()


@pytest.mark.parametrize("room", [35, 37, 0])
def test_a_read_names_a_target_of_another_size(tmp_path, room):
    store = make_store(tmp_path, slots=3)
    arrival, target = Arrival(1), memoryview(bytearray(64))
    (descriptor,) = {piece[0] for piece in store.banks[0].pieces(0, 0, 1)[1]}
    store._reader.start(Batch([(descriptor, 0, 36, [target[:room]], arrival)]))
    arrival.wait()
    assert f"36 bytes of an expert do not fit into {room}" in str(arrival.error)
    assert not any(target)
    store.close()


@arrays.compiled
def _too_far(x: arrays.Array, out: arrays.Array) -> None:
    for i in prange(x.size + 1):
        out[i // 2] = x[i]


@arrays.serial
def _inner(x: arrays.Array, i: int) -> float:
    return x[i + 3]


@arrays.compiled
def _by_another(x: arrays.Array, out: arrays.Array) -> None:
    for i in prange(out.size):
        out[i] = _inner(x, i)


@arrays.compiled
def _too_low(x: arrays.Array, out: arrays.Array) -> None:
    for i in prange(out.shape[0]):
        out[i, 0] = x[i - x.size - 1]


@arrays.serial
def _too_wide(x: arrays.Array, out: arrays.Array) -> None:
    arrays.copy(x, out)


@arrays.serial
def _addressed(x: arrays.Array, first: int, count: int) -> int:
    bounds.within("activations", first, count, x.size)
    return cpu_records.start_of(x) + 4 * first


def _unit(unit: int, x: arrays.Array) -> None:
    x[unit] = 1


_KIND = types.void(types.int64, types.float32[::1])
_APART, _call = FunctionByAddress(_KIND, _unit, **arrays.FAST), caller(_KIND)


@arrays.compiled
def _by_address(run: int, x: arrays.Array) -> None:
    for unit in prange(x.size + 2):
        _call(run, (unit, x))


EIGHT = np.zeros(8, F32)


@pytest.mark.parametrize(("mistake", "where", "numbers"), [
    (lambda: _too_far(EIGHT, EIGHT), r"_too_far .*, out\[i // 2\] = x\[i\]\): index out", (8, 8)),
    (lambda: _by_another(EIGHT, EIGHT.copy()), r"_inner .*, return x\[i \+ 3\]\): index", (8, 8)),
    (lambda: _too_low(EIGHT, EIGHT[:, None].copy()), r"_too_low .*, .* = x\[i - x", (-1, 8)),
    (lambda: _too_wide(EIGHT[:5].copy(), EIGHT.copy()), r"copy .*source\[i\]\): index", (5, 5)),
    (lambda: _by_address(_APART.address, EIGHT.copy()), r"_unit .*, x\[unit\] = 1\)", (8, 8)),
    (lambda: _addressed(EIGHT, 2, 7), r"_addressed .*: activations: first, count", (2, 7, 8)),
    (lambda: _addressed(EIGHT, -1, 2), "_addressed .*: activations: first, count", (-1, 2, 8)),
    (lambda: _addressed(EIGHT, 3, -1), "_addressed .*: activations: first, count", (3, -1, 8)),
])  # fmt: skip
def test_a_mistake_in_a_kernel_is_named(mistake, where, numbers):
    assert bounds.CHECKED
    with pytest.raises(IndexError, match=where) as error:
        mistake()
    assert error.value.args[1:] == numbers


@arrays.compiled
def _run_jobs(
    run: int, units: int, jobs: arrays.Array, matrices: arrays.Array, records: arrays.Array,
    sources: arrays.Array, targets: arrays.Array, out: arrays.Array,
) -> None:  # fmt: skip
    for unit in prange(units):
        cpu_decode.run_unit(run, (unit, jobs, matrices, records, sources, targets, out))


def run_jobs(places=2, records=2, wide=0, out=0, **wrong: int) -> None:
    """Run a job: multiply two records by the second of three matrices `[40, HIDDEN]`."""
    group = Group(matrix(3, 40, HIDDEN))
    jobs = np.zeros((2, cpu_decode.UNITS + 1), np.int64)
    jobs[0, cpu_decode.SECOND], jobs[0, cpu_decode.SLOT], jobs[0, cpu_decode.ROWS] = -1, 1, 2
    jobs[1, cpu_decode.UNITS] = 2
    for name, value in wrong.items():
        jobs[0, getattr(cpu_decode, name)] = value
    size = cpu_records.record_size(group.numbers, group.forms)
    rows = np.zeros((records, size + wide), F32)
    arrays = rows, np.arange(2), np.arange(2)[:places], np.zeros(80 + out, F32)
    _run_jobs(cpu_decode.UNIT_OF_WORK.address, 2, jobs, group.numbers, *arrays)


@pytest.mark.parametrize(("wrong", "what"), [
    ({"SLOT": 3}, "product .*: slots: first, count, size"),
    ({"SLOT": -1}, "product .*: slots: first, count, size"),
    ({"RECORD": 1}, "_find .*: records: first, count, size"),
    ({"RECORD": -1}, "_find .*: records: first, count, size"),
    ({"records": 1}, "_find .*: records: first, count, size"),
    ({"wide": -1}, "_unit .*: numbers of a record: first, count, size"),
    ({"START": 1}, "_unit .*: sources: first, count, size"),
    ({"ROWS": 3}, "_unit .*: sources: first, count, size"),
    ({"PLACE": 1}, "_unit .*: outputs: first, count, size"),
    ({"PLACE": -1}, "_unit .*: outputs: first, count, size"),
    ({"out": -1}, "_unit .*: outputs: first, count, size"),
    ({"places": 1}, r"_unit .* targets\[row \+ r\] .*: index"),
    ({"FIRST": 1}, r"_unit .*: index out of bounds of axis 0"),
    ({"SECOND": 1}, r"_unit .*: index out of bounds of axis 0"),
])  # fmt: skip
def test_a_wrong_entry_of_a_job_table_is_named(wrong, what):
    run_jobs()
    with pytest.raises(IndexError, match=what):
        run_jobs(**wrong)


def test_a_short_activation_row_or_record_is_named():
    (numbers,) = Group(matrix(8, HIDDEN)).numbers
    size = cpu_records.record_size(numbers[None], np.zeros(1, np.int64))
    cpu_records.write_record(np.zeros(HIDDEN, F32), numbers, np.zeros(size, F32))
    for columns, room, what in ((96, size, "activations"), (HIDDEN, size - 1, "a record")):
        with pytest.raises(IndexError, match=f"write_record .*: {what}: first, count, size"):
            cpu_records.write_record(np.zeros(columns, F32), numbers, np.zeros(room, F32))


@pytest.mark.parametrize(("field", "change"), [
    ("CODES", 64), ("CODES", -1), ("SCALES", 4), ("BIASES", 1 << 20), ("SLOTS", 3), ("HEIGHT", 1),
    ("COLUMNS", 32),
])  # fmt: skip
def test_an_address_outside_the_matrix_is_named(field, change):
    group, block = Group(matrix(2, 8, HIDDEN)), moe_block()
    group.numbers[0, getattr(cpu_records, field)] += change
    with pytest.raises(IndexError, match=r"matrix 0: bytes .* of an array of"):
        project(np.zeros((1, HIDDEN), F32), group)
    block._all.numbers[3, getattr(cpu_records, field)] += change
    with pytest.raises(IndexError, match=r"matrix 3: bytes .* of an array of"):
        block(np.zeros((1, HIDDEN), F32), at_once)
    delta = delta_block()
    delta._all.numbers[4, getattr(cpu_records, field)] += change
    new = [np.zeros(shape, F32) for shape in (PAST, STATE)]
    with pytest.raises(IndexError, match=r"matrix 4: bytes .* of an array of"):
        delta(np.zeros((2, HIDDEN), F32), *new, *new)


@pytest.mark.parametrize(("number", "change", "what"), [
    (1, 8, "a matrix: bytes 8 to"),
    (3, -4, "a matrix: bytes -4 to"),
    (7, -2, "unit .*: slots: first, count, size"),
    (5, -16, "unit .*: codes of a row: first, count, size"),
    (6, 1, "unit .*: codes of a row: first, count, size"),
])  # fmt: skip
def test_wrong_numbers_of_a_prompts_weights_are_named(number, change, what):
    weight = matrix(3, 32, HIDDEN).packed
    weight.numbers[number] += change
    with pytest.raises(IndexError, match=what):
        prefill.times(np.zeros((1, HIDDEN), F32), weight, prefill.runs(1, np.array([2])))


PLANTED = """
import numpy as np
from numba import prange
from flashmoe_mlx.custom_kernels.cpu.bounds import jit

@jit(parallel=True)
def beyond(x, out):
    for i in prange(out.size):
        out[i] = x[x.size + i]

out = np.zeros(2)
beyond(np.arange(16.0)[:8], out)
print(out, sum(beyond.stats.cache_hits.values()))
"""


def test_the_modes_cache_code_separately(tmp_path):
    file = tmp_path / "planted.py"
    file.write_text(PLANTED)

    def run(checked: str) -> str:
        env = os.environ | {bounds.VARIABLE: checked}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True)
        return done.stdout + done.stderr

    assert run("0") == "[8. 9.] 0\n"
    assert "IndexError: ('beyond (planted.py:9, out[i] = x[x.size + i]): index" in run("1")
    assert run("0") == "[8. 9.] 1\n"


def test_a_wrong_mode_is_named(monkeypatch):
    monkeypatch.setenv(bounds.VARIABLE, "yes")
    with pytest.raises(FlashMoEError, match="FLASHMOE_DEBUG_BOUNDS = 'yes' is not valid"):
        bounds._asked()


def test_kernels_without_checks():
    """Users run other code: with threads, and vectorized where the checks would be."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *WITHOUT_CHECKS],
        cwd=Path(__file__).parents[1],
        env=env | {bounds.VARIABLE: "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
