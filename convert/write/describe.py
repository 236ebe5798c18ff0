"""The report of `--dry-run`: tensors, bytes, free disk, and an estimate of the time."""

import math
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from ...models.qwen3_5.args import ModelArgs
from ..plan.parts import LayerPlan, Plan, Quant
from ..quant.calibrate import MOST_ROWS, LayerInputs
from ..source.arrays import FLOATS, NUMPY, as_bytes
from ..source.checkpoint import Source
from ..source.foreign_code import REMEDY
from ..source.read import Bytes, Reader
from .execute import ExpertSteps, Loaded
from .output import copied_code
from .steps import Fetched

DOWNLOAD_RATE = 100e6  # bytes per second, assumed
CHARACTERS = 4  # of a text per token, assumed


def describe(
    source: Source, plan: Plan, out: Path, fetching: Fetched, to_write: int, free: int
) -> str:
    """Return a table of the plan."""
    needed = to_write + fetching.most_bytes
    records = sorted({layer.record_bytes for layer in plan.layers})
    before = sorted({kind(p.before) for layer in plan.layers for p in layer.projections})
    after = sorted({kind(p.after) for layer in plan.layers for p in layer.projections})
    trunk = sum(len(file.outputs) for file in plan.trunk)
    experts = sum(layer.experts * len(layer.record) for layer in plan.layers)
    code = copied_code(source, plan)
    downloads = (
        f"{fetching.count} files, {fetching.nbytes:,} bytes ({human(fetching.nbytes)}); at once "
        f"at most {fetching.most}, {fetching.most_bytes:,} bytes ({human(fetching.most_bytes)})"
    )
    rows = (
        ("source", f"{source.name} (experts: {', '.join(before)})"),
        ("target", f"{out} (experts: {', '.join(after)})"),
        *([("ranks", str(plan.placement))] if plan.placement else ()),
        ("layers", f"{len(plan.layers)}, of {source.most_experts} experts each"),
        ("one expert", f"{' or '.join(f'{size:,}' for size in records)} bytes"),
        ("trunk", f"{plan.trunk_bytes:,} bytes ({human(plan.trunk_bytes)}), {trunk:,} tensors"),
        (
            "experts",
            f"{plan.expert_bytes:,} bytes ({human(plan.expert_bytes)}), {experts:,} tensors",
        ),
        *([("code", f"of {source.name}: {code}. {REMEDY}")] if code else ()),
        *([("to fetch", downloads)] if fetching.count else ()),
        ("to write", f"{to_write:,} bytes ({human(to_write)})"),
        ("free disk", f"{free:,} bytes ({human(free)}){', too little' * (needed > free)}"),
    )
    return "\n".join(f"{name:<12}{value}" for name, value in rows)


def kind(quant: Quant | None) -> str:
    """Say how weights are quantized."""
    return f"{quant.bits} bits, groups of {quant.group_size}" if quant else "floats"


def human(nbytes: int) -> str:
    """Format bytes in GB or MB."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.2f} MB"


def describe_time(
    source: Source, plan: Plan, share: float, fetching: Fetched, text: str | None = None
) -> str:
    """Estimate the time for a share (0 to 1) of the experts; takes seconds to measure a few.

    `text` is that of a calibration.
    """
    kinds: dict[object, list[LayerPlan]] = {}
    for layer in plan.layers:
        kinds.setdefault(layer.projections, []).append(layer)
    inputs = None if text is None else _inputs(plan, len(text) // CHARACTERS)
    seconds = sum(
        _seconds(source, layers[0], inputs) * sum(layer.experts for layer in layers)
        for layers in kinds.values()
    )
    parts = [f"{duration(share * seconds)} to compute on this machine"] if seconds else []
    if fetching.count:
        rate = f"{DOWNLOAD_RATE / 1e6:.0f} MB/s"
        parts.append(f"{duration(fetching.nbytes / DOWNLOAD_RATE)} to fetch at {rate}")
    rest = "disk time" if text is None else "running the text through the model, and disk time"
    known = f"about {', '.join(parts)}, plus {rest}" if parts else "disk time only"
    return f"time        {known}"


def _inputs(plan: Plan, tokens: int) -> LayerInputs:
    """Return random inputs of a layer; each expert has an average share of the text's tokens."""
    args = ModelArgs.from_dict(plan.config)
    rows = min(MOST_ROWS, tokens * args.num_experts_per_tok // args.num_experts + 1)
    inputs = np.random.default_rng(0).normal(size=(rows, args.hidden_size)).astype(np.float32)
    experts = np.tile(np.arange(args.num_experts, dtype=np.int32), (rows, 1))
    return LayerInputs(inputs, experts, np.full(experts.shape, 0.1, np.float32))


def _seconds(source: Source, plan: LayerPlan, inputs: LayerInputs | None) -> float:
    """Return the seconds to compute one expert; 0 if it is copied."""
    if all(projection.copied for projection in plan.projections):
        return 0.0
    steps = ExpertSteps(source, plan, Reader(), inputs)
    batch = steps.batches(plan.numbers)[0]
    loaded = _random(source, plan)
    list(steps.encode(batch[:1], [loaded.copy()]))  # compiles kernels
    begun = time.perf_counter()
    list(steps.encode(batch, [loaded.copy() for _ in batch]))
    return (time.perf_counter() - begun) / len(batch)


def _random(source: Source, plan: LayerPlan) -> Loaded:
    """Return an expert of random weights, as `ExpertSteps.load` does."""
    if source.layout:
        fields = source.layout.layers[plan.layer].fields
        tensors = [_tensor(field.dtype, field.shape) for field in fields]
        return [(np.concatenate(tensors), "U8")]
    if source.foreign:
        raws = source.foreign.raws(plan.layer, 0)
        return [(_tensor(raw.dtype, raw.shape), raw.dtype) for raw in raws]
    dtypes = [source.matrices[plan.layer, 0, p.name].dtype for p in plan.projections]
    shapes = [(p.rows, p.columns) for p in plan.projections]
    return [(_tensor(d, s), d) for d, s in zip(dtypes, shapes, strict=True)]


def _tensor(dtype: str, shape: tuple[int, ...]) -> Bytes:
    """Return random codes, or small random floats."""
    if dtype == "U32":
        array = mx.random.randint(-(1 << 31), (1 << 31) - 1, shape).astype(mx.uint32)
    elif dtype not in FLOATS:
        return np.random.default_rng(0).integers(0, 8, shape).astype(NUMPY[dtype]).view(np.uint8)
    else:
        array = (mx.random.normal(shape) * 0.02).astype(FLOATS[dtype])
    mx.eval(array)
    return np.frombuffer(as_bytes(array), np.uint8)


def duration(seconds: float) -> str:
    """Format seconds as "90 s", "5 min" or "5 h 20 min"."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
