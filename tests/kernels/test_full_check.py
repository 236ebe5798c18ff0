"""`flashmoe-doctor --full` has every op in every format, and judges."""

from pathlib import Path

from kernel_helpers import plant
from metal_cpu import metal_on_cpu, require_bench

from flashmoe_mlx.cli import full_check
from flashmoe_mlx.custom_kernels import launch
from flashmoe_mlx.custom_kernels.case import DTYPES

require_bench()


def first_of_each_op() -> dict:
    found: dict = {}
    for case in [*full_check.quantized(), *full_check.others()]:
        found.setdefault(case.op, case)
    return found


def test_the_full_check_has_every_op_in_every_format():
    formats = {(t.op, t.dtype, t.bits, t.group_size) for t in full_check.quantized()}
    ops = {op for op, *_ in formats}
    for op in ops:
        dtypes = 2 if op == "dequantized_matmul" else 3
        assert len([f for f in formats if f[0] == op]) == dtypes * 9
    assert {t.dtype for t in full_check.others()} == set(DTYPES)
    folder = Path(launch.__file__).parent
    kernels = {str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.metal")}
    helpers = {"affine", "gated_delta/common", "write", "linear/naive_matvec", "cuda/slots"}
    names = {  # ops named unlike their kernel; cuda/slots is in test_expert_slots
        "attention/prepare": "attention_step",
        "experts/add_terms": "expert_terms",
        "experts/combine": "expert_combine",
        "experts/down_combine": "expert_down_combine",
        "experts/gate_up": "expert_gate_up",
        "experts/router": "router",
        "experts/take_rows": "tiled_experts",
        "experts/tiles": "tiled_experts",
        "linear/dequant_matvec": "dequant_matvec",
        "linear/dequantize": "dequantize",
    }
    of = {names.get(kernel, kernel.replace("/", "_")) for kernel in kernels - helpers}
    assert of <= ops | {case.op for case in full_check.others()}


def test_the_full_check_judges(monkeypatch):
    with metal_on_cpu("fast"):
        for case in first_of_each_op().values():
            assert full_check.judge(case).ok, case
    plant(monkeypatch, "affine.metal", "(biases[group]), sum", "(scales[group]), sum")
    launch._build.cache_clear()
    with metal_on_cpu("fast"):
        assert not full_check.judge(first_of_each_op()["expert_gate_up"]).ok
