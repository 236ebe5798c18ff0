"""Streamed experts in the place of mlx-lm's `SwitchGLU` and `SwitchMLP`, in any of its models.

These modules map tokens and expert ids to the chosen experts' outputs, unweighted: routing comes
before them, weighting after. So the model around them stays mlx-lm's own.
"""

import functools
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwiGLU, SwitchLinear

from ..custom_kernels.device import on_gpu
from ..custom_kernels.experts.cases import wants_outputs
from ..custom_kernels.experts.decode import expert_outputs
from ..custom_kernels.experts.prefill import (
    ExpertMatrices,
    Routed,
    ascending,
    cpu_experts,
    expert_mlp,
)
from ..custom_kernels.op import Op
from ..custom_kernels.reference import NONE
from ..custom_kernels.weights import QuantizedMatrix, Shared
from ..distributed.expert_parallel import ExpertParallel
from ..format.modules import ExpertModule, projection_fields, projection_quantization
from ..format.names import PROJECTIONS
from ..store.store import ExpertStore
from .layer import StreamedLayer

ASSIGNMENTS_AT_ONCE = 2048  # token-expert assignments on a CPU: 60 MB of activations at 35B size


class StreamedSwitch(StreamedLayer):
    """A `SwitchGLU` or `SwitchMLP` whose experts stream; children but the projections are kept."""

    def __init__(self, stock: nn.Module, module: ExpertModule, number: int) -> None:
        """Take the place of `stock`, which has no weights yet."""
        super().__init__(number, module.num_experts)
        self._kind, self.module = type(stock), module
        for name, child in stock.items():
            if name not in module.shapes:
                self[name] = child

    def attach(self, store: ExpertStore, layer: int, parallel: ExpertParallel | None) -> None:
        """Use a layer of the store: see `StreamedLayer.attach`.

        Raises:
            FlashMoEError: the experts on disk are not those of the module.
        """
        super().attach(store, layer, parallel)
        twin, module = _empty(self._kind), self.module  # computes as stock's, on the slots
        for name, child in self.items():
            twin[name] = child
        layout, bank = store.layout.layers[layer], store.banks[layer]
        bound, matrices = bank.packed or bank.arrays, []
        for projection, shape in module.shapes.items():
            places = projection_fields(layout, projection)
            parts = {part: bank.arrays[place] for part, place in places.items()}
            found = projection_quantization(layout, projection, shape)
            twin[projection] = _linear(parts, found)
            if found and found.mode == "affine" and "bias" not in parts:
                three = [bound[places[name]] for name in ("weight", "scales", "biases")]
                matrices.append(QuantizedMatrix.of(three, found.bits, found.group_size))
        twin.freeze()
        plain = type(self.get("activation")) is SwiGLU and tuple(module.shapes) == PROJECTIONS
        self._on_slots = OnSlots(twin, matrices if plain and len(matrices) == 3 else None)

    @property
    def on_slots(self) -> "OnSlots":
        """The stock module over the slots."""
        return self._on_slots

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Map tokens `[..., H]` and expert ids `[..., K]` to the outputs `[..., K, H]`."""
        return switch(self, x, indices)


class OnSlots(Shared):
    """A stock module whose weights are the slots; slots take the place of expert ids.

    Attributes:
        stock: the module.
        matrices: gate, up and down for our kernels, None unless it is plain SwiGLU over affine
            weights.
    """

    def __init__(self, stock: nn.Module, matrices: ExpertMatrices | None) -> None:
        """Keep both."""
        self.stock, self.matrices = stock, matrices
        self._steps: dict[Any, Any] = {}

    def dtype(self, x: mx.array) -> mx.Dtype:
        """Return the dtype of the outputs for `x`."""
        arrays = [array for _, array in tree_flatten(self.stock.parameters())]
        found = [array.dtype for array in arrays if mx.issubdtype(array.dtype, mx.floating)]
        return functools.reduce(mx.result_type, found, x.dtype)

    def step(self, x: mx.array, top_k: int) -> Any:
        """Return a traced function of x and slots for a few tokens, None if stock is faster.

        Preparing the launches takes longer than running them, so each shape is traced once.
        """
        kind = x.shape, x.dtype, top_k
        if kind not in self._steps:
            wanted = self.matrices is not None and wants_outputs(x, self.matrices, top_k)
            self._steps[kind] = mx.compile(self._outputs) if wanted else None
        return self._steps[kind]

    def _outputs(self, x: mx.array, slots: mx.array) -> mx.array:
        assert self.matrices is not None
        rows = x.reshape(-1, x.shape[-1])
        y = expert_outputs(rows, slots.reshape(len(rows), -1), self.matrices)
        return y.reshape(*slots.shape, -1)


def _empty(kind: Any) -> Any:
    """Return a module of a class without running its constructor, which makes weights."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


