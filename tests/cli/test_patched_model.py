"""The commands and the Python API, with models that mlx-lm builds and whose experts stream."""

import copy
import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache, save_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

from flashmoe_mlx import FlashMoEError, batch_generate, load
from flashmoe_mlx.cli import doctor, full_check
from flashmoe_mlx.cli.doctor_model import examine

generate = importlib.import_module("flashmoe_mlx.cli.generate")
NAMES = "qwen3_moe", "gpt_oss"
LORA = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
PROMPT = "What is a library?"


@pytest.fixture(params=NAMES)
def directory(request, patched) -> Path:
    return patched / request.param


def opened(directory: Path, **settings: Any) -> Any:
    trust = {"trust_remote_code": True}
    return load(directory, tokenizer_config=trust, **{"expert_cache": "70KiB"} | settings)


def run(directory: Path, *flags: str) -> None:
    generate.main(["--model", str(directory), "--trust-remote-code", "--prompt", PROMPT,
                   "-m", "6", "--expert-cache", "70KiB", *flags])  # fmt: skip


def text_of(capsys) -> str:
    return capsys.readouterr().out.partition("\n\nTokens: ")[0]


def test_a_watched_run_gives_the_same_text_and_figures_that_add_up(directory, tmp_path, capsys):
    run(directory)
    plain = text_of(capsys)
    reports = ["--stats", "--live", "--plot", str(tmp_path / "p.png")]
    run(directory, *reports, "--stats-json", str(tmp_path / "s.json"))
    output = capsys.readouterr().out
    assert output.partition("\n\nTokens: ")[0] == plain != ""
    found = json.loads((tmp_path / "s.json").read_text())
    layers = found["layers"]["prompt"] + found["layers"]["generation"]
    assert len(layers) == 2 * families.LAYERS
    for name in ("asked", "hits", "bytes_read"):
        assert sum(layer[name] for layer in layers) == found["total"][name] > 0
    for layer in layers:
        assert (layer["kind"] == "moe") == (layer["experts_ms"] > 0) == (layer["asked"] > 0)
        assert layer["rest_ms"] > 0 and layer["attention_ms"] == 0 and layer["steps"] > 0
    titles = next(line for line in output.splitlines() if line.split()[:1] == ["layer"])
    assert {"experts", "rest"} < set(titles.split()) and "attention" not in titles
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_sampling_and_a_bounded_cache(patched, capsys):
    run(patched / "qwen3_moe", "--top-k", "1", "--temp", "1", "--max-kv-size", "64")
    sampled = text_of(capsys)
    run(patched / "qwen3_moe")
    assert sampled == text_of(capsys)
    with pytest.raises(SystemExit):
        run(patched / "gpt_oss", "--max-kv-size", "64")
    message = "max_kv_size = 64: mlx-lm cannot bound the caches that this model makes."
    assert message in capsys.readouterr().err


def test_top_k_above_the_vocabulary(directory, capsys):
    with pytest.raises(SystemExit):
        run(directory, "--top-k", "4096")
    assert "--top-k 4096: the model has 4096 tokens. Give fewer." in capsys.readouterr().err


def test_a_prompt_cache(directory, tmp_path, capsys):
    """Text after a cached prefix equals text after the same tokens uncached."""
    model, tokenizer = opened(directory)
    ids = tokenizer.encode("What is a library? It is a place.")
    cache, file = make_prompt_cache(model), str(tmp_path / "cache.safetensors")
    mx.eval(model(mx.array([ids]), cache=cache))
    save_prompt_cache(file, cache, {"model": str(directory), "tokenizer_config": "{}"})
    more = tokenizer.encode("Why?", add_special_tokens=False)
    expected = mlx_lm.generate(model, tokenizer, ids + more, max_tokens=5)
    flags = ["--prompt-cache-file", file, "--trust-remote-code", "--model", str(directory)]
    generate.main([*flags, "--ignore-chat-template", "--prompt", "Why?", "-m", "5"])
    assert text_of(capsys) == expected
    model.close()


def test_a_prompt_cache_of_another_model(patched, tmp_path, capsys):
    """Its classes and then its arrays are compared, before anything is computed from it."""
    file = str(tmp_path / "cache.safetensors")
    narrow = [KVCache() for _ in range(families.LAYERS)]
    for cache in narrow:
        cache.update_and_fetch(mx.zeros((1, 2, 5, 8)), mx.zeros((1, 2, 5, 8)))
    for name, message in (
        ("gpt_oss", "the prompt cache of layer 0 is KVCache, but the model needs RotatingKVCache"),
        ("qwen3_moe", "the prompt cache: its arrays do not fit the model"),
    ):
        save_prompt_cache(file, narrow, {"model": str(patched / name), "tokenizer_config": "{}"})
        with pytest.raises(SystemExit):
            run(patched / name, "--prompt-cache-file", file)
        assert message in capsys.readouterr().err


