"""Train the bundled model for a fixed wall-clock time.

    python train.py --data FOLDER --out FOLDER --state FILE --seconds 540 --span 0 0.5
    python train.py --data FOLDER --out FOLDER --state FILE --seconds 540 --span 0.5 1   # resumes

--span is the part of the learning-rate schedule that this call covers, so that one schedule can
be spread over several calls. Three eighths of every batch are English text (loss on every
token), the rest is dialogues (loss on the answers alone). Writes bfloat16 safetensors under Hugging
Face names, in shards, with config.json; log lines go to standard output.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import Config
from moe import LanguageModel
from optimizer import Optimizer
from safetensors.torch import load_file, save_file
from torch import Tensor

ANSWER, TOKEN = 0x8000, 0x7FFF
BALANCE = 0.03


def texts(size: int) -> int:
    """How many of `size` rows are text; the others are dialogues."""
    return size * 3 // 8


class Data:
    """All tokens on the device; batches are gathered there."""

    def __init__(self, path: Path, device: torch.device, length: int) -> None:
        arrays = np.load(path)
        self.length = length
        self.text, self.text_heldout = (
            torch.from_numpy(arrays[k].astype(np.int32)).to(device)
            for k in ("text", "text_heldout")
        )
        self.rows, self.rows_heldout = (
            torch.from_numpy(arrays[k].astype(np.int32)).to(device)
            for k in ("rows", "rows_heldout")
        )
        self.window = torch.arange(length + 1, device=device)
        self.order, self.next = torch.empty(0, dtype=torch.long), 0

    def batch(self, size: int) -> Tensor:
        """[size, length + 1]: text rows, every token marked as a target, then dialogue rows."""
        count = texts(size)
        starts = torch.randint(
            len(self.text) - self.length - 1, (count, 1), device=self.text.device
        )
        if self.next + size - count > len(self.order):
            self.order, self.next = torch.randperm(len(self.rows), device=self.rows.device), 0
        chosen = self.order[self.next : self.next + size - count]
        self.next += size - count
        text = self.text[starts + self.window] | ANSWER
        return torch.cat([text, self.rows[chosen, : self.length + 1]])


def losses(model: LanguageModel, batch: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean loss on the targets of the text rows, and of the dialogue rows."""
    tokens, targets = batch[:, :-1] & TOKEN, batch[:, 1:]
    logits = model(tokens.contiguous(), dtype).flatten(0, 1)
    each = F.cross_entropy(logits.float(), (targets & TOKEN).flatten().long(), reduction="none")
    wanted = (targets & ANSWER > 0).float()
    half = texts(len(batch))
    each = each.view_as(wanted) * wanted
    return (
        each[:half].sum() / wanted[:half].sum(),
        each[half:].sum() / wanted[half:].sum().clamp(min=1),
    )


@torch.no_grad()
def held_out(model: LanguageModel, data: Data, dtype: torch.dtype) -> str:
    """Held-out losses, and the share of dialogue tokens that are the model's first choice."""
    size = min(32, len(data.rows_heldout))
    rows = data.rows_heldout[:size, : data.length + 1]
    count = min(size, (len(data.text_heldout) - 1) // data.length)
    starts = torch.arange(count, device=rows.device)[:, None] * data.length
    text = data.text_heldout[(starts + data.window).clamp(max=len(data.text_heldout) - 1)] | ANSWER
    text_loss = losses(model, torch.cat([text, text]), dtype)[0]
    used = [int((layer.mlp.counts > 0).sum()) for layer in model.layers]
    most = [float(layer.mlp.counts.max() / layer.mlp.counts.mean()) for layer in model.layers]
    answer_loss = losses(model, torch.cat([rows, rows]), dtype)[1]
    return (
        f"held-out text {text_loss:.4f} answers {answer_loss:.4f} experts used {used} "
        f"busiest/mean {[round(m, 2) for m in most]}"
    )


def stepper(
    model: LanguageModel, optimizer: Optimizer, static: Tensor, dtype: torch.dtype, graph: bool
) -> Callable[[], list[Tensor]]:
    """One training step on `static`; recorded as a CUDA graph if asked."""

    def step() -> list[Tensor]:
        for p in model.parameters():
            p.grad = None
        text, answers = losses(model, static, dtype)
        balance = model.balance()
        (text + answers + BALANCE * balance).backward()
        optimizer.step()
        return [text.detach(), answers.detach(), balance.detach()]

    if not graph:
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # the learning rate is still zero: nothing moves but the moments
            step()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    for p in model.parameters():
        p.grad = None
    with torch.cuda.graph(recorded):
        results = step()

    def replay() -> list[Tensor]:
        recorded.replay()
        return results

    return replay


def rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 1.5 %, then linear decay to zero."""
    return peak * min(progress / 0.015, (1.0 - progress) / 0.985)


def export(model: LanguageModel, out: Path, shards: int) -> None:
    """bfloat16 shards under Hugging Face names, and config.json."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        f"model.{k}": v.detach().to(torch.bfloat16).cpu().contiguous()
        for k, v in model.state_dict().items()
    }
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for name, value in sorted(state.items(), key=lambda item: -item[1].numel()):
        min(parts, key=lambda part: sum(v.numel() for v in part.values()))[name] = value
    for i, part in enumerate(parts, 1):
        save_file(part, out / f"trained-{i}-of-{shards}.safetensors")
    (out / "config.json").write_text(json.dumps(model.c.to_hf(), indent=2) + "\n")


