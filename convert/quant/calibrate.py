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
from .compensate import Floats, Rounded, quantize_for
from .products import cross, product

if TYPE_CHECKING:
    from ...models.qwen3_5.model import Decoder, DecoderLayer

CHUNK = 2048  # tokens per forward pass, and the context length
MOST_ROWS = 4096  # of an expert's inputs to use
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
        """Return one expert's inputs `[rows, H]` and scores `[rows]`; rows may be 0.

        At most MOST_ROWS, evenly spaced.
        """
        tokens, places = np.nonzero(self.experts == expert)
        some = _spaced(len(tokens), MOST_ROWS)
        return self.inputs[tokens[some]], self.scores[tokens[some], places[some]]

    @cached_property
    def sample(self) -> Floats:
        """Up to 4 PRIOR inputs of the layer, evenly spaced."""
        return self.inputs[_spaced(len(self.inputs), 4 * PRIOR)]

    @cached_property
    def moments(self) -> Floats:
        """The mean of x x^T over all inputs, `[H, H]`."""
        return _moments(self.inputs, self.inputs)

    def prepare(self) -> None:
        """Compute what all experts share, before several threads ask for it."""
        _ = self.sample, self.moments

    def quantize(
        self, expert: int, weights: Sequence[Floats], projections: Sequence[Projection]
    ) -> list[Rounded | None]:
        """Quantize an expert's gate, up and down (`[I, H]`, `[I, H]`, `[H, I]` float32).

        Returns None for those that are copied.

        Inputs are weighted by the effect of an error on the layer's output. Down is quantized for
        the outputs of the new gate and up, towards those of the old ones.
        """
        rows, scores = self.rows(expert)
        counts = scores**2
        old = _Hidden.of(rows, *weights[:2])
        found: list[Rounded | None] = []
        for index, own in enumerate(old.sensitivities(weights[2])):
            moments = _mixed(_moments(rows, rows, counts * own), self.moments, len(rows))
            found.append(_quantized(weights[index], moments, projections[index]))
        new = [
            before if after is None else after.restored()
            for before, after in zip(weights[:2], found, strict=True)
        ]
        # Tokens of other experts stand in for this expert's rare ones.
        seen = [_Hidden.of(x, *new).values for x in (rows, self.sample)]
        wanted = old.values, _Hidden.of(self.sample, *weights[:2]).values
        both = [
            _mixed(_moments(x[0], seen[0], counts), _moments(x[1], seen[1]), len(rows))
            for x in (seen, wanted)
        ]
        return [*found, _quantized(weights[2], both[0], projections[2], both[1])]


def _spaced(count: int, most: int) -> npt.NDArray[np.int64]:
    """Return up to `most` of the numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


@dataclass(frozen=True)
class _Hidden:
    """Outputs of gate and of up `[rows, I]`, and the sigmoid of gate's."""

    gated: Floats
    lifted: Floats
    sigmoid: Floats

    @classmethod
    def of(cls, rows: Floats, gate: Floats, up: Floats) -> "_Hidden":
        gated = product(rows, gate.T)
        sigmoid: Floats = np.reciprocal(1 + np.exp(-gated))
        return cls(gated, product(rows, up.T), sigmoid)

    @property
    def values(self) -> Floats:
        """The inputs of down, `[rows, I]`."""
        return self.gated * self.sigmoid * self.lifted

    def sensitivities(self, down: Floats) -> tuple[Floats, Floats]:
        """Return how squared errors of gate's and of up's outputs scale in down's, `[rows]`."""
        heights = (down**2).sum(0)
        slope = self.sigmoid * (1 + self.gated * (1 - self.sigmoid))
        effects = slope * self.lifted, self.gated * self.sigmoid
        first, second = ((effect**2 * heights).sum(-1) for effect in effects)
        return first, second


def _quantized(
    weights: Floats, moments: Floats, projection: Projection, wanted: Floats | None = None
) -> Rounded | None:
    if projection.copied or projection.after is None:
        return None
    return quantize_for(weights, moments, projection.after, FLOATS[projection.dtype], wanted)


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
    # Both sides get the root: rounded inputs (TF32) then keep x x^T positive.
    shares = np.sqrt(counts / np.float32(counts.sum() or 1))[:, None]
    return cross(left * shares, right * shares)


def _mixed(own: Floats, layer: Floats, rows: int) -> Floats:
    """Shrink an expert's moments towards its layer's; the fewer rows, the more."""
    share = np.float32(rows / (rows + PRIOR))
    return share * own + (1 - share) * layer
