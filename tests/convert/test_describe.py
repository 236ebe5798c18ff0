"""A dry run estimates the time from experts that it quantizes, one kind of layer at a time."""

import re

import pytest
from convert_helpers import EXPERTS, HIDDEN, INTERMEDIATE, LAYERS

from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.plan.parts import Options
from flashmoe_mlx.convert.plan.plan import build_plan
from flashmoe_mlx.convert.quant.calibrate import LayerInputs
from flashmoe_mlx.convert.source.open import open_source
from flashmoe_mlx.convert.write import describe
from flashmoe_mlx.convert.write.execute import ExpertSteps
from flashmoe_mlx.convert.write.steps import Fetched

NOTHING = Fetched(0, 0, 0, 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that advances by a minute per computed expert."""
    now = [0.0]
    real = ExpertSteps.encode

    def encode(self, batch, loaded):
        now[0] += 60 * len(batch)
        return real(self, batch, loaded)

    monkeypatch.setattr(ExpertSteps, "encode", encode)
    monkeypatch.setattr(describe.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize("source", ["hf", "stock"])
def test_every_expert_counts(root, clock, source):
    opened = open_source(root / source, source)
    plan = build_plan(opened, Options(True, 2))
    hours = LAYERS * EXPERTS / 60
    told = describe.describe_time(opened, plan, 1.0, NOTHING)
    assert (
        told == f"time        about {hours * 60:.0f} min to compute on this machine, plus disk time"
    )
    told = describe.describe_time(opened, plan, 0.5, Fetched(3, 10**12, 2, 10**9))
    assert told == (
        f"time        about {hours * 30:.0f} min to compute on this machine, "
        "2 h 47 min to fetch at 100 MB/s, plus disk time"
    )


def test_copied_experts_take_no_time_to_compute(root, clock):
    opened = open_source(root / "stock", "stock")
    told = describe.describe_time(opened, build_plan(opened, Options()), 1.0, NOTHING)
    assert told == "time        disk time only"
    assert clock == [0.0]


def test_the_last_rows_of_a_dry_run(root, tmp_path, capsys):
    convert(root / "hf", tmp_path / "out", quantize=True, dry_run=True)
    text = capsys.readouterr().out
    record = 3 * INTERMEDIATE * HIDDEN * 9 // 16
    experts = f"{LAYERS * EXPERTS * record:,} bytes"
    assert re.search(rf"\nexperts +{experts} \(\S+ MB\), {LAYERS * EXPERTS * 9:,} tensors\n", text)
    assert re.search(r"\ntime +about \d+ s to compute on this machine, plus disk time\n$", text)
    assert not (tmp_path / "out").exists()


def test_a_calibration_is_timed_on_inputs_of_the_texts_length(root, tmp_path, capsys, monkeypatch):
    rows, quantize = [], LayerInputs.quantize

    def watched(inputs, expert, *arguments):
        rows.append(len(inputs.rows(expert)[0]))
        return quantize(inputs, expert, *arguments)

    monkeypatch.setattr(LayerInputs, "quantize", watched)
    text = tmp_path / "text"
    text.write_text("abcd" * 100)
    convert(root / "stock", tmp_path / "out", quantize=True, q_bits=2, calibrate=text, dry_run=True)
    told = capsys.readouterr().out
    assert re.search(
        r"\ntime +about \d+ s to compute on this machine, plus running the text through the model, "
        r"and disk time\n$",
        told,
    )
    assert set(rows) == {100 * 2 // EXPERTS + 1}


@pytest.mark.parametrize("seconds, text", [
    (0.3, "1 s"), (119.2, "120 s"), (299, "5 min"), (19_200, "5 h 20 min"), (3599, "1 h 0 min"),
])  # fmt: skip
def test_durations(seconds, text):
    assert describe.duration(seconds) == text
