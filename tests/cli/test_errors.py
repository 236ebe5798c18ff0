"""Bad input: one sentence with value, place and remedy; exit code 2; never a traceback."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.cli.generate import main
from flashmoe_mlx.custom_kernels import device


@pytest.fixture
def copy(models, tmp_path):
    """A private copy of the packed model."""
    return shutil.copytree(models["packed4"], tmp_path / "model")


def edit_config(model, **change) -> None:
    path = model / "config.json"
    config = json.loads(path.read_text())
    config.get("text_config", config).update(change)
    path.write_text(json.dumps(config))


def truncate(model) -> None:
    path = model / "model_experts" / "layer_01.safetensors"
    os.truncate(path, path.stat().st_size - 100)


DAMAGE = {
    "truncated": (truncate, r"layer_01\.safetensors: truncated or altered: \d+ bytes long"),
    "layer missing": (
        lambda m: (m / "model_experts" / "layer_02.safetensors").unlink(),
        r"layer_02\.safetensors: missing, so layer 2 has no experts\. Run flashmoe-convert again",
    ),
    "no manifest": (
        lambda m: (m / "model_experts" / "manifest.json").unlink(),
        r"unfinished conversion .* Run flashmoe-convert again",
    ),
    "no experts": (
        lambda m: shutil.rmtree(m / "model_experts"),
        r"the folder model_experts/ is missing, .* Run flashmoe-convert again",
    ),
    "no trunk": (
        lambda m: [f.unlink() for f in m.glob("model*.safetensors")],
        r"no model\*\.safetensors found",
    ),
    "no config": (
        lambda m: (m / "config.json").unlink(),
        r"no config\.json\. Give the directory of a model",
    ),
    "more layers": (
        lambda m: edit_config(m, num_hidden_layers=400, layer_types=None),
        r"lists \d+ layers, but config\.json has num_hidden_layers = 400",
    ),
    "more experts": (
        lambda m: edit_config(m, num_experts=4000),
        r"no tensor experts\.\d+\.gate_proj\.weight; config\.json asks for 4000 experts",
    ),
    "K above experts": (
        lambda m: edit_config(m, num_experts_per_tok=9999),
        r"num_experts_per_tok = 9999, but the model has \d+ experts per layer\. Choose 1 to",
    ),
    "config not JSON": (
        lambda m: (m / "config.json").write_text("{"),
        r"config\.json: not JSON .* Restore the checkpoint's own",
    ),
    "other model": (
        lambda m: (m / "config.json").write_text('{"model_type": "mixtral"}'),
        r"lists experts of other modules than config\.json asks for",
    ),
    "other width": (
        lambda m: edit_config(m, moe_intermediate_size=96),
        r"is not a matrix of 96 x 192, as config\.json has it",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_directories(copy, damage):
    spoil, message = DAMAGE[damage]
    spoil(copy)
    with pytest.raises(FlashMoEError, match=message) as caught:
        load(copy)
    assert str(copy) in str(caught.value) or "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_cache": 1}, r"= 1 bytes holds 0 experts per layer, .* Give at least \d+ bytes"),
        ({"expert_cache": "huge"}, r"expert_cache = 'huge' is not a size"),
        ({"io_threads": 0}, r"io_threads = 0 is not a whole number of at least 1"),
        ({"experts_per_token": 5000}, r"experts_per_token = 5000, but the model has \d+ experts"),
    ],
)
def test_settings_out_of_range(models, settings, message):
    with pytest.raises(FlashMoEError, match=message):
        load(models["packed4"], **settings)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "no/such/dir"], "no/such/dir: no such directory"),
        (["--expert-cache", "12"], "expert_cache = 12 bytes holds 0 experts"),
        (["--io-threads", "many"], "io_threads = 'many' is not a whole number"),
        (["--experts-per-token", "0"], "experts_per_token = '0' is not a whole number"),
        (["--draft-model", "x"], "--draft-model is not supported for streamed models"),
        (["--image", "x.png"], "--image is not supported for streamed models"),
        (["FLASHMOE_KERNELS=fast"], "FLASHMOE_KERNELS = 'fast' is not valid"),
        (["FLASHMOE_IO_THREADS=x"], "FLASHMOE_IO_THREADS = 'x' is not a whole number"),
    ],
)
def test_command_line(args, message, capsys, monkeypatch):
    """Options of a command, or environment variables."""
    device._cpu_module.cache_clear()  # caches the kernel mode
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = [arg.split("=") for arg in args if "=" in arg]
    for setting in settings:
        monkeypatch.setenv(*setting)
    with pytest.raises(SystemExit) as exit_:
        main(["--prompt", "Hello", *([] if settings else args)])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith(f"flashmoe-generate: error: {message}")
    assert captured.err.count("\n") == 1


def test_no_traceback_from_the_command():
    command = [sys.executable, "-m", "flashmoe_mlx.cli.generate", "Hello", "--expert-cache", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    message = "expert_cache = 1 bytes holds 0 experts"
    assert result.stderr.startswith(f"flashmoe-generate: error: {message}")


def test_long_messages_are_shortened_in_the_middle():
    message = "config.json: model_type " + 100_000 * "x" + " cannot be streamed."
    text = str(FlashMoEError(message))
    assert len(text) < 1300 and text.startswith(message[:900]) and text.endswith(message[-300:])
    assert "[98844 characters left out]" in text
    assert str(FlashMoEError(1200 * "y")) == 1200 * "y"