def load_shards(model: LanguageModel, folder: Path) -> None:
    """Start from weights that export() wrote."""
    state: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("trained-*.safetensors")):
        state.update(load_file(shard))
    model.load_state_dict({k.removeprefix("model."): v.float() for k, v in state.items()})


def run(args: argparse.Namespace) -> None:
    """Train until the time is over."""
    begin = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed + int(1000 * args.span[0]))
    data = Data(args.data / "data.npz", device, args.length)
    config = Config(**json.loads(args.config))
    end_of_text = int(data.text_heldout[-1])
    model = LanguageModel(config, end_of_text).to(device)
    if args.init:
        load_shards(model, args.init)
    optimizer = Optimizer(model, device)
    step = 0
    static = data.batch(args.rows)
    forward = stepper(model, optimizer, static, dtype, args.graph)
    if args.state.exists() and args.span[0] > 0:
        saved = torch.load(args.state, map_location=device)
        with torch.no_grad():
            for p, q in zip(model.parameters(), saved["model"], strict=True):
                p.copy_(q)
        optimizer.load(saved["optimizer"])
        step = saved["step"]
    elif args.span[0] > 0:
        raise FileNotFoundError(
            f"{args.state}: --span {args.span[0]} resumes, but no state is "
            "there; start with --span 0"
        )
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{time.monotonic() - begin:.1f} s to start",
        flush=True,
    )
    start, shown, first = time.monotonic(), time.monotonic(), step
    while (elapsed := time.monotonic() - start) < args.seconds:
        part = elapsed / args.seconds
        progress = args.span[0] + part * (args.span[1] - args.span[0])
        optimizer.lr.fill_(rate(progress, args.peak))
        static.copy_(data.batch(args.rows))
        text, answers, balance = forward()
        step += 1
        if step % 50 == 0:
            torch.cuda.synchronize() if device.type == "cuda" else None
        if time.monotonic() - shown > args.report:
            shown = time.monotonic()
            speed = (step - first) * args.rows * args.length / (shown - start)
            print(
                f"{progress:6.3f} step {step} text {text:.3f} answers {answers:.4f} balance "
                f"{balance:.3f} {speed:,.0f} tokens/s",
                held_out(model, data, dtype),
                flush=True,
            )
            if not torch.isfinite(text + answers):
                raise FloatingPointError(f"loss is {text}, {answers} at step {step}: lower --peak")
    torch.save(
        {"model": list(model.parameters()), "optimizer": optimizer.state(), "step": step},
        args.state,
    )
    export(model, args.out, args.shards)
    print(
        f"step {step}, {step * args.rows * args.length / 1e6:.0f} M tokens,",
        held_out(model, data, dtype),
        flush=True,
    )


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="resumable state")
    parser.add_argument("--init", type=Path, help="folder of exported shards to start from")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--span", type=float, nargs=2, default=(0.0, 1.0))
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024, help="a multiple of 64")
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--report", type=float, default=20)
    parser.add_argument("--graph", action="store_true", help="record a CUDA graph")
    parser.add_argument("--config", default="{}", help="JSON with changes to model.Config")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
