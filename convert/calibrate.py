"""What a model's experts see of a text: their inputs, layer by layer, kept on disk.

The model streams its experts as in generation. Of each layer's mixture the input is written down,
one row a token, and the experts that the router picked; second moments are made from them when
an expert is quantised, so that no more than a few experts' moments are ever in memory.
"""

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.base import create_attention_mask, create_ssm_mask

from flashmoe_mlx.custom_kernels.linear import swiglu
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.model import Decoder, DecoderLayer

CHUNK = 2048  # tokens that are computed together, and see one another
PRIOR = 64  # tokens' worth of the whole layer's moments that each expert's are mixed with

Floats = npt.NDArray[np.float32]


class Calibration:
    """The inputs of every layer's experts.

    Attributes:
        tokens: of the text.
    """

    def __init__(self, directory: Path, layers: int, tokens: int) -> None:
        """Name the files; `record` writes them."""
        self.tokens = tokens
        self._directory = directory
        self._layers = layers

    def _file(self, layer: int, what: str) -> Path:
        return self._directory / f"layer_{layer:02d}.{what}.npy"

    def inputs(self, layer: int) -> Floats:
        """Return `[tokens, H]`, read as it is used."""
        return np.load(self._file(layer, "inputs"), mmap_mode="r")

    def experts(self, layer: int) -> npt.NDArray[np.int32]:
        """Return the experts that the router picked, `[tokens, K]`."""
        return np.load(self._file(layer, "experts"))

    def rows(self, layer: int, expert: int) -> Floats:
        """Return the inputs of one expert, `[rows, H]`; there may be none."""
        chosen = (self.experts(layer) == expert).any(-1)
        return self.inputs(layer)[np.flatnonzero(chosen)]


def record(model: Decoder, tokens: Sequence[int], directory: Path) -> Calibration:
    """Run a text through a model and write down what its experts see.

    Args:
        model: a decoder; `Model.model` of a loaded model.
        tokens: token ids of the text.
        directory: where to write `4 H` bytes per token and layer.

    Raises:
        FlashMoEError: there are no tokens.
    """
    if not tokens:
        raise FlashMoEError("the calibration text has no tokens. Give a file with text in it.")
    found = Calibration(directory, len(model.layers), len(tokens))
    pieces = [tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK)]
    states = [model.embed_tokens(mx.array([piece])) for piece in pieces]
    for number, layer in enumerate(model.layers):
        inputs, experts = [], []
        for index, h in enumerate(states):
            h, x, ids = _through(layer, h)
            mx.eval(h, x, ids)
            states[index] = h
            inputs.append(np.array(x.astype(mx.float32))[0])
            experts.append(np.array(ids).astype(np.int32)[0])
        np.save(found._file(number, "inputs"), np.concatenate(inputs))
        np.save(found._file(number, "experts"), np.concatenate(experts))
    return found


def _through(layer: DecoderLayer, h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return a layer's output, and the input `[1, T, H]` and choice `[1, T, K]` of its experts."""
    make_mask = create_ssm_mask if layer.is_linear else create_attention_mask
    mixer = layer.linear_attn if layer.is_linear else layer.self_attn
    h = mixer(h, layer.input_layernorm, make_mask(h, None), None)
    block, norm = layer.mlp, layer.post_attention_layernorm
    x = norm(h)
    ids = mx.argpartition(block.gate(x), kth=-block.top_k, axis=-1)[..., -block.top_k :]
    return block(h, norm), x, ids


def moments(rows: Floats) -> Floats:
    """Return the mean of x x^T over `[rows, columns]`; zeros if there are no rows."""
    return rows.T @ rows / np.float32(max(1, len(rows)))


def hidden(rows: Floats, gate: mx.array, up: mx.array) -> Floats:
    """Return what an expert's down projection sees, `[rows, I]`.

    Args:
        rows: the expert's inputs, `[rows, H]`.
        gate: `[I, H]` float32.
        up: `[I, H]` float32.
    """
    x = mx.array(rows)
    return np.array(swiglu(x @ gate.T, x @ up.T))


def mixed(rows: Floats, layer: Floats, prior: int = PRIOR) -> Floats:
    """Return an expert's moments, drawn towards its layer's the fewer rows it has."""
    share = np.float32(len(rows) / (len(rows) + prior))
    return share * moments(rows) + (1 - share) * layer
