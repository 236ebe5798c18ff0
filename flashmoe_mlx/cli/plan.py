"""`flashmoe-plan`: what a model needs and how fast it ought to be, before it is downloaded."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..bench.published import ENGINES, MACHINES, MLX_RESIDENT, ROWS, tally
from ..commands import as_command
from ..errors import FlashMoEError
from ..format.json_file import exists
from ..format.model_files import CONFIG, read_config
from ..format.names import PROJECTIONS
from ..models.qwen3_5.args import PREFILL_CHUNK, ModelArgs
from ..settings import parse_size
from .plan_model import (
    SYSTEM_BYTES,
    Decode,
    Engine,
    Machine,
    Weights,
    advised,
    as_dict,
    bank_sizes,
    decode,
    distinct_experts,
    free_bytes,
    largest_bank,
    named_args,
    prefill_seconds,
    weigh,
)

NAMES = ("397b", "122b", "35b")
BITS = (4, 2)
_EXPERTS = re.compile(r"\blayers\.(\d+)\.mlp\.switch_mlp\.(\w+)$")


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="flashmoe-plan",
        description="Predict memory, hits and speed of a streamed model (docs/reference/plan.md).",
    )
    add = parser.add_argument
    add("--model", help=f"{', '.join(NAMES)}, or a model's directory, of which config.json is read")
    add("--bits", type=int, help="of the experts, 4 or 2 (default: config.json's, else 4)")
    add("--top-k", type=int, help="experts per token (default: the model's own)")
    add("--machine", help=f"figures that others published: {', '.join(MACHINES)}")
    add("--ram", help="installed memory, such as 48GB")
    add("--ssd", type=float, help="GB/s of cold reads of experts, as flashmoe-doctor measures it")
    add("--memory-bandwidth", type=float, help="the memory's GB/s, as its vendor states it")
    add("--cache", help="size of the expert cache to predict for (default: the best of a few)")
    add("--prompt", type=int, default=1000, help="tokens to predict prefill for (default: 1000)")
    add("--engine", default="flash-moe", help=f"whose time per layer: {', '.join(ENGINES)}")
    add("--json", action="store_true", help="print one JSON line last")
    add("--check", action="store_true", help="compare with what others published, and no more")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; exits with 2 on bad input."""
    if code := as_command("flashmoe-plan", lambda: report(build_parser().parse_args(argv))):
        sys.exit(code)