def test_doctor(directory, capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.main([str(directory), "--json", "--sample-mib", "2"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0, found["problems"]
    model = found["model"]
    layers = 3 if directory.name == "gpt_oss" else 2
    assert (model["complete"], model["layers"], model["experts"]) == (True, layers, 12)
    assert model["token_bytes"] * 4 == model["expert_bytes"]  # 3 of 12 experts
    size = (directory / "model.safetensors").stat().st_size
    assert 0 < size - model["trunk_bytes"] - model["expert_bytes"] < 20_000  # the header
    assert any("After flashmoe-convert, it takes one." in advice for advice in found["advice"])


def test_the_full_check(directory, monkeypatch):
    """Its prompts here are few and short."""
    monkeypatch.setattr(full_check, "TEXTS", ["What is a library?"])
    monkeypatch.setattr(full_check, "QUESTIONS", [])
    monkeypatch.setattr(full_check, "LENGTHS", (1, 30))
    monkeypatch.setattr(full_check, "parity", lambda cases: [])
    monkeypatch.setattr(full_check, "memory", lambda report: (True, ""))  # starts a process
    report = examine(directory)
    found = full_check.full_check(report)
    assert [finding.name for finding in found] == [
        "streamed logits",
        "greedy tokens",
        "peak memory",
    ]
    assert all(finding.ok for finding in found), found


def test_doctor_finds_a_missing_tensor(patched, tmp_path, capsys):
    directory = shutil.copytree(patched / "qwen3_moe", tmp_path / "m")
    tensors: Any = mx.load(str(directory / "model.safetensors"))
    mx.eval(tensors)
    del tensors["model.norm.weight"]
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, {"format": "mlx"})
    with pytest.raises(SystemExit) as ended:
        doctor.main([str(directory), "--sample-mib", "2"])
    assert ended.value.code == 1
    assert "Missing 1 parameters: model.norm.weight" in " ".join(capsys.readouterr().out.split())


def test_batches_equal_single_prompts(directory):
    model, tokenizer = opened(directory)
    with model:
        prompts = [tokenizer.encode(text) for text in ("A", "What is it?", "One two three four.")]
        batch = batch_generate(model, tokenizer, prompts, max_tokens=5).texts
        single = [mlx_lm.generate(model, tokenizer, p, max_tokens=5) for p in prompts]
    assert [text.strip() for text in batch] == [text.strip() for text in single]


def test_copies_share_the_store_and_close_with_it(directory):
    model, _ = opened(directory)
    twin, tokens = copy.deepcopy(model), mx.array([[1, 2, 3]])
    assert mx.array_equal(twin(tokens), model(tokens))
    assert twin.expert_stats() is model.expert_stats()
    assert model.expert_stats().asked > 0
    with model:
        pass
    model.close()
    for each in (model, twin):
        with pytest.raises(FlashMoEError, match="closed"):
            each(tokens)
    with pytest.raises(TypeError, match="cannot be pickled"):
        model.__reduce_ex__(4)


def test_a_fork_refuses_to_compute(directory):
    model, _ = opened(directory)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            model(mx.array([[1]]))
        except FlashMoEError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert b"fork" in os.read(reader, 1000)
    model.close()


def write_adapters(model: Any, folder: Path, keys: list[str]) -> None:
    folder.mkdir()
    linear_to_lora_layers(model, 2, LORA | {"keys": keys})
    entries = {"num_layers": 2, "lora_parameters": LORA | {"keys": keys}}
    (folder / "adapter_config.json").write_text(json.dumps(entries))
    found = dict(tree_flatten(model.parameters()))
    adapters = {k: mx.ones_like(v) * 0.1 for k, v in found.items() if ".lora_" in k}
    mx.save_safetensors(str(folder / "adapters.safetensors"), adapters)


def test_adapters_equal_stock(directory, tmp_path):
    stock, _ = mlx_lm.load(str(directory), tokenizer_config={"trust_remote_code": True})
    write_adapters(stock, tmp_path / "a", ["self_attn.q_proj", "self_attn.o_proj"])
    stock = mlx_lm.load(str(directory), adapter_path=str(tmp_path / "a"),
                        tokenizer_config={"trust_remote_code": True})[0]  # fmt: skip
    stock.set_dtype(mx.float32)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    with opened(directory, adapter_path=str(tmp_path / "a"))[0] as model:
        assert mx.abs(model(tokens) - stock(tokens)).max() <= 1e-4 * mx.abs(stock(tokens)).max()
        plain = opened(directory)[0]
        assert mx.abs(model(tokens) - plain(tokens)).max() > 0.01


def test_adapters_of_streamed_experts(patched, tmp_path):
    """mlx-lm would not find these layers."""
    directory = patched / "qwen3_moe"
    stock, _ = mlx_lm.load(str(directory), tokenizer_config={"trust_remote_code": True})
    write_adapters(stock, tmp_path / "a", ["mlp.switch_mlp.gate_proj"])
    with pytest.raises(FlashMoEError, match="adapters that do not fit this model"):
        opened(directory, adapter_path=str(tmp_path / "a"))
