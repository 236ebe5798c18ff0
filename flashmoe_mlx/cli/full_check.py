"""`flashmoe-doctor --full`: check every kernel in every format, and a model against stock mlx-lm.

The tolerance is twice the error of MLX's own ops in the same dtype, as in `autotune.check`.
The checks time nothing, so several processes compile in parallel.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import make_prompt_cache

from ..custom_kernels.attention.step import AttentionStepCase
from ..custom_kernels.autotune import NEEDS_GPU, Verdict, measure
from ..custom_kernels.case import DTYPES, KernelCase
from ..custom_kernels.experts.cases import (
    ExpertDownCase,
    ExpertGateUpCase,
    ExpertOutputsCase,
    ExpertsCase,
    ExpertTermsCase,
)
from ..custom_kernels.experts.prefill import TiledCase
from ..custom_kernels.experts.router import RouterCase
from ..custom_kernels.experts.tiles import CombineCase
from ..custom_kernels.gated_delta.cases import (
    GatedDeltaNormCase,
    GatedDeltaPrepareCase,
    GatedDeltaScanCase,
    GatedDeltaStepCase,
)
from ..custom_kernels.linear.cases import MatvecCase, NormedMatvecCase
from ..custom_kernels.linear.dequantize import DequantizeCase, MatmulCase
from ..custom_kernels.linear.matvec import BITS, GROUP_SIZES
from ..errors import FlashMoEError
from ..loader import load
from ..models.patch import vocabulary
from ..profile import machine
from ..progress import bar
from .doctor_model import ModelReport, free_bytes
from .stock import stacked_experts, stock_model

PROCESSES = 8  # at most, to compile kernels in
LENGTHS = 1, 8, 20, 60, 300  # of the prompts in `streamed`
SINGLE = 5  # tokens decoded after each of these prompts
TOKENS = 64  # decoded after each prompt of TEXTS and QUESTIONS
TEXTS = (
    "Once upon a time there was a small village by the sea.", "def add(a, b):", "Water boils at",
    "The river rises in the mountains and", "The old man opened the door and",
    "In the morning the children went to school, and",
)  # fmt: skip
QUESTIONS = (
    "Hello! How are you?", "What is the capital of France?", "Tell me a story about a cat.",
    "Write a list of three fruits.", "How many days are in a week?",
    "What is the weather in Paris?", "Give me JSON with a name and an age.", "Who are you?",
    "Count from one to five.", "Explain why the sky is blue.",
    "Translate 'good morning' into French.", "Say goodbye.",
)  # fmt: skip
# Tokens may differ if stock's two largest logits are closer than this: in float32 the sum of two
# tolerances of 1e-4, else some steps of the dtype (the bundled model on an H100 needs 5).
TIE, TIE_STEPS = 2e-4, 8
UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}
ALLOWANCE = 400 * 10**6  # bytes of peak memory besides trunk and expert cache
LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 4

Logits = npt.NDArray[np.float32]
Outcome = tuple[bool | None, str]  # `ok` and `message` of a Finding


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `ok` is None if the check cannot run on this machine."""

    name: str
    ok: bool | None
    message: str


def full_check(report: ModelReport | None) -> list[Finding]:
    """Check every kernel, and the model if `doctor_model.examine` found it complete."""
    found = parity([*quantized(), *others()])
    if report and report.layout and not report.problems:
        checks = {"streamed logits": streamed, "greedy tokens": greedy, "peak memory": memory}
        with bar(len(checks)) as steps:
            for name, check in checks.items():
                steps.set_description(name)
                found.append(_finding(name, check, report))
                steps.update()
    return found


def _finding(name: str, check: Callable[[ModelReport], Outcome], report: ModelReport) -> Finding:
    try:
        return Finding(name, *check(report))
    except FlashMoEError as error:
        return Finding(name, False, str(error))


# ---- kernels -------------------------------------------------------------------------------------


def quantized() -> Iterator[KernelCase]:
    """Yield the cases of quantized weights; float32 activations take scales of any dtype."""
    pairs = [(x, s) for x, s in product(DTYPES, DTYPES) if s == x or x == "float32"]
    for (dtype, scales), bits, group in product(pairs, BITS, GROUP_SIZES):
        kind = bits, group, dtype, scales
        experts = 5, 3, *kind
        yield MatvecCase(37, 384, *kind, tokens=3)
        yield MatvecCase(1001, 2176, *kind)
        yield NormedMatvecCase(37, 384, *kind, tokens=2)
        yield ExpertGateUpCase(384, 19, *experts, shared_bits=bits, tokens=3)
        yield ExpertDownCase(19, 384, *experts, shared_bits=bits, tokens=3)
        yield ExpertOutputsCase(384, 384, *experts, tokens=3)
        yield ExpertsCase(384, 256, *experts, shared_bits=bits, tokens=2)
        yield ExpertTermsCase(384, 256, *experts, shared_bits=bits, tokens=2)
        yield DequantizeCase(37, 384, bits, group, dtype, scales)
        yield TiledCase(384, 256, *kind, down_bits=bits, slots=5, rows=11)
        if dtype != "float32":  # float32 is left to MLX: NVIDIA GPUs round its products
            yield MatmulCase(37, 384, *kind, tokens=70)


