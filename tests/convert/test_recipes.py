"""Mixed bits: recipes follow mlx-lm's rule, and layers of unequal records stream exactly."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from convert_helpers import EXPERTS, LAYERS, contents, flip, load, read, unpack
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder
from mlx_lm.convert import convert as stock_convert

import flashmoe_mlx
from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.cli import main
from flashmoe_mlx.convert.plan.recipes import RECIPES, Target
from flashmoe_mlx.convert.quant.calibrate import Calibration
from flashmoe_mlx.convert.verify.repair import repair
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.format.layout import open_layout
from flashmoe_mlx.format.names import PROJECTIONS, layer_prefix
from flashmoe_mlx.loader import BUNDLED_MODEL

MATRIX = {2: 128 * 64 // 4, 4: 128 * 64 // 2}
SCALES = 2 * 2 * 128  # bytes of a matrix's scales and biases, in groups of 64
TOP_K = 2
TOKENS = [(7 * i * i + 11 * i) % 96 for i in range(40)]


@pytest.fixture(scope="module")
def root(root, tmp_path_factory):
    """A bfloat16 checkpoint, mlx-lm's conversions of it, and ours."""
    root = shutil.copytree(root, tmp_path_factory.mktemp("recipes"), dirs_exist_ok=True)
    stock_convert(
        str(root / "hf"), str(root / "stock_2_6"), quantize=True, quant_predicate="mixed_2_6"
    )
    for recipe in ("mixed_2_2_4", "mixed_2_4_ends"):
        convert(root / "hf", root / recipe, quantize=True, quant_predicate=recipe)
        unpack(root / recipe, root / f"resident_{recipe}")
    return root


def bits_of(recipe: str, layers: int) -> list[tuple[int, ...]]:
    target = Target(layers, 64, recipe=recipe)
    return [tuple(target.experts(n, p).bits for p in PROJECTIONS) for n in range(layers)]


@pytest.mark.parametrize("layers", [4, 12, 40])
@pytest.mark.parametrize("recipe", QUANT_RECIPES)
def test_mlx_lms_recipes_mean_the_same_for_experts(recipe, layers):
    names = [f"{layer_prefix(n)}.mlp.switch_mlp.{p}" for n in range(layers) for p in PROJECTIONS]
    model = SimpleNamespace(
        layers=[None] * layers, named_modules=lambda: [(name, None) for name in names]
    )
    stock = mixed_quant_predicate_builder(recipe, model)
    found = [bits for layer in bits_of(recipe, layers) for bits in layer]
    assert found == [stock(name, None)["bits"] for name in names]


def test_our_own_recipes():
    assert bits_of("mixed_2_2_4", 3) == [(2, 2, 4)] * 3
    assert bits_of("mixed_2_4_ends", 4) == [(4, 4, 4), (2, 2, 2), (2, 2, 2), (4, 4, 4)]
    ends = [layer[0] for layer in bits_of("mixed_2_4_ends", 40)]
    assert ends == [4] * 5 + [2] * 30 + [4] * 5
    assert [layer[2] for layer in bits_of("mixed_2_4", 8)] == [4, 2, 2, 4, 2, 2, 4, 4]
    assert {layer[:2] for layer in bits_of("mixed_2_4", 8)} == {(2, 2)}


def layout_of(path):
    return open_layout(path, LAYERS, EXPERTS)


@pytest.mark.parametrize("recipe", ["mixed_2_2_4", "mixed_2_4_ends"])
def test_files_config_and_reports_tell_the_bits(root, recipe):
    wanted = bits_of(recipe, LAYERS)
    entry = read(root / recipe / "config.json")["quantization"]
    assert (entry["bits"], entry["group_size"]) == (4, 64)
    for number, (layer, bits) in enumerate(
        zip(layout_of(root / recipe).layers, wanted, strict=True)
    ):
        assert layer.record_bytes == sum(MATRIX[b] + SCALES for b in bits)
        for projection, own in zip(PROJECTIONS, bits, strict=True):
            path = f"{layer_prefix(number)}.mlp.switch_mlp.{projection}"
            assert entry.get(path, entry)["bits"] == own
            assert (path in entry) == (own != 4)
    found = examine(root / recipe)
    assert not found.problems and found.bits == tuple(sorted({b for bits in wanted for b in bits}))


