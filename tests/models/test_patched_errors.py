"""What a model of mlx-lm refuses: one sentence with value, place and remedy."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from families import EXPERTS, TOP_K, affine, floats, make
from shared_folders import made_once
from test_families import streamed

from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.errors import named
from flashmoe_mlx.models.trunk_checks import REMEDY

EXPERT = "model.layers.1.mlp.switch_mlp"
DOWN = f"{EXPERT}.down_proj"


def make_all(base: Path) -> None:
    make("qwen3_moe", base / "affine", affine(4))
    make("qwen3_moe", base / "mxfp4", floats("mxfp4", 4, 32))
    make("qwen3_moe", base / "plain", {})


@pytest.fixture
def copy(tmp_path_factory, tmp_path):
    """Copy a tiny checkpoint, to be damaged."""
    source = made_once(tmp_path_factory, "qwen3_moe", make_all)

    def take(mode: str) -> Path:
        return Path(shutil.copytree(source / mode, tmp_path / mode))

    return take


def set_config(directory: Path, **entries: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def set_tensors(directory: Path, change: dict[str, mx.array | None]) -> None:
    """Replace tensors, or remove those that are None."""
    path = str(directory / "model.safetensors")
    tensors: Any = mx.load(path)
    mx.eval(tensors)
    tensors = {k: v for k, v in (tensors | change).items() if v is not None}
    mx.save_safetensors(path, tensors, {"format": "mlx"})


def refusal(directory: Path, **settings: Any) -> str:
    """Return the sentence with which `flashmoe_mlx.load` refuses."""
    with (
        pytest.raises(FlashMoEError) as caught,
        named(directory, "its weights do not fit its config.json", REMEDY),
    ):
        streamed(directory, **settings)
    return str(caught.value)


WEIGHT, SCALES = (EXPERTS, 64, 4), (EXPERTS, 64, 1)
HOSTILE: dict[str, tuple[str, dict[str, mx.array | None]]] = {
    "too large": ("affine", {f"{DOWN}.weight": mx.zeros((EXPERTS, 640, 4), mx.uint32)}),
    "empty": ("affine", {f"{DOWN}.weight": mx.zeros((EXPERTS, 64, 0), mx.uint32)}),
    "rank 2": ("affine", {f"{DOWN}.weight": mx.zeros((EXPERTS, 256), mx.uint32)}),
    "rank 1": ("affine", {f"{DOWN}.weight": mx.zeros((EXPERTS,), mx.uint32)}),
    "rank 4": ("affine", {f"{DOWN}.weight": mx.zeros((*WEIGHT, 1), mx.uint32)}),
    "codes": ("affine", {f"{DOWN}.weight": mx.zeros(WEIGHT, mx.float32)}),
    "scales": ("affine", {f"{DOWN}.scales": mx.zeros(SCALES, mx.int32)}),
    "no scales": ("affine", {f"{DOWN}.scales": None}),
    "scales of no group": ("affine", {f"{DOWN}.scales": mx.zeros((EXPERTS, 64, 0))}),
    "mixed": ("affine", {f"{DOWN}.biases": mx.zeros(SCALES, mx.bfloat16)}),
    "no biases": ("affine", {f"{DOWN}.biases": None}),
    "biases": ("mxfp4", {f"{DOWN}.biases": mx.zeros(SCALES, mx.uint8)}),
    "bias": ("mxfp4", {f"{DOWN}.bias": mx.zeros((EXPERTS, 65))}),
    "a global scale": ("mxfp4", {f"{DOWN}.global_scale": mx.zeros((EXPERTS,))}),
    "plain": ("plain", {f"{DOWN}.weight": mx.zeros((EXPERTS, 64, 31))}),
    "plain integers": ("plain", {f"{DOWN}.weight": mx.zeros((EXPERTS, 64, 32), mx.int32)}),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_experts_that_are_no_matrix_of_the_model(fault, copy):
    mode, change = HOSTILE[fault]
    directory = copy(mode)
    set_tensors(directory, change)
    message = refusal(directory)
    assert message.startswith(f"{directory}/model.safetensors: layer 0 down_proj: weight ")
    assert message.endswith(
        " is not a matrix of 64 x 32, as config.json has it, in a format of MLX. Restore the "
        "checkpoint's own files."
    )


def test_another_number_of_experts(copy):
    directory = copy("affine")
    set_config(directory, num_experts=EXPERTS - 1)
    assert "model.safetensors: model.layers.1.mlp.switch_mlp.gate_proj.weight has shape [12, 32, " \
        "8], but config.json asks for 11 experts. Restore the " in refusal(directory)  # fmt: skip


@pytest.mark.parametrize(
    "entries",
    [{"hidden_size": 0}, {"num_experts": 0}, {"num_experts": -1}, {"hidden_size": 1 << 60},
     {"num_hidden_layers": 10**9}, {"num_experts": 1e12},
     {"moe_intermediate_size": 1 << 40}, {"num_experts": "many"}, {"num_hidden_layers": 1},
     {"num_hidden_layers": None}],
)  # fmt: skip
def test_sizes_that_no_model_has(entries, copy):
    directory = copy("affine")
    set_config(directory, **entries)
    message = refusal(directory)
    assert str(directory) in message or "config.json" in message
    assert message.endswith(".")


def test_a_trunk_that_is_no_matrix(copy):
    """Biases of another dtype than their scales would be read out of bounds by the CPU kernels."""
    directory = copy("affine")
    name = "model.layers.0.self_attn.q_proj.biases"
    set_tensors(directory, {name: mx.zeros((64, 2), mx.bfloat16)})
    with streamed(directory) as model, pytest.raises(FlashMoEError, match="biases"):
        mx.eval(model(mx.array([[1]])))


def test_a_checkpoint_of_hugging_face(copy):
    directory = copy("plain")
    tensors: Any = mx.load(str(directory / "model.safetensors"))
    change: dict[str, mx.array | None] = {}
    for name in [name for name in tensors if name.startswith("model.layers") and "switch" in name]:
        for expert, matrix in enumerate(tensors[name]):
            own = name.replace("switch_mlp", f"experts.{expert}")
            change |= {own: matrix, name: None}
    set_tensors(directory, change)
    assert refusal(directory) == (
        f"{directory}: no tensor {EXPERT}.gate_proj.weight, so it is not in MLX's own format. "
        "Convert it first: mlx_lm.convert."
    )


def test_a_model_without_experts(copy):
    directory = copy("plain")
    set_config(directory, model_type="qwen3", num_experts=0)
    assert refusal(directory) == (
        "config.json: model_type = 'qwen3' has no routed experts (no SwitchGLU or SwitchMLP), so "
        "nothing can be streamed. Use stock mlx-lm."
    )


@pytest.mark.parametrize("kind", ["nobodys", "switch_layers", "../x", "", None, 3, "_x", "a.b"])
def test_a_model_type_that_mlx_lm_lacks(kind, copy):
    directory = copy("plain")
    set_config(directory, model_type=kind)
    message = refusal(directory)
    assert f"config.json: model_type = {kind!r} is not a " in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"experts_per_token": EXPERTS + 1},
            "experts_per_token = 13, but the model has 12 experts per layer. Choose 1 to 12.",
        ),
        (
            {"lookahead": "on"},
            "lookahead = 'on': no prefetch for model_type 'qwen3_moe'. Choose auto, or off.",
        ),
        (
            {"expert_cache": 1000},
            "expert_cache = 1000 bytes holds 0 experts per layer, but each token uses 3. Give at "
            "least 27648 bytes, or auto.",
        ),
    ],
)
def test_settings(settings, message, copy):
    assert refusal(copy("affine"), **settings) == message


def test_no_checksums(copy):
    directory = copy("affine")
    assert refusal(directory, verify=True) == (
        f"verify = true: {directory} is not a converted model, so its experts have no checksums. "
        "Leave verify out."
    )


def test_the_checkpoints_own_top_k(copy):
    directory = copy("affine")
    set_config(directory, num_experts_per_tok=EXPERTS + 1)
    assert refusal(directory) == (
        "config.json: top-k = 13, but the model has 12 experts per layer. Choose 1 to 12."
    )


def test_top_k_of_a_family_without_the_entry(tmp_path):
    make("hunyuan", tmp_path, affine(4))
    assert refusal(tmp_path, experts_per_token=2) == (
        "experts_per_token = 2: top-k cannot be changed for this model. Leave it out."
    )


def test_another_top_k_is_used(copy):
    with streamed(copy("affine"), experts_per_token=TOP_K - 1) as model:
        assert model.args.num_experts_per_tok == TOP_K - 1
        mx.eval(model(mx.array([[1]])))


def test_the_variable_that_chooses_the_model(copy, monkeypatch):
    monkeypatch.setenv("FLASHMOE_MODEL", "wrong")
    assert refusal(copy("affine")) == (
        "FLASHMOE_MODEL = 'wrong' is not valid. Set it to auto or generic."
    )
