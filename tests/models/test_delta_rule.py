"""GatedDeltaNet layers of mlx-lm's own models: our kernels scan in our models, and in no others."""

import mlx.core as mx
import pytest
from families import affine, make
from family_helpers import streamed
from mlx_lm.models.cache import make_prompt_cache

from flashmoe_mlx.custom_kernels.cpu import gated_delta

TOKENS = mx.array([[5, 9, 3, 77, 2, 1, 8]])


@pytest.fixture
def scans(monkeypatch) -> list[int]:
    """The tokens of each scan by the CPU kernel."""
    kernel, found = gated_delta.gated_delta, []

    def counted(q, *others):
        found.append(q.shape[1])
        return kernel(q, *others)

    monkeypatch.setattr(gated_delta, "gated_delta", counted)
    return found


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear"])  # a decay per head, per column
def test_only_our_models_scan_by_our_kernels(family, scans, tmp_path):
    stock = make(family, tmp_path, affine(4))
    mx.eval(stock(TOKENS))
    assert scans == []
    with streamed(tmp_path) as model:
        scans.clear()  # loading compiled the kernels
        cache = make_prompt_cache(model)
        mx.eval(model(TOKENS, cache=cache))
        mx.eval(stock(TOKENS))  # in the same process
        layers = scans.count(TOKENS.size)
        assert layers > 0 and set(scans) == {TOKENS.size}
        mx.eval(model(TOKENS[:, :1], cache=cache))
        assert scans == [TOKENS.size] * layers + [1] * layers