def test_each_matrix_is_what_its_bits_alone_give(root, tmp_path):
    for bits in (2, 4):
        convert(root / "hf", tmp_path / str(bits), True, q_bits=bits, q_method="least-squares")
    file = "model_experts/layer_01.safetensors"
    mixed = load(root / "mixed_2_2_4", file)
    for bits, projections in ((2, PROJECTIONS[:2]), (4, PROJECTIONS[2:])):
        alone = load(tmp_path / str(bits), file)
        names = [name for name in alone if name.split(".")[2] in projections]
        assert len(names) == 3 * EXPERTS * len(projections)
        assert all(mx.array_equal(mixed[name], alone[name]) for name in names)
    trunks = [load(path) for path in (root / "mixed_2_2_4", tmp_path / "4")]
    assert trunks[0].keys() == trunks[1].keys()
    assert all(mx.array_equal(trunks[0][name], trunks[1][name]) for name in trunks[0])


def in_float32(model):
    model.set_dtype(mx.float32)
    return model


def greedy(model, prompt, steps=6):
    cache = model.make_cache()
    rows = [model(mx.array([prompt]), cache=cache)[0]]
    for _ in range(steps):
        rows.append(model(mx.argmax(rows[-1][-1:], -1)[None], cache=cache)[0])
    return mx.concatenate(rows)


@pytest.mark.parametrize("recipe", ["mixed_2_2_4", "mixed_2_4_ends"])
def test_streamed_equals_stock_with_everything_in_memory(root, recipe):
    """Prompts and steps take different kernels."""
    expected = greedy(in_float32(mlx_lm.load(str(root / f"resident_{recipe}"))[0]), TOKENS)
    for slots in (TOP_K, EXPERTS):
        cache = slots * layout_of(root / recipe).token_bytes
        model, _ = flashmoe_mlx.load(root / recipe, expert_cache=cache)
        ours = greedy(in_float32(model), TOKENS)
        assert mx.abs(ours - expected).max().item() <= 1e-4
        model.close()


def test_bytes_read_are_those_of_the_experts_asked_for(root):
    layout = layout_of(root / "mixed_2_4_ends")
    sizes = [layer.record_bytes for layer in layout.layers]
    assert sizes[0] == sizes[3] > sizes[1] == sizes[2]
    model, _ = flashmoe_mlx.load(root / "mixed_2_4_ends", expert_cache=TOP_K * layout.token_bytes)
    model(mx.array([TOKENS[:1]]))
    assert model.expert_stats().bytes_read == TOP_K * sum(sizes)
    text = Calibration(model.model, TOKENS)
    wanted = [np.unique(text.layer(number).experts).size for number in range(LAYERS)]
    model.close()
    model, _ = flashmoe_mlx.load(root / "mixed_2_4_ends", expert_cache=TOP_K * layout.token_bytes)
    model(mx.array([TOKENS]))
    read_once = sum(count * size for count, size in zip(wanted, sizes, strict=True))
    assert model.expert_stats().bytes_read == read_once
    model.close()


def test_a_mixed_checkpoint_of_mlx_lm_streams_and_is_repacked_as_it_is(root, tmp_path):
    """2 and 6 bits; its config.json has null for group sizes."""
    convert(root / "stock_2_6", tmp_path / "packed")
    before, after = (
        read(path / "config.json")["quantization"]
        for path in (root / "stock_2_6", tmp_path / "packed")
    )
    experts = [f"{layer_prefix(n)}.mlp.switch_mlp.{p}" for n in range(LAYERS) for p in PROJECTIONS]
    for name in before.keys() | after.keys():
        if name in experts:
            assert before.get(name, before)["bits"] == after.get(name, after)["bits"]
        else:
            assert before[name] == after[name]
    expected = in_float32(mlx_lm.load(str(root / "stock_2_6"))[0])(mx.array([TOKENS[:9]]))
    for path in (root / "stock_2_6", tmp_path / "packed"):
        cache = 5 * layout_of(path).token_bytes
        model, _ = flashmoe_mlx.load(path, expert_cache=cache)
        assert mx.abs(in_float32(model)(mx.array([TOKENS[:9]])) - expected).max().item() <= 1e-4
        model.close()


