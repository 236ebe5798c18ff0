"""The bundled model, loaded once for the tests of a file."""

import pytest

from flashmoe_mlx import load
from flashmoe_mlx.loader import BUNDLED_MODEL


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(BUNDLED_MODEL)
    with model:
        yield model, tokenizer
