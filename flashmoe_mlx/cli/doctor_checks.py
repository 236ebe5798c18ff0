"""The checks of `flashmoe-doctor`, as plain JSON values."""

import argparse
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..custom_kernels.autotune import NEEDS_GPU, verdict
from ..custom_kernels.case import KernelCase
from ..custom_kernels.cases import cases, label
from ..custom_kernels.cpu.compile import compiled_folder
from ..custom_kernels.device import kernel_mode
from ..custom_kernels.kept import cache_dir
from ..custom_kernels.linear.matvec import BITS
from ..errors import FlashMoEError
from ..loader import BUNDLED_MODEL
from ..models.families import SHAPES
from ..profile import machine
from ..profile.read_speed import ReadSpeed, expert_ranges, time_reads
from ..progress import Bar, bar
from ..settings import StreamConfig
from ..store.io_mode import plan_io
from ..store.memory import available_bytes, cgroup_limit
from . import here, what_runs
from .doctor_model import ModelReport, examine
from .full_check import full_check
from .text import duration, size


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
    findings = _model(directory, args) if directory else _machine(args)
    findings |= {
        **machine.facts(),
        "kernel_mode": mode,
        "dtype": machine.default_dtype(),
        "memory_available": available_bytes(),
        "memory_limit": cgroup_limit(),
    }
    findings["problems"] = _problems(findings)
    findings["advice"] = _advice(findings)
    findings["ok"] = not findings["problems"]
    findings["verdict"] = verdict_of(findings)
    return findings


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    """Check the machine and the bundled model, and list what runs here."""
    sample, folder = args.sample_mib << 20, here.models_folder()
    tried = _cases(args.geometry, None, machine.default_dtype())
    with bar(here.STEPS + len(tried) + 1) as steps:
        found = here.look(folder, steps, sample)
        kernels = _kernels(tried, steps)
        steps.set_description("checking the bundled model")
        bundled = examine(BUNDLED_MODEL)
    return {
        **_disk(folder, found.read),
        **kernels,
        "model": None,
        "bundled": bundled.as_dict(),
        "full": [asdict(check) for check in full_check(None)] if args.full else [],
        "what_runs": what_runs.as_dict(found, what_runs.what_runs(found)),
    }


def _model(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Check a model directory, the kernels at its shapes, and reads of its experts."""
    with bar(None, what=f"checking {directory}"):
        model = examine(directory)
    tried = _cases(args.geometry, model, machine.default_dtype())
    with bar(len(tried) + 1) as steps:
        kernels = _kernels(tried, steps)
        steps.set_description("reading the disk")
        speed = _read_speed(model, args.sample_mib << 20)
    return {
        **_disk(directory, speed),
        **kernels,
        "model": model.as_dict(),
        "bundled": None,
        "full": [asdict(check) for check in full_check(model)] if args.full else [],
        "what_runs": None,
    }


def _disk(place: Path, speed: ReadSpeed | str) -> dict[str, Any]:
    return {
        "disk": {"path": str(place), "free": shutil.disk_usage(here.existing(place)).free},
        "read_speed": speed.as_dict() if isinstance(speed, ReadSpeed) else None,
        "read_speed_line": str(speed),
    }


def _kernels(tried: list[KernelCase], steps: Bar) -> dict[str, Any]:
    found = []
    for case in tried:
        steps.set_description(f"kernel {case.op}")
        found.append(_kernel(case))
        steps.update()
    folder, complaints = compiled_folder()
    verdicts = cache_dir()
    kept = {
        "kernels": folder,
        "verdicts": str(verdicts),
        "writable": os.access(place := here.existing(verdicts), os.W_OK) and place.is_dir(),
        "complaints": complaints,
    }
    return {"kernels": found, "kept": kept}


def _cases(geometry: str | None, model: ModelReport | None, dtype: str) -> list[KernelCase]:
    """Return the kernel cases of the geometry, at 4 bits, or of the model, at its own bits."""
    if model and model.args and not geometry:
        known = [bits for bits in model.bits if bits in BITS] or [4]
        return list(dict.fromkeys(c for bits in known for c in cases(model.args, bits, dtype)))
    return cases(SHAPES[geometry or "35b"], 4, dtype)


def _kernel(case: KernelCase) -> dict[str, Any]:
    return {"op": case.op, "trial": label(case), **verdict(case, fresh=True).as_dict()}


def _read_speed(model: ModelReport, sample: int) -> ReadSpeed | str:
    """Time reads of the model's experts or of a temporary file; return the reason on failure."""
    if model.layout is None:
        return here.disk_speeds(here.existing(cache_dir()), sample)[0]
    try:
        ranges, direct = expert_ranges(model.layout, sample), _reads_directly(model)
        return time_reads(ranges, "experts of the model", direct=direct)
    except FlashMoEError as error:
        return f"not measured: {error}"


def _reads_directly(model: ModelReport) -> bool:
    """Return whether the store would bypass the page cache for the model at this moment."""
    if model.layout is None or model.args is None:
        return False
    mode = StreamConfig.resolve(model.args.flashmoe).io_mode
    room = available_bytes() - (model.trunk_bytes or 0)
    return plan_io(mode, model.layout, room).direct


def _problems(found: dict[str, Any]) -> list[str]:
    kernels = [
        f"kernel {kernel['op']}: {kernel['message']}; MLX's own ops are used instead"
        for kernel in found["kernels"]
        if not kernel["ok"] and kernel["message"] != NEEDS_GPU
    ]
    models = (found["model"] or found["bundled"])["problems"]
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
    if model.get("kind") in ("stock", "linked"):
        advice.append("Each expert takes nine reads. After flashmoe-convert, it takes one.")
    if speed and model.get("token_bytes"):
        seconds = model["token_bytes"] / speed["bytes_per_s"]
        cache = "expert" if speed["direct"] else "page"
        advice.append(
            f"A token reads {size(model['token_bytes'])} in {duration(seconds)} if none of its "
            f"experts are in memory. Leave memory for the {cache} cache."
        )
    if model.get("trunk_bytes") and model["trunk_bytes"] > found["memory_available"]:
        advice.append("The trunk is larger than the available memory. Close other programs.")
    if not found["kept"]["writable"]:
        verdicts = found["kept"]["verdicts"]
        advice.append(f"{verdicts} cannot be written: each run times its GPU kernels again.")
    if any(not k["ok"] and k["message"] != NEEDS_GPU for k in found["kernels"]):
        advice.append("Please report the failing kernel and the output of flashmoe-doctor --json.")
    return advice


def verdict_of(found: dict[str, Any]) -> str:
    """Return the result in one sentence: what to expect and do next, or what to mend first."""
    if problems := found["problems"]:
        others = f" ({len(problems)} problems in all)" if len(problems) > 1 else ""
        return f"Not ready{others}. Fix this first: {problems[0]}"
    if model := found["model"]:
        command = what_runs.generate_command(model["directory"])
        return f"Ready: {model['directory']} is complete; next: {command}"
    for row in found["what_runs"]["best"].values():
        best = what_runs.Row(**row)
        speed = f"; expect {best.expected()}" if best.tokens_per_s else ""
        return f"Ready: {best.name} runs at {best.bits} bits{speed}; next: {best.commands[0]}"
    command = what_runs.generate_command(None)
    return f"Ready for the bundled model; no other fits this memory and disk; next: {command}"
