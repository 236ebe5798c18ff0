"""The mixture-of-experts block: router, shared expert, and the experts that come from disk."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from ...custom_kernels.cpu.entry import cpu_steps
from ...custom_kernels.device import on_gpu
from ...custom_kernels.experts.cases import wanted
from ...custom_kernels.experts.decode import expert_mlp_by_kernels
from ...custom_kernels.experts.prefill import Banks, Routed, ascending, cpu_experts, expert_mlp
from ...custom_kernels.experts.router import route
from ...custom_kernels.experts.tiles import combine
from ...custom_kernels.launch import scalar
from ...custom_kernels.linear.linear import join, joined, linear, mlp
from ...custom_kernels.traced import Traced
from ...custom_kernels.weights import Bank, arrays_of, same
from ...format.layout import quantisation
from ...format.names import PROJECTIONS
from ...store.cuda.mailbox import to_device, to_host
from ...store.requests import Pending
from ...store.store import ExpertStore
from .args import ModelArgs

FEW = 16  # missing experts, which are not worth a pause between the first half and the second
GUESSED = 5 / 8  # of as many experts as a token has; the others are wrong too often
PAIRS_AT_ONCE = 2048  # of token and expert, on a CPU; what they make takes 60 MB at 35B size
Step = Callable[..., Any]


class MLP(nn.Module):
    """SwiGLU feed-forward; the shared expert."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        """Make the three projections of a `hidden`-wide block."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Map `[..., H]` to `[..., H]`."""
        return mlp(x, self.gate_proj, self.up_proj, self.down_proj)

    def banks(self) -> list[Bank] | None:
        """Return the weights of gate, up and down, or None if they are not affine-quantised."""
        weights = [join([self[name]]) for name in PROJECTIONS]
        return [w.bank for w in weights if w] if all(weights) else None


