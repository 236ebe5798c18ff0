"""Record which experts a model's routers choose, and what the next layer's router would have said.

    python dev/routing/record_routing.py OUT [--model DIR] [--tokens 400] [--sample]

Writes one trace per text for `replay_routing.py`. The texts are English, code, JSON and tool calls
from this repository. Their first tokens are the prompt; the others are fed one by one, as if the
model had written them, or with --sample the model does write them, at temperature 1.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from replay_routing import Trace

from flashmoe_mlx.loader import BUNDLED_MODEL, load
from flashmoe_mlx.models.qwen3_5.args import PREFILL_CHUNK
from flashmoe_mlx.models.qwen3_5.model import Model
from flashmoe_mlx.models.qwen3_5.moe import SparseMoeBlock, StreamedExperts

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "tools" / "bundled_model"
CODE = ("format/layout.py", "settings.py", "loader.py")
EACH = 3  # texts of each kind
DIALOGUES = 12  # in one text


class Recorder:
    """What routers choose while it is active, call by call."""

    def __init__(self, model: Model) -> None:
        self._layers = model.layers
        self._number = {id(layer.mlp): number for number, layer in enumerate(model.layers)}
        self._k = model.layers[0].mlp.top_k
        self._ids: dict[int, np.ndarray] = {}
        self._before: dict[int, mx.array] = {}
        self._after: dict[int, mx.array] = {}
        self._calls: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Watch the blocks and their experts."""
        block, waves, slots = (
            SparseMoeBlock.__call__, StreamedExperts.waves, StreamedExperts.slots
        )  # fmt: skip

        def watched_block(this: SparseMoeBlock, h: mx.array, *others: Any) -> mx.array:
            number = self._number[id(this)]
            y = block(this, h, *others)
            if number + 1 < len(self._layers):
                self._before[number] = self._guess(number + 1, h)
                self._after[number] = self._guess(number + 1, y)
            return y

        def watched_waves(this: StreamedExperts, ids: np.ndarray) -> Any:
            self._ids[this._layer] = np.array(ids).reshape(-1, self._k)
            return waves(this, ids)

        def watched_slots(this: StreamedExperts, ids: mx.array) -> mx.array | None:
            self._ids[this._layer] = np.array(ids).reshape(-1, self._k)
            return slots(this, ids)

        with (
            patch.object(SparseMoeBlock, "__call__", watched_block),
            patch.object(StreamedExperts, "waves", watched_waves),
            patch.object(StreamedExperts, "slots", watched_slots),
        ):
            yield

    def _guess(self, number: int, h: mx.array) -> mx.array:
        """Return the 2 k best experts `[tokens, 2 k]` by a layer's router."""
        layer = self._layers[number]
        logits = layer.mlp.gate(layer.post_attention_layernorm(h)).astype(mx.float32)
        return mx.argsort(-logits, axis=-1)[..., : 2 * self._k].reshape(-1, 2 * self._k)

    def end_call(self) -> None:
        """Note one call of the model."""
        stacked = [
            np.stack([np.array(found[n]) for n in sorted(found)], axis=1).astype(np.int16)
            for found in (self._ids, self._before, self._after)
        ]
        self._calls.append((stacked[0], stacked[1], stacked[2]))

    def trace(self, name: str, experts: int, record_bytes: int) -> Trace:
        """Return all calls so far as one trace, and forget them."""
        lengths = np.array([len(ids) for ids, _, _ in self._calls])
        ids, before, after = (np.concatenate(x) for x in zip(*self._calls, strict=True))
        self._calls = []
        return Trace(name, experts, record_bytes, lengths, ids, before, after)


def record(
    model: Model, name: str, tokens: list[int], prompt: int, wanted: int, sample: bool = False
) -> Trace:
    """Run a prompt and then single tokens, and return what the routers chose.

    Args:
        model: with streamed experts.
        name: of the trace.
        tokens: the text.
        prompt: how many of its tokens are the prompt.
        wanted: how many single tokens follow, if the text has so many.
        sample: draw them from the model.
    """
    recorder, cache = Recorder(model), model.make_cache()
    given = tokens[:prompt]
    # As mlx-lm does it: all of the prompt but its last token in chunks, then that token.
    chunks = [given[:-1][n : n + PREFILL_CHUNK] for n in range(0, prompt - 1, PREFILL_CHUNK)]
    following = iter(tokens[prompt : prompt + wanted])
    with recorder.active():
        token = given[-1]
        for chunk in chunks:
            mx.eval(model(mx.array([chunk]), cache))
            recorder.end_call()
        for _ in range(wanted):
            logits = model(mx.array([[token]]), cache)[0, -1].astype(mx.float32)
            mx.eval(logits)
            recorder.end_call()
            if not sample and not (fed := list(islice(following, 1))):
                break
            token = int(np.array(mx.random.categorical(logits))) if sample else fed[0]
    assert model._store is not None
    layer = model._store.layout.layers[0]
    return recorder.trace(name, layer.num_experts, layer.record_bytes)


def texts(tokenizer: TokenizerWrapper) -> Iterator[tuple[str, list[int]]]:
    """Yield names and tokens of texts of four kinds."""
    english = (HELD_OUT / "heldout.txt").read_text()
    for n in range(EACH):
        start = n * len(english) // EACH
        yield f"english-{n}", tokenizer.encode(english[start : start + 6000])
    for name in CODE:
        source = (ROOT / "flashmoe_mlx" / name).read_text()
        yield f"code-{name.removesuffix('.py')}", tokenizer.encode(source[:6000])
    cases = [json.loads(line) for line in (HELD_OUT / "heldout.jsonl").read_text().splitlines()]
    for kind in ("json", "tool"):
        of_kind = [case for case in cases if case["kind"] == kind]
        for n in range(EACH):
            messages = []
            for case in of_kind[n * DIALOGUES : (n + 1) * DIALOGUES]:
                messages += [*case["messages"], answer(case)]
            tools = of_kind[n * DIALOGUES]["tools"]
            yield f"{kind}-{n}", tokenizer.apply_chat_template(messages, tools=tools)


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Return the right answer to a case as a message."""
    if case["kind"] == "json":
        return {"role": "assistant", "content": json.dumps(case["json"], indent=2)}
    calls = [{"type": "function", "function": call} for call in case["calls"]]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="A directory to make.")
    parser.add_argument("--model", default=str(BUNDLED_MODEL))
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=400, help="Decoded tokens of each text.")
    parser.add_argument("--sample", action="store_true", help="Draw them from the model.")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    model, tokenizer = load(args.model, lookahead="off")
    mx.random.seed(0)
    for number, (name, tokens) in enumerate(texts(tokenizer)):
        trace = record(model, name, tokens, args.prompt_tokens, args.tokens, args.sample)
        trace = Trace(**{**vars(trace), "name": f"{number:02}-{name}"})
        trace.save(args.out)
        print(f"{trace.name}: {len(trace.lengths)} calls, {int(trace.lengths.sum())} tokens")


if __name__ == "__main__":
    main()
