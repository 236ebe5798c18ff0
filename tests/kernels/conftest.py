"""Each test builds its kernels, in the geometry that it names."""

import pytest
from gpu_cases import launch_as

from flashmoe_mlx.custom_kernels import launch


@pytest.fixture(autouse=True)
def fresh_kernels():
    """Build kernels inside each bench block, and keep none."""
    launch._build.cache_clear()
    yield
    launch._build.cache_clear()


@pytest.fixture
def geometry(request, monkeypatch):
    """Launch with this vendor's geometry."""
    launch_as(request.param, monkeypatch)
    return request.param
