"""Run a text through a model layer by layer, and quantize experts for the inputs they see.

The model streams its experts as in generation. Memory holds the inputs and routing of one layer
(6 H + 4 K bytes per token).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ...errors import FlashMoEError
from ..plan.parts import Projection
from ..source.arrays import FLOATS
from .codes import Codes
from .compensate import DAMPING, Floats, quantize_for

if TYPE_CHECKING:
    from ...models.qwen3_5.model import Decoder, DecoderLayer

CHUNK = 2048  # tokens per forward pass, and the context length
PRIOR = 64  # tokens of the whole layer that count in each expert's moments


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of one layer's experts, and their routing.

    Attributes:
        inputs: `[tokens, H]` float32.
        experts: `[tokens, K]`, the router's top k.
        scores: `[tokens, K]` float32, the weights of their outputs.
    """

    inputs: Floats
    experts: npt.NDArray[np.int32]
    scores: Floats

    def rows(self, expert: int) -> tuple[Floats, Floats]:
        """Return one expert's inputs `[rows, H]` and scores `[rows]`; rows may be 0."""
        chosen = self.experts == expert
        return self.inputs[chosen.any(-1)], self.scores[chosen]

    @cached_property
    def sample(self) -> Floats:
        """Up to 4 PRIOR inputs of the layer, evenly spaced."""
        places = np.linspace(0, len(self.inputs) - 1, min(4 * PRIOR, len(self.inputs)))
        return self.inputs[np.unique(places.astype(int))]

    @cached_property
    def moments(self) -> Floats:
        """The mean of x x^T over all inputs, `[H, H]`."""
        return _moments(self.inputs, self.inputs)

    def quantize(
        self, expert: int, matrices: Sequence[mx.array], projections: Sequence[Projection]
    ) -> list[Codes]:
        """Quantize an expert's gate, up and down (`[I, H]`, `[I, H]`, `[H, I]` float32).

        Inputs are weighted by the effect of an error on the layer's output. Down is quantized for
        the outputs of the new gate and up, towards those of the old ones.
        """
        rows, scores = self.rows(expert)
        weights: list[Floats] = [np.array(matrix) for matrix in matrices]
        counts = scores**2
        found, new = [], []
        for index, own in enumerate(_sensitivities(rows, *weights)):
            moments = _mixed(_moments(rows, rows, counts * own), self.moments, len(rows))
            found.append(_quantized(weights[index], moments, projections[index]))
            now = weights[index]
            if not projections[index].copied:
                now = np.array(found[index].restored(projections[index].after))
            new.append(now)
        # Tokens of other experts stand in for this expert's rare ones.
        seen, wanted = (
            [_hidden(x, gate, up) for x in (rows, self.sample)] for gate, up in (new, weights[:2])
        )
        both = [
            _mixed(_moments(x[0], seen[0], counts), _moments(x[1], seen[1]), len(rows))
            for x in (seen, wanted)
        ]
        target: Floats = weights[2] @ _correction(*both)
        return [*found, _quantized(target, both[0], projections[2])]


def _sensitivities(rows: Floats, gate: Floats, up: Floats, down: Floats) -> tuple[Floats, Floats]:
    """Return how squared errors of gate's and of up's outputs scale in down's, `[rows]` each."""
    gated, lifted = rows @ gate.T, rows @ up.T
    sigmoid = 1 / (1 + np.exp(-gated))
    slope = sigmoid * (1 + gated * (1 - sigmoid))
    heights = (down**2).sum(0)
    return (slope * lifted) ** 2 @ heights, (gated * sigmoid) ** 2 @ heights


def _quantized(weights: Floats, moments: Floats, projection: Projection) -> Codes:
    dtype = FLOATS[projection.dtype]
    batch = quantize_for(weights[None], moments[None], projection.after, dtype)
    return Codes(*(part[0] for part in batch))


def _correction(seen: Floats, wanted: Floats) -> Floats:
    """Return the least-squares map from x' to x, given the means of x' x'^T and of x x'^T."""
    damping = DAMPING * np.trace(seen) / len(seen) or 1.0
    ridge = np.eye(len(seen), dtype=np.float32) * np.float32(damping)
    return np.linalg.solve(seen + ridge, (wanted + ridge).T).T.astype(np.float32)


class Calibration:
    """Runs a text through a model, one layer at a time."""

    def __init__(self, model: "Decoder", tokens: Sequence[int]) -> None:
        """Embed the tokens. `model` is `Model.model` of a loaded model.
        Raises:
            FlashMoEError: there are no tokens.
        """
        if not tokens:
            raise FlashMoEError("the calibration text has no tokens. Give a file with text in it.")
        self._model, self._next = model, 0
        pieces = [tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK)]
        self._states = [model.embed_tokens(mx.array([piece])) for piece in pieces]

    def layer(self, number: int) -> LayerInputs:
        """Run through a layer, in increasing order, and return its experts' inputs."""
        while self._next <= number:
            found = []
            for index, state in enumerate(self._states):
                h, x, ids, scores = _through(self._model.layers[self._next], state)
                mx.eval(h, x, ids, scores)
                self._states[index] = h
                wide = x.astype(mx.float32), ids.astype(mx.int32), scores.astype(mx.float32)
                found.append([np.array(part)[0] for part in wide])
            self._next += 1
        return LayerInputs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _through(layer: "DecoderLayer", h: mx.array) -> tuple[mx.array, ...]:
    """Return a layer's output, its experts' input `[1, T, H]`, ids and scores `[1, T, K]`."""
    from mlx_lm.models.base import create_attention_mask, create_ssm_mask  # slow to import

    make_mask = create_ssm_mask if layer.is_linear else create_attention_mask
    mixer = layer.linear_attn if layer.is_linear else layer.self_attn
    h = mixer(h, layer.input_layernorm, make_mask(h, None), None)
    block, norm = layer.mlp, layer.post_attention_layernorm
    x = norm(h)
    logits = block.gate(x)
    ids = mx.argpartition(logits, kth=-block.top_k, axis=-1)[..., -block.top_k :]
    scores = mx.take_along_axis(mx.softmax(logits, axis=-1, precise=True), ids, axis=-1)
    if block.norm_topk_prob:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return block(h, norm), x, ids, scores


def _moments(left: Floats, right: Floats, counts: Floats | None = None) -> Floats:
    """Return the weighted mean of x y^T over `[rows, columns]`; zeros if rows is 0."""
    if counts is None:
        counts = np.ones(len(left), np.float32)
    shares = (counts / np.float32(counts.sum() or 1))[:, None]
    return ((left * shares).T @ right).astype(np.float32)


def _hidden(rows: Floats, gate: Floats, up: Floats) -> Floats:
    """Return the down projection's input `[rows, I]` for `[rows, H]`."""
    gated = rows @ gate.T
    return gated / (1 + np.exp(-gated)) * (rows @ up.T)


def _mixed(own: Floats, layer: Floats, rows: int) -> Floats:
    """Shrink an expert's moments towards its layer's; the fewer rows, the more."""
    share = np.float32(rows / (rows + PRIOR))
    return share * own + (1 - share) * layer
