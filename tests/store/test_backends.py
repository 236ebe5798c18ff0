"""Each device gets its back-end, and the back-ends that run here meet the interface."""

import os

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.store import devices
from flashmoe_mlx.store.cuda import backend as cuda
from flashmoe_mlx.store.host import CpuBackend, UnifiedBackend
from flashmoe_mlx.store.io_mode import BLOCK

HERE = [CpuBackend(), UnifiedBackend()]


@pytest.mark.parametrize(
    ("device", "has_cuda", "kind"),
    [
        (mx.cpu, False, CpuBackend),
        (mx.cpu, True, CpuBackend),
        (mx.gpu, False, UnifiedBackend),
        (mx.gpu, True, cuda.CudaBackend),
    ],
)
def test_the_default_device_decides(monkeypatch, device, has_cuda, kind):
    monkeypatch.setattr(cuda.CudaBackend, "__init__", lambda self: None)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    monkeypatch.setattr(mx.cuda, "is_available", lambda: has_cuda)
    assert type(devices.choose()) is kind


@pytest.mark.parametrize("backend", HERE, ids=lambda backend: type(backend).__name__)
@pytest.mark.parametrize("dtype", [mx.uint32, mx.bfloat16])
def test_what_is_read_into_rows_is_in_the_arrays(tmp_path, backend, dtype):
    data = np.random.default_rng(0).integers(256, size=3 * 5 * dtype.size, dtype=np.uint8)
    (tmp_path / "file").write_bytes(b"before" + data.tobytes())
    array = backend.allocate((3, 5), dtype)
    assert array.shape == (3, 5) and not mx.any(array.astype(mx.bool_)).item()
    (row,) = backend.rows([array])
    with open(tmp_path / "file", "rb") as file:
        assert backend.preadv(file.fileno(), [row[:7], row[7:]], 6) == len(row) == data.size
    assert np.array_equal(np.array(array.view(mx.uint8)).reshape(-1), data)


@pytest.mark.parametrize("backend", HERE, ids=lambda backend: type(backend).__name__)
def test_small_arrays_cross_both_ways(backend):
    ids = mx.array([[3, 1]], dtype=mx.uint32)
    assert backend.to_host(ids).tolist() == [[3, 1]]
    assert backend.to_device(np.array([[3, 1]], np.uint32)).tolist() == [[3, 1]]
    assert backend.visible and backend.bulk is None and backend.free_bytes is None


def test_on_a_cpu_arrays_start_at_a_block():
    for shape in ((3, 5), (1, 4096), (7, 33, 2)):
        array = CpuBackend().allocate(shape, mx.uint32)
        view = np.frombuffer(memoryview(array).cast("B"), np.uint8)
        assert view.ctypes.data % BLOCK == 0


def test_memory_that_the_system_refuses_is_an_error():
    with pytest.raises(FlashMoEError, match=rf"takes {2**62} bytes.*Give a smaller expert_cache"):
        CpuBackend().check_room(2**62)
    CpuBackend().check_room(os.sysconf("SC_PAGE_SIZE"))
    UnifiedBackend().check_room(2**62)  # GPU allocations report their own errors