def others() -> Iterator[KernelCase]:
    """Yield the cases of router, expert sums, attention and GatedDeltaNet."""
    for dtype in DTYPES:
        for experts, top_k in (16, 4), (33, 10), (100, 4), (256, 8), (512, 10):
            yield RouterCase(experts, top_k, dtype, tokens=3)
        for weights in DTYPES:
            yield CombineCase(384, 3, dtype, weights, tokens=5)
            yield CombineCase(2056, 8, dtype, weights)
        yield AttentionStepCase(6, 2, 64, 16, dtype, batch=2, keys=301, position=70_000)
        yield AttentionStepCase(16, 2, 256, 64, dtype, keys=257)
        yield AttentionStepCase(3, 3, 128, 24, dtype, keys=1)
        for weights in {dtype, "bfloat16"}:
            odd, real = (2, 6, 48, 37, dtype, weights), (16, 32, 128, 128, dtype, weights)
            for sizes, batch in (odd, 2), (real, 1):
                yield GatedDeltaStepCase(*sizes, batch=batch)
                yield GatedDeltaPrepareCase(*sizes, batch=batch, tokens=21, masked=batch > 1)
                yield GatedDeltaScanCase(*sizes, batch=batch, tokens=21, masked=batch > 1)
                yield GatedDeltaNormCase(*sizes, batch=batch, tokens=21)


def judge(case: KernelCase) -> Verdict:
    """Compare one kernel with the reference."""
    return measure(case, timed=False)


def parity(cases: Sequence[KernelCase]) -> list[Finding]:
    """Compare kernel cases with the float32 reference; return one finding per op."""
    verdicts: dict[str, list[tuple[KernelCase, Verdict]]] = {}
    pool = ProcessPoolExecutor(min(PROCESSES, machine.cores()), get_context("spawn"))
    try:
        with pool, bar(len(cases), " kernels", "checking") as progress:  # minutes on a GPU
            for case, verdict in zip(cases, pool.map(judge, cases), strict=True):
                verdicts.setdefault(case.op, []).append((case, verdict))
                progress.update()
    except BrokenProcessPool:
        done = sum(map(len, verdicts.values()))
        return [Finding("kernels", False, f"a process died at or soon after {cases[done]}")]
    return [summary(op, found) for op, found in sorted(verdicts.items())]


def summary(op: str, found: list[tuple[KernelCase, Verdict]]) -> Finding:
    """Count the cases of an op that agree, and quote the first three that do not."""
    tried = [(case, verdict) for case, verdict in found if verdict.message != NEEDS_GPU]
    if not tried:
        return Finding(f"kernel {op}", None, NEEDS_GPU)
    wrong = [f"{case}: {verdict.message}" for case, verdict in tried if not verdict.ok]
    idle = f" ({len(found) - len(tried)} more need a GPU)" if len(tried) < len(found) else ""
    right = f"{len(tried) - len(wrong)} of {len(tried)} cases agree with the float32 reference"
    return Finding(f"kernel {op}", not wrong, "; ".join([right + idle, *wrong[:3]]))


# ---- a model -------------------------------------------------------------------------------------


def streamed(report: ModelReport) -> Outcome:
    """Compare logits, bit by bit, with a quarter and with all of the experts in memory.

    Each prompt runs twice before and twice after mlx-lm generates a text in its own stream.
    """
    assert report.layout
    if lacking := _lacks_memory(report, copies=1):
        return None, lacking
    with load(report.directory, expert_cache=report.layout.total_bytes)[0] as resident:
        expected = {length: logits(resident, length) for length in LENGTHS}
    model, tokenizer = load(report.directory, expert_cache=quarter(report))
    with model:
        wrong = differing_runs(model, expected)
        mlx_lm.generate(model, tokenizer, "Hello", max_tokens=16)
        wrong += differing_runs(model, expected)
    right = f"{4 * len(expected) - len(wrong)} of {4 * len(expected)} runs agree"
    return not wrong, "; ".join([right, *wrong[:3]])


