"""The mixture-of-experts block: router, shared expert and streamed experts."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from ...custom_kernels.case import NAMES
from ...custom_kernels.cpu.entry import cpu_steps
from ...custom_kernels.device import on_gpu
from ...custom_kernels.experts.cases import wanted
from ...custom_kernels.experts.decode import add_terms, expert_mlp_by_kernels, expert_terms
from ...custom_kernels.experts.prefill import ExpertMatrices, Format
from ...custom_kernels.experts.router import choose_experts, route, router_logits
from ...custom_kernels.experts.tiles import combine
from ...custom_kernels.linear.linear import join, joined, linear, mlp
from ...custom_kernels.op import Op
from ...custom_kernels.traced import Traced
from ...custom_kernels.weights import QuantizedMatrix, arrays_of, norm_parts, remembered
from ...distributed.expert_parallel import ExpertParallel
from ...format.layout import LayerLayout
from ...format.modules import projection_fields, projection_quantization
from ...format.names import PROJECTIONS
from ...store.slots import DTYPES as SLOT_DTYPES
from ...store.store import ExpertStore
from ..layer import StreamedLayer
from ..switch import outputs_by_cpu, outputs_in_batches
from .args import ModelArgs

PREFETCHED = 5 / 8  # of top-k; lower-ranked experts are wrong too often
Step = Callable[..., Any]


class MLP(nn.Module):
    """SwiGLU feed-forward; the shared expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        """Make the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map `[..., H]` to `[..., H]`."""
        return mlp(x, self.gate_proj, self.up_proj, self.down_proj)

    def matrices(self) -> list[QuantizedMatrix] | None:
        """Return gate, up and down, or None if they are not affine-quantized."""
        weights = [join([self[name]]) for name in PROJECTIONS]
        return [w.matrix for w in weights if w] if all(weights) else None


