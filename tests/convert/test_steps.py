"""The order of a conversion from the Hub: how many source files are needed at once."""

import math
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe_mlx.convert.plan.parts import (
    LayerPlan,
    Plan,
    Projection,
    Quant,
    Spec,
    TrunkFile,
    TrunkTensor,
)
from flashmoe_mlx.convert.source.checkpoint import Dims, Matrix, Source, qwen_modules
from flashmoe_mlx.convert.write.output import place
from flashmoe_mlx.convert.write.steps import Fetched, Step, fetched, plan_steps
from flashmoe_mlx.format.headers import TensorInfo
from flashmoe_mlx.format.names import FIELDS, PROJECTIONS

Where = Callable[[int, int, str], int]
BYTES = 10  # of every file


def file(number: int) -> Path:
    return Path(f"model-{number:05d}.safetensors")


def make(layers: int, experts: int, where: Where) -> tuple[Source, Plan]:
    """A float checkpoint with `where(layer, expert, projection)` in that file.

    Its trunk has a tensor in every file.
    """
    keys = [(n, e, p) for n in range(layers) for e in range(experts) for p in PROJECTIONS]
    matrices = {key: Matrix(file(where(*key)), 0, "BF16", (4, 4)) for key in keys}
    files = sorted({matrix.file for matrix in matrices.values()})
    info = TensorInfo("BF16", (2,), 0, 4)
    tensors = [
        TrunkTensor((f, info), "BF16", False, None, (Spec(f.name, "BF16", (2,)),)) for f in files
    ]
    projections = [Projection(name, 4, 4, None, Quant(4, 64), "BF16") for name in PROJECTIONS]
    modules = qwen_modules(Dims(layers, experts, 1, 4, 4, False))
    plans = [
        LayerPlan(n, range(experts), tuple(projections), m.path) for n, m in enumerate(modules)
    ]
    source = Source(Path(), "x", None, {}, 1, modules, {}, None, matrices)
    return source, Plan(tuple(plans), (TrunkFile("model.safetensors", tuple(tensors)),), {})


def remote(source: Source) -> frozenset[Path]:
    return frozenset(matrix.file for matrix in source.matrices.values())


def steps_of(source: Source, plan: Plan) -> tuple[list[Step], Fetched]:
    steps = plan_steps(source, plan, {}, remote(source))
    check(source, plan, steps)
    return steps, fetched(steps, dict.fromkeys(remote(source), BYTES), frozenset())


def check(source: Source, plan: Plan, steps: list[Step]) -> None:
    """Every part is written once, with its files at hand; files are fetched and deleted once."""
    parts = [(place(step.file), part) for step in steps for part in step.parts]
    whole = [(place(f), n) for f in plan.trunk for n in range(len(f.tensors))]
    whole += [(place(f), n) for f in plan.layers for n in range(f.experts)]
    assert sorted(parts) == sorted(whole)
    held, gone = set(), set()
    for step in steps:
        held |= step.needs
        assert not held & gone
        for part in step.parts:
            if isinstance(step.file, LayerPlan):
                keys = [(step.file.layer, part, name) for name in PROJECTIONS]
                assert {source.matrices[key].file for key in keys} <= held
            else:
                assert step.file.tensors[part].source[0] in held
        gone |= step.spent
        held -= step.spent
    assert not held and gone == remote(source)


def test_layers_that_follow_one_another():
    """Layers cross file boundaries: two files are needed at once, or one if boundaries coincide."""
    source, plan = make(12, 8, lambda layer, e, p: layer)
    assert steps_of(source, plan)[1] == Fetched(12, 120, 1, 10)
    source, plan = make(12, 8, lambda n, e, p: math.floor(0.7 * n + 0.4 * (p == "down_proj")))
    steps, found = steps_of(source, plan)
    assert (found.most, found.most_bytes) == (2, 20)
    layers = [step.file.layer for step in steps if isinstance(step.file, LayerPlan)]
    assert layers == sorted(layers)


def test_layers_larger_than_files():
    """With experts in order in three files, two are enough; stacked tensors need all three."""
    source, plan = make(6, 9, lambda n, e, p: 3 * n + e // 3)
    assert steps_of(source, plan)[1].most == 1
    source, plan = make(6, 9, lambda n, e, p: (9 * n + e + (p == "down_proj")) // 4)
    assert steps_of(source, plan)[1].most == 2
    source, plan = make(6, 9, lambda n, e, p: 3 * n + PROJECTIONS.index(p))
    steps, found = steps_of(source, plan)
    assert (found.most, found.most_bytes) == (3, 30)
    assert all(step.whole for step in steps if isinstance(step.file, LayerPlan))


def test_names_in_alphabetical_order():
    """Layer 10 comes before layer 2, and expert 10 before expert 2."""
    order = sorted((str(n), str(e)) for n in range(20) for e in range(16))
    index = {(int(n), int(e)): place for place, (n, e) in enumerate(order)}
    source, plan = make(20, 16, lambda n, e, p: (3 * index[n, e] + PROJECTIONS.index(p)) // 31)
    assert steps_of(source, plan)[1].most == 2


def test_scattered_as_badly_as_can_be():
    """It is planned nevertheless, and the real peak is reported."""
    source, plan = make(8, 64, lambda *key: zlib.crc32(repr(key).encode()) % 40)
    found = steps_of(source, plan)[1]
    assert 20 < found.most <= 40 and found.count == 40


@pytest.mark.parametrize("held", [(), (3,), (3, 4), (9,)])
def test_what_is_left(held):
    """Written parts need no files; held files are used first."""
    source, plan = make(12, 4, lambda n, e, p: (3 * n + PROJECTIONS.index(p)) // 4)
    done = {place(layer): {"file": "x"} for layer in plan.layers[:5]}
    trunk = ["00000000"] * 4 + [""] * 5
    written = ["00000000"] * 2 * len(FIELDS) + [""] * 2 * len(FIELDS)
    done |= {"model.safetensors": {"written": trunk}, place(plan.layers[5]): {"written": written}}
    at_hand = frozenset(map(file, held))
    steps = plan_steps(source, plan, done, remote(source), at_hand)
    parts = {place(step.file): set() for step in steps}
    for step in steps:
        parts[place(step.file)] |= set(step.parts)
        assert step.whole == (isinstance(step.file, LayerPlan) and step.file.layer > 5)
    assert parts["model.safetensors"] == {4, 5, 6, 7, 8}
    assert parts[place(plan.layers[5])] == {2, 3} and len(parts) == 8
    found = fetched(steps, dict.fromkeys(remote(source), BYTES), at_hand)
    needed = {file(number) for number in range(3, 9)}
    assert found.count == len(needed - at_hand) and found.most == 2
    if held == (3,):
        assert file(3) in steps[0].needs
    visit = next(step for step in steps if place(step.file) == "model.safetensors").visit(done)
    assert visit and visit.written == trunk


def test_local_sources_are_written_in_the_order_of_the_plan():
    source, plan = make(5, 4, lambda n, e, p: n % 2)
    steps = plan_steps(source, plan, {}, frozenset())
    assert [place(step.file) for step in steps] == [place(f) for f in (*plan.trunk, *plan.layers)]
    assert all(step.whole and not step.needs and step.visit({}) is None for step in steps)