def quarter(report: ModelReport) -> int:
    """Return the larger of a quarter of the experts and one token's experts, in bytes."""
    assert report.layout
    token = report.layout.token_bytes * report.top_k
    return max(report.layout.total_bytes // 4, token)


def logits(model: Any, prompt: int) -> Logits:
    """Return the last logits of a random prompt and of SINGLE more tokens: `[1 + SINGLE, V]`."""
    rng = np.random.default_rng(prompt)
    tokens = rng.integers(vocabulary(model.args) or 2, size=prompt + SINGLE).tolist()
    cache, rows = make_prompt_cache(model), []
    for part in [tokens[:prompt], *([token] for token in tokens[prompt:])]:
        rows.append(np.array(model(mx.array([part]), cache=cache)[:, -1].astype(mx.float32)))
    return np.concatenate(rows)


def differing_runs(model: Any, expected: dict[int, Logits]) -> list[str]:
    """Run each prompt twice, and describe the runs whose logits differ in any bit."""
    wrong = []
    for prompt, run in product(expected, (1, 2)):
        found = logits(model, prompt)
        rows = np.flatnonzero((found != expected[prompt]).any(axis=1)).tolist()
        if rows:
            most = np.abs(found - expected[prompt]).max()
            wrong.append(
                f"prompt of {prompt}, run {run}: rows {rows} differ, by {most:.4g} at most"
            )
    return wrong


def greedy(report: ModelReport) -> Outcome:
    """Compare greedy tokens with those of stock mlx-lm and the same weights.

    Both compute in the checkpoint's dtype on a GPU, in float32 on a CPU.
    """
    if lacking := _lacks_memory(report, copies=2):
        return None, lacking
    model, tokenizer = load(report.directory)
    stock = load_stock(report)
    with model:
        found = [differences(stock, model, prompt, TOKENS) for prompt in prompts(tokenizer)]
    gaps = [gap for differing in found for gap in differing]
    far = [gap for gap, tie in gaps if gap > tie]
    same = f"{TOKENS * len(found) - len(gaps)} of {TOKENS * len(found)} equal stock mlx-lm's"
    if far:
        return False, f"{same}; {len(far)} differ where stock's two largest logits are {far} apart"
    return True, same + ("; at the others the two largest logits nearly tie" if gaps else "")


def prompts(tokenizer: Any) -> Iterator[list[int]]:
    """Yield TEXTS and QUESTIONS as token ids."""
    yield from map(tokenizer.encode, TEXTS)
    for question in QUESTIONS:
        message = {"role": "user", "content": question}
        yield tokenizer.apply_chat_template([message], add_generation_prompt=True)


def differences(
    stock: nn.Module, ours: nn.Module, prompt: list[int], tokens: int
) -> list[tuple[float, float]]:
    """Return, for each token that differs, the gap between stock's two largest logits and a tie's.

    Both models continue with stock's token, so that one difference does not cause others.
    """
    caches, fed, gaps = list(map(make_prompt_cache, (stock, ours))), mx.array([prompt]), []
    for _ in range(tokens):
        expected, found = (
            model(fed, cache=cache)[0, -1]
            for model, cache in zip((stock, ours), caches, strict=True)
        )
        token = mx.argmax(expected)
        if token.item() != mx.argmax(found).item():
            second, best = np.array(mx.sort(expected.astype(mx.float32))[-2:]).tolist()
            tie = max(TIE, TIE_STEPS * mx.finfo(expected.dtype).eps * abs(best))
            gaps.append((best - second, tie))
        fed = token[None, None]
    return gaps


def load_stock(report: ModelReport) -> nn.Module:
    """Load stock mlx-lm's model of the directory."""
    layout = report.layout
    assert layout
    packed = layout.kind == "packed"
    sizes = len(layout.layers), layout.num_experts
    return stock_model(
        report.directory, stacked_experts(report.directory, *sizes) if packed else {}
    )


def memory(report: ModelReport, expert_cache: int | None = None) -> Outcome:
    """Check that the peak of `flashmoe-generate` is at most trunk, expert cache and ALLOWANCE.

    A GPU's peak is reported but not checked: drivers add memory to the process, and part of the
    model's memory is not the process's.
    """
    cache = expert_cache or quarter(report)
    result = run_apart(
        "-m", "flashmoe_mlx.cli.generate", "--model", str(report.directory),
        "--expert-cache", str(cache), "--prompt", LONG_PROMPT, "--max-tokens", "16",
    )  # fmt: skip
    peak = re.search(r"^Memory: ([\d.]+) ([MG]iB) at peak", result.stdout, re.M)
    if result.returncode or not peak:
        return False, f"flashmoe-generate failed: {result.stderr.strip()[-300:]}"
    limit, found = (report.trunk_bytes or 0) + cache + ALLOWANCE, float(peak[1]) * UNITS[peak[2]]
    allowed = f"trunk, expert cache and {ALLOWANCE / 1e6:.0f} MB are {limit / 1e6:.0f} MB"
    return machine.on_gpu() or found <= limit, f"{found / 1e6:.0f} MB; {allowed}"


def run_apart(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python from a shell: the peak of a direct child starts at this process's own."""
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    return subprocess.run([*shell, sys.executable, *arguments], capture_output=True, text=True)


def _lacks_memory(report: ModelReport, copies: int) -> str:
    """Return why `copies` of the whole model do not fit in memory, or an empty text."""
    assert report.layout
    needed = copies * ((report.trunk_bytes or 0) + report.layout.total_bytes)
    free = free_bytes()
    if needed <= 0.8 * free:
        return ""
    return f"needs {needed / 1e9:.1f} GB of memory, but {free / 1e9:.1f} GB are available"
