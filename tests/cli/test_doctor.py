"""flashmoe-doctor: facts for a report, and for each problem a sentence and exit code 1."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, astuple, dataclass, replace

import pytest
from metal_cpu import metal_on_cpu, require_bench
from test_errors import DAMAGE

from flashmoe_mlx.cli import doctor_checks, doctor_text, full_check, here, what_runs
from flashmoe_mlx.cli.doctor import main
from flashmoe_mlx.cli.doctor_model import examine
from flashmoe_mlx.cli.full_check import Finding
from flashmoe_mlx.custom_kernels import autotune, launch
from flashmoe_mlx.custom_kernels.autotune import Verdict
from flashmoe_mlx.custom_kernels.experts.router import RouterCase
from flashmoe_mlx.custom_kernels.linear.cases import MatvecCase
from flashmoe_mlx.format.layout import open_layout
from flashmoe_mlx.loader import BUNDLED_MODEL
from flashmoe_mlx.models.qwen3_5.geometry import GEOMETRIES
from flashmoe_mlx.profile.read_speed import ReadSpeed, expert_ranges, scratch_ranges, time_reads
from flashmoe_mlx.store.memory import available_bytes
from flashmoe_mlx.store.sizing import IoPlan

QUICK = ["--geometry", "tiny", "--sample-mib", "4"]


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Use an empty cache directory, and short timings of kernels."""
    monkeypatch.setattr(autotune, "MOST_CALLS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FLASHMOE_KERNELS", raising=False)


@pytest.fixture
def copy(models, tmp_path):
    """A private copy of the packed model."""
    return shutil.copytree(models["packed4"], tmp_path / "model")


def run(args, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    return exit_.value.code, capsys.readouterr().out


def test_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "flashmoe_mlx.cli.doctor", *QUICK],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    facts = [line.split()[0] for line in lines[:4]]
    assert facts == ["machine", "device", "memory", "disk"]
    checks = ["✓ versions", "✓ reading", "✓ cache", "✓ bundled"]
    assert [line[:10].rstrip() for line in lines[4:8]] == checks
    assert lines[-1].startswith("Ready")


def test_json_has_the_facts(models, capsys):
    code, out = run([models["packed4"], *QUICK, "--json"], capsys)
    found = json.loads(out)
    assert code == 0 and found["ok"] and found["problems"] == []
    assert found["cores"] >= 1 and found["memory"] >= found["memory_available"] > 0
    assert found["packages"]["mlx"] and found["device"] and found["disk"]["free"] > 0
    assert found["read_speed"]["bytes_per_s"] > 0
    model = found["model"]
    assert (model["complete"], model["kind"], model["bits"]) == (True, "packed", [4])
    assert model["layers"] * model["experts"] * model["record_bytes"] == model["expert_bytes"]
    assert {kernel["op"] for kernel in found["kernels"]} >= {"dequant_matvec", "router"}


def test_json_of_this_machine(capsys):
    """Reports and CI keep these keys."""
    code, out = run([*QUICK, "--json"], capsys)
    found = json.loads(out)
    assert code == 0 and found["model"] is None and found["bundled"]["complete"]
    keys = """system cpu cores memory python packages device kernel_mode dtype kernels kept
        memory_available memory_limit disk read_speed read_speed_line model full problems advice
        ok"""
    assert set(keys.split()) <= found.keys()
    assert found["what_runs"]["rows"][0]["name"] == "Qwen3.5-35B-A3B"
    assert found["verdict"].startswith("Ready")


def test_verdicts():
    row = what_runs.Row("35b", "Q", 4, True, True, 1, 1, 1, True, 9.2, ("do this", "then that"))
    ready = {"problems": [], "model": None, "what_runs": {"best": {"fastest": asdict(row)}}}
    said = "Ready: Q runs at 4 bits; expect about 9.2 tokens/s (predicted); next: do this"
    assert doctor_checks.verdict_of(ready) == said
    ready["what_runs"] = {"best": {}}
    assert doctor_checks.verdict_of(ready).startswith("Ready for the bundled model; no other fits")
    ready["model"] = {"directory": "a b"}
    said = "Ready: a b is complete; next: flashmoe-generate --model 'a b' --prompt \"Hello\""
    assert doctor_checks.verdict_of(ready) == said
    ready["problems"] = ["x is wrong", "y too"]
    said = "Not ready (2 problems in all). Fix this first: x is wrong"
    assert doctor_checks.verdict_of(ready) == said


@pytest.mark.parametrize("name", ["packed2", "linked", "unmodified"])
def test_every_kind_of_directory(name, models, capsys):
    code, out = run([models[name], *QUICK], capsys)
    assert code == 0
    assert "complete (headers, sizes, tokenizer)" in out
    assert ("After flashmoe-convert, it takes one" in out) == (name != "packed2")