def _linear(parts: dict[str, mx.array], found: Any) -> nn.Module:
    """Return stock's linear layer over the arrays of one projection."""
    linear = _empty(QuantizedSwitchLinear if found else SwitchLinear)
    if found:
        linear.bits, linear.group_size, linear.mode = found.bits, found.group_size, found.mode
        for part in ("biases", "global_scale"):  # an attribute would hide the part of that name
            if part not in parts:
                setattr(linear, part, None)
    for part, array in parts.items():
        linear[part] = array
    return linear


@Op
def switch(experts: StreamedSwitch, x: mx.array, indices: mx.array) -> mx.array:
    """Return the chosen experts' outputs, by mlx-lm's own module over the slots.

    Experts are loaded in batches, each expert once, however few slots there are.

    Args:
        experts: a layer's experts.
        x: `[..., H]` tokens.
        indices: `[..., K]` expert ids.

    Returns:
        `[..., K, H]`.
    """
    stock = experts.on_slots.stock
    slots = experts.slots(indices, x)
    if slots is not None:
        y: mx.array = stock(x, slots)
        experts.hold(y)
        return y
    rows, top_k = x.reshape(-1, x.shape[-1]), indices.shape[-1]
    parts, orders = [], []
    for assignments, where in experts.batches(np.array(indices).reshape(-1)):
        y = stock(rows[mx.array(assignments // top_k)], mx.array(where.astype(np.uint32))[:, None])
        experts.hold(y, where)
        mx.async_eval(y)
        parts.append(y.squeeze(1))
        orders.append(assignments)
    whole = (indices.size, x.shape[-1]), experts.on_slots.dtype(x)
    return experts.total(in_order(parts, orders, *whole)).reshape(*indices.shape, -1)


@switch.register
def _by_cpu(experts: StreamedSwitch, x: mx.array, indices: mx.array) -> mx.array | None:
    outputs = outputs_by_cpu(experts, x, indices, experts.on_slots.matrices)
    if outputs is None:
        return None
    return experts.total(mx.array(outputs)).reshape(*indices.shape, -1)


@switch.register
def _by_gpu(experts: StreamedSwitch, x: mx.array, indices: mx.array) -> mx.array | None:
    """Compute a few tokens by the expert kernels, and prompts by tiles."""
    matrices, top_k = experts.on_slots.matrices, indices.shape[-1]
    if matrices is None or not on_gpu(x):
        return None
    if (run := experts.on_slots.step(x, top_k)) is not None:
        ids = indices.astype(mx.uint32)
        if (slots := experts.slots(ids, x)) is None:
            return experts.in_parts(ids, partial(run, x))
        outputs: mx.array = run(x, slots)
        experts.hold(outputs)
        return outputs
    if x.size == x.shape[-1]:
        return None
    y, place = outputs_in_batches(experts, x, indices, matrices)
    if experts.is_split:
        return experts.total_of(y).reshape(*indices.shape, -1)
    return y[place].reshape(*indices.shape, -1)


def outputs_by_cpu(
    experts: Any, x: mx.array, indices: mx.array, matrices: ExpertMatrices | None
) -> np.ndarray | None:
    """Return the chosen experts' outputs `[assignments, H]` float32, or None if not on a CPU.

    Computes eagerly, a part of a batch at a time.
    """
    if matrices is None or (kernels := cpu_experts(x, matrices)) is None:
        return None
    ids, top_k = np.array(indices).reshape(-1), indices.shape[-1]
    rows, packed = kernels.rows(x.reshape(-1, x.shape[-1])), [m.packed for m in matrices]
    empty = np.zeros if experts.is_split else np.empty
    outputs = empty((ids.size, x.shape[-1]), np.float32)
    for assignments, slots in experts.batches(ids):
        order = ascending(slots)
        for part in np.split(order, range(ASSIGNMENTS_AT_ONCE, len(order), ASSIGNMENTS_AT_ONCE)):
            tokens = assignments[part] // top_k
            outputs[assignments[part]] = kernels.mlp(rows[tokens], *packed, slots[part])
    return outputs


def outputs_in_batches(
    experts: Any, x: mx.array, indices: mx.array, matrices: ExpertMatrices
) -> tuple[mx.array, mx.array]:
    """Return the chosen experts' outputs in the order computed, and where each one lies.

    If all experts are resident, the ids are not sent to the host. If other ranks have some of them,
    the outputs are in the order of `indices`, and zero where an expert is another rank's.

    Returns:
        `[rows, H]`, and `[tokens, K]` uint32.
    """
    rows, top_k = x.reshape(-1, x.shape[-1]), indices.shape[-1]
    if experts.in_memory:
        slots = indices.reshape(-1)
        if experts.is_split:
            experts.note_later(indices)
            slots = experts.own_slots(slots.astype(mx.uint32))
        tokens = mx.arange(slots.size, dtype=mx.uint32) // top_k
        whole = Routed(slots.size, experts.count)
        y, place = expert_mlp(rows, tokens, slots, matrices, whole)
        if not experts.is_split:
            return y, place.reshape(-1, top_k)
        own = slots != NONE
        y = mx.where(own[:, None], y[mx.where(own, place, 0)], 0)
        return y, mx.arange(slots.size, dtype=mx.uint32).reshape(-1, top_k)
    ids = np.array(indices).reshape(-1)
    whole = Routed(ids.size, experts.count)
    outputs, places, orders, starts = [], list[mx.array](), list[np.ndarray](), [0]
    for assignments, where in experts.batches(ids):
        tokens, slots = mx.array(np.stack([assignments // top_k, where]).astype(np.uint32))
        y, positions = expert_mlp(rows, tokens, slots, matrices, whole)
        experts.hold(y, where)
        mx.async_eval(y, positions)
        outputs.append(y)
        places.append(positions + starts[-1])
        orders.append(assignments)
        starts.append(starts[-1] + len(y))
    if experts.is_split:
        parts = [y[place - first] for y, place, first in zip(outputs, places, starts, strict=False)]
        y = in_order(parts, orders, (ids.size, x.shape[-1]), x.dtype)
        return y, mx.arange(ids.size, dtype=mx.uint32).reshape(-1, top_k)
    rank = np.argsort(np.concatenate(orders)).astype(np.uint32)
    place = mx.concatenate(places)[mx.array(rank)].reshape(-1, top_k)
    return mx.concatenate(outputs), place


def in_order(
    parts: list[mx.array], assignments: list[np.ndarray], shape: tuple[int, int], dtype: mx.Dtype
) -> mx.array:
    """Put parts `[n, H]` of the assignments' outputs in their places; others are zero: `shape`."""
    order = np.concatenate([*assignments, np.zeros(0, np.int64)])
    if len(order) == shape[0]:
        return mx.concatenate(parts)[mx.array(np.argsort(order))]
    whole = mx.zeros(shape, dtype)
    if parts:
        whole[mx.array(order)] = mx.concatenate(parts).astype(dtype)
    return whole
