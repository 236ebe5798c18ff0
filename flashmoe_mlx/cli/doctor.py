"""`flashmoe-doctor`: check this machine, the kernels on it, its disk, and a model directory."""

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..commands import as_command
from ..custom_kernels.autotune import NEEDS_GPU, Verdict, verdict
from ..custom_kernels.case import KernelCase
from ..custom_kernels.cases import cases, label
from ..custom_kernels.cpu.compile import compiled_folder
from ..custom_kernels.device import kernel_mode
from ..custom_kernels.kept import cache_dir
from ..custom_kernels.linear.matvec import BITS
from ..errors import FlashMoEError
from ..models.qwen3_5.geometry import GEOMETRIES
from ..profile import machine
from ..profile.read_speed import SAMPLE, ReadSpeed, expert_ranges, scratch_ranges, time_reads
from ..settings import StreamConfig
from ..store.io_mode import plan_io
from ..store.memory import available_bytes, cgroup_limit
from .doctor_model import ModelReport, examine
from .full_check import full_check

GIB = 1 << 30


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="flashmoe-doctor",
        description="Check this machine, the kernels on it, its disk, and a model directory.",
    )
    parser.add_argument("model_dir", nargs="?", type=Path, help="model directory to check")
    parser.add_argument("--model", type=Path, metavar="DIR", help="same as MODEL_DIR")
    parser.add_argument(
        "--full",
        action="store_true",
        help="also compare every kernel, in every format, with its float32 reference; with a "
        "model, also compare its logits with a quarter and with all of its experts in memory, "
        "compare its greedy tokens with stock mlx-lm's, and check its peak memory; takes minutes",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--geometry",
        choices=GEOMETRIES,
        help="check the kernels at this model's shapes (default: MODEL_DIR's, else 35b)",
    )
    parser.add_argument(
        "--sample-mib",
        type=int,
        default=SAMPLE >> 20,
        help=f"MiB to read from the disk (default: {SAMPLE >> 20})",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run the command; exit with 0, 1 if a check fails, 2 on bad input."""
    sys.exit(as_command("flashmoe-doctor", lambda: report(build_parser().parse_args(argv))))


def report(args: argparse.Namespace) -> int:
    """Print all findings, and return 1 if a check fails."""
    findings = examine_all(args)
    print(json.dumps(findings) if args.json else render(findings))
    return 0 if findings["ok"] else 1


def examine_all(args: argparse.Namespace) -> dict[str, Any]:
    """Run every check and return the findings as plain JSON values.

    Raises:
        FlashMoEError: a flag or FLASHMOE_KERNELS is invalid, or MODEL_DIR is not a directory.
    """
    if args.sample_mib < 2:
        raise FlashMoEError(
            f"--sample-mib must be at least 2, the size of one expert, got {args.sample_mib}"
        )
    mode, directory = kernel_mode(), args.model_dir or args.model
    model = examine(directory) if directory else None
    dtype = machine.default_dtype()
    kernels = [_kernel(case) for case in _cases(args.geometry, model, dtype)]
    folder, complaints = compiled_folder()
    speed = _read_speed(model, args.sample_mib << 20)
    place = directory or _existing(cache_dir())
    findings: dict[str, Any] = {
        **machine.facts(),
        "kernel_mode": mode,
        "dtype": dtype,
        "kernels": kernels,
        "kept": {"kernels": folder, "verdicts": str(cache_dir()), "complaints": complaints},
        "memory_available": available_bytes(),
        "memory_limit": cgroup_limit(),
        "disk": {"path": str(place), "free": shutil.disk_usage(place).free},
        "read_speed": speed.as_dict() if isinstance(speed, ReadSpeed) else None,
        "read_speed_line": str(speed),
        "model": model.as_dict() if model else None,
        "full": [asdict(found) for found in full_check(model)] if args.full else [],
    }
    findings["problems"] = _problems(findings)
    findings["advice"] = _advice(findings)
    findings["ok"] = not findings["problems"]
    return findings


def _cases(geometry: str | None, model: ModelReport | None, dtype: str) -> list[KernelCase]:
    """Return the kernel cases of the geometry, at 4 bits, or of the model, at its own bits."""
    if model and model.args and not geometry:
        known = [bits for bits in model.bits if bits in BITS] or [4]
        return list(dict.fromkeys(c for bits in known for c in cases(model.args, bits, dtype)))
    return cases(GEOMETRIES[geometry or "35b"], 4, dtype)


def _kernel(case: KernelCase) -> dict[str, Any]:
    return {"op": case.op, "trial": label(case), **verdict(case, fresh=True).as_dict()}


def _read_speed(model: ModelReport | None, sample: int) -> ReadSpeed | str:
    """Time reads of the model's experts or of a temporary file; return the reason on failure."""
    try:
        if model and model.layout:
            ranges, direct = expert_ranges(model.layout, sample), _reads_directly(model)
            return time_reads(ranges, "experts of the model", direct=direct)
        with scratch_ranges(cache_dir(), sample) as ranges:
            return time_reads(ranges, f"a temporary file in {cache_dir()}")
    except OSError as error:
        return f"not measured: {error.strerror} ({error.filename or cache_dir()})"
    except FlashMoEError as error:
        return f"not measured: {error}"


def _reads_directly(model: ModelReport) -> bool:
    """Return whether the store would bypass the page cache for the model at this moment."""
    if model.layout is None or model.args is None:
        return False
    mode = StreamConfig.resolve(model.args.flashmoe).io_mode
    room = available_bytes() - (model.trunk_bytes or 0)
    return plan_io(mode, model.layout, room).direct


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if os.path.exists(parent))


