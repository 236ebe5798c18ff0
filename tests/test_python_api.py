"""The Python API: the script of python-api.md, closing, several models, threads, copies."""

import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from model_helpers import make_model

import flashmoe_mlx
from flashmoe_mlx import BUNDLED_MODEL, FlashMoEError, generate, load, stream_generate

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reference/python-api.md").read_text(encoding="utf-8")
CLOSED = r"^this model was closed; load it again\.$"
# Messages on stderr from other packages and from the first use on a machine; no warnings.
SAID = re.compile(r"\[transformers\] PyTorch was not found\..*|\[flashmoe\] compiling kernels.*")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.S | re.M)


def run_strictly(script: str) -> str:
    """Run a script in Python's development mode, which reports warnings and open files."""
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", script],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if not SAID.fullmatch(line)]
    assert not said, result.stderr
    return result.stdout


def test_page_runs_without_a_warning_and_prints_what_it_shows():
    prose = re.sub(r"^```python\n.*?^```", "", PAGE, flags=re.S | re.M)
    shown = re.findall(r"^```\n(.*?)^```", prose, re.S | re.M)
    assert len(shown) == len(blocks("python"))
    assert run_strictly("\n".join(blocks("python"))) == "".join(shown)


def test_an_open_file_is_detected():
    with pytest.raises(AssertionError, match="ResourceWarning"):
        run_strictly("open('/dev/null')")


def test_page_names_every_argument_of_load():
    arguments = load.__kwdefaults__ or {}
    rows = " ".join(re.findall(r"^\| (`\w.*?) \|", PAGE, re.M))
    assert sorted(re.findall(r"`(\w+)`", rows)) == sorted(arguments)


def test_public_names():
    assert all(hasattr(flashmoe_mlx, name) for name in flashmoe_mlx.__all__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == flashmoe_mlx.__version__


Loader = Callable[..., tuple[Any, Any]]


@pytest.fixture
def loaded(models) -> Iterator[Loader]:
    """Load models, and close them after the test."""
    opened = []

    def opener(name: str = "packed4", cache: int | str = "1MiB") -> tuple[Any, Any]:
        opened.append(load(models[name], expert_cache=cache))
        return opened[-1]

    yield opener
    for model, _ in opened:
        model.close()


def answer(model: Any, tokenizer: Any) -> str:
    return generate(model, tokenizer, "What is a library?", max_tokens=12)


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("flashmoe")]


def test_with_closes_files_and_threads_also_after_an_error(models):
    def held() -> tuple[int, int]:
        return len(os.listdir("/dev/fd")), len(readers())

    load(models["packed4"])[0].close()  # opens what the process opens once
    gc.collect()  # models of other tests
    before = held()
    model, _ = load(models["packed4"], expert_cache="1MiB", io_threads=3)
    with pytest.raises(ZeroDivisionError), model as same:
        assert same is model
        assert held() == (before[0] + 4, before[1] + 3)  # the model has four layers
        raise ZeroDivisionError
    assert held() == before
    model.close()
    with pytest.raises(FlashMoEError, match=CLOSED), model:
        pass


@pytest.mark.parametrize("cache", ["1MiB", "auto"])
def test_a_closed_model_raises(cache, loaded):
    model, tokenizer = loaded(cache=cache)
    assert answer(model, tokenizer)
    model.close()
    with pytest.raises(FlashMoEError, match=CLOSED):
        answer(model, tokenizer)


def test_close_in_the_middle_of_an_answer(loaded):
    model, tokenizer = loaded()
    responses = stream_generate(model, tokenizer, "What is a library?", max_tokens=12)
    next(responses)
    model.close()
    with pytest.raises(FlashMoEError, match=CLOSED):
        list(responses)


def test_memory_goes_with_the_last_reference(loaded, models):
    model, _ = load(models["packed4"])
    held = mx.get_active_memory()
    model.close()
    del model  # without garbage collection: no cycle keeps it alive
    assert held - mx.get_active_memory() > 8_000_000  # the experts alone have 8.3 MB


