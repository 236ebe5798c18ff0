"""Two NVIDIA GPUs of one host, through NCCL, beside one GPU: equality, speed, sums and faults.

    python tests/stress/two_gpus.py [--layers 40] [--folder DIR] [--steps one,...] [--runs 5]

35B geometry, random weights, bfloat16, all experts resident. `exact` must give one GPU's 64 tokens
and logits to the bit. `tensor` rounds otherwise: `float32`, stock on one GPU, shows how far from it
`tensor` is and how far one GPU. Faults of the second rank must end both within the watchdog's time.
Each line is printed as it comes.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from flashmoe_mlx import load
from flashmoe_mlx.bench.synthetic import Recipe, checkpoint
from flashmoe_mlx.cli.stock import stacked_experts, stock_model
from flashmoe_mlx.store.store import ExpertStore

VOCABULARY, PROMPT, LONG, TOKENS = 248320, 200, 2048, 64
TIMEOUT, LIMIT = 10, 500  # seconds: of the watchdog in trials of faults; of a step
LAUNCH = "import sys; from mlx._distributed_utils.launch import main; sys.exit(main())"
KEPT, FAULTS = ("one", "float32"), ("eio", "SIGKILL", "SIGSTOP")
ALONE = *KEPT, "stock-one"
STEPS = *KEPT, "sums", "exact", "auto", "tensor", "stock", "pipeline", *FAULTS
SHARDING = {"auto", "tensor"}  # else exact


def prompt(length: int) -> mx.array:
    """Return token ids `[1, length]`."""
    ids = np.random.default_rng(length).integers(VOCABULARY, size=length)
    return mx.array(ids.astype(np.int32))[None]


def say(step: str, *words: Any) -> None:
    rank = os.environ.get("MLX_RANK", "0")
    print(f"{time.strftime('%H:%M:%S')} {step}, rank {rank}:", *words, flush=True)


def opened(step: str, path: Path) -> Any:
    """Return the model that a step measures, shared with the other rank."""
    if step == "float32" or step.startswith("stock"):
        sizes = json.loads((path / "config.json").read_text())["text_config"]
        experts = sizes["num_hidden_layers"], sizes["num_experts"]
        model = stock_model(path, stacked_experts(path, *experts))
        if step == "float32":
            model.set_dtype(mx.float32)
    else:
        model, _ = load(path)
    if step == "pipeline":
        model.model.pipeline(mx.distributed.init())
    elif step not in ALONE:
        model.shard(mx.distributed.init())
    return model


def answer(model: Any, right: Any) -> dict[str, np.ndarray]:
    """Return greedy tokens `[TOKENS]` and their logits `[TOKENS, V]`, each after `right`'s."""
    cache, tokens, rows = make_prompt_cache(model), [], []
    logits = model(prompt(PROMPT), cache=cache)[:, -1]
    for place in range(TOKENS):
        tokens.append(mx.argmax(logits, axis=-1).item())
        rows.append(np.array(logits.astype(mx.float32)))
        last = int(right["tokens"][place]) if right else tokens[-1]
        logits = model(mx.array([[last]]), cache=cache)[:, -1]
    return {"tokens": np.array(tokens), "logits": np.concatenate(rows)}


def together() -> None:
    """Let all ranks begin together."""
    if mx.distributed.init().size() > 1:
        mx.eval(mx.distributed.all_sum(mx.zeros(4)))


def decode(model: Any, count: int) -> float:
    """Return tokens per second, after eight."""
    together()
    steps = generate_step(prompt(PROMPT)[0], model, max_tokens=count + 8)
    for _ in range(8):
        next(steps)
    start = time.perf_counter()
    return len(list(steps)) / (time.perf_counter() - start)


def prefill(model: Any) -> float:
    """Return tokens per second of a long prompt."""
    cache = make_prompt_cache(model)
    together()
    start = time.perf_counter()
    model(prompt(LONG), cache=cache)
    mx.eval([c.state for c in cache])
    return LONG / (time.perf_counter() - start)