def _problems(found: dict[str, Any]) -> list[str]:
    kernels = [
        f"kernel {kernel['op']}: {kernel['message']}; MLX's own ops are used instead"
        for kernel in found["kernels"]
        if not kernel["ok"] and kernel["message"] != NEEDS_GPU
    ]
    models = found["model"]["problems"] if found["model"] else []
    full = [f"{check['name']}: {check['message']}" for check in found["full"] if _fails(check)]
    # A kernel often fails at every shape with the same message: report each message once.
    return [*dict.fromkeys(kernels), *found["kept"]["complaints"], *models, *full]


def _fails(check: dict[str, Any]) -> bool:
    return check["ok"] is False  # None: not run


def _advice(found: dict[str, Any]) -> list[str]:
    """Return suggestions, most important first."""
    cpu = not machine.on_gpu()
    model, speed = found["model"] or {}, found["read_speed"]
    advice = []
    if cpu and platform.system() == "Darwin":
        advice.append("MLX runs on this Mac's CPU. Use a native arm64 Python instead of Rosetta.")
    if cpu and shutil.which("nvidia-smi"):
        advice.append("To use the NVIDIA GPU: pip install 'flashmoe-mlx[cuda13]' (or cuda12).")
    if cpu and found["packages"]["numba"] is None:
        advice.append("CPU kernels need numba: pip install numba")
    if model.get("kind") in ("stock", "linked") and model["convertible"]:
        advice.append("Each expert takes nine reads. After flashmoe-convert, it takes one.")
    if speed and model.get("token_bytes"):
        seconds = model["token_bytes"] / speed["bytes_per_s"]
        cache = "expert" if speed["direct"] else "page"
        advice.append(
            f"A token reads {model['token_bytes'] / 1e9:.3g} GB in {seconds:.2g} s if none of its "
            f"experts are in memory. Leave memory for the {cache} cache."
        )
    if model.get("trunk_bytes") and model["trunk_bytes"] > found["memory_available"]:
        advice.append("The trunk is larger than the available memory. Close other programs.")
    verdicts = Path(found["kept"]["verdicts"])
    if not (os.access(place := _existing(verdicts), os.W_OK) and place.is_dir()):
        advice.append(f"{verdicts} cannot be written: each run times its GPU kernels again.")
    if any(not k["ok"] and k["message"] != NEEDS_GPU for k in found["kernels"]):
        advice.append("Please report the failing kernel and the output of flashmoe-doctor --json.")
    return advice