@pytest.mark.parametrize("damage", DAMAGE)
def test_incomplete_directories(damage, copy, capsys):
    spoil, message = DAMAGE[damage]
    spoil(copy)
    code, out = run([copy, *QUICK, "--json"], capsys)
    found = json.loads(out)
    assert code == 1 and not found["ok"] and not found["model"]["complete"]
    assert re.search(message, "\n".join(found["problems"]))


def test_the_sentence_stands_in_the_text(copy, capsys):
    (copy / "model_experts" / "manifest.json").unlink()
    code, out = run([copy, *QUICK], capsys)
    assert code == 1
    assert "INCOMPLETE" in out
    assert f"✗ PROBLEM   {copy}: unfinished conversion" in out
    assert out.splitlines()[-1].startswith(f"Not ready. Fix this first: {copy}: unfinished")


def test_a_missing_shard_of_the_trunk(copy, capsys):
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["x"] = "model-00009-of-00009.safetensors"
    index.write_text(json.dumps(content))
    code, out = run([copy, *QUICK], capsys)
    assert code == 1
    assert f"{index}: lists model-00009-of-00009.safetensors, which is missing" in out


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (["no/such/dir"], {}, "no/such/dir: not a directory"),
        (["--sample-mib", "0"], {}, "--sample-mib must be at least 2"),
        ([], {"FLASHMOE_KERNELS": "fast"}, "FLASHMOE_KERNELS = 'fast' is not valid"),
    ],
)
def test_bad_input(args, env, message, capsys, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as exit_:
        main(args)
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert err.startswith(f"flashmoe-doctor: error: {message}") and err.count("\n") == 1


def test_bad_usage(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--fast"])
    assert exit_.value.code == 2


# ---- kernels -------------------------------------------------------------------------------------


def test_kernels_are_measured_again(capsys, monkeypatch):
    require_bench()
    launch._build.cache_clear()
    cases = doctor_checks.cases
    monkeypatch.setattr(
        doctor_checks, "cases", lambda *a: [t for t in cases(*a) if t.op == "router"]
    )
    with metal_on_cpu():
        (case,) = doctor_checks.cases(GEOMETRIES["tiny"], 4, "float32")
        autotune._remember(case, Verdict(False, message="old"))
        code, out = run(QUICK, capsys)
        assert autotune.verdict(case).ok
    launch._build.cache_clear()
    assert code == 0
    assert "router  ✓ 1 of 1 shapes" in out


@pytest.mark.parametrize(
    ("failing", "line"),
    [
        (Verdict(False, 0.5, 0.01, message="error 5.0e-01, limit 1.0e-02"), "error 5.0e-01"),
        (Verdict(False, message="does not run (RuntimeError: no)"), "does not run"),
    ],
)
def test_a_failing_kernel(failing, line, capsys, monkeypatch):
    right = Verdict(True, 1e-6, 1e-5, 0.5, 1.0)
    found = {"router": failing}
    monkeypatch.setattr(doctor_checks, "verdict", lambda case, fresh: found.get(case.op, right))
    code, out = run(QUICK, capsys)
    assert code == 1
    assert out.count(f"PROBLEM   kernel router: {line}") == 1
    assert "  wrong: router experts=16 top_k=4\n" in out
    assert re.search(r"^router +✗ 0 of 1 shapes +MLX's own +– +–$", out, re.M)
    assert re.search(r"^attention_step +✓ 1 of 1 shapes +ours +0.5 ms +1 ms$", out, re.M)
    assert "Please report the failing kernel and the output of flashmoe-doctor --json" in out


@pytest.mark.parametrize(
    ("mode", "gpu", "custom_ms", "used", "told"),
    [
        ("auto", False, (9.0, 9.0), "ours", "On a CPU ours always run, also at shapes where"),
        ("stock", False, (0.1, 0.1), "MLX's own", "MLX's own ops run everywhere"),
        ("auto", True, (9.0, 9.0), "MLX's own", "Ours run where they are right, and faster"),
        ("auto", True, (0.1, 0.1), "ours", "Ours run where they are right, and faster"),
        ("auto", True, (0.1, 9.0), "ours at 1 of 2 shapes", "Ours run where"),
        ("custom", True, (9.0, 9.0), "ours", "ours run wherever they are right"),
        ("stock", True, (0.1, 0.1), "MLX's own", "MLX's own ops run everywhere"),
    ],
)
def test_which_op_is_used(mode, gpu, custom_ms, used, told, monkeypatch):
    monkeypatch.setattr(doctor_text.machine, "on_gpu", lambda: gpu)
    found = [Verdict(True, 1e-6, 1e-5, ms, 1.0).as_dict() for ms in custom_ms]
    kernels = [{"op": "router", "trial": "", **verdict} for verdict in found]
    _, row, explanation = doctor_text.kernel_table(kernels, mode)
    total = f"{sum(custom_ms):.2g} ms"
    assert re.split(r"  +", row) == ["router", "✓ 2 of 2 shapes", used, total, "2 ms"]
    assert told in explanation


# ---- --full --------------------------------------------------------------------------------------


MATVEC = MatvecCase(37, 384, 4, 64, "float32", "float32", tokens=3)
ROUTER = RouterCase(16, 4, "float32", tokens=3)


@dataclass(frozen=True)
class Deadly(MatvecCase):
    """A case whose kernel ends the process."""

    op = "deadly"

    def custom(self, *inputs):
        os.abort()


@pytest.mark.parametrize(
    ("ok", "code", "line"),
    [(True, 0, "✓ full      kernel router"), (False, 1, "✗ full      FAILS: kernel router")],
)
def test_findings_determine_the_exit_code(ok, code, line, models, capsys, monkeypatch):
    asked = []
    found = [Finding("kernel router", ok, "1 of 2"), Finding("greedy tokens", None, "no room")]
    monkeypatch.setattr(
        doctor_checks, "full_check", lambda report: (asked.append(report), found)[1]
    )
    args = ["--full", "--model", models["packed2"], *QUICK]
    ended, out = run(args, capsys)
    assert ended == code and asked[0].directory == models["packed2"]
    assert f"{line}: 1 of 2\n" in out
    assert "– full      not run: greedy tokens: no room\n" in out
    assert ("PROBLEM   kernel router: 1 of 2\n" in out) == (not ok)
    assert json.loads(run([*args, "--json"], capsys)[1])["full"][0]["ok"] is ok


def test_cases_are_summarized_per_op():
    """Other processes, without a GPU, compare the cases."""
    found = full_check.parity([MATVEC, replace(MATVEC, dtype="float16"), ROUTER])
    said = "1 of 1 cases agree with the float32 reference (1 more need a GPU)"
    assert found == [
        Finding("kernel dequant_matvec", True, said),
        Finding("kernel router", None, "needs a GPU"),
    ]
    wrong = full_check.summary("router", [(ROUTER, Verdict(False, message="error 1"))])
    said = f"0 of 1 cases agree with the float32 reference; {ROUTER}: error 1"
    assert wrong == Finding("kernel router", False, said)


def test_a_kernel_that_ends_the_process_is_named():
    deadly = Deadly(*astuple(MATVEC))
    (found,) = full_check.parity([MATVEC, deadly])
    assert found.ok is False and "a process died at " in found.message


def test_a_model_by_itself(models, monkeypatch):
    report = examine(models["packed2"])
    assert full_check.streamed(report) == (True, "20 of 20 runs agree")
    monkeypatch.setattr(full_check, "run_apart", functools.cache(full_check.run_apart))
    right, said = full_check.memory(report)
    assert right and " MB; trunk, expert cache and 400 MB are " in said
    monkeypatch.setattr(full_check, "ALLOWANCE", -report.trunk_bytes)
    assert full_check.memory(report)[0] is False
    monkeypatch.setattr(full_check, "free_bytes", lambda: 10**6)
    for check in full_check.streamed, full_check.greedy:
        right, said = check(report)
        assert right is None and said.endswith("GB of memory, but 0.0 GB are available")


# ---- reading -------------------------------------------------------------------------------------


def test_reads_are_those_of_the_experts(models):
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())["text_config"]
    for name, reads in (("packed4", 1), ("unmodified", 9)):
        layout = open_layout(models[name], config["num_hidden_layers"], config["num_experts"])
        ranges = expert_ranges(layout, sample=5 * layout.record_bytes)
        speed = time_reads(ranges, "a test", threads=3)
        assert (speed.reads, speed.nbytes) == (5 * reads, 5 * layout.record_bytes)
        assert speed.bytes_per_s > 0 and speed.threads == 3
        assert f"{speed.reads} random reads" in str(speed)


@pytest.mark.parametrize(("direct", "cache"), [(True, "expert"), (False, "page")])
def test_experts_are_read_as_in_a_load(direct, cache, models, capsys, monkeypatch):
    def plan(mode, layout, room):
        assert mode == "auto" and 0 < room < available_bytes() + (1 << 30)
        return IoPlan(direct, "a test")

    speed = ReadSpeed(1 << 30, 100, 8, 2.0, "cold", "a test", direct)
    asked = []
    monkeypatch.setattr(doctor_checks, "plan_io", plan)
    reads = lambda *_, direct: (asked.append(direct), speed)[1]  # noqa: E731
    monkeypatch.setattr(doctor_checks, "time_reads", reads)
    code, out = run([models["packed4"], *QUICK], capsys)
    assert (code, asked) == (0, [direct])
    assert f"Leave memory for the {cache} cache." in out


def test_the_temporary_file_is_removed(tmp_path):
    with scratch_ranges(tmp_path / "new", sample=1 << 20, record=1 << 17) as ranges:
        assert sorted(offset for _, offset, _ in ranges) == [i << 17 for i in range(8)]
        assert time_reads(ranges, "a test").nbytes == 1 << 20
    assert not list((tmp_path / "new").iterdir())


def test_a_disk_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(here, "models_folder", lambda: tmp_path / "file")
    code, out = run(QUICK, capsys)
    assert code == 0
    assert "– reading   not measured: File exists" in out
    assert "the disk could not be measured" in out
