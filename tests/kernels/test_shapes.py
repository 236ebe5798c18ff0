"""Kernels name arrays of a wrong shape, dtype or slot before they compute."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from block_cases import (
    CHANNELS,
    F32,
    HEADS,
    HIDDEN,
    PAST,
    STATE,
    TAPS,
    VALUES,
    at_once,
    delta_block,
    matrix,
    mixer_weights,
    moe_block,
)
from store_helpers import make_store

from flashmoe_mlx.custom_kernels.attention import step as attention_step
from flashmoe_mlx.custom_kernels.cpu import attention, gated_delta, prefill
from flashmoe_mlx.custom_kernels.cpu.decode import Group, numbers_of, project
from flashmoe_mlx.custom_kernels.cpu.pread import pread_all
from flashmoe_mlx.custom_kernels.cuda import slots as expert_slots
from flashmoe_mlx.custom_kernels.experts import decode as experts
from flashmoe_mlx.custom_kernels.experts import router, tiles
from flashmoe_mlx.custom_kernels.gated_delta import prepare, scan
from flashmoe_mlx.custom_kernels.gated_delta import step as delta_step
from flashmoe_mlx.custom_kernels.gated_delta.naive import mix
from flashmoe_mlx.custom_kernels.gated_delta.weights import Heads, MixerState
from flashmoe_mlx.custom_kernels.linear import dequantize, matvec
from flashmoe_mlx.custom_kernels.weights import QuantizedMatrix
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.store.reader import Arrival, Batch


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