def render(found: dict[str, Any]) -> str:
    """Format findings as one screen of text."""
    versions = ", ".join(f"{name} {v or 'missing'}" for name, v in found["packages"].items())
    memory = f"{found['memory_available'] / GIB:.1f} of {found['memory'] / GIB:.1f} GiB available"
    if found["memory_limit"]:
        memory += f", cgroup limit {found['memory_limit'] / GIB:.1f} GiB"
    device = f"{found['device']}, {found['dtype']}, FLASHMOE_KERNELS={found['kernel_mode']}"
    disk = found["disk"]
    lines = [
        ("machine", f"{found['system']}; {found['cpu']}, {found['cores']} cores"),
        ("versions", f"Python {found['python']}, {versions}"),
        ("device", device),
        ("memory", memory),
        ("disk", f"{disk['free'] / GIB:.1f} GiB free at {disk['path']}"),
        ("reading", found["read_speed_line"]),
        *(("model", line) for line in _model_lines(found["model"])),
        *(("kernel", line) for line in _kernel_lines(found["kernels"], found["kernel_mode"])),
        *(("full", _full_line(check)) for check in found["full"]),
        *(("advice", line) for line in found["advice"]),
        *(("PROBLEM", line) for line in found["problems"]),
        ("result", "no problems" if found["ok"] else f"{len(found['problems'])} problem(s)"),
    ]
    return "\n".join(f"{name:9} {line}" for name, line in lines)


def _model_lines(model: dict[str, Any] | None) -> list[str]:
    if model is None:
        return []
    state = "complete (headers, sizes, tokenizer)" if model["complete"] else "INCOMPLETE"
    lines = [f"{model['directory']}: {state}"]
    if "kind" in model:
        record, experts = model["record_bytes"] / 1e6, model["expert_bytes"] / 1e9
        bits = " and ".join(map(str, model["bits"]))
        lines.append(
            f"{model['kind']}, {bits}-bit, {model['layers']} layers of {model['experts']} experts "
            f"of {'up to ' if len(model['bits']) > 1 else ''}{record:.3g} MB, "
            f"{experts:.3g} GB in total; "
            f"trunk {(model['trunk_bytes'] or 0) / 1e9:.3g} GB"
        )
    return lines


def _kernel_lines(kernels: list[dict[str, Any]], mode: str) -> list[str]:
    idle = [kernel for kernel in kernels if kernel["message"] == NEEDS_GPU]
    lines = [_kernel_line(kernel, mode) for kernel in kernels if kernel not in idle]
    if idle:
        lines.append(f"{len(idle)} GPU kernels not run: this machine has no GPU that MLX supports")
    return lines


def _full_line(check: dict[str, Any]) -> str:
    if check["ok"] is None:
        return f"not run: {check['name']}: {check['message']}"
    return f"{'FAILS' if _fails(check) else 'ok'}: {check['name']}: {check['message']}"


def _kernel_line(kernel: dict[str, Any], mode: str) -> str:
    found = Verdict.from_dict({k: v for k, v in kernel.items() if k not in ("op", "trial")})
    shape = f"{kernel['op']} {kernel['trial']}"
    if not found.ok:
        return f"FAILS: {shape}"
    always = mode == "custom" or not machine.on_gpu()  # CPU kernels are not timed
    used = "used" if mode != "stock" and (always or found.faster) else "stock used"
    return (
        f"ok, {found.custom_ms:.3f} ms, stock {found.stock_ms:.3f} ms, {used}; "
        f"error {found.error:.0e} of {found.limit:.0e}; {shape}"
    )


if __name__ == "__main__":
    main()
