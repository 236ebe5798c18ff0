"""Model directories that the tests share: the bundled model and its conversions."""

import json
import os
import shutil
import signal
from pathlib import Path

# A process in a shell's background ignores Ctrl-C, and its children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Kernels read this on import; test_kernels_without_checks runs without it.
os.environ.setdefault("FLASHMOE_DEBUG_BOUNDS", "1")

# On a CPU MLX runs a C++ compiler, for about a second, for each function and shape that it
# compiles; the tests that use `compiled` pay for it, as users do.
os.environ.setdefault("MLX_DISABLE_COMPILE", "1")

import families
import mlx.core as mx
import mlx_lm
import pytest
from convert_helpers import unpack, write_checkpoints
from shared_folders import CONVERSIONS, PATCHED, Directories, made_once, text_config

from flashmoe_mlx.convert import convert
from flashmoe_mlx.custom_kernels import device
from flashmoe_mlx.custom_kernels.cpu import compile
from flashmoe_mlx.loader import BUNDLED_MODEL, load

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; set before importing numba
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")

# Run long tests first, so that no worker idles at the end. The first two go to one worker each and
# compile for all: the CPU's kernels, and the bench's. The third needs neither.
FIRST = (
    "test_cpu_kernels", "test_gpu_kernels", "test_resume", "test_exactness", "test_bounds",
    "test_families", "test_answers", "test_gated_delta_kernels", "test_gpu_mistakes",
    "test_gpu_model", "test_doctor", "test_calibrate", "test_expert_tiles", "test_stock_tools",
    "test_faults", "test_metal_bench", "test_convert", "test_memory", "test_serving",
    "test_python_api", "test_attention_kernels", "test_examples", "test_style",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def compile_here(tmp_path_factory):
    """Compile the CPU's kernels in this process; another test covers the separate process."""
    marker = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile, "_marker", lambda formats: marker)
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Directories:
    """Map each format to a streamable directory made from the bundled model."""

    def make(name: str) -> Path:
        if name == "unmodified":
            return BUNDLED_MODEL

        def write(base: Path) -> None:
            convert(BUNDLED_MODEL, base / "model", **CONVERSIONS[name])

        return made_once(tmp_path_factory, name, write) / "model"

    return Directories(make)


def make_root(base: Path) -> None:
    write_checkpoints(base)
    convert(base / "hf", base / "whole", quantize=True)
    convert(base / "stock", base / "packed")


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """Return the folder of tiny checkpoints `hf` and `stock`, and conversions `whole`, `packed`."""
    return made_once(tmp_path_factory, "checkpoints", make_root)


def make_patched(base: Path) -> None:
    """Write other families' models, with the bundled model's tokenizer, and convert them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.TINY, "vocab_size", text_config(BUNDLED_MODEL)["vocab_size"])
        for name in PATCHED:
            families.make(name, base / name, *families.mode_of(name))
            for file in BUNDLED_MODEL.iterdir():
                if file.name.startswith(("token", "chat", "generation")):
                    shutil.copy(file, base / name)
            convert(base / name, converted := base / f"{name}-converted")
            config = json.loads((converted / "config.json").read_text())
            config["flashmoe"]["expert_cache"] = "70KiB"  # fewer than all experts
            (converted / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def patched(tmp_path_factory) -> Path:
    """Return the folder of the models of PATCHED, and of their conversions."""
    return made_once(tmp_path_factory, "patched", make_patched)


@pytest.fixture(scope="session")
def stock_models(models, request, tmp_path_factory) -> Directories:
    """Map each format to the stock checkpoint with the same weights."""

    def make(name: str) -> Path:
        if name in PATCHED:
            return request.getfixturevalue("patched") / name
        if not name.startswith("packed"):
            return BUNDLED_MODEL
        return unpack(models[name], tmp_path_factory.mktemp("stock") / name)

    return Directories(make)


@pytest.fixture(scope="session")
def load_stock(stock_models):
    """Load (once) the stock model of a format in float32, everything resident."""
    loaded = {}

    def load(name: str):
        path = stock_models[name]
        if path not in loaded:
            trust = {"trust_remote_code": True}
            model, tokenizer = mlx_lm.load(str(path), tokenizer_config=trust)
            model.set_dtype(mx.float32)
            loaded[path] = model, tokenizer
        return loaded[path]

    return load


@pytest.fixture(scope="module")
def loaded():
    """The bundled model and its tokenizer, for all tests of a file."""
    model, tokenizer = load(BUNDLED_MODEL)
    with model:
        yield model, tokenizer


@pytest.fixture(scope="module")
def unsynced():
    """Leave out fsync in this process: only a power loss would tell the difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="module")
def compiled():
    """Let MLX compile functions, as it does for users."""
    mx.enable_compile()
    yield
    mx.disable_compile()


@pytest.fixture
def fresh_kernel_mode():
    """Read the kernel mode again."""
    device._cpu_module.cache_clear()
    yield
    device._cpu_module.cache_clear()
