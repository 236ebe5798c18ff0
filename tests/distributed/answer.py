"""One rank: load models, share them with the other ranks, and save their answers.

    python answer.py OUT WAYS:DIRECTORY...

WAYS are comma-separated: alone, exact, auto, tensor or pipeline; stock-tensor and stock-pipeline
are mlx-lm's own models in float32.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from families import TOP_K, VOCABULARY
from family_answers import batch_logits, token_bytes
from family_helpers import streamed
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from flashmoe_mlx.settings import SHARDING

STEPS = {"alone": 64, "exact": 64}  # else 8: a sum takes milliseconds while other tests run
PROMPTS = 1, 17, 300


def answers(model: Any, way: str) -> dict[str, mx.array]:
    """Return the last logits of prompts, those of greedy steps after the last, and a batch's."""
    found = {}
    for length in PROMPTS:
        cache = make_prompt_cache(model)
        ids = mx.random.randint(0, VOCABULARY, (1, length), key=mx.random.key(length))
        rows = [model(ids, cache=cache)[:, -1:]]
        mx.eval(rows)  # mlx-lm's pipeline hangs if the next token is still to be gathered
        while length == PROMPTS[-1] and len(rows) < STEPS.get(way, 8):
            rows.append(model(mx.argmax(rows[-1], axis=-1), cache=cache))
            mx.eval(rows[-1])
        found[f"{length}"] = mx.concatenate(rows, axis=1)
        mx.eval(found)
    return found | {"batch": batch_logits(model)}


def load(directory: Path, way: str, group: mx.distributed.Group) -> Any:
    model = load_model(directory)[0]
    if way.startswith("stock"):
        model.set_dtype(mx.float32)
    else:
        os.environ["FLASHMOE_SHARDING"] = way if way in SHARDING else "auto"
        model = streamed(directory, expert_cache=TOP_K * token_bytes(model))
    if way.endswith("pipeline"):
        model.model.pipeline(group)
    elif way != "alone":
        model.shard(group)
    return model


def main(out: str, *jobs: str) -> None:
    mx.disable_compile()  # on a CPU MLX would run a C++ compiler for each function
    group = mx.distributed.init()
    for ways, _, path in (job.partition(":") for job in jobs):
        directory = Path(path)
        for way in ways.split(","):
            model = load(directory, way, group)
            name = f"{out}/{directory.name}.{way}.{group.rank()}"
            found = answers(model, way)
            mx.eval(
                found, mx.distributed.all_sum(mx.array(1.0))
            )  # no rank leaves before the others
            mx.save_safetensors(f"{name}.safetensors", found)
            if not way.startswith("stock"):
                stats = model.expert_stats()
                store = model._store
                memory = sum(a.nbytes for bank in store.banks for a in bank.arrays) if store else 0
                facts = {"asked": stats.asked, "read": stats.bytes_read, "memory": memory}
                Path(f"{name}.json").write_text(json.dumps(facts))
                model.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
