"""Errors of flashmoe-convert, what they leave on disk, and the command line."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import threading

import mlx.core as mx
import pytest
from convert_helpers import (
    EXPERTS,
    LAYERS,
    make_config,
    make_weights,
    read,
    save,
    separate,
)  # fmt: skip

from flashmoe_mlx.convert import convert, run
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.write import execute, files, output
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.format.layout import open_layout

PREFIX = "language_model.model.layers"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["the experts are not quantized", "Add -q"]),
        ({"q_bits": 4}, ["--q-bits 4 has no effect without -q"]),
        ({"quantize": True, "q_bits": 7}, ["--q-bits 7", "2, 3, 4, 5, 6, 8"]),
        ({"quantize": True, "q_group_size": 48}, ["--q-group-size 48", "32, 64, 128"]),
        ({"quantize": True, "q_bits": 0}, ["--q-bits 0"]),
        (
            {"quantize": True, "q_group_size": 128},
            ["moe_intermediate_size = 64", "Sizes that fit this model: 32, 64."],
        ),
        ({"quantize": True, "revision": "main"}, ["--revision main has no effect on the local"]),
        ({"link": True}, ["the experts are not quantized"]),
        ({"link": True, "quantize": True}, ["--link copies nothing"]),
    ],
)
def test_bad_options(root, tmp_path, options, parts):
    with pytest.raises(FlashMoEError) as error:
        convert(str(root / "hf"), tmp_path / "out", **options)
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_dtype_of_a_quantized_source_stays(root, tmp_path):
    with pytest.raises(FlashMoEError, match=r"--dtype float16: the source keeps its BF16 scales"):
        convert(str(root / "stock"), tmp_path / "out", dtype="float16")
    convert(str(root / "stock"), tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"model_type": "qwen3_moe"}, ["'qwen3_moe'", "but its text_config"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok = 9", "num_experts = 8"]),
        ({"num_experts": None}, ["num_experts is None"]),
        ({"num_experts": 9}, ["_proj is BF16[8, 128, ", "expected [9, 128, "]),
        ({"num_hidden_layers": 5}, ["layer 4 expert 0 gate_proj is missing"]),
        ({"num_hidden_layers": 3}, ["expert 0 of layer 3", "3 layers"]),
        ({"moe_intermediate_size": 32}, ["_proj is BF16[8, 128, ", "expected [8, "]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["'fp8'", "bfloat16 checkpoint"]),
    ],
)
def test_config_that_does_not_fit(root, tmp_path, change, parts):
    source = tmp_path / "hf"
    shutil.copytree(root / "hf", source)
    config = read(source / "config.json")
    config["text_config"].update(change)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlashMoEError) as error:
        convert(str(source), tmp_path / "out", quantize=True)
    for part in [str(source), *parts]:
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_expert_is_named(tmp_path):
    weights = separate(make_weights(make_config()))
    del weights[f"{PREFIX}.2.mlp.experts.6.up_proj.weight"]
    source = save(tmp_path / "hf", make_config(), weights)
    with pytest.raises(FlashMoEError, match=r"layer 2 expert 6 up_proj is missing"):
        convert(str(source), tmp_path / "out", quantize=True)


def test_missing_files(root, tmp_path):
    source = tmp_path / "hf"
    source.mkdir()
    with pytest.raises(FlashMoEError, match=r"config.json: missing"):
        convert(str(source), tmp_path / "out", quantize=True)
    shutil.copy(root / "hf" / "config.json", source)
    with pytest.raises(FlashMoEError, match=r"no model\*.safetensors found"):
        convert(str(source), tmp_path / "out", quantize=True)
    for path in (root / "hf").iterdir():
        shutil.copy(path, source)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FlashMoEError, match=r"promises \S+ in model-00002-of-00003.safetensors"):
        convert(str(source), tmp_path / "out", quantize=True)
    with pytest.raises(FlashMoEError, match=r"nowhere: not a directory"):
        convert(str(tmp_path / "nowhere"), tmp_path / "out", quantize=True)
    assert not (tmp_path / "out").exists()


def test_foreign_quantization_modes(root, tmp_path):
    source = tmp_path / "mlx"
    shutil.copytree(root / "stock", source)
    config = read(source / "config.json")
    for mode, message in (
        ("mxfp5", "quantization mode 'mxfp5' is not one of MLX's"),
        ("mxfp4", "a quantization that does not fit the model"),  # its codes are affine
    ):
        config["quantization"]["mode"] = mode
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(FlashMoEError, match=message):
            convert(str(source), tmp_path / "out")


def test_link_needs_a_stock_checkpoint(root, tmp_path):
    convert(str(root / "stock"), tmp_path / "packed")
    with pytest.raises(FlashMoEError, match=r"Use it as it is"):
        convert(str(tmp_path / "packed"), tmp_path / "out", link=True)
    assert not (tmp_path / "out").exists()


def test_existing_output_is_untouched(root, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FlashMoEError, match=r"out: exists already. Delete it, or give another"):
        convert(str(root / "hf"), tmp_path / "out", quantize=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_full_disk_is_seen_early(root, tmp_path, monkeypatch):
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(FlashMoEError, match=r"needs 0.7\d MB, but only 0.00 MB are free"):
        convert(str(root / "hf"), tmp_path / "deep" / "out", quantize=True)
    assert not (tmp_path / "deep").exists()


def test_failure_leaves_no_manifest(root, tmp_path, monkeypatch):
    written = []

    def write_layer(source, plan, *rest):
        if plan.layer == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(plan.file))
        written.append(plan.layer)
        return execute.write_layer(source, plan, *rest)

    monkeypatch.setattr(output, "write_layer", write_layer)
    with pytest.raises(FlashMoEError, match=r"No space left on device\). Free some.*Run the same"):
        convert(str(root / "hf"), tmp_path / "out", quantize=True)
    assert written == [0, 1]
    assert not (tmp_path / "out/model_experts/manifest.json").exists()
    with pytest.raises(FlashMoEError, match=r"unfinished conversion"):
        open_layout(tmp_path / "out", LAYERS, EXPERTS)
    (tmp_path / "out/model_experts/unfinished.json").unlink()
    with pytest.raises(FlashMoEError, match=r"is an unfinished conversion. Delete it"):
        convert(str(root / "hf"), tmp_path / "out", quantize=True)


def test_failed_write_back_is_not_forgotten(root, tmp_path, monkeypatch):
    """The system reports a lost write once, possibly to a background fsync."""
    real, calls = os.fsync, []

    def fsync(file):
        calls.append(file)
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.EIO, "Input/output error")
        real(file)

    monkeypatch.setattr(files, "SYNC_BYTES", 5000)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(FlashMoEError, match=r"cannot be written \(Input/output error\)"):
        convert(str(root / "hf"), tmp_path / "out", quantize=True)
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors*")}
    assert calls and names == {"model.safetensors.index.json"}


def test_failure_inside_a_file_leaves_no_file(root, tmp_path, monkeypatch):
    """The source shrinks while it is read: the file in progress is deleted, .tmp included."""
    source = tmp_path / "mlx"
    shutil.copytree(root / "stock", source)
    real = execute.read_records

    def read_records(reader, layout, batch):
        if layout.layer == 1 and 5 in batch:
            os.truncate(source / "model.safetensors", 8)
        return real(reader, layout, batch)

    monkeypatch.setattr(execute, "read_records", read_records)
    with pytest.raises(FlashMoEError, match=r"model.safetensors: ends at byte .* it again"):
        convert(str(source), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out/model_experts").iterdir()}
    assert names == {"layer_00.safetensors", "unfinished.json"}


# --- command -------------------------------------------------------------------------------------


def test_command(root, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", str(root / "hf"), "--mlx-path", str(out), "-q", "--q-bits", "2"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "2 bits" in capsys.readouterr().out
    assert main(arguments) == 0
    assert f"mlx_lm.generate --model {out} --trust-remote-code" in capsys.readouterr().out
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"flashmoe-convert: error: {out}: exists already. Delete it, or give another --mlx-path.\n"
    )
    assert captured.out == ""


def test_interruption(root, tmp_path, capsys, monkeypatch):
    def write_layer(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(output, "write_layer", write_layer)
    out = tmp_path / "out"
    assert main(["--model", str(root / "hf"), "--mlx-path", str(out), "-q"]) == 130
    assert capsys.readouterr().err == (
        f"flashmoe-convert: interrupted; run the same command again to resume, or delete {out}\n"
    )
    assert not (out / "model_experts/manifest.json").exists()


def test_help_says_what_two_bits_mean(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "2-bit conversion has a 4-bit trunk" in " ".join(capsys.readouterr().out.split())


MEASURE = """
import resource, sys
import mlx.core
from flashmoe_mlx.convert import convert
def peak():  # in KiB, but bytes on macOS
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size // 1024 if sys.platform == "darwin" else size
before = peak()
convert(sys.argv[1], sys.argv[2], quantize=True)
print(before, peak())
"""


def test_memory_stays_small(tmp_path):
    """A stacked tensor of 403 MB is never in memory: the process grows by less than 150 MB."""
    config = make_config(
        hidden_size=1024, moe_intermediate_size=512, num_experts=192, num_hidden_layers=1
    )
    small = make_config(hidden_size=1024, num_experts=1, num_hidden_layers=1)
    weights = {k: v for k, v in make_weights(small).items() if "switch_mlp" not in k}
    weights[f"{PREFIX}.0.mlp.gate.weight"] = mx.zeros((192, 1024), mx.bfloat16)
    source = save(tmp_path / "hf", config, weights)
    header, end = {}, 0
    for name, shape in (("gate_up_proj", (192, 1024, 1024)), ("down_proj", (192, 1024, 512))):
        start, end = end, end + 2 * math.prod(shape)
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        header[f"{PREFIX}.0.mlp.experts.{name}"] = entry
    text = json.dumps(header).encode()
    with open(source / "model-experts.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # a sparse file
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert (after - before) / 1024 < 150
