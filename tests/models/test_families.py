"""Every mixture of experts of mlx-lm streams from its own checkpoint, and equals stock."""

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest
from convert_helpers import write_tokenizer
from families import EXPERTS, FAMILIES, TOP_K, floats, make, mode_of
from family_answers import batch_logits, close, distance, prompt_logits, token_bytes, tokens
from family_helpers import streamed
from mlx_lm.models.cache import make_prompt_cache

from flashmoe_mlx.convert import convert
from flashmoe_mlx.custom_kernels import device
from flashmoe_mlx.models.patch import switches

pytestmark = pytest.mark.usefixtures("unsynced")

STEPS = 32
BANKS = TOP_K, EXPERTS // 2, EXPERTS
OURS = [("affine", bits) for bits in (2, 4, 8)]  # formats that our CPU kernels take


def greedy_logits(model: Any) -> mx.array:
    """Return the logits of a prompt of 17 tokens and of the steps after it."""
    cache = make_prompt_cache(model)
    rows = [model(mx.array([tokens(17)]), cache=cache)[0]]
    for _ in range(STEPS - 1):
        rows.append(model(mx.argmax(rows[-1][-1:], axis=-1)[None], cache=cache)[0])
        mx.eval(rows[-1])
    return mx.concatenate(rows)


def answers(model: Any) -> dict[str, mx.array | str]:
    found = {
        "1": prompt_logits(model, 1),
        "90": prompt_logits(model, 90),
        "greedy": greedy_logits(model),
        "batch": batch_logits(model),
    }
    mx.eval(found)
    return found


def compare(found: dict, expected: dict, equal: Callable[[mx.array, mx.array], bool]) -> None:
    for name, value in expected.items():
        if isinstance(value, str):
            assert found[name] == value
            continue
        assert equal(found[name], value), (name, distance(found[name], value))
        first = 16 if name == "greedy" else 0
        assert mx.array_equal(found[name][first:].argmax(-1), value[first:].argmax(-1)), name


@pytest.fixture
def kernels(monkeypatch, fresh_kernel_mode):
    def choose(mode: str) -> None:
        monkeypatch.setenv("FLASHMOE_KERNELS", mode)
        device._cpu_module.cache_clear()

    monkeypatch.setenv("FLASHMOE_MODEL", "generic")  # Qwen3.5 too
    return choose


WIDE_ONLY = "Currently only supports float32"  # MLX, of unquantized bfloat16 experts on a CPU


def in_every_form(source: Path) -> list[Path]:
    """Return a checkpoint, its conversion, and a directory that is linked to it."""
    write_tokenizer(source)
    forms = [source, source.parent / "converted", source.parent / "linked"]
    convert(source, forms[1])
    convert(source, forms[2], link=True)
    return forms


def check(directory: Path, slots: int, size: int, expected: dict, equal: Callable) -> None:
    with streamed(directory, expert_cache=slots * size) as model:
        compare(answers(model), expected, equal)
        assert not switches(model)
        stats = model.expert_stats()
        assert slots == EXPERTS or stats.asked > 0
        assert (stats.bytes_preloaded > 0) == (stats.bytes_read == 0) == (slots == EXPERTS)


def in_ours(family: str) -> bool:
    """Return whether our CPU kernels take a family's format; else MLX's ops run in float32."""
    quantization, _ = mode_of(family)
    return not quantization or (quantization["mode"], quantization["bits"]) in OURS


def turns(family: str) -> tuple[int, int]:
    """Return which form comes first, and which of the three our kernels read."""
    number = list(FAMILIES).index(family)
    return number % 3, number // 7 % 3


def test_our_kernels_meet_each_form_with_each_number_of_slots():
    assert len({turns(family) for family in FAMILIES if in_ours(family)}) == 9


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "muse_spark"])
def test_logits_and_tokens_equal_stock(family, tmp_path, kernels):
    """To the bit by MLX's ops, whatever the cache; within the tolerance by our CPU kernels.

    Each form meets each number of slots, by MLX's ops and by our kernels; see `turns`.
    """
    quantization, dtype = mode_of(family)
    stock = make(family, tmp_path / "source", quantization, dtype)
    size, forms = token_bytes(stock), in_every_form(tmp_path / "source")
    turn, which = turns(family)
    forms = forms[turn:] + forms[:turn]
    kernels("stock")
    if quantization or dtype == mx.float32:
        expected = answers(stock)
        for directory, slots in zip(forms, BANKS, strict=True):
            check(directory, slots, size, expected, mx.array_equal)
    else:
        for model in stock, streamed(forms[0], expert_cache=TOP_K * size):
            with pytest.raises(RuntimeError, match=WIDE_ONLY):
                mx.eval(prompt_logits(model, 1))
    kernels("auto")
    if dtype != mx.float32:
        stock.set_dtype(mx.float32)
        expected = answers(stock)
    check((forms[1:] + forms[:1])[which], BANKS[which], size, expected, close)


