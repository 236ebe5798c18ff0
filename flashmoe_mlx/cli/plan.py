"""`flashmoe-plan`: what runs on this machine; or memory, hits and speed of one model."""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..commands import add_version, as_command
from ..errors import FlashMoEError, shown
from ..format.json_file import exists
from ..format.model_files import CONFIG, read_config
from ..format.names import PROJECTIONS
from ..models.families import FAMILIES
from ..models.qwen3_5.args import MODEL_TYPES, PREFILL_CHUNK, ModelArgs
from ..progress import bar
from ..settings import check_variables, parse_size
from . import here, plan_model, plan_ranks, what_runs
from .plan_model import Machine, Weights, named_args
from .published import ENGINES, MACHINES, MLX_RESIDENT, ROWS, count_within

QWEN = ("397b", "122b", "35b")
NAMES = *QWEN, *FAMILIES
BITS = (4, 2)
_EXPERTS = re.compile(r"\blayers\.(\d+)\.mlp\.switch_mlp\.(\w+)$")


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="flashmoe-plan",
        description="Without --model: look at this machine and list the models that it can run. "
        "With --model: predict memory, hits and speed of one model, on any machine "
        "(docs/reference/plan.md).",
    )
    add_version(parser)
    add = parser.add_argument
    add("--model", help=f"{', '.join(NAMES)}, or a directory with the model's config.json")
    add("--bits", type=int, help="bits per expert weight, 4 or 2 (default: config.json's, else 4)")
    add("--top-k", type=int, help="experts per token (default: the model's own)")
    add("--machine", help=f"machine with published figures: {', '.join(MACHINES)}")
    add("--ram", help="installed memory, such as 48GB")
    add("--ssd", type=float, help="GB/s of cold reads of experts, as flashmoe-doctor measures it")
    add("--memory-bandwidth", type=float, help="memory's GB/s, as the vendor states it")
    add("--cache", help="size of the expert cache (default: the best of several)")
    add("--prompt", type=int, default=1000, help="length of the prompt in tokens (default: 1000)")
    add("--engine", default="flash-moe", help=f"take its time per layer: {', '.join(ENGINES)}")
    add("--machines", type=int, help="machines that share the experts, all as described here")
    add("--link", help="with --machines: bandwidth and latency between them, such as 40gbps,30us")
    add("--folder", type=Path, help="without --model: where models lie (default: the Hub's cache)")
    add("--json", action="store_true", help="also print one JSON line, last")
    add("--check", action="store_true", help="only compare predictions with published figures")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit with 2 on bad input."""
    if code := as_command("flashmoe-plan", lambda: report(build_parser().parse_args(argv))):
        sys.exit(code)


def report(args: argparse.Namespace) -> None:
    """Print what runs here, the predictions, or their comparison with published figures."""
    check_variables()
    if args.check:
        result, text = (found := check()), render_check(found)
    elif _asks_about_here(args):
        result, text = look_here(args.folder)
    else:
        result, text = (found := plan(args)), render(found)
    print(text)
    if args.json:
        print(json.dumps(result))


def _asks_about_here(args: argparse.Namespace) -> bool:
    """Say whether no flag asks for a model or describes a machine."""
    default = vars(build_parser().parse_args([]))
    return vars(args) == default | {"folder": args.folder, "json": args.json}


def look_here(folder: Path | None) -> tuple[dict[str, Any], str]:
    """Measure this machine; return what runs on it as plain JSON values, and as text."""
    with bar(here.STEPS) as steps:
        found = here.look(folder or here.models_folder(), steps)
    runs = what_runs.as_dict(found, what_runs.what_runs(found))
    lines = [f"{name:9}{text}" for name, text in what_runs.render_machine(found)]
    return runs, "\n".join([*lines, "", *what_runs.render_rows(runs)])


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Return every prediction as plain JSON values: bytes, seconds, rates per second.

    Raises:
        FlashMoEError: an argument is missing or out of range, or memory is too small.
    """
    if args.folder is not None:
        raise FlashMoEError("--folder is for this machine's own list. Drop it, or the other flags.")
    weights, machine = _weights(args), _machine(args)
    machines = plan_ranks.read_machines(args.machines, args.link, weights)
    whole, average, sums = weights, weights, 0.0
    if machines:
        weights = machines.share(whole, machines.busiest(whole))
        average = machines.share(whole, whole.top_k / machines.count)
        sums = machines.token_seconds(whole)
    engine = ENGINES[_one_of(args.engine, ENGINES, "--engine")]
    if args.prompt < 1:
        raise FlashMoEError(f"--prompt must be at least 1 (token), got {args.prompt}")

    def decode(bank: float) -> plan_model.Decode:
        all_fit = bank >= weights.expert_bytes  # layers never wait for experts
        return plan_model.decode(weights, machine, MLX_RESIDENT if all_fit else engine, bank)

    decodes = [decode(bank) for bank in plan_model.bank_sizes(weights, machine)]
    best = plan_model.advised(weights, machine, decodes)
    if args.cache is not None:
        best = decode(_cache(args.cache, weights, machine))
        decodes = sorted({*decodes, best}, key=lambda d: d.bank)
    engine = MLX_RESIDENT if best.bank_hits == 1 else engine
    seconds = plan_model.prefill_seconds(average, machine, engine, args.prompt, best.bank)
    seconds += machines.prefill_seconds(whole, args.prompt) if machines else 0
    chunk = min(args.prompt, PREFILL_CHUNK)
    within, rows = count_within()
    return {
        "model": args.model, "trunk_bytes": round(whole.trunk),
        "expert_bytes": round(whole.expert_bytes), "record_bytes": round(whole.record),
        "token_bytes": round(whole.token_bytes), "top_k": whole.top_k,
        "layers": whole.layers, "experts": whole.experts,
        "machines": machines and machines.as_dict(whole, best.bank),
        "machine": asdict(machine), "engine": args.engine,
        "free_bytes": plan_model.free_bytes(weights, machine),
        "most_advised_bytes": plan_model.most_advised(weights, machine),
        "caches": [asdict(d) for d in decodes], "chosen": asdict(best),
        "asked": args.cache is not None, "decode_tokens_per_s": 1 / (best.seconds + sums),
        "prompt": args.prompt,
        "distinct_experts": plan_model.distinct_experts(whole, chunk),
        "prefill_seconds": seconds, "prefill_tokens_per_s": args.prompt / seconds,
        "check": {"within_20_percent": within, "predicted_rows": rows},
    }  # fmt: skip


