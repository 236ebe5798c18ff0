"""The mixture-of-experts block for one token per row on a CPU, without round trips through MLX.

Three calls into compiled code: hidden states to expert ids; the experts, once per expert batch that
the caller loads; their weighted sum.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ..shapes import expect, expect_below, expect_count
from ..weights import QuantizedMatrix, Shared
from .arrays import ALL, Array, copy, exp, serial, sigmoid, use_threads
from .decode import (
    ROWS,
    SLOT,
    START,
    UNIT_OF_WORK,
    UNITS,
    Arrays,
    Group,
    Norm,
    add_job,
    run_jobs,
)  # fmt: skip
from .records import HEIGHT, new_records, record_size, rms_norm, write_record, write_records

# Indices in the groups of matrices.
ROUTER, SWITCH, SHARED_GATE, SHARED_UP = range(4)
GATE, UP, DOWN, SHARED_DOWN = range(4)


@serial
def choose(logits: Array, renormalize: bool, ids: Array, scores: Array) -> None:
    """Write the ids of the largest logits to `ids`, best first, and their softmax to `scores`."""
    largest = logits.max()
    total = np.float32(0)
    left = np.empty_like(logits)
    for i in range(logits.size):
        left[i] = exp(logits[i] - largest)
        total += left[i]
    chosen = np.float32(0)
    for k in range(ids.size):
        best = 0
        for i in range(logits.size):
            if left[i] > left[best]:
                best = i
        ids[k], scores[k] = best, left[best]
        chosen += left[best]
        left[best] = np.float32(-1)
    scores /= chosen if renormalize else total


@serial
def _route(
    run: int, h: Array, norm: Norm, group: Arrays, renormalize: bool, x: Array, outputs: Arrays
) -> None:
    (weight, eps), (matrices, forms, form_of) = norm, group
    hidden, switch, ids, scores = outputs
    batch = h.shape[0]
    records = new_records(forms.size * batch, record_size(matrices, forms))
    for row in range(batch):
        rms_norm(h[row], weight, eps, x[row])
    write_records(x, weight[:0], eps, matrices, forms, records)
    experts, inner = matrices[ROUTER, HEIGHT], matrices[SHARED_GATE, HEIGHT]
    switches, hiddens = batch * experts, batch * (experts + 1)  # offsets in `out`
    jobs, first, rows = np.zeros((4, UNITS + 1), np.int64), form_of * batch, np.arange(batch)
    add_job(jobs, 0, matrices, (ROUTER, -1, 0, first[ROUTER], 0, 0, batch, 0))
    add_job(jobs, 1, matrices, (SWITCH, -1, 0, first[SWITCH], 0, 0, batch, switches))
    shared = (SHARED_GATE, SHARED_UP, 0, first[SHARED_GATE], first[SHARED_UP], 0, batch, hiddens)
    units = add_job(jobs, 2, matrices, shared)
    out = np.empty(hiddens + batch * inner, np.float32)
    run_jobs(run, units, jobs, matrices, records, rows, rows, out)
    for row in range(batch):
        choose(out[row * experts : (row + 1) * experts], renormalize, ids[row], scores[row])
        switch[row] = sigmoid(out[switches + row])
        copy(out[hiddens + row * inner : hiddens + (row + 1) * inner], hidden[row])


@serial
def _experts(run: int, x: Array, assigned: Arrays, shared: Array, group: Arrays, y: Array) -> None:
    (tokens, slots, rows), (matrices, forms, form_of) = assigned, group
    assignments, batch = tokens.size, x.shape[0]
    inner, total = matrices[GATE, HEIGHT], tokens.size + shared.shape[0]
    inputs = new_records(forms.size * batch, record_size(matrices, forms))
    write_records(x, x[0, :0], 0.0, matrices, forms, inputs)
    jobs, hidden = (
        np.zeros((assignments + 2, UNITS + 1), np.int64),
        np.empty(assignments * inner, np.float32),
    )
    sources, targets = np.arange(total), np.empty(total, np.int64)
    copy(rows, targets[:assignments])
    for n in range(assignments, total):  # the shared expert's rows come last
        targets[n] = n + y.shape[0] - batch - assignments
    first, count, units, start = form_of * batch, 0, 0, 0
    for end in range(1, assignments + 1):
        if end == assignments or slots[end] != slots[start]:
            job = (GATE, UP, slots[start], first[GATE], first[UP], start, end - start, 0)
            units = add_job(jobs, count, matrices, job)
            count, start = count + 1, end
    run_jobs(run, units, jobs, matrices, inputs, tokens, sources, hidden)

    size = record_size(matrices, np.array([DOWN, SHARED_DOWN]))
    middle = new_records(total, size)
    for n in range(assignments):
        write_record(hidden[n * inner : (n + 1) * inner], matrices[DOWN], middle[n])
    for row in range(shared.shape[0]):
        write_record(shared[row], matrices[SHARED_DOWN], middle[assignments + row])
    for n in range(count):
        job = (DOWN, -1, jobs[n, SLOT], 0, 0, jobs[n, START], jobs[n, ROWS], 0)
        units = add_job(jobs, n, matrices, job)
    if total > assignments:
        job = (SHARED_DOWN, -1, 0, 0, 0, assignments, total - assignments, 0)
        units = add_job(jobs, count, matrices, job)
    flat = y.reshape(-1)
    run_jobs(run, units, jobs, matrices, middle, sources, targets, flat)


@serial
def _combine(h: Array, scores: Array, switch: Array, y: Array, out: Array) -> None:
    batch, top_k = scores.shape
    for row in range(batch):
        total = out[row]
        for i in range(total.size):
            total[i] = h[row, i] + switch[row] * y[batch * top_k + row, i]
        for k in range(top_k):
            score, expert = scores[row, k], y[row * top_k + k]
            for i in range(total.size):
                total[i] += score * expert[i]


# Loads experts: takes ids `[rows, K]`; yields flat indices of ids and their slots per expert batch.
Batches = Callable[[Array], Iterable[tuple[Array, Array]]]
# Adds up outputs `[rows * K, H]` in place over machines that have some of the experts each.
Total = Callable[[Array], None]


class MoeBlock(Shared):
    """A layer's mixture of experts, with the norm before it and the residual around it."""

    def __init__(
        self,
        router: QuantizedMatrix,
        switch: QuantizedMatrix,
        shared: Sequence[QuantizedMatrix],
        experts: Sequence[QuantizedMatrix],
        norm: Norm,
        top_k: int,
        renormalize: bool,
    ) -> None:
        """Take the layer's weights.

        Args:
            router: `[experts, H]`.
            switch: `[1, H]`, whose sigmoid scales the shared expert.
            shared: gate `[I', H]`, up `[I', H]` and down `[H, I']` of the shared expert.
            experts: gate `[S, I, H]`, up `[S, I, H]` and down `[S, H, I]` in S slots.
            norm: `[H]` float32 weight and epsilon of the RMS norm before the block.
            top_k: experts per row.
            renormalize: whether the chosen experts' scores sum to one.
        """
        self._route = Group(router, switch, *shared[:2])
        self._inputs = Group(*experts[:2])
        self._all = Group(*experts, shared[2])
        self._norm = norm
        self._top_k, self._renormalize = top_k, renormalize
        self._slots, inner, _ = experts[GATE].shape
        hidden, extra = norm[0].size, shared[0].shape[-2]
        for name, matrix, shape in (
            ("the router", router, (router.shape[-2], hidden)),
            ("the shared expert's switch", switch, (1, hidden)),
            ("gate of the shared expert", shared[0], (extra, hidden)),
            ("up of the shared expert", shared[1], (extra, hidden)),
            ("down of the shared expert", shared[2], (hidden, extra)),
            ("gate of the experts", experts[GATE], (self._slots, inner, hidden)),
            ("up of the experts", experts[UP], (self._slots, inner, hidden)),
            ("down of the experts", experts[DOWN], (self._slots, hidden, inner)),
        ):
            expect(name, matrix, shape)
        expect_count("experts per token", top_k, router.shape[-2])

    def __call__(self, h: Array, batches: Batches, total: Total | None = None) -> Array:
        """Map hidden states `[rows, H]` float32 to `h + moe(norm(h))`."""
        (batch, width), top_k = h.shape, self._top_k
        expect("hidden states", h, (batch, self._norm[0].size), np.float32)
        self._route.check_addresses()
        self._all.check_addresses()
        x, switch = np.empty_like(h), np.empty(batch, np.float32)
        shared = np.empty((batch, self._route.heights[SHARED_GATE]), np.float32)
        ids, scores = np.empty((batch, top_k), np.int64), np.empty((batch, top_k), np.float32)
        use_threads(ALL)
        outputs = shared, switch, ids, scores
        run, group = UNIT_OF_WORK.address, self._route.arguments
        _route(run, h, self._norm, group, self._renormalize, x, outputs)
        y = (np.zeros if total else np.empty)((batch * (top_k + 1), width), np.float32)
        inputs = self._all.numbers, self._inputs.forms, self._inputs.form_of
        for places, slots in batches(ids):
            expect_below("places of experts", places, ids.size)
            expect_below("slots of experts", slots, self._slots)
            if batch > 1:  # compute rows of one expert together
                order = np.argsort(slots, kind="stable")
                places, slots = places[order], slots[order]
            _experts(run, x, (places // top_k, slots, places), shared, inputs, y)
            shared = shared[:0]
        if total:
            if len(shared):  # no expert of this machine was chosen
                none = np.empty(0, np.int64)
                _experts(run, x, (none, none, none), shared, inputs, y)
            total(y[: ids.size])
        out = np.empty_like(h)
        _combine(h, scores, switch, y, out)
        return out