def compare(step: str, model: Any, folder: Path) -> None:
    """Compare a step's answer with those kept, and keep one GPU's."""
    files = {name: folder / f"{name}.npz" for name in KEPT}
    found = answer(model, None if step == "one" else np.load(files["one"]))
    if step in KEPT:
        np.savez(files[step], **found)
    for name, right in ((name, np.load(file)) for name, file in files.items() if file.exists()):
        same = int((found["tokens"] == right["tokens"]).sum())
        bits = bool((found["logits"] == right["logits"]).all())
        off = np.linalg.norm(found["logits"] - right["logits"], axis=-1)
        off /= np.linalg.norm(right["logits"], axis=-1)
        errors = f"relative errors: first {off[0]:.4f}, median {np.median(off):.4f}"
        equal = "logits equal" if bits else errors
        say(step, f"beside {name}: {same} of {TOKENS} tokens equal, {equal}")


def measure(step: str, path: Path, folder: Path, runs: int) -> None:
    """Compare a step's answer with one GPU's, and time it."""
    model = opened(step, path)
    compare(step, model, folder)
    if hasattr(model, "expert_stats"):
        stats, counts = model.expert_stats(), model.expert_counts()
        say(step, f"{counts[0]} experts in memory, {model.expert_cache()}, asked {stats.asked}")
    for name, run in (("decode", lambda: decode(model, 32)), ("prefill", lambda: prefill(model))):
        rates = [run() for _ in range(runs + 1)][1:] if runs else []  # the first compiles
        if rates:
            median, each = statistics.median(rates), (f"{rate:.1f}" for rate in rates)
            say(step, f"{name} {median:.1f} tok/s of", *each)
    together()


def fail(step: str, path: Path) -> None:
    """Decode, and let the second rank fail after a while."""
    model = opened(step, path)
    cache, token = make_prompt_cache(model), prompt(1)
    for place in range(100):
        if place == 20 and mx.distributed.init().rank() == 1:
            say(step, "fails")
            if step == "eio":
                ExpertStore.fetch = _broken
            else:
                ended = ["sh", "-c", f"sleep {3 * TIMEOUT}; kill -KILL {os.getpid()}"]
                subprocess.Popen(ended)  # mlx.launch waits for a stopped rank
                os.kill(os.getpid(), getattr(signal, step))
        token = mx.argmax(model(token, cache=cache)[:, -1], axis=-1)[None]
        mx.eval(token)
    say(step, "was not noticed")


def _broken(*_: Any) -> None:
    raise OSError(5, "Input/output error")


def start(step: str, path: Path, folder: Path, runs: int) -> None:
    """Run a step in one process or two, and print how it ended."""
    own = [str(Path(__file__)), "--runs", str(runs), "--rank", step, str(path), str(folder)]
    command, env = [sys.executable, *own], dict(os.environ)
    if step in ALONE:
        env["CUDA_VISIBLE_DEVICES"] = "0"
    else:
        sharding = step if step in SHARDING else "exact"
        passed = [f"--env={n}={v}" for n, v in env.items() if n.startswith(("NCCL", "MLX", "XDG"))]
        passed += [f"--env={n}={env[n]}" for n in ("PYTHONPATH", "LD_LIBRARY_PATH") if n in env]
        passed += [f"--env=FLASHMOE_SHARDING={sharding}"]
        passed += [f"--env=FLASHMOE_COLLECTIVE_TIMEOUT={TIMEOUT}"] if step in FAULTS else []
        passed += ["--env=FLASHMOE_EXPERT_CACHE=4GiB"] if step == "eio" else []  # else none is read
        launcher = [sys.executable, "-c", LAUNCH, "-n", "2", "--backend", "nccl", *passed]
        doctor = ["-m", "flashmoe_mlx", "doctor", "--distributed"]
        command = [*launcher, sys.executable, *(doctor if step == "sums" else own)]
    began = time.monotonic()
    try:
        code: Any = subprocess.run(command, env=env, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        code = "hung"
    subprocess.run(["pkill", "-9", "-f", "two_gpus.py .*--rank"], check=False)
    say(step, f"ended after {time.monotonic() - began:.0f} s: {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/two_gpus"))
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--runs", type=int, default=5, help="of each speed; 0: none")
    parser.add_argument(
        "--rank", nargs=3, metavar=("STEP", "MODEL", "FOLDER"), help="a rank's part"
    )
    args = parser.parse_args()
    if args.rank:
        step, path, folder = args.rank[0], Path(args.rank[1]), Path(args.rank[2])
        fail(step, path) if step in FAULTS else measure(step, path, folder, args.runs)
        return
    path = checkpoint(Recipe("35b", args.layers, VOCABULARY, 4), args.folder)
    for step in args.steps.split(","):
        start(step, path, args.folder, args.runs)


if __name__ == "__main__":
    main()
