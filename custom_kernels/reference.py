"""The float32 reference of every kernel, in plain mx ops.

Shapes use B batch, T tokens, H hidden size, I expert intermediate size, S slots, K experts per
token, Hk/Hv key and value heads, Dk/Dv their sizes; in full attention Hq query heads, D sizes.
"""

import math

import mlx.core as mx
import numpy as np

NONE = 0xFFFFFFFF  # no expert, no slot


def dequantize(codes: mx.array, scales: mx.array, biases: mx.array, bits: int) -> mx.array:
    """Unpack affine codes: w = code * scale + bias.

    Args:
        codes: `[..., rows, columns * bits / 32]` uint32, lowest bits first. Codes of widths that
            do not divide 32 (3, 5, 6) straddle words.
        scales: `[..., rows, groups]`.
        biases: `[..., rows, groups]`.
        bits: bits per weight.

    Returns:
        `[..., rows, columns]` float32.
    """
    if 32 % bits == 0:
        shifted = codes[..., None] >> mx.arange(0, 32, bits, dtype=mx.uint32)
        weights = (shifted & ((1 << bits) - 1)).flatten(-2).astype(mx.float32)
    else:
        words = codes[..., None] >> mx.arange(32, dtype=mx.uint32)
        stream = (words & 1).reshape(*codes.shape[:-1], -1, bits)
        weights = (stream << mx.arange(bits, dtype=mx.uint32)).sum(-1).astype(mx.float32)
    grouped = weights.reshape(*scales.shape, -1)
    grouped = grouped * scales.astype(mx.float32)[..., None] + biases.astype(mx.float32)[..., None]
    return grouped.reshape(weights.shape)


def expert_mlp(x: mx.array, gate: mx.array, up: mx.array, down: mx.array) -> mx.array:
    """Run one SwiGLU expert: down(silu(gate x) * up x).

    Args:
        x: `[rows, H]`.
        gate: `[I, H]` weights.
        up: `[I, H]` weights.
        down: `[H, I]` weights.

    Returns:
        `[rows, H]` float32.
    """
    x = x.astype(mx.float32)
    g = x @ gate.astype(mx.float32).T
    u = x @ up.astype(mx.float32).T
    return (g * mx.sigmoid(g) * u) @ down.astype(mx.float32).T


def route(logits: mx.array, top_k: int) -> mx.array:
    """Return softmax weights over each token's `top_k` largest logits, 0 elsewhere.

    Args:
        logits: `[tokens, experts]`, without ties.
        top_k: experts per token.

    Returns:
        `[tokens, experts]` float32; rows sum to 1.
    """
    logits = logits.astype(mx.float32)
    least = mx.sort(logits, axis=-1)[:, -top_k, None]
    return mx.softmax(mx.where(logits >= least, logits, -mx.inf), axis=-1)


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    beta: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Gated delta rule, token by token.

    Per head: S <- g S; S <- S + beta (v - S k) k^T; y = S q. A masked token leaves S unchanged.

    Args:
        q: `[B, T, Hk, Dk]` normalized queries, scale folded in.
        k: `[B, T, Hk, Dk]` normalized keys.
        v: `[B, T, Hv, Dv]` values; Hv is a multiple of Hk.
        g: `[B, T, Hv]` decay in (0, 1], or `[B, T, Hv, Dk]`, one for each column of S.
        beta: `[B, T, Hv]` write strength.
        state: `[B, Hv, Dv, Dk]` float32.
        mask: `[B, T]` bool, False for padding.

    Returns:
        y `[B, T, Hv, Dv]` float32 and the final state `[B, Hv, Dv, Dk]` float32.
    """
    q, k, v, g, beta = (t.astype(mx.float32) for t in (q, k, v, g, beta))
    repeat = v.shape[2] // k.shape[2]
    q, k = (mx.repeat(t, repeat, axis=2) for t in (q, k))
    g = g[..., None] if g.ndim == 3 else g
    outputs = []
    for t in range(q.shape[1]):
        new = state * g[:, t, :, None]
        error = v[:, t] - (new * k[:, t, :, None, :]).sum(-1)
        new = new + (error * beta[:, t, :, None])[..., None] * k[:, t, :, None, :]
        outputs.append((new * q[:, t, :, None, :]).sum(-1))
        state = new if mask is None else mx.where(mask[:, t, None, None, None], new, state)
    return mx.stack(outputs, axis=1), state


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return weight * x / sqrt(mean of x^2 + eps), over the last axis, in float32."""
    x = x.astype(mx.float32)
    return x * mx.rsqrt(mx.square(x).mean(-1, keepdims=True) + eps) * weight.astype(mx.float32)


