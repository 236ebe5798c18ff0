"""flashmoe-plan: predictions compared with published figures, and error messages."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from mlx.utils import tree_flatten
from published_configs import published_config

from flashmoe_mlx.cli import plan_model
from flashmoe_mlx.cli.plan import check, main, render_check
from flashmoe_mlx.cli.plan_model import Engine, Machine, count_bytes, decode, named_args
from flashmoe_mlx.cli.plan_ranks import Link, Machines
from flashmoe_mlx.cli.published import MACHINES, ROWS, count_within
from flashmoe_mlx.models.families import FAMILIES
from flashmoe_mlx.models.patch import describe_all, stock_classes, switches

M3_MAX = MACHINES["m3-max-48"]
ENGINE = Engine(1e-3)


def run(args: str, capsys) -> tuple[str, dict]:
    main([*args.split(), "--json"])
    text, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    return text, json.loads(last)


@pytest.mark.parametrize(
    ("name", "trunk", "records", "experts"),
    [
        ("397b", 5.5, (7_077_888, 3_932_160), (217.4, 120.8)),
        ("122b", 3.5, (5_308_416, 2_949_120), (65.2, 36.2)),
        ("35b", 1.4, (1_769_472, 983_040), (18.1, 10.1)),
    ],
)
def test_sizes_are_the_checkpoints(name, trunk, records, experts):
    for bits, record, total in zip((4, 2), records, experts, strict=True):
        weights = count_bytes(named_args(name), bits)
        assert weights.record == record
        assert weights.expert_bytes / 1e9 == pytest.approx(total, abs=0.05)
        assert weights.trunk / 1e9 == pytest.approx(trunk, abs=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_of_other_families_are_those_of_mlx_lms_models(name):
    """Built without memory from the published config.json."""
    model_class, args_class = stock_classes(config := published_config(name))
    model = model_class(args_class.from_dict(config))
    modules = describe_all(switches(model), config)
    experts = tuple(prefix for module in modules for prefix in module.prefixes)
    trunk = {k: a.size for k, a in tree_flatten(model.parameters()) if not k.startswith(experts)}
    table = sum(size for key, size in trunk.items() if key.endswith("embed_tokens.weight"))
    found, top = FAMILIES[name], config["num_experts_per_tok"]
    (shapes,) = {tuple(module.shapes.values()) for module in modules}
    assert shapes[0] == (found.moe_intermediate_size, found.hidden_size) == shapes[2][::-1]
    counts = len(modules), modules[0].num_experts, top, sum(trunk.values()), table
    assert counts == (*found[:3], found.trunk, found.table)


@pytest.mark.parametrize(("name", "megabytes", "total"), [
    ("gpt-oss-120b", 13.2, 61), ("qwen3-next-80b", 1.8, 43.5), ("qwen3-235b", 10.6, 128),
    ("glm-4.5-air", 9.7, 56), ("glm-5", 21.2, 407), ("deepseek-v3", 24.8, 368),
    ("kimi-k2", 24.8, 571), ("minimax-m2", 8.0, 126),
])  # fmt: skip
def test_a_plan_of_another_family(name, megabytes, total, capsys):
    text, found = run(f"--model {name} --machine m3-max-48", capsys)
    assert found["record_bytes"] / 1e6 == pytest.approx(megabytes, abs=0.06)
    assert found["expert_bytes"] / 1e9 == pytest.approx(total, rel=0.01)
    assert name in text and found["decode_tokens_per_s"] > 0
    _, narrow = run(f"--model {name} --machine m3-max-48 --bits 2 --top-k 2", capsys)
    assert narrow["record_bytes"] < 0.6 * found["record_bytes"]
    assert narrow["token_bytes"] < found["token_bytes"]


def test_published_rows_are_met():
    """Predictions meet six or more figures that the model was not fitted to, of three machines."""
    met = [r for r in ROWS if r.unit == "tok/s" and r.kind == "predicted" and abs(r.error) <= 0.2]
    assert len(met) == count_within()[0] >= 6
    assert len({row.setup.machine for row in met}) > 2


def test_fitted_rows_fit():
    fitted = [row for row in ROWS if row.kind == "fitted"]
    assert {row.kind for row in ROWS} == {"fitted", "assumed", "predicted"}
    assert all(abs(row.error) < (0.07 if row.unit == "% hits" else 0.03) for row in fitted)
    # One row per engine fits its time per layer; four rows fit the exponent of the hit rate.
    assert len({row.setup.engine for row in fitted if row.unit == "tok/s"}) == 4
    assert sum(row.unit == "tok/s" for row in fitted) == 4


def test_check_hides_no_row(capsys):
    text, found = run("--check", capsys)
    assert len(found["rows"]) == len(ROWS)
    for row in ROWS:
        line = next(
            line
            for line in text.splitlines()
            if line.startswith(f"{row.setup.name}, {row.name}  ") and f"  {row.unit}, " in line
        )
        assert ("MISS" in line) == (abs(row.error) > 0.2) and row.kind in line
    assert all(row["source"].startswith("https://") for row in found["rows"])


def test_the_documentation_shows_the_check():
    page = Path(__file__).parents[2].joinpath("docs/reference/plan.md").read_text()
    assert render_check(check()) in page


@pytest.mark.parametrize("machine", MACHINES.values())
def test_machines_cite_their_figures(machine):
    assert "https://" in machine.source


def test_a_token_is_the_sum_of_its_parts():
    weights = count_bytes(named_args("397b"), 4, top_k=4)
    found = decode(weights, M3_MAX, ENGINE, bank=4e9)
    parts = found.copied + found.read + found.computed + found.waited
    assert found.seconds == pytest.approx(parts)
    assert found.waited == pytest.approx(0.060)
    assert 0 < found.bank_hits < found.hits < 1
    overlapped = decode(weights, M3_MAX, Engine(1e-3, overlaps=True), bank=4e9)
    assert overlapped.seconds == pytest.approx(found.copied + found.read)


def test_faster_disks_and_larger_memories_never_slow_a_token():
    weights = count_bytes(named_args("122b"), 4)
    base = Machine(32e9, 3e9, 200e9, "")
    seconds = decode(weights, base, ENGINE).seconds
    for better in (
        Machine(64e9, 3e9, 200e9, ""),
        Machine(32e9, 6e9, 200e9, ""),
        Machine(32e9, 3e9, 400e9, ""),
    ):
        assert decode(weights, better, ENGINE).seconds < seconds


def test_hit_rate_is_a_share():
    assert plan_model.hit_rate(0) == 0 and plan_model.hit_rate(-1) == 0
    assert plan_model.hit_rate(1) == plan_model.hit_rate(2) == 1
    assert plan_model.hit_rate(1 / 32) == pytest.approx(0.5)


def test_prefill_reads_each_expert_once_per_chunk():
    weights = count_bytes(named_args("35b"), 4)
    assert plan_model.distinct_experts(weights, 1) == pytest.approx(weights.top_k)
    assert plan_model.distinct_experts(weights, 10_000) == pytest.approx(256)
    machine = Machine(16e9, 2e9, 100e9, "")

    def seconds(tokens):
        return plan_model.prefill_seconds(weights, machine, ENGINE, tokens)

    assert seconds(2048) < 1.1 * seconds(200)
    assert seconds(4096) == pytest.approx(2 * seconds(2048))


def test_the_best_cache_is_the_fastest_candidate(capsys):
    _, found = run("--model 397b --machine m3-max-48 --top-k 4", capsys)
    sound = [c for c in found["caches"] if c["bank"] <= found["free_bytes"] / 2]
    assert found["chosen"] == min(sound, key=lambda c: c["seconds"])
    assert found["decode_tokens_per_s"] == pytest.approx(1 / found["chosen"]["seconds"])
    assert len(found["caches"]) == 5 and found["top_k"] == 4


def test_a_model_that_fits_is_resident(capsys):
    text, found = run("--model 35b --machine m5-max-128", capsys)
    assert found["chosen"]["hits"] == found["chosen"]["bank_hits"] == 1
    assert found["chosen"]["read"] == found["chosen"]["copied"] == 0
    assert "all experts fit in memory" in text
    _, tight = run("--model 35b --machine m5-max-128 --ram 20GB", capsys)
    assert tight["chosen"]["bank_hits"] < 1


def test_a_given_cache_size(capsys):
    text, found = run("--model 397b --machine m5-max-128 --cache 20GB --bits 2", capsys)
    assert found["chosen"]["bank"] == 20e9 and "20.00GB, from --cache" in text
    assert found["record_bytes"] == 3_932_160
    assert len(text.splitlines()) < 24


def test_flags_override_a_machine(capsys):
    _, found = run("--model 122b --machine m4-32 --ssd 7 --memory-bandwidth 300", capsys)
    assert found["machine"]["ssd"] == 7e9 and found["machine"]["bandwidth"] == 300e9
    assert found["machine"]["memory"] == 32e9


def test_sizes_and_bits_come_from_config_json(tmp_path, capsys):
    args = {**vars(named_args("35b")), "model_type": "qwen3_5_moe"}
    places = [(n, name) for n in range(40) for name in ("gate_proj", "up_proj", "down_proj")]
    experts = {
        f"language_model.model.layers.{n}.mlp.switch_mlp.{p}": {"bits": 2} for n, p in places
    }
    args["quantization"] = {"bits": 4, "group_size": 64, **experts}
    (tmp_path / "config.json").write_text(json.dumps(args))
    _, found = run(f"--model {tmp_path} --machine m4-32", capsys)
    assert found["record_bytes"] == 983_040 and found["layers"] == 40
    _, found = run(f"--model {tmp_path} --machine m4-32 --bits 4", capsys)
    assert found["record_bytes"] == 1_769_472


def test_experts_of_mixed_bits_count_by_their_mean(tmp_path, capsys):
    args = {**vars(named_args("35b")), "model_type": "qwen3_5_moe"}
    down = {
        f"language_model.model.layers.{n}.mlp.switch_mlp.down_proj": {"bits": 6} for n in range(20)
    }
    args["quantization"] = {"bits": 2, "group_size": 64, **down}
    (tmp_path / "config.json").write_text(json.dumps(args))
    _, found = run(f"--model {tmp_path} --machine m4-32", capsys)
    assert found["record_bytes"] == 983_040 + 4 * 2048 * 512 // 8 // 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--model 35b --machine m4-32 --bits 0", "--bits 0 is unknown. Choose from 4, 2."),
        ("--model 35b --machine m4-32 --top-k 300", "--top-k = 300, but the model has 256 exp"),
        ("--model 35b --machine m4-32 --ram auto", "--ram auto is not a size. Give bytes or a"),
        (
            "--model 397b --machine m4-32 --cache 1GB",
            "--cache must be from 4.25 GB (one token's ex",
        ),
        (
            "--model 397b --machine m4-32 --cache 90GB",
            "--cache must be from 4.25 GB (one token's ex",
        ),
    ],
)
def test_bad_input(args, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(args.split())
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert err.startswith(f"flashmoe-plan: error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(("text", "fault"), [("{", "not JSON ("), ("[]", "not a JSON object.")])
def test_a_damaged_config(text, fault, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        main(["--model", str(tmp_path), "--machine", "m4-32"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"config.json: {fault}" in error and "Restore the checkpoint's own file." in error


def test_the_arrow_is_at_the_fastest_row_that_is_advised(capsys):
    """Caches over half of the memory for experts look faster in the formula only."""
    text, found = run("--model 397b --top-k 4 --machine m3-max-48", capsys)
    rows = [line for line in text.splitlines() if line.count(" GB ") == 2 and "%" in line]
    marks = [row.partition("  <-")[1] or row.partition("  not advised")[1] for row in rows]
    assert len(rows) == len(found["caches"]) == 5
    assert marks == ["", "  <-", "", "", "  not advised"]
    seconds = [line["seconds"] for line in found["caches"]]
    assert min(seconds) == seconds[-1] and min(seconds[:-1]) == found["chosen"]["seconds"]
    assert found["caches"][3]["bank"] <= found["most_advised_bytes"] < found["caches"][4]["bank"]


def test_all_experts_are_advised(capsys):
    text, found = run("--model 35b --machine m3-max-128", capsys)
    (chosen,) = [line for line in text.splitlines() if line.endswith("<-")]
    assert "18.1 GB" in chosen and found["chosen"]["bank_hits"] == 1


def test_measured_rates_replace_the_shares_of_bandwidth():
    weights = count_bytes(named_args("35b"), 4)
    slow = Machine(24e9, 1e9, 20e9, "a test", system=1e9)
    fast = Machine(24e9, 1e9, 20e9, "a test", system=1e9, copy=5e9)
    assert slow.copy_rate == plan_model.COPY_SHARE * 20e9 and fast.copy_rate == 5e9
    ratio = decode(weights, slow, ENGINE).copied / decode(weights, fast, ENGINE).copied
    assert ratio == pytest.approx(5e9 / slow.copy_rate)
    assert plan_model.free_bytes(weights, slow) == 24e9 - 1e9 - weights.trunk


# --- several machines -----------------------------------------------------------------------------

LINK = Link(5e9, 30e-6)


@pytest.mark.parametrize(
    ("experts", "top_k", "count"), [(6, 3, 2), (7, 3, 2), (8, 4, 3), (5, 5, 5)]
)
def test_the_busiest_machine_has_the_mean_of_the_maximum(experts, top_k, count):
    weights = replace(count_bytes(named_args("35b"), 4), experts=experts, top_k=top_k)
    every = list(combinations(range(experts), top_k))
    most = [
        max(sum(e % count == rank for e in chosen) for rank in range(count)) for chosen in every
    ]
    assert Machines(count, LINK).busiest(weights) == pytest.approx(sum(most) / len(every))


def test_sums_over_a_ring():
    """Four machines, one layer, one number: six steps of the latency and a quarter of the bytes."""
    assert Machines(4, LINK).sum_seconds(2e9) == pytest.approx(6 * (30e-6 + 0.1))
    weights = count_bytes(named_args("397b"), 4)
    two = Machines(2, LINK)
    assert two.token_bytes(weights) == 10 * 4096 * 2
    assert two.token_seconds(weights) == pytest.approx(60 * 2 * (30e-6 + 40960 / 5e9))
    prompt = 60 * 2 * (3 * 30e-6 + 5000 * 4096 / 5e9)  # three chunks
    assert two.prefill_seconds(weights, 5000) == pytest.approx(prompt)


def test_two_machines(capsys):
    command = "--model 397b --machine m3-max-48"
    _, one = run(command, capsys)
    text, two = run(f"{command} --machines 2 --link 40gbps,0.03ms", capsys)
    part, best = two["machines"], two["chosen"]
    assert part["disk_bytes"] == one["trunk_bytes"] + one["expert_bytes"] / 2
    assert part["memory_bytes"] == one["trunk_bytes"] + best["bank"]
    assert part["experts_per_token"] == 5 < part["busiest"] < 10
    assert 1 / two["decode_tokens_per_s"] == best["seconds"] + part["sum_seconds"]
    assert best["read"] < one["chosen"]["read"] * part["busiest"] / 10
    assert one["decode_tokens_per_s"] < two["decode_tokens_per_s"]
    assert one["machines"] is None and two["expert_bytes"] == one["expert_bytes"]
    assert "link     40 Gbit/s, 30 us: 60 sums of 81.9 kB per token take 4.58 ms, 2 % of" in text
    assert "+ 0.005 sums between machines\n" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--machines 2", "--machines and --link go together"),
        ("--link 40gbps,30us", "--machines and --link go together"),
        ("--machines 1 --link 40gbps,30us", "--machines must be from 2 to 512, got 1"),
        ("--machines 513 --link 40gbps,30us", "--machines must be from 2 to 512, got 513"),
        ("--machines 2 --link 40,30", "--link 40,30 is not a bandwidth above 0 and a latency"),
        ("--machines 2 --link 0gbps,30us", "--link 0gbps,30us is not a bandwidth above 0"),
        ("--machines 2 --link=-1gbps,30us", "--link -1gbps,30us is not a bandwidth above 0"),
        ("--machines 2 --link infgbps,30us", "--link infgbps,30us is not"),
    ],
)
def test_bad_machines(options, message, capsys):
    with pytest.raises(SystemExit):
        main(["--model", "397b", "--machine", "m3-max-48", *options.split()])
    assert f"flashmoe-plan: error: {message}" in capsys.readouterr().err
