"""Kernels for NVIDIA: their CUDA text compiles here, where no GPU runs it, and loads once there."""

import ctypes
import importlib.util
import os
import platform
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from flashmoe_mlx.cli import full_check
from flashmoe_mlx.custom_kernels import autotune, launch
from flashmoe_mlx.custom_kernels.cuda import compiled, copy
from flashmoe_mlx.custom_kernels.packed import Part, pack
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.store.cuda import mailbox, pinned

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="as MLX for CUDA"
)


def nvrtc() -> ctypes.CDLL:
    """Load the compiler of the `test` extra."""
    folders = importlib.util.find_spec("nvidia").submodule_search_locations
    files = (f for folder in folders for f in Path(folder).glob("*/lib/libnvrtc.so.*[0-9]"))
    return ctypes.CDLL(str(next(files)))


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """Compile for a GPU, and note what would be launched instead of launching it."""
    made = []

    def take(name, compiled_source, output_shapes, output_dtypes, scalars, **_):
        made.append((name, compiled_source, scalars))
        return [mx.zeros(s, d) for s, d in zip(output_shapes, output_dtypes, strict=True)]

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", take)
    monkeypatch.setattr(launch, "is_cuda", lambda: True)
    monkeypatch.setattr(autotune, "_decide", lambda case: True)
    monkeypatch.setattr(compiled, "_library", nvrtc)
    monkeypatch.setattr(compiled, "_target", lambda: ("sm_90", 13, 0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.kernel.cache_clear()
    autotune.forget()
    yield made
    compiled.kernel.cache_clear()
    autotune.forget()


@pytest.mark.parametrize("target", ["sm_75", "sm_90"])
def test_every_kernel_compiles(launches, monkeypatch, target):
    """On one GPU activations of 32 bits, on the other of 16."""
    monkeypatch.setattr(compiled, "_target", lambda: (target, 13, 0))
    cases = {}
    for case in [*full_check.quantized(), *full_check.others()]:
        if (case.dtype == "float32") == (target == "sm_75"):
            cases.setdefault((case.op, case.dtype), case)
    for case in cases.values():
        case.custom(*case.inputs())
    words, numbers = mx.zeros((8,), mx.uint32), mx.zeros(4, mx.uint64)
    copy.copy(mx.zeros((3, 2), mx.uint32), words, mx.zeros((9, 4), mx.uint64), numbers)
    mailbox._to_host([words, numbers], [((1,), mx.uint32)], (1, 1, 1), 32, n=8)
    mailbox._to_device([numbers], [((8,), mx.uint32)], (1, 1, 1), 32, n=8)
    pinned.gpu_rows([words, mx.zeros((2, 2), mx.bfloat16), mx.zeros(3, mx.uint8)])
    names = {name.rpartition("_")[0] for name, *_ in launches}
    folder = Path(launch.__file__).parent
    texts = {p.relative_to(folder).with_suffix("") for p in folder.glob("*/*.metal")}
    kernels = {f"flashmoe_{str(text).replace('/', '_')}" for text in texts}
    helpers = {"flashmoe_gated_delta_common", "flashmoe_linear_naive_matvec", "flashmoe_cuda_slots"}
    own = {"flashmoe_copy", "flashmoe_to_host", "flashmoe_to_device", "flashmoe_addresses"}
    assert names == kernels - helpers | own
    assert all(code[:4] == b"\x7fELF" or len(code) == 8 for _, code, _ in launches)


def test_a_text_with_a_mistake_is_named(launches):
    kernel = launch.Kernel("wrong", ("x",), ("y",), source="y[0] = z;")
    with pytest.raises(FlashMoEError, match='identifier "z" is undefined'):
        kernel([mx.zeros(4)], [((4,), mx.float32)], (1, 1, 1), 32)


PLUS = launch.Kernel("plus", ("x", "w", "v"), ("y",), source="y[0] = x[0] + w[x_shape[1]] + v[N];")
OUT = [((4,), mx.float32)]


def test_launches_pass_the_code_once(launches):
    x = mx.zeros((2, 3))
    for _ in range(2):
        PLUS([x, x, mx.zeros(8)], OUT, (1, 1, 1), 32, N=3)
    (name, code, none), short, first, second = launches
    assert len(code) > 1000 and none == [0, 0, 0]
    assert short == (name, compiled.same_hash(code), [0, 0, 0])
    assert first == second == (name, compiled.same_hash(code), [2, 3, 1])


def test_an_mlx_that_needs_the_code_gets_it(launches, monkeypatch):
    take = mx.fast.precompiled_cuda_kernel

    def refuse(compiled_source, **options):
        if len(compiled_source) == 8:
            raise RuntimeError("cuModuleLoadDataEx failed")
        return take(compiled_source=compiled_source, **options)

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", refuse)
    PLUS([mx.zeros((2, 3))] * 3, OUT, (1, 1, 1), 32, N=3)
    assert len(launches[-1][1]) > 1000 and launches[-1][2] == [2, 3, 1]


def test_code_is_kept_and_damage_noticed(launches, monkeypatch, tmp_path):
    def make():
        compiled.kernel.cache_clear()
        PLUS([mx.zeros((2, 3))] * 3, OUT, (1, 1, 1), 32, N=3)
        return launches[-3][1]

    code = make()
    (file,) = (tmp_path / "flashmoe-mlx/cuda").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "compile_text", lambda text: pytest.fail("compiled twice"))
        assert make() == code
    file.write_bytes(file.read_bytes()[:-1])
    assert make() == code


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 4824, 25516])
def test_the_hash_is_that_of_the_standard_library(length):
    standard = ctypes.CDLL("libstdc++.so.6")._ZSt11_Hash_bytesPKvmm
    standard.argtypes, standard.restype = [ctypes.c_char_p, *[ctypes.c_size_t] * 2], ctypes.c_size_t
    data = os.urandom(length)
    assert compiled.hash_of(data) == standard(data, length, compiled.SEED)
    short = compiled.same_hash(data)
    assert len(short) == 8 and standard(short, 8, compiled.SEED) == compiled.hash_of(data)


def test_packed_arrays_are_bound_once():
    a, b, c = mx.arange(5.0), mx.ones((3, 3), mx.bfloat16), mx.arange(7, dtype=mx.uint32)
    parts = pack([a, a + 5], [b], [c])
    assert mx.array_equal(parts[0].array, mx.arange(10.0))
    assert mx.array_equal(parts[1].array, b) and mx.array_equal(parts[2].array, c)
    assert [part.offset for part in parts] == [0, 48, 80]
    bound, views = launch._bind(("x", "y", "p", "q", "r"), [a, a, *parts])
    assert [*bound] == ["x", "buffer1"] and bound["buffer1"] is parts[0].buffer
    assert views[0] == "auto y = x;"
    assert views[2].startswith("auto q = (const device bfloat16_t*)") and "48ul" in views[2]
    assert all(isinstance(part, Part) for part in parts)
