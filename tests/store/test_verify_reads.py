"""Every expert is compared with its checksum after its read and before its use."""

import importlib
import json
import os
import shutil
import threading
import zlib
from pathlib import Path

import pytest
from convert_helpers import flip
from store_helpers import EXPERTS, Gate, assert_whole, big_layout

from flashmoe_mlx import FlashMoEError, generate, load
from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.format.headers import read_header
from flashmoe_mlx.format.layout import read_manifest
from flashmoe_mlx.format.names import FIELDS
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.settings import StreamConfig
from flashmoe_mlx.store import slots
from flashmoe_mlx.store.checks import RecordChecks
from flashmoe_mlx.store.devices import choose
from flashmoe_mlx.store.host import CpuBackend
from flashmoe_mlx.store.io_mode import obstacle
from flashmoe_mlx.store.sizing import CachePlan, IoPlan
from flashmoe_mlx.store.store import ExpertStore

SIZES = [n * 4096 for n in (8, 1, 1, 7, 2, 1, 9, 1, 1)]
MANIFEST = "model_experts/manifest.json"
LAYER = "model_experts/layer_02.safetensors"
CACHE = "1MiB"
generate_cli = importlib.import_module("flashmoe_mlx.cli.generate")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Let records of some kilobytes be cut."""
    monkeypatch.setattr(slots, "LEAST_PIECE", 4096)


@pytest.fixture
def compared(monkeypatch) -> list[tuple[int, int]]:
    """Collect the experts that are compared."""
    seen: list[tuple[int, int]] = []
    real = RecordChecks.compare

    def compare(self, layer, expert, rows):
        seen.append((layer, expert))
        return real(self, layer, expert, rows)

    monkeypatch.setattr(RecordChecks, "compare", compare)
    return seen


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    convert(BUNDLED_MODEL, path := tmp_path_factory.mktemp("verify") / "packed")
    return path


@pytest.fixture
def packed(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "packed")


def checked_store(tmp_path, threads: int, io: bool = False) -> ExpertStore:
    """A store of one layer of random experts, with their checksums."""
    layout = big_layout(tmp_path, SIZES)
    data, size = (tmp_path / "big.bin").read_bytes(), sum(SIZES)
    parts = [data[e * size : (e + 1) * size] for e in range(EXPERTS)]
    manifest = {
        "format": "flashmoe-experts", "version": 1, "checksum": "crc32",
        "layers": [{"records": [f"{zlib.crc32(part):08x}" for part in parts]}],
    }  # fmt: skip
    (tmp_path / "model_experts").mkdir(exist_ok=True)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    plan = CachePlan(4, 0, "a test", IoPlan(io and not obstacle(layout), "a test"))
    return ExpertStore(layout, plan, threads, checks=RecordChecks(layout, choose()))


def write(model, tokenizer) -> str:
    return generate(model, tokenizer, prompt="The library", max_tokens=4)


# --- one store -----------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_each_expert_once_it_is_whole(tmp_path, compared, threads, direct):
    """Also if several threads read the pieces of one expert."""
    store = checked_store(tmp_path, threads, direct)
    for experts in ([7], [2, 9], [0, 4, 3, 1], [4, 5]):
        assert_whole(store, experts, store.fetch(0, experts))
    assert sorted(compared) == [(0, e) for e in (0, 1, 2, 3, 4, 5, 7, 9)]
    assert (store.stats.reads > len(compared)) == (threads > 1)


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("direct", [False, True])
def test_one_bit_anywhere(tmp_path, threads, direct):
    """The first and the last byte of each tensor; the others of the layer are served."""
    store, start = checked_store(tmp_path, threads, direct), 6 * sum(SIZES)
    for size in SIZES:
        for place in (start, start + size - 1):
            flip(tmp_path / "big.bin", place)
            with pytest.raises(FlashMoEError) as raised:
                store.fetch(0, [3, 6])
            flip(tmp_path / "big.bin", place)
            assert_whole(store, [3, 5], store.fetch(0, [3, 5]))
            text = str(raised.value)
            assert f"{tmp_path / 'big.bin'}: layer 0 expert 6 is not as it was written (" in text
            command = f"`flashmoe-convert verify {tmp_path} --repair --hf-path SOURCE`"
            assert "; nothing was computed from it. Run " + command in text
        start += size
    assert_whole(store, [6], store.fetch(0, [6]))  # read again, and intact


def test_an_expert_is_not_resident_before_the_comparison(tmp_path, monkeypatch):
    """An expert counts as being read until its checksum is compared."""
    started, go_on, real = threading.Event(), threading.Event(), RecordChecks.compare

    def compare(*arguments):
        started.set()
        go_on.wait(20)
        return real(*arguments)

    monkeypatch.setattr(RecordChecks, "compare", compare)
    store = checked_store(tmp_path, 3)
    flip(tmp_path / "big.bin", 5 * sum(SIZES))
    first = store.request(0, [5])
    assert started.wait(20)
    second = store.request(0, [5])
    assert store.banks[0].resident([5]) == [] and 5 in store.banks[0].arriving
    go_on.set()
    for pending in (first, second):
        with pytest.raises(FlashMoEError, match="layer 0 expert 5 is not as it was written"):
            pending.wait()
    assert store.banks[0].resident([5]) == [] and not store.banks[0].arriving


def test_a_failed_read_is_reported_as_such(tmp_path, compared, monkeypatch):
    store, real = checked_store(tmp_path, 4), os.preadv

    def preadv(descriptor, rows, offset):
        if offset == 6 * sum(SIZES):
            raise OSError(5, "Input/output error")
        return real(descriptor, rows, offset)

    monkeypatch.setattr("os.preadv", preadv)
    with pytest.raises(FlashMoEError, match="Input/output error"):
        store.fetch(0, [6])
    assert_whole(store, [5], store.fetch(0, [5]))
    assert compared == [(0, 5)]


@pytest.mark.parametrize("error", [ValueError, MemoryError])
def test_an_expert_whose_comparison_raises_is_not_used(tmp_path, monkeypatch, error):
    def compare(*arguments):
        raise error

    store = checked_store(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(RecordChecks, "compare", compare)
        pending = store.request(0, [6])
        with pytest.raises((FlashMoEError, error)):
            pending.wait()
        assert store.banks[0].resident([6]) == []
    assert_whole(store, [6], store.fetch(0, [6]))


def test_close_while_experts_are_being_read(tmp_path, monkeypatch, compared):
    gate, store = Gate(monkeypatch), checked_store(tmp_path, 1)
    pending = store.request(0, [1, 2, 3])
    closer = threading.Thread(target=store.close)
    closer.start()
    gate.opened.set()
    closer.join(20)
    assert not closer.is_alive()
    with pytest.raises(FlashMoEError, match="was cancelled"):
        pending.wait()


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["auto", CACHE])
def test_the_same_text_and_every_expert_compared(packed, compared, cache):
    model, tokenizer = load(packed, expert_cache=cache)
    expected = write(model, tokenizer)
    model.close()
    assert not compared
    model, tokenizer = load(packed, expert_cache=cache, verify=True)
    assert write(model, tokenizer) == expected
    stats = model.expert_stats()
    record = sum(read_manifest(packed / MANIFEST)["layers"][0]["field_bytes"])
    assert len(compared) * record == stats.bytes_preloaded + stats.bytes_read
    assert len(compared) >= 50
    model.close()


def test_no_token_is_computed_from_damage(packed):
    """An expert repaired while the model is loaded is read again."""
    model, tokenizer = load(packed, expert_cache=CACHE, verify=True)
    expected = write(model, tokenizer)
    path, tensors = packed / LAYER, read_header(packed / LAYER)
    whole = path.read_bytes()
    for expert in range(100):
        flip(path, tensors[f"experts.{expert}.{FIELDS[expert % 9]}"].offset)
    model.close()
    model, tokenizer = load(packed, expert_cache=CACHE, verify=True)
    with pytest.raises(FlashMoEError, match=r"layer_02.safetensors: layer 2 expert \d+ is not as"):
        write(model, tokenizer)
    with open(path, "r+b") as file:
        file.write(whole)
    assert write(model, tokenizer) == expected
    model.close()


def test_the_remedy_in_the_error_works(packed, capsys):
    """The error appears at load, where all experts are read; `verify --repair` fixes the file."""
    expert = read_header(packed / LAYER)["experts.41.up_proj.scales"]
    flip(packed / LAYER, expert.offset)
    with pytest.raises(FlashMoEError, match="layer 2 expert 41 is not as it was written") as raised:
        load(packed, expert_cache="auto", verify=True)
    command = str(raised.value).partition("`flashmoe-convert ")[2].partition("`")[0]
    assert main(command.replace("SOURCE", str(BUNDLED_MODEL)).split()) == 0
    load(packed, expert_cache="auto", verify=True)[0].close()
    capsys.readouterr()


@pytest.mark.parametrize("source", ["flag", "variable", "config.json"])
def test_each_source_of_the_setting(packed, compared, monkeypatch, capsys, source):
    arguments = ["--model", str(packed), "--prompt", "The", "--max-tokens", "1"]
    if source == "variable":
        monkeypatch.setenv("FLASHMOE_VERIFY", "1")
    if source == "config.json":
        config = json.loads((packed / "config.json").read_text())
        config["flashmoe"]["verify"] = True
        (packed / "config.json").write_text(json.dumps(config))
    generate_cli.main(arguments + ["--verify-reads"] * (source == "flag"))
    assert len(compared) == 400
    compared.clear()
    monkeypatch.setenv("FLASHMOE_VERIFY", "0")  # above config.json, below the flag
    generate_cli.main(arguments + ["--verify-reads"] * (source == "flag"))
    assert len(compared) == (400 if source == "flag" else 0)
    capsys.readouterr()


def test_off_unless_asked():
    assert StreamConfig.resolve({}).verify is False


@pytest.mark.parametrize("link", [False, True])
def test_directories_without_checksums(tmp_path, link):
    if link:
        convert(BUNDLED_MODEL, tmp_path / "linked", link=True)
    message = (
        r"verify = true: .* is not a converted model, so its experts have no checksums. Convert it"
    )
    with pytest.raises(FlashMoEError, match=message):
        load(tmp_path / "linked" if link else BUNDLED_MODEL, verify=True)


def test_a_manifest_with_too_few(packed):
    manifest = json.loads((packed / MANIFEST).read_text())
    del manifest["layers"][1]["records"][7]
    (packed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FlashMoEError, match=r"has 399 checksums for 400 experts. Run flashmoe-con"):
        load(packed, verify=True)
    del manifest["layers"][1]["records"]
    (packed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(FlashMoEError, match=r"manifest.json: no checksum for every expert"):
        load(packed, verify=True)


def test_gpu_memory_is_refused(packed, monkeypatch):
    monkeypatch.setattr(CpuBackend, "visible", False)
    with pytest.raises(FlashMoEError, match=r"NVIDIA GPU's memory cannot be compared .* leave ver"):
        load(packed, verify=True)