def test_two_models_take_turns(loaded):
    names = ("packed4", "packed2")
    alone = [answer(*loaded(name)) for name in names]
    both = [stream_generate(*loaded(name), "What is a library?", max_tokens=12) for name in names]
    turns = list(zip(*both, strict=False))
    assert ["".join(r.text for r in responses) for responses in zip(*turns, strict=True)] == alone
    assert alone[0] != alone[1]


@pytest.mark.parametrize("cache", ["1MiB", "auto"])
def test_another_thread_may_use_a_model_and_load_one(cache, loaded):
    model, tokenizer = loaded(cache=cache)
    here = answer(model, tokenizer)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(answer, model, tokenizer).result() == here
        theirs = pool.submit(loaded, cache=cache).result()
    assert answer(*theirs) == here


def test_two_threads_in_one_bank_raise(loaded):
    store = loaded()[0]._store
    bank = len(store.banks[0])
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(store.request, 0, list(range(bank))).result()
    told = f"layer 0: another thread is generating with this model, and {bank} slots are too few"
    with pytest.raises(FlashMoEError, match=told):
        store.request(0, [bank])
    pending.release()
    assert store.fetch(0, [bank])


def test_copies_share_files_and_are_closed_together(loaded):
    model, tokenizer = loaded()
    shallow, deep = copy.copy(model), copy.deepcopy(model)
    name = "language_model.model.norm.weight"
    weights = [dict(tree_flatten(m.parameters()))[name] for m in (model, shallow, deep)]
    assert weights[0] is weights[1] and weights[0] is not weights[2]
    assert answer(deep, tokenizer) == answer(shallow, tokenizer) == answer(model, tokenizer)
    model.close()
    for twin in (shallow, deep):
        with pytest.raises(FlashMoEError, match=CLOSED):
            answer(twin, tokenizer)


def test_pickles_are_refused(loaded):
    model, _ = loaded()
    with pytest.raises(TypeError, match=r"experts stream .* cannot be pickled; load it again"):
        pickle.dumps(model)


def test_a_resident_model_closes_and_copies_as_any_module():
    model = make_model()
    with model:
        twin = copy.deepcopy(model)
    tokens = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(tokens), twin(tokens))


def test_a_forked_model_raises(models):
    """In a separate process, because forking this one, with its threads, is unsafe."""
    script = f"""
import os, warnings, flashmoe_mlx
warnings.simplefilter("ignore")  # newer Pythons warn of any fork of a process with threads
opened = [flashmoe_mlx.load({str(models["packed4"])!r}, expert_cache=c) for c in ("1MiB", "auto")]
if (child := os.fork()) == 0:
    for model, tokenizer in opened:
        try:
            flashmoe_mlx.generate(model, tokenizer, "Hello", max_tokens=2)
        except flashmoe_mlx.FlashMoEError as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    told = "this model was loaded in another process, and a fork does not copy its reader threads"
    assert run_strictly(script).count(told) == 2


def test_bundled_model_is_a_directory():
    assert (BUNDLED_MODEL / "config.json").is_file()


def test_a_conversion_imports_neither_mlx_lm_nor_transformers():
    """These imports take two seconds, and more from a cold disk."""
    code = (
        "import sys, flashmoe_mlx.convert.run; "
        "print([m for m in ('mlx_lm', 'transformers', 'numba', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_public_names_are_imported_on_demand():
    assert set(flashmoe_mlx.__all__) <= set(dir(flashmoe_mlx))
    for name in flashmoe_mlx.__all__:
        assert getattr(flashmoe_mlx, name) is vars(flashmoe_mlx)[name]
    with pytest.raises(AttributeError, match="'flashmoe_mlx' has no attribute 'lod'"):
        flashmoe_mlx.lod  # noqa: B018