class ResidentExperts(SwitchGLU):
    """Experts as ordinary parameters, in mlx-lm's names: expert e lies in slot e."""

    def banks(self) -> list[Bank] | None:
        """Return gate, up and down, or None if they are not affine-quantised."""
        layers = [self[name] for name in PROJECTIONS]
        if not all(type(x) is QuantizedSwitchLinear and x.mode == "affine" for x in layers):
            return None
        arrays = arrays_of(layers)
        known = getattr(self, "_known", None)
        if known is None or not same(known[0], arrays):
            banks = [Bank(x.weight, x.scales, x.biases, x.bits, x.group_size) for x in layers]
            known = self._known = arrays, banks
        return known[1]

    def slots(self, ids: mx.array, x: mx.array) -> mx.array:
        """Return the slots of experts, which are their ids."""
        return ids

    def waves(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all places in `ids` and their slots, which are the ids."""
        yield np.arange(ids.size), ids.reshape(-1)

    def hold(self, consumer: mx.array, slots: np.ndarray | None = None) -> None:
        """Do nothing: nobody writes into these banks."""

    def mixture(self, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
        """Run the chosen experts and add up what they give: `[..., H]` to `[..., H]`."""
        if (banks := self.banks()) and on_gpu(x):
            return _mixture_of_residents(x, indices, scores, banks)
        return (self(x, indices) * scores[..., None]).sum(axis=-2)


class StreamedExperts(nn.Module):
    """One layer's routed experts, read from disk when the router picks them. No parameters."""

    def __init__(self, args: ModelArgs, layer: int, store: ExpertStore) -> None:
        """Bind a layer to the store.

        Raises:
            FlashMoEError: the experts on disk do not have the sizes that config.json states.
        """
        super().__init__()
        self._store = store
        self._layer = layer
        layout, arrays = store.layout.layers[layer], store.banks[layer].arrays
        self._banks = []
        for index, projection in enumerate(PROJECTIONS):
            bits, group_size = quantisation(layout, projection, args.expert_shape(projection))
            self._banks.append(Bank.of(arrays[3 * index : 3 * index + 3], bits, group_size))

    def banks(self) -> list[Bank]:
        """Return gate, up and down."""
        return self._banks

    def slots(self, ids: mx.array, x: mx.array) -> mx.array | None:
        """Make experts resident and return their slots, or None if the bank holds too few.

        Waits for the ids, unless every expert is resident: then expert e lies in slot e; or the
        GPU can bring them by itself.

        Args:
            ids: `[..., K]`.
            x: `[..., H]`, what they were chosen for.
        """
        bank = self._store.banks[self._layer]
        if bank.complete:
            return ids
        if (there := self._store.bring(self._layer, ids, x)) is not None:
            return there
        chosen, places = np.unique(to_host(ids), return_inverse=True)
        if len(chosen) > len(bank):
            return None
        slots = np.array(self._store.fetch(self._layer, chosen.tolist()), dtype=np.uint32)
        return to_device(slots[places].reshape(ids.shape))

    def waves(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Bring experts into the bank, as many as it holds at a time.

        Those that are resident come first, so that they are computed while others are read; of
        the others, those that most rows ask for come last and stay for the tokens that follow.
        Where reading is the computing cores' work, all that fit come together.
        While one wave is computed the next ones are read, as far ahead as the bank has room.

        Yields:
            The flat places in `ids` whose experts are there now, and their slots. They stay
            until the next wave is asked for, or what was given to `hold` is evaluated.
        """
        flat, bank = ids.reshape(-1), self._store.banks[self._layer]
        counts = np.bincount(flat, minlength=bank.layout.num_experts)
        wanted = np.flatnonzero(counts)
        if bank.complete:
            self._store.count_hits(self._layer, wanted.tolist())
            yield np.arange(flat.size), flat.astype(np.int64)
            return
        slot_of = np.full(len(counts), -1, dtype=np.int64)
        room = len(bank)
        ahead: deque[Pending] = deque()

        def serve() -> tuple[np.ndarray, np.ndarray]:
            slot_of[ahead[0].experts] = ahead[0].wait()
            slots = slot_of[flat]
            slot_of[ahead[0].experts] = -1
            places = np.flatnonzero(slots >= 0)
            return places, slots[places]

        self._store.decide(self._layer, wanted.tolist())
        try:
            for wave in self._waves(wanted, counts[wanted]):
                while len(wave) > room:
                    yield serve()
                    room += len(ahead.popleft().experts)
                ahead.append(self._store.request(self._layer, wave))
                room -= len(wave)
            while ahead:
                yield serve()
                ahead.popleft()
        finally:  # if it failed, whoever keeps the traceback keeps this frame
            for pending in ahead:
                pending.release()

    def guess(self, ids: np.ndarray) -> None:
        """Begin to read experts `[..., K]` that are likely to be asked for next."""
        self._store.guess(self._layer, np.unique(ids).tolist())

    def hold(self, consumer: mx.array, slots: np.ndarray | None = None) -> None:
        """Keep the bank, or some slots of it, as they are until `consumer` is evaluated."""
        self._store.hold(consumer, self._layer, None if slots is None else slots.tolist())

    def mixture(self, x: mx.array, indices: mx.array, scores: mx.array) -> mx.array:
        """Run the chosen experts and add up what they give.

        They come in waves, each read once however small the bank is. Every row is computed on its
        own and added up in the router's order, so the result does not depend on the bank. Where
        the bank has all experts a GPU need not tell the host which ones were chosen.

        Args:
            x: `[..., H]` tokens.
            indices: `[..., K]` expert ids.
            scores: `[..., K]` their weights.

        Returns:
            `[..., H]`.
        """
        if kernels := cpu_experts(x, self._banks):
            return self._mixture_by_cpu(kernels, x, indices, scores)
        if self._store.banks[self._layer].complete:
            return _mixture_of_residents(x, indices, scores, self._banks)
        rows, top_k = x.reshape(-1, x.shape[-1]), indices.shape[-1]
        ids = np.array(indices).reshape(-1)
        part_of = Routed(ids.size, self._store.layout.layers[self._layer].num_experts)
        outputs, places, orders, done = [], [], [], 0
        for pairs, slots in self.waves(ids):
            tokens, where = mx.array(np.stack([pairs // top_k, slots]).astype(np.uint32))
            y, there = expert_mlp(rows, tokens, where, self._banks, part_of)
            self.hold(y, slots)
            mx.async_eval(y, there)
            outputs.append(y)
            places.append(there + done)
            orders.append(pairs)
            done += len(y)
        order, there = mx.array(np.concatenate(orders).astype(np.uint32)), mx.concatenate(places)
        there = mx.put_along_axis(there, order, there, axis=0).reshape(-1, top_k)
        y = combine(mx.concatenate(outputs), there, scores.reshape(-1, top_k))
        return y.reshape(x.shape)

    def _mixture_by_cpu(
        self, kernels: ModuleType, x: mx.array, indices: mx.array, scores: mx.array
    ) -> mx.array:
        """Do what `mixture` does by the CPU's kernels, a part of a wave at a time."""
        ids, top_k = np.array(indices).reshape(-1), indices.shape[-1]
        rows, packed = kernels.rows(x.reshape(-1, x.shape[-1])), [b.packed for b in self._banks]
        outputs = np.empty((ids.size, x.shape[-1]), np.float32)
        for pairs, slots in self.waves(ids):
            order = ascending(slots)
            for part in np.split(order, range(PAIRS_AT_ONCE, len(order), PAIRS_AT_ONCE)):
                tokens = pairs[part] // top_k
                outputs[pairs[part]] = kernels.mlp(rows[tokens], *packed, slots[part])
        # By numpy: all outputs of a prompt are many, and MLX would copy them twice.
        weights = np.array(scores.astype(mx.float32)).reshape(len(rows), 1, -1)
        return mx.array(weights @ outputs.reshape(len(rows), top_k, -1)).reshape(x.shape)

    def _waves(self, experts: np.ndarray, rows: np.ndarray) -> list[list[int]]:
        """Split experts into groups of which two fit the bank: resident ones, then by rows."""
        bank = self._store.banks[self._layer]
        if len(experts) <= len(bank) and self._store.reads_compute:
            return [experts.tolist()]
        by_rows = experts[np.argsort(rows, kind="stable")].tolist()
        resident = set(bank.resident(by_rows))
        missing = [e for e in by_rows if e not in resident]
        missing.sort(key=bank.arriving.__contains__, reverse=True)  # on their way: first
        most = len(bank) if len(experts) <= len(bank) else max(1, len(bank) // 2)
        half = min(most, max(FEW, -(-len(missing) // 2)))
        waves = _groups([e for e in by_rows if e in resident], most) + _groups(missing, half)
        return [sorted(wave) for wave in waves]


def _mixture_of_residents(
    x: mx.array, indices: mx.array, scores: mx.array, banks: Banks
) -> mx.array:
    """Run and add up experts that lie in the slots of their ids, without asking which they are."""
    rows, top_k = x.reshape(-1, x.shape[-1]), indices.shape[-1]
    slots = indices.reshape(-1)
    tokens = mx.arange(slots.size, dtype=mx.uint32) // top_k
    part_of = Routed(slots.size, len(banks[0].codes))
    y, places = expert_mlp(rows, tokens, slots, banks, part_of)
    return combine(y, places.reshape(-1, top_k), scores.reshape(-1, top_k)).reshape(x.shape)


def _groups(experts: list[int], size: int) -> list[list[int]]:
    """Cut a list into pieces of at most `size`."""
    return [experts[i : i + size] for i in range(0, len(experts), size)] if experts else []


def _of_real_rows(ids: mx.array, rows: mx.array | None) -> mx.array:
    """Let padding ask for the experts `[..., K]` of some row that is none."""
    if rows is None:
        return ids
    some = ids.reshape(-1, ids.shape[-1])[mx.argmax(rows.reshape(-1))]
    return mx.where(rows[..., None], ids, some)


class SparseMoeBlock(nn.Module):
    """Router, routed experts and shared expert of one layer."""

    def __init__(self, args: ModelArgs, layer: int, store: ExpertStore | None) -> None:
        """Make the block; without a store the experts are ordinary parameters."""
        super().__init__()
        hidden, inner = args.hidden_size, args.moe_intermediate_size
        self._step = Traced()
        self.top_k = args.num_experts_per_tok
        self.norm_topk_prob = args.norm_topk_prob
        self.gate = nn.Linear(hidden, args.num_experts, bias=False)
        self.shared_expert = MLP(hidden, args.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)
        self.switch_mlp = (
            ResidentExperts(hidden, inner, args.num_experts)
            if store is None
            else StreamedExperts(args, layer, store)
        )

    def __call__(self, h: mx.array, norm: nn.RMSNorm, rows: mx.array | None = None) -> mx.array:
        """Map the residual stream `[B, T, H]` to `[B, T, H]`: h + block(norm(h)).

        Where `rows` `[B, T]` is False there is padding, for which no expert is read, and what comes
        out means nothing.
        """
        known = self._step.ready(h)
        if (known or on_gpu(h)) and (y := self._by_kernels(h, norm, known, rows)) is not None:
            return y
        if (steps := cpu_steps(h)) and (y := self._by_cpu(steps, h, norm)) is not None:
            return y
        x = norm(h)
        logits, shared_gate = linear(x, self.gate, self.shared_expert_gate)
        probabilities = mx.softmax(logits, axis=-1, precise=True)
        indices = mx.argpartition(probabilities, kth=-self.top_k, axis=-1)[..., -self.top_k :]
        scores = mx.take_along_axis(probabilities, indices, axis=-1)
        indices = _of_real_rows(indices, rows)
        if self.norm_topk_prob:
            scores = scores / scores.sum(axis=-1, keepdims=True)
        shared = mx.sigmoid(shared_gate) * self.shared_expert(x)
        # The device computes the shared expert while the disk delivers the routed ones.
        mx.async_eval(indices, scores)
        mx.async_eval(shared)
        routed = self.switch_mlp.mixture(x, indices, scores)
        return h + routed + shared

    def guess(self, h: mx.array, norm: nn.RMSNorm) -> None:
        """Begin to read experts that the router likes best for `[B, 1, H]`, if a CPU computes.

        The layer before has made h; attention will add to it before the router is asked.
        """
        steps = cpu_steps(h)
        logits = steps.router_logits(h, self.gate, norm) if steps else None
        if logits is not None:
            few = math.ceil(GUESSED * self.top_k)
            best = np.argpartition(logits, -few, axis=-1)[:, -few:]
            self.switch_mlp.guess(best)

    def _by_cpu(self, steps: ModuleType, h: mx.array, norm: nn.RMSNorm) -> mx.array | None:
        """Run the block on one token per row, or return None if it is something else."""
        if (banks := self.switch_mlp.banks()) is None:
            return None
        shared = [self.shared_expert[name] for name in PROJECTIONS]
        waves, choice = self.switch_mlp.waves, (self.top_k, self.norm_topk_prob)
        return steps.moe_step(
            h, self.gate, self.shared_expert_gate, shared, banks, norm, *choice, waves
        )

    def _by_kernels(
        self, h: mx.array, norm: nn.RMSNorm, known: bool, rows: mx.array | None
    ) -> mx.array | None:
        """Run the block in four launches, or return None if kernels cannot or should not."""
        functions = self._step.functions if known else self._functions(h, norm)
        if functions is None:
            return None
        choose, run = functions
        ids, scores, gate = choose(h)
        slots = self.switch_mlp.slots(_of_real_rows(ids, rows), h)
        if slots is None:
            return None
        y: mx.array = run(h, slots, scores, gate)
        self.switch_mlp.hold(y)
        if not known:
            self._step.trace(h, (self, norm), choose, run)
        return y

    def _functions(self, h: mx.array, norm: nn.RMSNorm) -> tuple[Step, Step] | None:
        """Return the halves of the block before and after the experts' slots are known."""
        shared, banks = self.shared_expert.banks(), self.switch_mlp.banks()
        if not (shared and banks and wanted(h, banks, shared, self.top_k)):
            return None

        def choose(h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            # In float32: a rounding that changes the choice is felt in every later layer.
            gates = self.gate, self.shared_expert_gate
            logits = joined(h, *gates, norm=norm, dtype=mx.float32)
            return route(logits, self.top_k, renormalise=self.norm_topk_prob, shared=True)

        def run(h: mx.array, slots: mx.array, scores: mx.array, gate: mx.array) -> mx.array:
            mixture = h, slots, scores, banks, shared, gate
            gain = norm.weight, scalar(norm.eps)
            return expert_mlp_by_kernels(*mixture, norm=gain, residual=h)

        return choose, run