def rope(x: mx.array, dims: int, base: float, position: int) -> mx.array:
    """Rotate elements i and i + dims / 2 of the last axis by position * base^(-2i / dims).

    Angles are float64: float32 is off by 0.01 at position 200,000.
    """
    angles = [position * base ** (-2 * i / dims) for i in range(dims // 2)]
    cos, sin = (mx.array([f(angle) for angle in angles]) for f in (math.cos, math.sin))
    a, b, rest = mx.split(x.astype(mx.float32), [dims // 2, dims], axis=-1)
    return mx.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Softmax attention of one token per row.

    Args:
        queries: `[B, Hq, D]`, scale folded in; Hq is a multiple of Hk.
        keys: `[B, Hk, S, D]`.
        values: `[B, Hk, S, D]`.

    Returns:
        `[B, Hq, D]` float32.
    """
    queries, keys, values = (t.astype(mx.float32) for t in (queries, keys, values))
    repeat = queries.shape[1] // keys.shape[1]
    keys, values = (mx.repeat(t, repeat, axis=1) for t in (keys, values))
    scores = (queries[:, :, None] * keys).sum(-1)
    return (mx.softmax(scores, axis=-1)[..., None] * values).sum(2)


def choose_slots(
    slot_of: mx.array, demand: mx.array, ids: mx.array, slots: int, half_life: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Assign a slot to each requested expert: a free one, or one evicted by decayed LFU.

    Args:
        slot_of: `[experts]` uint32, the slot of each or NONE.
        demand: `[experts]` float32, log2 of each expert's decayed uses.
        ids: `[..., K]` uint32, at most `slots` of them distinct.
        slots: slots of the layer.
        half_life: uses of any experts after which a use counts half.

    Returns:
        new slot_of and demand; slots `[..., K]`; and `[ids, 2]` uint32, expert and slot of each
        missing expert in request order, then NONE.
    """
    where, scores, flat = np.array(slot_of), np.array(demand), np.array(ids).reshape(-1)
    requested = list(dict.fromkeys(flat.tolist()))
    missing = [e for e in requested if where[e] == NONE]
    owner = {int(where[e]): e for e in np.flatnonzero(where != NONE).tolist()}
    free = [s for s in range(slots) if s not in owner]
    others = [s for s, e in owner.items() if e not in requested]
    others.sort(key=lambda s: (scores[owner[s]], s))
    targets = (free + others)[: len(missing)]
    for slot in targets:
        if slot in owner:
            where[owner[slot]] = NONE
    where[missing] = targets
    scores -= np.float32(len(requested) / half_life)
    scores[requested] = np.log2(1 + np.exp2(scores[requested]))
    tasks = np.full((flat.size, 2), NONE, np.uint32)
    tasks[: len(missing)] = list(zip(missing, targets, strict=True)) or np.empty((0, 2))
    places = where[flat].reshape(ids.shape)
    return mx.array(where), mx.array(scores), mx.array(places), mx.array(tasks)


def cut(
    slots: mx.array, slot_count: int, rows: int, tiles: int
) -> tuple[mx.array, mx.array, mx.array]:
    """Cut token-expert assignments into tiles of one slot each.

    Args:
        slots: `[assignments]` uint32, the slot of each.
        slot_count: slots of the layer.
        rows: rows of a tile.
        tiles: maximum number of tiles.

    Returns:
        The assignment in each row `[tiles, rows]`, 0 if unused; the slot of each tile `[tiles]`,
        ascending, the last slot for unused tiles; the row of each assignment `[assignments]`.
    """
    flat = np.array(slots)
    assigned = np.zeros((tiles, rows), np.uint32)
    slot_of = np.full(tiles, slot_count - 1, np.uint32)
    places, used = np.empty(len(flat), np.uint32), 0
    for slot in np.unique(flat):
        mine = np.flatnonzero(flat == slot)
        places[mine] = used * rows + np.arange(len(mine))
        assigned.reshape(-1)[places[mine]] = mine
        slot_of[used : used + -(-len(mine) // rows)] = slot
        used += -(-len(mine) // rows)
    return mx.array(assigned), mx.array(slot_of), mx.array(places)