class ResidentExperts(SwitchGLU):
    """Experts as ordinary parameters, named as in mlx-lm: expert e lies in slot e."""

    def matrices(self) -> list[QuantizedMatrix] | None:
        """Return gate, up and down, or None if they are not affine-quantized."""
        layers = [self[name] for name in PROJECTIONS]

        def make() -> list[QuantizedMatrix] | None:
            if not all(type(x) is QuantizedSwitchLinear and x.mode == "affine" for x in layers):
                return None
            return [QuantizedMatrix.of_layer(layer) for layer in layers]

        return remembered(self, "_known", lambda: arrays_of(layers), make)

    holds_all = in_memory = True
    is_split, weighs_first, is_first = False, False, True

    def total_of(self, outputs: mx.array) -> mx.array:
        """Return the outputs: no other machine has experts."""
        return outputs

    @property
    def count(self) -> int:
        """The layer's number of experts."""
        return self.gate_proj.num_experts

    def slots(self, ids: mx.array, x: mx.array) -> mx.array:
        """Return the experts' slots: their ids."""
        return ids

    def batches(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all positions in `ids`, and their slots: the ids."""
        yield np.arange(ids.size), ids.reshape(-1)

    def hold(self, consumer: mx.array, slots: np.ndarray | None = None) -> None:
        """Do nothing: parameters are never overwritten."""

    def mixture(self, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
        """Return the weighted sum of the chosen experts' outputs: `[..., H]` to `[..., H]`."""
        return resident_mixture(self, x, indices, scores)


def formats(layout: LayerLayout, args: ModelArgs) -> tuple[list[Format], str] | None:
    """Return rows, columns, bits and group size of gate, up and down, and the scales' dtype.

    None if the scales are wider than 16 bits.
    """
    found = []
    for projection in PROJECTIONS:
        shape = args.expert_shape(projection)
        quantization = projection_quantization(layout, projection, shape)
        assert quantization
        found.append((*shape, quantization.bits, quantization.group_size))
    scales = layout.fields[projection_fields(layout, PROJECTIONS[0])["scales"]]
    dtype = NAMES.get(SLOT_DTYPES[scales.dtype])
    return (found, dtype) if dtype and dtype != "float32" else None


class StreamedExperts(StreamedLayer):
    """One layer's routed experts, read from disk when the router chooses them. No parameters."""

    def __init__(self, args: ModelArgs, number: int) -> None:
        """Make the layer that has this number; `attach` a store."""
        super().__init__(number, args.num_experts)
        self._args = args

    def attach(self, store: ExpertStore, layer: int, parallel: ExpertParallel | None) -> None:
        """Use a layer of the store: see `StreamedLayer.attach`.

        Raises:
            FlashMoEError: the experts on disk contradict the sizes in config.json.
        """
        super().attach(store, layer, parallel)
        layout, bank = store.layout.layers[layer], store.banks[layer]
        self._matrices = []
        for index, projection in enumerate(PROJECTIONS):
            shape = self._args.expert_shape(projection)
            found = projection_quantization(layout, projection, shape)
            assert found
            three = (bank.packed or bank.arrays)[3 * index : 3 * index + 3]
            self._matrices.append(QuantizedMatrix.of(three, found.bits, found.group_size))

    def matrices(self) -> list[QuantizedMatrix]:
        """Return gate, up and down."""
        return self._matrices

    def mixture(self, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
        """Return the weighted sum of the chosen experts' outputs: see `streamed_mixture`."""
        return streamed_mixture(self, x, indices, scores)


@Op
def resident_mixture(
    experts: ResidentExperts, x: mx.array, indices: mx.array, scores: mx.array
) -> mx.array:
    """Compute `streamed_mixture` for experts that are ordinary parameters."""
    return (experts(x, indices) * scores[..., None]).sum(axis=-2)


@resident_mixture.register
def _resident_by_gpu(
    experts: ResidentExperts, x: mx.array, indices: mx.array, scores: mx.array
) -> mx.array | None:
    matrices = experts.matrices() if on_gpu(x) else None
    return _weighted(experts, x, indices, scores, matrices) if matrices else None


@Op
def streamed_mixture(
    experts: StreamedExperts, x: mx.array, indices: mx.array, scores: mx.array
) -> mx.array:
    """Return the weighted sum of the chosen experts' outputs.

    Experts are loaded in batches, each expert once, however few slots there are. Every assignment
    is computed separately and summed in the router's order, so the result does not depend on the
    cache. If all experts are resident, a GPU does not send the ids to the host.

    Args:
        experts: a layer's experts.
        x: `[..., H]` tokens.
        indices: `[..., K]` expert ids.
        scores: `[..., K]` weights.

    Returns:
        `[..., H]`.
    """
    return _weighted(experts, x, indices, scores, experts.matrices())


@streamed_mixture.register
def _streamed_by_cpu(
    experts: StreamedExperts, x: mx.array, indices: mx.array, scores: mx.array
) -> mx.array | None:
    if (outputs := outputs_by_cpu(experts, x, indices, experts.matrices())) is None:
        return None
    # In numpy: MLX would copy a prompt's outputs twice.
    tokens, top_k = x.size // x.shape[-1], indices.shape[-1]
    first = experts.weighs_first and x.shape[-2] > 1
    if experts.is_split and not first:
        experts.total_in_place(outputs)
    weights = np.array(scores.astype(mx.float32)).reshape(tokens, 1, top_k)
    mixture = mx.array(weights @ outputs.reshape(tokens, top_k, -1)).reshape(x.shape)
    return experts.total(mixture) if first else mixture


def _weighted(
    experts: ResidentExperts | StreamedExperts,
    x: mx.array,
    indices: mx.array,
    scores: mx.array,
    matrices: ExpertMatrices,
) -> mx.array:
    """Return the weighted sum, in the router's order."""
    y, place = outputs_in_batches(experts, x, indices, matrices)
    first = experts.weighs_first and x.shape[-2] > 1
    mixture = combine(y if first else experts.total_of(y), place, scores.reshape(place.shape))
    return (experts.total_of(mixture) if first else mixture).reshape(x.shape)


def _of_real_rows(ids: mx.array, rows: mx.array | None) -> mx.array:
    """Replace the experts `[..., K]` of padding by those of a real row."""
    if rows is None:
        return ids
    some = ids.reshape(-1, ids.shape[-1])[mx.argmax(rows.reshape(-1))]
    return mx.where(rows[..., None], ids, some)


class SparseMoeBlock(nn.Module):
    """Router, routed experts and shared expert of one layer."""

    def __init__(self, args: ModelArgs, layer: int, streamed: bool) -> None:
        """Make the block; unless streamed, experts are ordinary parameters."""
        super().__init__()
        hidden, inner = args.hidden_size, args.moe_intermediate_size
        self._step = Traced()
        self.top_k = args.num_experts_per_tok
        self.norm_topk_prob = args.norm_topk_prob
        self.gate = nn.Linear(hidden, args.num_experts, bias=False)
        self.shared_expert = MLP(hidden, args.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)
        self.switch_mlp = (
            StreamedExperts(args, layer)
            if streamed
            else ResidentExperts(hidden, inner, args.num_experts)
        )

    def __call__(self, h: mx.array, norm: nn.RMSNorm, rows: mx.array | None = None) -> mx.array:
        """Map the residual stream `[B, T, H]` to `[B, T, H]`: h + block(norm(h)).

        `rows` `[B, T]` is False for padding, which reads no experts and has undefined outputs.
        """
        return sparse_moe(self, h, norm, rows)

    def traced(self, h: mx.array) -> Callable[[mx.array], tuple[mx.array, mx.array | None]] | None:
        """Return the traced block for `[B, 1, H]`, None without one, or if experts are missing.

        Of several ranks, the block returns the experts' ids as well.
        """
        experts = self.switch_mlp
        if not (experts.in_memory and self._step.ready(h)):
            return None
        choose, run, terms, _ = self._step.functions

        def step(h: mx.array) -> tuple[mx.array, mx.array | None]:
            ids, scores = choose(h)
            if not experts.is_split:
                return run(h, ids, scores), None  # expert e lies in slot e
            own = terms(h, experts.own_slots(ids), scores)
            return add_terms(experts.lazy_total(own), h), ids

        return step

    def prefetch(self, h: mx.array, norm: nn.RMSNorm) -> None:
        """Start to read the experts with the highest scores for `[B, 1, H]`, on a CPU only.

        h is the previous layer's output, without this layer's attention.
        """
        logits = router_logits(h, self.gate, norm)
        if logits is not None:
            count = math.ceil(PREFETCHED * self.top_k)
            best = np.argpartition(logits, -count, axis=-1)[:, -count:]
            self.switch_mlp.prefetch(best)


@Op
def sparse_moe(
    block: SparseMoeBlock, h: mx.array, norm: nn.RMSNorm, rows: mx.array | None = None
) -> mx.array:
    """Run a block: see `SparseMoeBlock.__call__`."""
    x = norm(h)
    logits, shared_gate = linear(x, block.gate, block.shared_expert_gate)
    indices, scores = choose_experts(logits, block.top_k, block.norm_topk_prob)
    indices = _of_real_rows(indices, rows)
    shared = mx.sigmoid(shared_gate) * block.shared_expert(x)
    # The device computes the shared expert while the disk reads the routed ones.
    mx.async_eval(indices, scores)
    mx.async_eval(shared)
    routed = block.switch_mlp.mixture(x, indices, scores)
    return h + routed + shared


@sparse_moe.register
def _by_gpu(
    block: SparseMoeBlock, h: mx.array, norm: nn.RMSNorm, rows: mx.array | None = None
) -> mx.array | None:
    """Run the block in four launches."""
    known = block._step.ready(h)
    if not known and not on_gpu(h):
        return None
    functions = block._step.functions if known else _functions(block, h, norm)
    if functions is None:
        return None
    choose, run, *terms = functions
    experts = block.switch_mlp
    ids, scores = choose(h)
    ids = _of_real_rows(ids, rows)
    if (slots := experts.slots(ids, h)) is None:
        ways = (lambda slots, way=way: way(h, slots, scores) for way in terms)
        y: mx.array = add_terms(experts.in_parts(ids, *ways), h)
    else:
        y = run(h, slots, scores)
        experts.hold(y)
    if not known:
        block._step.trace((h,), (block, norm), *functions)
    return y


def _functions(block: SparseMoeBlock, h: mx.array, norm: nn.RMSNorm) -> tuple[Step, ...] | None:
    """Return the two halves of a block: before and after the slots are known.

    Then the second half for a part of the experts, up to the terms of the sum: of the first part,
    with the shared expert on the first rank; and of others.
    """
    shared, matrices = block.shared_expert.matrices(), block.switch_mlp.matrices()
    if not (shared and matrices and wanted(h, matrices, shared, block.top_k)):
        return None

    def choose(h: mx.array) -> tuple[mx.array, mx.array]:
        # In float32: rounding that changes the router's choice affects all later layers.
        gates = block.gate, block.shared_expert_gate
        logits = joined(h, *gates, norm=norm, dtype=mx.float32)
        return route(logits, block.top_k, renormalize=block.norm_topk_prob, shared=True)

    def run(h: mx.array, slots: mx.array, scores: mx.array) -> mx.array:
        mixture = h, slots, scores, matrices, shared
        return expert_mlp_by_kernels(*mixture, norm=norm_parts(norm), residual=h)

    def terms(adds_shared: bool, h: mx.array, slots: mx.array, scores: mx.array) -> mx.array:
        mixture = h, slots, scores, matrices, shared
        return expert_terms(*mixture, norm=norm_parts(norm), adds_shared=adds_shared)

    return choose, run, partial(terms, block.switch_mlp.is_first), partial(terms, False)


@sparse_moe.register
def _step_by_cpu(
    block: SparseMoeBlock, h: mx.array, norm: nn.RMSNorm, rows: mx.array | None = None
) -> mx.array | None:
    """Run the block for one token per row, in one call."""
    if not (steps := cpu_steps(h)) or (matrices := block.switch_mlp.matrices()) is None:
        return None
    shared = [block.shared_expert[name] for name in PROJECTIONS]
    experts, choice = block.switch_mlp, (block.top_k, block.norm_topk_prob)
    ways = experts.batches, experts.total_in_place if experts.is_split else None
    return steps.moe_step(
        h, block.gate, block.shared_expert_gate, shared, matrices, norm, *choice, *ways
    )
