"""Checkpoints as transformers writes them, converted and streamed: the logits of transformers."""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from convert_helpers import read
from family_helpers import streamed_logits, write
from family_references import CONFIGS, FIXTURES, weights

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.verify.verify import verify

TOLERANCE = 2e-4

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # read at the first matmul; its 10 bits are too few


@pytest.fixture(params=CONFIGS)
def reference(request) -> dict[str, Any]:
    return json.loads((FIXTURES / f"{request.param}.json").read_text())


@pytest.fixture
def source(reference, tmp_path) -> Path:
    arrays = {name: mx.array(a) for name, a in weights(reference["shapes"]).items()}
    return write(tmp_path / "source", reference["config"], arrays)


def test_logits(source, reference, tmp_path):
    """Experts are copied, floats or gpt-oss's mxfp4, and streamed by a cache for half of them."""
    convert(source, out := tmp_path / "out")
    mode = "mxfp4" if reference["config"]["model_type"] == "gpt_oss" else None
    assert read(out / "config.json").get("quantization", {}).get("mode") == mode
    assert verify(out) == []
    size = sum(path.stat().st_size for path in out.glob("model_experts/*.safetensors"))
    found = streamed_logits(out, reference["prompt"], expert_cache=size * 5 // 8)
    np.testing.assert_allclose(found, reference["logits"], rtol=0, atol=TOLERANCE)