def _one_of(value: Any, choices: Iterable[Any], name: str) -> Any:
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise FlashMoEError(f"{name} {value} is unknown. Choose from {known}.")
    return value


def _weights(args: argparse.Namespace) -> Weights:
    if args.model is None:
        raise FlashMoEError(
            f"--model is missing. Give {', '.join(NAMES)}, or a directory; or no flag, to see what "
            "this machine can run."
        )
    if args.model in FAMILIES:
        known = None if args.bits is None else _one_of(args.bits, BITS, "--bits")
        return plan_model.count_family(FAMILIES[args.model], known, args.top_k)
    settings = named_args(args.model) if args.model in QWEN else _read_config(args.model)
    quantization = settings.quantization
    own = _expert_bits(quantization, settings.num_hidden_layers)
    bits = own if args.bits is None else _one_of(args.bits, BITS, "--bits")
    trunk_bits, group = quantization.get("bits") or 4, quantization.get("group_size") or 64
    return plan_model.count_bytes(settings, bits, args.top_k, trunk_bits, group)


def _read_config(directory: str) -> ModelArgs:
    if not exists(Path(directory) / CONFIG):
        raise FlashMoEError(
            f"--model {directory}: has no {CONFIG}. Give {', '.join(NAMES)}, or the directory of a "
            "model."
        )
    config = read_config(Path(directory))
    if (kind := config.get("model_type")) not in MODEL_TYPES:
        raise FlashMoEError(
            f"--model {directory}: its model_type is {shown(kind)}, and predictions read the "
            f"config.json of Qwen3.5 only. Give one of {', '.join(FAMILIES)}, or let "
            "flashmoe-doctor look at the directory."
        )
    return ModelArgs.from_dict(config)


def _expert_bits(quantization: dict[str, Any], layers: int) -> float:
    """Return the mean bits of the routed experts' weights: from their entries, or the default."""
    own = {
        (int(match[1]), match[2]): entry.get("bits") or 4
        for name, entry in quantization.items()
        if isinstance(entry, dict) and (match := _EXPERTS.search(name))
    }
    default = quantization.get("bits") or 4
    matrices = [(layer, name) for layer in range(layers) for name in PROJECTIONS]
    return sum(own.get(matrix, default) for matrix in matrices) / len(matrices)


def _machine(args: argparse.Namespace) -> Machine:
    flags = {"memory": "--ram", "ssd": "--ssd", "bandwidth": "--memory-bandwidth"}
    rates = {"ssd": args.ssd, "bandwidth": args.memory_bandwidth}
    given: dict[str, Any] = {
        name: _rate(x, flags[name]) for name, x in rates.items() if x is not None
    }
    if args.ram is not None:
        given["memory"] = _size(args.ram, "--ram")
    if args.machine:
        return replace(MACHINES[_one_of(args.machine, MACHINES, "--machine")], **given)
    if missing := [flag for name, flag in flags.items() if name not in given]:
        raise FlashMoEError(
            f"missing {' and '.join(missing)}. Give the figures, or a --machine that has them: "
            f"{', '.join(MACHINES)}. Without flags, flashmoe-plan looks at this machine."
        )
    return Machine(**given, source="as given")


def _rate(value: float, name: str) -> float:
    if not 0 < value < float("inf"):
        raise FlashMoEError(f"{name} must be greater than 0 (GB/s), got {value:g}")
    return value * 1e9


