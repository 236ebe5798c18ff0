"""Compare every GPU kernel with float32 truth on this machine's GPU, in every format.

    python tools/gpu_parity.py [--processes 8]

All ops, float32, bfloat16 and float16, 2, 4 and 8 bits, groups of 32, 64 and 128, at sizes that are
odd where a kernel takes such. An output may be off by twice what MLX's own ops are off in the same
dtype, as in `choice.check`. Nothing is timed, so several processes compile side by side.
Exit code 1 if a kernel disagrees or does not run.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context

from flashmoe_mlx.custom_kernels import autotune, launch
from flashmoe_mlx.custom_kernels.attention.step import AttentionStepTrial
from flashmoe_mlx.custom_kernels.case import DTYPES, Trial
from flashmoe_mlx.custom_kernels.experts.cases import (
    ExpertDownTrial,
    ExpertGateUpTrial,
    ExpertsTrial,
)
from flashmoe_mlx.custom_kernels.experts.prefill import TiledTrial
from flashmoe_mlx.custom_kernels.experts.router import RouterTrial
from flashmoe_mlx.custom_kernels.experts.tiles import CombineTrial
from flashmoe_mlx.custom_kernels.gated_delta.cases import (
    GatedDeltaNormTrial,
    GatedDeltaPrepareTrial,
    GatedDeltaScanTrial,
    GatedDeltaStepTrial,
)
from flashmoe_mlx.custom_kernels.linear.cases import MatvecTrial, NormedMatvecTrial
from flashmoe_mlx.custom_kernels.linear.dequantize import DequantizeTrial, MatmulTrial
from flashmoe_mlx.custom_kernels.linear.matvec import BITS, GROUP_SIZES


def quantised() -> Iterator[Trial]:
    """Yield the trials of quantised weights. Float32 activations go with scales of any dtype."""
    pairs = [(x, s) for x, s in product(DTYPES, DTYPES) if s == x or x == "float32"]
    for (dtype, scales), bits, group in product(pairs, BITS, GROUP_SIZES):
        kind = bits, group, dtype, scales
        experts = 5, 3, *kind
        yield MatvecTrial(37, 384, *kind, tokens=3)
        yield MatvecTrial(1001, 2176, *kind)
        yield NormedMatvecTrial(37, 384, *kind, tokens=2)
        yield ExpertGateUpTrial(384, 19, *experts, shared_bits=bits, tokens=3)
        yield ExpertDownTrial(19, 384, *experts, shared_bits=bits, tokens=3)
        yield ExpertsTrial(384, 256, *experts, shared_bits=bits, tokens=2)
        yield DequantizeTrial(37, 384, bits, group, dtype, scales)
        yield TiledTrial(384, 256, *kind, down_bits=bits, slots=5, rows=11)
        if dtype != "float32":  # where NVIDIA's GPUs round products, these are left to MLX
            yield MatmulTrial(37, 384, *kind, tokens=70)


def others() -> Iterator[Trial]:
    """Yield the trials of router, sums of experts, attention and GatedDeltaNet."""
    for dtype in DTYPES:
        for experts, top_k in (16, 4), (33, 10), (100, 4), (256, 8), (512, 10):
            yield RouterTrial(experts, top_k, dtype, tokens=3)
        for weights in DTYPES:
            yield CombineTrial(384, 3, dtype, weights, tokens=5)
            yield CombineTrial(2056, 8, dtype, weights)
        yield AttentionStepTrial(6, 2, 64, 16, dtype, batch=2, keys=301, position=70_000)
        yield AttentionStepTrial(16, 2, 256, 64, dtype, keys=257)
        yield AttentionStepTrial(3, 3, 128, 24, dtype, keys=1)
        for weights in {dtype, "bfloat16"}:
            odd, real = (2, 6, 48, 37, dtype, weights), (16, 32, 128, 128, dtype, weights)
            for sizes, batch in (odd, 2), (real, 1):
                yield GatedDeltaStepTrial(*sizes, batch=batch)
                yield GatedDeltaPrepareTrial(*sizes, batch=batch, tokens=21, masked=batch > 1)
                yield GatedDeltaScanTrial(*sizes, batch=batch, tokens=21, masked=batch > 1)
                yield GatedDeltaNormTrial(*sizes, batch=batch, tokens=21)


def examine(trial: Trial) -> tuple[Trial, autotune.Verdict]:
    """Check one trial."""
    return trial, autotune.measure(trial, timed=False)


def main() -> int:
    """Check all, and print what disagrees and a count for each op."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8, help="that compile (default: 8)")
    args = parser.parse_args()
    if not launch.available():
        sys.exit("this MLX has no GPU to run kernels on.")
    print(f"{autotune.device_name()}, MLX {version('mlx')}", flush=True)
    counts: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    trials = [*quantised(), *others()]
    with get_context("spawn").Pool(args.processes) as pool:
        for trial, found in pool.imap_unordered(examine, trials):
            counts[trial.op] += 1
            if not found.ok:
                wrong[trial.op] += 1
                print(f"{trial}: {found.message}", flush=True)
    for op, count in sorted(counts.items()):
        print(f"{op:24} {count - wrong[op]} of {count}")
    print(f"{'all':24} {counts.total() - wrong.total()} of {counts.total()}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
