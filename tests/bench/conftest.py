"""A folder with a tiny checkpoint."""

import pytest
from tiny_bench import RECIPE

from flashmoe_mlx.bench.synthetic import checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("synthetic")
    checkpoint(RECIPE, directory)
    return directory