def _size(text: str, name: str) -> float:
    try:
        return float(parse_size(text, name))  # float("auto") raises ValueError
    except ValueError as error:
        message = f"{name} {text} is not a size. Give bytes or a unit, such as 48GB."
        raise FlashMoEError(message) from error


def _cache(text: str, weights: Weights, machine: Machine) -> float:
    most = min(plan_model.largest_bank(weights, machine), weights.expert_bytes)
    bank = min(_size(text, "--cache"), weights.expert_bytes)
    if not weights.token_bytes <= bank <= most:
        raise FlashMoEError(
            f"--cache must be from {weights.token_bytes / 1e9:.2f} GB (one token's experts) to "
            f"{most / 1e9:.2f} GB (the memory available), got {text}"
        )
    return bank


def render(found: dict[str, Any]) -> str:
    """Format a plan as one screen of text."""
    machine, best = found["machine"], found["chosen"]
    within, rows = found["check"].values()
    machines, sums, between = found["machines"], 0.0, ""
    if machines:
        sums = machines["sum_seconds"]
        between = f" + {sums:.3f} sums between machines"
    return f"""\
model    {found["model"]}: {found["layers"]} layers of {found["experts"]} experts
bytes    trunk {_gb(found["trunk_bytes"])}, experts {_gb(found["expert_bytes"])}, \
one {found["record_bytes"]:,} bytes; a token uses {found["top_k"]} per layer, \
{found["token_bytes"] / 1e9:.2f} GB
machine  {_gb(machine["memory"])}, SSD {machine["ssd"] / 1e9:g} GB/s, \
memory {machine["bandwidth"] / 1e9:g} GB/s
         (figures: {machine["source"]})
{plan_ranks.render(machines, found) if machines else ""}\
memory   {_gb(found["free_bytes"])} for experts, \
besides the trunk and {_gb(plan_model.SYSTEM_BYTES)} for the system
            cache  page cache  hits: cache   both  copy ms  read ms  tokens/s
{"".join(_cache_line(line, found) for line in found["caches"])}\
cache    {_reason(found)}
decode   {found["decode_tokens_per_s"]:.2g} tokens/s: {best["seconds"] + sums:.3g} s = \
{best["read"]:.3f} SSD + {best["copied"]:.3f} page cache + {best["computed"]:.3f} weights + \
{best["waited"]:.3f} launches and waits{between}
prefill  {found["prompt"]} tokens: at most {found["prefill_tokens_per_s"]:.0f} tokens/s, \
since loading weights takes {found["prefill_seconds"]:.3g} s (arithmetic not included); \
{found["distinct_experts"]:.0f} of {found["experts"]} experts per layer
accuracy {within} of {rows} published rows lie within 20 %: flashmoe-plan --check"""


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB"


def _cache_line(line: dict[str, Any], found: dict[str, Any]) -> str:
    large = line["bank_hits"] < 1 and line["bank"] > found["most_advised_bytes"]
    sign = "  <-" if line == found["chosen"] else "  not advised" if large else ""
    return (
        f"         {line['bank'] / 1e9:5.1f} GB {line['page_cache'] / 1e9:8.1f} GB "
        f"{100 * line['bank_hits']:11.0f}% {100 * line['hits']:5.0f}% {1e3 * line['copied']:8.1f} "
        f"{1e3 * line['read']:8.1f} {1 / line['seconds']:9.2f}{sign}\n"
    )


def _reason(found: dict[str, Any]) -> str:
    best = found["chosen"]
    if best["bank_hits"] == 1:
        return "all experts fit in memory: layers need neither reads nor waits"
    size = f"{best['bank'] / 1e9:.2f}GB"
    if found["asked"]:
        return f"{size}, from --cache"
    return (
        f"--expert-cache {size}: the fastest of at most half of the memory for experts; larger "
        "ones look fast in the formula, and lost speed wherever they were tried"
    )


def check() -> dict[str, Any]:
    """Return every published row with its prediction, and count those within 20 %."""
    within, rows = count_within()
    found = [row.as_dict() for row in ROWS]
    return {"rows": found, "within_20_percent": within, "predicted_rows": rows}


def render_check(found: dict[str, Any]) -> str:
    """Format the check as a table that marks errors over 20 %."""
    lines = [f"{'published by others':54} {'published':>9} {'predicted':>9} {'error':>7}"]
    for row in found["rows"]:
        miss = "  MISS" if abs(row["error"]) > 0.2 else ""
        lines.append(
            f"{row['row']:54} {row['published']:9.3g} {row['predicted']:9.3g} "
            f"{100 * row['error']:+6.0f}%  {row['unit']}, {row['kind']}{miss}"
        )
    return "\n".join(lines) + (
        f"\n{found['within_20_percent']} of {found['predicted_rows']} predicted decode rows "
        "(tok/s) lie within 20 %."
    )


if __name__ == "__main__":
    main()