def test_a_matrix_that_has_its_bits_already_is_copied(root, tmp_path):
    convert(root / "stock", tmp_path / "mixed", quantize=True, quant_predicate="mixed_2_2_4")
    convert(root / "stock", tmp_path / "four")
    file = "model_experts/layer_03.safetensors"
    mixed, four = (load(tmp_path / name, file) for name in ("mixed", "four"))
    down = [name for name in four if "down_proj" in name]
    assert len(down) == 3 * EXPERTS and all(mx.array_equal(mixed[n], four[n]) for n in down)


def test_stock_generate_runs_it(tmp_path):
    options = {"quantize": True, "quant_predicate": "mixed_2_2_4", "q_method": "min-max"}
    convert(BUNDLED_MODEL, tmp_path / "mixed", **options)
    arguments = ["--model", str(tmp_path / "mixed"), "--trust-remote-code", "-p", "What is a cat?"]
    found = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", *arguments, "-m", "8"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    path = unpack(tmp_path / "mixed", tmp_path / "resident")
    stock, tokenizer = mlx_lm.load(str(path), tokenizer_config={"trust_remote_code": True})
    question = [{"role": "user", "content": "What is a cat?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    expected = mlx_lm.generate(in_float32(stock), tokenizer, prompt, max_tokens=8)
    assert found.stdout.split("==========\n")[1].removesuffix("\n") == expected


def test_verify_and_repair_know_the_places_of_unequal_records(root, tmp_path):
    convert(root / "hf", tmp_path / "out", quantize=True, quant_predicate="mixed_2_4_ends")
    whole = contents(tmp_path / "out")
    assert whole == contents(root / "mixed_2_4_ends")
    layer = layout_of(tmp_path / "out").layers[3]
    flip(layer.fields[0].file, layer.fields[6].offset + 5 * layer.record_bytes)
    problems = verify(tmp_path / "out")
    assert [(p.file, p.expert) for p in problems] == [("model_experts/layer_03.safetensors", 5)]
    assert "down_proj" in str(problems[0])
    assert repair(tmp_path / "out", problems, root / "hf") == []
    assert contents(tmp_path / "out") == whole


def test_a_dry_run_names_both(root, tmp_path, capsys):
    options = ["--hf-path", str(root / "hf"), "--mlx-path", str(tmp_path / "out"), "-q"]
    assert main([*options, "--quant-predicate", "mixed_2_4_ends", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "experts: 2 bits, groups of 64, 4 bits, groups of 64" in shown
    assert "7,680 or 13,824 bytes" in shown


@pytest.mark.parametrize("options, message", [
    ({"quant_predicate": "mixed_9"}, "--quant-predicate mixed_9: unknown recipe. Choose one of "
     "mixed_2_4, mixed_2_6, mixed_3_4, mixed_3_6, mixed_4_6, mixed_2_2_4, mixed_2_4_ends."),
    ({"quant_predicate": "mixed_2_4", "q_bits": 3}, "--q-bits 3 and --quant-predicate mixed_2_4 "
     "both set bits. Drop one of them."),
    ({"quant_predicate": "mixed_2_4", "quantize": False}, "--quant-predicate mixed_2_4 has no "
     "effect without -q. Add -q."),
])  # fmt: skip
def test_what_is_refused(root, tmp_path, options, message):
    with pytest.raises(FlashMoEError) as error:
        convert(root / "hf", tmp_path / "out", **{"quantize": True} | options)
    assert str(error.value) == message
    assert not (tmp_path / "out").exists()


def test_the_command_lists_the_recipes(tmp_path, capsys):
    with pytest.raises(SystemExit) as code:
        main(["--hf-path", "x", "-q", "--quant-predicate", "mixed_9"])
    assert code.value.code == 2
    shown = capsys.readouterr().err
    assert "mixed_9" in shown and all(name in shown for name in RECIPES)


def test_the_manifest_keeps_the_recipe(root):
    path = root / "mixed_2_2_4" / "model_experts" / "manifest.json"
    assert json.loads(path.read_text())["options"]["recipe"] == "mixed_2_2_4"