def report(args: argparse.Namespace) -> None:
    """Print the predictions, or how well they meet what was measured."""
    result = check() if args.check else plan(args)
    print(render_check(result) if args.check else render(result))
    if args.json:
        print(json.dumps(result))


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Return every prediction as plain JSON values: bytes, seconds, rates per second.

    Raises:
        FlashMoEError: an argument is missing or no good, or the memory is too small.
    """
    weights = _weights(args)
    machine = _machine(args)
    engine = ENGINES[_among(args.engine, list(ENGINES), "--engine")]
    if args.prompt < 1:
        raise FlashMoEError(f"--prompt {args.prompt} is no number of tokens. Give 1 or more.")
    decodes = [_decode(weights, machine, engine, bank) for bank in bank_sizes(weights, machine)]
    best = advised(weights, machine, decodes)
    if args.cache is not None:
        best = _decode(weights, machine, engine, _cache(args.cache, weights, machine))
        decodes = sorted({*decodes, best}, key=lambda d: d.bank)
    resident = best.bank_hits == 1
    seconds = prefill_seconds(
        weights, machine, MLX_RESIDENT if resident else engine, args.prompt, best.bank
    )
    within, rows = tally()
    return {
        "model": args.model,
        **as_dict(weights),
        "layers": weights.layers,
        "experts": weights.experts,
        "machine": asdict(machine),
        "engine": args.engine,
        "free_bytes": free_bytes(weights, machine),
        "caches": [asdict(d) for d in decodes],
        "chosen": asdict(best),
        "asked": args.cache is not None,
        "decode_tokens_per_s": 1 / best.seconds,
        "prompt": args.prompt,
        "distinct_experts": distinct_experts(weights, min(args.prompt, PREFILL_CHUNK)),
        "prefill_seconds": seconds,
        "prefill_tokens_per_s": args.prompt / seconds,
        "check": {"within_20_percent": within, "predicted_rows": rows},
    }


def _decode(weights: Weights, machine: Machine, engine: Engine, bank: float) -> Decode:
    """Predict decoding; a model that is wholly resident waits for no layer."""
    whole = bank >= weights.expert_bytes
    return decode(weights, machine, MLX_RESIDENT if whole else engine, bank)


def _among(value: Any, choices: Sequence[Any], name: str) -> Any:
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise FlashMoEError(f"{name} {value} is not known. Choose among {known}.")
    return value


def _weights(args: argparse.Namespace) -> Weights:
    if args.model is None:
        raise FlashMoEError(f"--model is missing. Give {', '.join(NAMES)}, or a directory.")
    settings = named_args(args.model) if args.model in NAMES else _read_config(args.model)
    quantization = settings.quantization
    own = _expert_bits(quantization, settings.num_hidden_layers)
    bits = own if args.bits is None else _among(args.bits, BITS, "--bits")
    trunk_bits, group = quantization.get("bits") or 4, quantization.get("group_size") or 64
    return weigh(settings, bits, args.top_k, trunk_bits, group)


def _read_config(directory: str) -> ModelArgs:
    if not exists(Path(directory) / CONFIG):
        raise FlashMoEError(
            f"--model {directory}: no {CONFIG} there. Give {', '.join(NAMES)}, or the directory "
            "of a model."
        )
    return ModelArgs.from_dict(read_config(Path(directory)))


def _expert_bits(quantization: dict[str, Any], layers: int) -> float:
    """Return the mean bits of routed experts' weights: of their own entries, or the default's."""
    own = {
        (int(match[1]), match[2]): entry.get("bits") or 4
        for name, entry in quantization.items()
        if isinstance(entry, dict) and (match := _EXPERTS.search(name))
    }
    default = quantization.get("bits") or 4
    matrices = [(layer, name) for layer in range(layers) for name in PROJECTIONS]
    return sum(own.get(matrix, default) for matrix in matrices) / len(matrices)


def _machine(args: argparse.Namespace) -> Machine:
    given: dict[str, Any] = {
        "memory": None if args.ram is None else _size(args.ram, "--ram"),
        "ssd": _rate(args.ssd, "--ssd"),
        "bandwidth": _rate(args.memory_bandwidth, "--memory-bandwidth"),
    }
    given = {name: value for name, value in given.items() if value is not None}
    if args.machine:
        return replace(MACHINES[_among(args.machine, list(MACHINES), "--machine")], **given)
    flags = {"memory": "--ram", "ssd": "--ssd", "bandwidth": "--memory-bandwidth"}
    if missing := [flag for name, flag in flags.items() if name not in given]:
        raise FlashMoEError(
            f"{' and '.join(missing)} not given. Give it, or a --machine whose figures others "
            f"published: {', '.join(MACHINES)}."
        )
    return Machine(**given, source="as given")


def _rate(value: float | None, name: str) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise FlashMoEError(f"{name} {value:g} is no rate. Give GB/s, such as 5.")
    return None if value is None else value * 1e9


def _size(text: str, name: str) -> int:
    try:
        size = parse_size(text, name)
    except FlashMoEError:
        size = "auto"  # which is no size here either
    if isinstance(size, str):
        raise FlashMoEError(f"{name} {text} is not a size. Give bytes or a unit, such as 48GB.")
    return size


def _cache(text: str, weights: Weights, machine: Machine) -> float:
    most = min(largest_bank(weights, machine), weights.expert_bytes)
    bank = min(float(_size(text, "--cache")), weights.expert_bytes)
    if not weights.token_bytes <= bank <= most:
        raise FlashMoEError(
            f"--cache {text} does not fit: one token's experts take "
            f"{weights.token_bytes / 1e9:.2f} GB, and {most / 1e9:.2f} GB can be spared. "
            f"Give a size between."
        )
    return bank


def render(found: dict[str, Any]) -> str:
    """Write a plan as one screen of text."""
    machine, best = found["machine"], found["chosen"]
    within, rows = found["check"].values()
    lines = [
        ("model", f"{found['model']}: {found['layers']} layers of {found['experts']} experts"),
        (
            "bytes",
            f"trunk {_gb(found['trunk_bytes'])}, experts {_gb(found['expert_bytes'])}, one "
            f"{found['record_bytes']:,} bytes; a token uses {found['top_k']} a layer, "
            f"{found['token_bytes'] / 1e9:.2f} GB",
        ),
        (
            "machine",
            f"{_gb(machine['memory'])}, SSD {machine['ssd'] / 1e9:g} GB/s, memory "
            f"{machine['bandwidth'] / 1e9:g} GB/s",
        ),
        ("", f"(figures: {machine['source']})"),
        (
            "memory",
            f"{_gb(found['free_bytes'])} for experts, after the trunk and {_gb(SYSTEM_BYTES)} "
            f"for the system",
        ),
        ("", "   cache  page cache  hits: cache   both  copy ms  read ms  tokens/s"),
        *(("", _cache_line(line, best)) for line in found["caches"]),
        ("cache", _reason(found)),
        (
            "decode",
            f"{found['decode_tokens_per_s']:.2g} tokens/s: {best['seconds']:.3g} s = "
            f"{best['read']:.3f} SSD + {best['copied']:.3f} page cache + {best['computed']:.3f} "
            f"weights + {best['waited']:.3f} launches and waits",
        ),
        (
            "prefill",
            f"{found['prompt']} tokens: at most {found['prefill_tokens_per_s']:.0f} tokens/s, "
            f"since weights take {found['prefill_seconds']:.3g} s to arrive (arithmetic is not "
            f"counted); {found['distinct_experts']:.0f} of {found['experts']} experts a layer",
        ),
        ("trust", f"{within} of {rows} published rows lie within 20 %: flashmoe-plan --check"),
    ]
    return "\n".join(f"{name:8} {line}" for name, line in lines)


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB"


def _cache_line(line: dict[str, Any], best: dict[str, Any]) -> str:
    mark = "  <-" if line == best else ""
    return (
        f"{line['bank'] / 1e9:5.1f} GB {line['page_cache'] / 1e9:8.1f} GB "
        f"{100 * line['bank_hits']:11.0f}% {100 * line['hits']:5.0f}% {1e3 * line['copied']:8.1f} "
        f"{1e3 * line['read']:8.1f} {1 / line['seconds']:9.2f}{mark}"
    )


def _reason(found: dict[str, Any]) -> str:
    best = found["chosen"]
    if best["bank_hits"] == 1:
        return "all experts fit in memory: no reads, no waits between layers"
    size = f"{best['bank'] / 1e9:.2f}GB"
    if found["asked"]:
        return f"{size}, as asked"
    return (
        f"--expert-cache {size}: a larger one saves copies, but leaves less to the page cache; "
        "over half is not advised"
    )


def check() -> dict[str, Any]:
    """Return every published row beside its prediction, and how many lie within 20 %."""
    within, rows = tally()
    return {
        "rows": [row.as_dict() for row in ROWS],
        "within_20_percent": within,
        "predicted_rows": rows,
    }


def render_check(found: dict[str, Any]) -> str:
    """Write the check as a table; errors over 20 % are marked, none is left out."""
    lines = [f"{'published by others':54} {'published':>9} {'predicted':>9} {'error':>7}"]
    for row in found["rows"]:
        miss = "  MISS" if abs(row["error"]) > 0.2 else ""
        lines.append(
            f"{row['row']:54} {row['published']:9.3g} {row['predicted']:9.3g} "
            f"{100 * row['error']:+6.0f}%  {row['unit']}, {row['kind']}{miss}"
        )
    lines.append(
        f"{found['within_20_percent']} of {found['predicted_rows']} predicted decode rows (tok/s) "
        "lie within 20 %."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
