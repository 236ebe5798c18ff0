"""The findings of `flashmoe-doctor` as one screen of text."""

from typing import Any

from ..custom_kernels.autotune import NEEDS_GPU, Verdict
from ..profile import machine
from .text import duration, mark, place, size, table
from .what_runs import render_rows

Line = tuple[str, str, str]  # mark, subject, text


def render(found: dict[str, Any]) -> str:
    """Format findings as one screen of text, the verdict last."""
    lines = [
        *_machine_lines(found),
        *_model_lines("bundled", "test model", found["bundled"]),
        *_model_lines("model", None, found["model"]),
        *((mark(check["ok"]), "full", _full_line(check)) for check in found["full"]),
        *(("!", "advice", line) for line in found["advice"]),
        *((mark(False), "PROBLEM", line) for line in found["problems"]),
    ]
    parts = [f"{sign:{len(mark(False))}} {name:9} {line}".rstrip() for sign, name, line in lines]
    parts += ["", *kernel_table(found["kernels"], found["kernel_mode"])]
    if runs := found["what_runs"]:
        parts += ["", "What runs here (flashmoe-plan):", *render_rows(runs)]
    return "\n".join([*parts, "", found["verdict"]])


def _machine_lines(found: dict[str, Any]) -> list[Line]:
    versions = ", ".join(f"{name} {v or 'missing'}" for name, v in found["packages"].items())
    memory = f"{size(found['memory_available'])} available of {size(found['memory'])}"
    if found["memory_limit"]:
        memory += f", cgroup limit {size(found['memory_limit'])}"
    device = f"{found['device']}, {found['dtype']}, FLASHMOE_KERNELS={found['kernel_mode']}"
    disk, kept = found["disk"], found["kept"]
    writable = "can be written" if kept["writable"] else "cannot be written"
    return [
        ("", "machine", f"{found['system']}; {found['cpu']}, {found['cores']} cores"),
        ("", "device", device),
        ("", "memory", memory),
        ("", "disk", f"{size(disk['free'])} free at {place(disk['path'])}"),
        (mark(True), "versions", f"Python {found['python']}, {versions}"),
        (mark(found["read_speed"] is not None or None), "reading", found["read_speed_line"]),
        (mark(kept["writable"]), "cache", f"{place(kept['verdicts'])} {writable}"),
    ]


def _model_lines(subject: str, name: str | None, model: dict[str, Any] | None) -> list[Line]:
    if model is None:
        return []
    state = "complete (headers, sizes, tokenizer)" if model["complete"] else "INCOMPLETE"
    text = f"{name or model['directory']}: {state}"
    if "kind" in model:
        bits = " and ".join(map(str, model["bits"]))
        most = "up to " if len(model["bits"]) > 1 else ""
        text += (
            f"; {model['kind']}, {bits}-bit, {model['layers']} layers of {model['experts']} "
            f"experts of {most}{size(model['record_bytes'])}, {size(model['expert_bytes'])} in "
            f"total; trunk {size(model['trunk_bytes'] or 0)}"
        )
    return [(mark(model["complete"]), subject, text)]


def _full_line(check: dict[str, Any]) -> str:
    state = {True: "", False: "FAILS: ", None: "not run: "}[check["ok"]]
    return f"{state}{check['name']}: {check['message']}"


def kernel_table(kernels: list[dict[str, Any]], mode: str) -> list[str]:
    """Return a row per op that ran, what the columns mean, and the names of those that did not."""
    idle = {kernel["op"] for kernel in kernels if kernel["message"] == NEEDS_GPU}
    ops = dict.fromkeys(kernel["op"] for kernel in kernels if kernel["op"] not in idle)
    cells = [_cells(op, [k for k in kernels if k["op"] == op], mode) for op in ops]
    head = ["kernel", "equals the reference", "used", "ours", "MLX's own"]
    lines = table([head, *cells], right=(3, 4)) if cells else []
    lines += [f"  wrong: {k['op']} {k['trial']}" for k in kernels if _is_wrong(k)]
    if cells:
        lines.append(_explanation(mode))
    if idle:
        lines.append(f"Not run, for want of a GPU that MLX supports: {', '.join(sorted(idle))}.")
    return lines


def _is_wrong(kernel: dict[str, Any]) -> bool:
    return not kernel["ok"] and kernel["message"] != NEEDS_GPU


def _cells(op: str, kernels: list[dict[str, Any]], mode: str) -> list[str]:
    right = [kernel for kernel in kernels if kernel["ok"]]
    used = sum(is_used(kernel, mode) for kernel in kernels)
    every, some = f"{len(right)} of {len(kernels)} shapes", f"at {used} of {len(kernels)} shapes"
    whose = {0: "MLX's own", len(kernels): "ours"}.get(used, f"ours {some}")
    ours, stock = (
        duration(sum(kernel[key] or 0 for kernel in right) / 1e3) if right else mark(None)
        for key in ("custom_ms", "stock_ms")
    )
    return [op, f"{mark(len(right) == len(kernels))} {every}", whose, ours, stock]


def is_used(kernel: dict[str, Any], mode: str) -> bool:
    """Say whether a run uses our kernel at this shape: on a GPU, only where it is faster."""
    found = Verdict.from_dict({k: v for k, v in kernel.items() if k not in ("op", "trial")})
    if mode == "stock" or not found.ok:
        return False
    return found.faster or mode == "custom" or not machine.on_gpu()


def _explanation(mode: str) -> str:
    times = "Times are of one call at each shape."
    if mode == "stock":
        return f"{times} FLASHMOE_KERNELS=stock: MLX's own ops run everywhere."
    if mode == "custom":
        return f"{times} FLASHMOE_KERNELS=custom: ours run wherever they are right."
    if machine.on_gpu():
        return f"{times} Ours run where they are right, and faster."
    return f"{times} On a CPU ours always run, also at shapes where MLX's own are faster."