def test_every_format_is_covered_twice():
    found = Counter((q.get("mode"), q.get("bits")) for q, _ in map(mode_of, FAMILIES))
    affine = [("affine", bits) for bits in (2, 3, 4, 5, 6, 8)]
    others = [("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4), (None, None)]
    assert {*affine, *others} == found.keys()
    assert min(found.values()) >= 2


def test_the_table_has_every_family_of_mlx_lm():
    """A family that mlx-lm adds needs a line in families.py."""
    folder = Path(mlx_lm.models.__path__[0])
    uses = re.compile(r"SwitchGLU|SwitchMLP|(deepseek_v3|deepseek_v32|glm4_moe|qwen3_moe)\b")
    found = {path.stem for path in folder.glob("*.py") if uses.search(path.read_text())}
    assert found - {"switch_layers"} <= FAMILIES.keys()


def experts_of(model: nn.Module, path: str) -> Any:
    return dict(model.named_modules())[path]


def same_experts(stock: nn.Module, model: nn.Module) -> None:
    """Compare every module of experts alone, to the bit."""
    for path, module in switches(stock).items():
        width = module.gate_proj.input_dims
        x = mx.random.normal((1, 9, width), key=mx.random.key(1))
        ids = mx.random.randint(0, EXPERTS, (1, 9, TOP_K), key=mx.random.key(2))
        assert mx.array_equal(experts_of(model, path)(x, ids), module(x, ids))


def test_muse_spark_loads_but_stock_runs_it_on_metal_only(tmp_path, kernels):
    kernels("stock")
    stock = make("muse_spark", tmp_path, *mode_of("muse_spark"))
    with streamed(tmp_path, expert_cache=TOP_K * token_bytes(stock)) as model:
        for each in stock, model:
            with pytest.raises(RuntimeError, match="No Metal back-end"):
                mx.eval(prompt_logits(each, 1))
        same_experts(stock, model)
        for path in switches(stock):
            assert experts_of(model, path)["post_expert_norm"]


def test_nvfp4_with_a_global_scale_loads_but_mlx_computes_it_on_gpus_only(tmp_path, kernels):
    kernels("stock")
    nvfp4 = {"bits": 4, "group_size": 16, "mode": "nvfp4", "global_scale": True}
    stock = make("qwen3_moe", tmp_path, nvfp4)
    with streamed(tmp_path, expert_cache=TOP_K * token_bytes(stock)) as model:
        for each in stock, model:
            with pytest.raises(ValueError, match="Global scale is only supported on the GPU"):
                mx.eval(prompt_logits(each, 1))


def test_qwen_in_a_mode_that_our_own_code_lacks(tmp_path, kernels, monkeypatch):
    kernels("stock")
    monkeypatch.delenv("FLASHMOE_MODEL")
    stock = make("qwen3_5_moe", tmp_path, floats("mxfp4", 4, 32))
    with streamed(tmp_path, expert_cache=TOP_K * token_bytes(stock)) as model:
        assert mx.array_equal(prompt_logits(model, 17), prompt_logits(stock, 17))


NEW_FAMILY = """
import mlx.core as mx
import mlx.nn as nn
from dataclasses import dataclass
from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.cache import KVCache
from mlx_lm.models.switch_layers import SwitchGLU

@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    num_experts: int
    num_experts_per_tok: int

class Block(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.k = args.num_experts_per_tok
        self.router = nn.Linear(args.hidden_size, args.num_experts, bias=False)
        self.norm = nn.RMSNorm(args.hidden_size)
        self.experts = SwitchGLU(args.hidden_size, 32, args.num_experts)

    def __call__(self, x, cache):
        keys, _ = cache.update_and_fetch(x[:, None], x[:, None])
        x = x + keys[:, 0].mean(axis=1, keepdims=True)
        h = self.norm(x)
        scores = self.router(h)
        chosen = mx.argpartition(-scores, self.k - 1, axis=-1)[..., : self.k]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1)
        return x + (self.experts(h, chosen) * weights[..., None]).sum(-2)

class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args = args
        self.embed = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs, cache=None):
        x = self.embed(inputs)
        for layer, c in zip(self.layers, cache):
            x = layer(x, c)
        return self.head(x)

    def make_cache(self):
        return [KVCache() for _ in self.layers]
"""


def test_a_family_that_nobody_listed(tmp_path, kernels, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "unheard_of.py").write_text(NEW_FAMILY)
    folders = [*mlx_lm.models.__path__, str(tmp_path / "code")]
    monkeypatch.setattr(mlx_lm.models, "__path__", folders)
    monkeypatch.setitem(sys.modules, "mlx_lm.models.unheard_of", None)  # forgotten after the test
    del sys.modules["mlx_lm.models.unheard_of"]
    monkeypatch.setitem(FAMILIES, "unheard_of", {"num_hidden_layers": 11})
    kernels("stock")
    stock = make("unheard_of", tmp_path, {"bits": 4, "group_size": 32})
    with streamed(tmp_path, expert_cache=TOP_K * token_bytes(stock)) as model:
        compare(answers(model), answers(stock), mx.array_equal)
        numbers = [experts_of(model, f"layers.{n}.experts").layer for n in range(11)]
    assert numbers == list(range(11))
