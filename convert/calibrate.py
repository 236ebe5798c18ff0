"""What a model's experts see of a text, layer by layer, and experts quantised for it.

The model streams its experts as in generation, one layer at a time: while a layer is converted, the
inputs of its mixture and the router's choices are in memory (6 H + 4 K bytes a token), and nothing
of other layers but their input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.base import create_attention_mask, create_ssm_mask

from flashmoe_mlx.convert.compensate import quantize_for
from flashmoe_mlx.convert.fit import Codes
from flashmoe_mlx.convert.parts import Projection
from flashmoe_mlx.convert.read import FLOATS
from flashmoe_mlx.custom_kernels.linear import swiglu
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.model import Decoder, DecoderLayer

CHUNK = 2048  # tokens that are computed together, and see one another
PRIOR = 64  # tokens of the layer that count among each expert's own

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerInputs:
    """What one layer's experts see.

    Attributes:
        inputs: `[tokens, H]` float32.
        experts: `[tokens, K]`, the router's choice.
    """

    inputs: Floats
    experts: npt.NDArray[np.int32]

    def rows(self, expert: int) -> Floats:
        """Return the inputs of one expert, `[rows, H]`; there may be none."""
        return self.inputs[(self.experts == expert).any(-1)]

    @cached_property
    def some(self) -> Floats:
        """Up to four times PRIOR inputs of the layer, evenly spread."""
        places = np.linspace(0, len(self.inputs) - 1, min(4 * PRIOR, len(self.inputs)))
        return self.inputs[np.unique(places.astype(int))]

    @cached_property
    def moments(self) -> Floats:
        """The mean of x x^T over all inputs, `[H, H]`."""
        return _moments(self.inputs)

    def quantize(
        self, expert: int, matrices: Sequence[mx.array], projections: Sequence[Projection]
    ) -> list[Codes]:
        """Quantise an expert's gate, up and down for what it sees.

        Args:
            expert: id.
            matrices: `[I, H]`, `[I, H]` and `[H, I]` float32.
            projections: their plans.

        Returns:
            codes, scales and biases of each.
        """
        rows, (gate, up, down) = self.rows(expert), matrices
        before = _mixed(rows, self.moments)
        # Tokens of other experts stand in for those that this one will see once in a while.
        after = _mixed(_hidden(rows, gate, up), _moments(_hidden(self.some, gate, up)))
        one, other, last = projections
        if (one.after, one.dtype) == (other.after, other.dtype):
            wide = mx.concatenate([gate, up])  # rows do not depend on one another
            both = _quantized(wide, before, one)
            first, second = zip(*(mx.split(part, 2) for part in both), strict=True)
            found = [Codes(*first), Codes(*second)]
        else:
            found = [_quantized(gate, before, one), _quantized(up, before, other)]
        return [*found, _quantized(down, after, last)]


def _quantized(matrix: mx.array, moments: Floats, projection: Projection) -> Codes:
    """Quantise one matrix `[rows, columns]`."""
    dtype = FLOATS[projection.dtype]
    several = quantize_for(np.array(matrix)[None], moments[None], projection.after, dtype)
    return Codes(*(part[0] for part in several))


class Calibration:
    """A text on its way through a model."""

    def __init__(self, model: Decoder, tokens: Sequence[int]) -> None:
        """Begin at the first layer.

        Args:
            model: a decoder; `Model.model` of a loaded model.
            tokens: token ids of the text.

        Raises:
            FlashMoEError: there are no tokens.
        """
        if not tokens:
            raise FlashMoEError("the calibration text has no tokens. Give a file with text in it.")
        self._model, self._next = model, 0
        pieces = [tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK)]
        self._states = [model.embed_tokens(mx.array([piece])) for piece in pieces]

    def layer(self, number: int) -> LayerInputs:
        """Go on to a layer that was not passed yet, and return what its experts see."""
        while self._next <= number:
            inputs, experts = [], []
            for index, state in enumerate(self._states):
                h, x, ids = _through(self._model.layers[self._next], state)
                mx.eval(h, x, ids)
                self._states[index] = h
                inputs.append(np.array(x.astype(mx.float32))[0])
                experts.append(np.array(ids).astype(np.int32)[0])
            self._next += 1
        return LayerInputs(np.concatenate(inputs), np.concatenate(experts))


def _through(layer: DecoderLayer, h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return a layer's output, and the input `[1, T, H]` and choice `[1, T, K]` of its experts."""
    make_mask = create_ssm_mask if layer.is_linear else create_attention_mask
    mixer = layer.linear_attn if layer.is_linear else layer.self_attn
    h = mixer(h, layer.input_layernorm, make_mask(h, None), None)
    block, norm = layer.mlp, layer.post_attention_layernorm
    x = norm(h)
    ids = mx.argpartition(block.gate(x), kth=-block.top_k, axis=-1)[..., -block.top_k :]
    return block(h, norm), x, ids


def _moments(rows: Floats) -> Floats:
    """Return the mean of x x^T over `[rows, columns]`; zeros if there are no rows."""
    return rows.T @ rows / np.float32(max(1, len(rows)))


def _hidden(rows: Floats, gate: mx.array, up: mx.array) -> Floats:
    """Return what an expert's down projection sees of `[rows, H]`: `[rows, I]`."""
    x = mx.array(rows)
    return np.array(swiglu(x @ gate.T, x @ up.T))


def _mixed(rows: Floats, layer: Floats) -> Floats:
    """Return an expert's moments, drawn towards its layer's the fewer rows it has."""
    share = np.float32(len(rows) / (len(rows) + PRIOR))
    return share * _moments(rows) + (1 - share) * layer
