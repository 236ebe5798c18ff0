"""Qwen3.5 by mlx-lm's own model code (FLASHMOE_MODEL=generic) equals this package's."""

import importlib
from typing import Any

import mlx.core as mx
import pytest
from test_exactness import TOLERANCE, greedy, prompt_of

from flashmoe_mlx import Model, load

generate = importlib.import_module("flashmoe_mlx.cli.generate")


def loaded(monkeypatch, directory, mode: str, **settings: Any):
    monkeypatch.setenv("FLASHMOE_MODEL", mode)
    return load(directory, expert_cache="2MiB", **settings)


@pytest.mark.parametrize("name", ["packed4", "linked", "unmodified"])
def test_tokens_and_logits(name, models, monkeypatch):
    """Of a converted directory, a linked one and the checkpoint itself."""
    found = []
    for mode in "auto", "generic":
        model, tokenizer = loaded(monkeypatch, models[name], mode)
        with model:
            assert isinstance(model, Model) == (mode == "auto")
            found.append(greedy(model, prompt_of(tokenizer, 17), count=24))
            assert model.expert_stats().bytes_read > 0
    (tokens, logits), (generic_tokens, generic_logits) = found
    assert generic_tokens == tokens
    assert mx.abs(generic_logits - logits).max().item() <= TOLERANCE


def test_generate(models, monkeypatch, capsys):
    texts = []
    for mode in "auto", "generic":
        monkeypatch.setenv("FLASHMOE_MODEL", mode)
        flags = ["--expert-cache", "2MiB", "--prompt", "What is a library?", "-m", "12"]
        generate.main(["--model", str(models["packed4"]), "--trust-remote-code", *flags])
        texts.append(capsys.readouterr().out.partition("\n\nTokens: ")[0])
    assert texts[0] == texts[1] != ""


def test_reads_of_a_converted_directory_are_compared_with_their_checksums(models, monkeypatch):
    model, _ = loaded(monkeypatch, models["packed4"], "generic", verify=True)
    with model:
        mx.eval(model(mx.array([[1, 2, 3]])))
        assert model.expert_stats().bytes_read > 0
