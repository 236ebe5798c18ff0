"""One rank, or one machine alone: load models, and save what they answer.

    python own_disk.py OUT DIRECTORY...

With ranks that each have a directory of their own, DIRECTORY ends in {rank}.
"""

import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import flashmoe_mlx

mx.disable_compile()  # on a CPU MLX would run a C++ compiler for each function
out, *directories = sys.argv[1:]
group = mx.distributed.init()
for directory in (Path(name.format(rank=group.rank())) for name in directories):
    model, _ = flashmoe_mlx.load(directory, expert_cache="8MiB")
    if group.size() > 1:
        model.shard(group)
    with model:
        cache = make_prompt_cache(model)
        logits = [model(mx.arange(17)[None], cache=cache)[:, -1:]]
        for _ in range(12):
            logits.append(model(logits[-1].argmax(-1), cache=cache))
            mx.eval(logits)
        found = {"logits": mx.concatenate(logits)}
        mx.save_safetensors(f"{out}/{directory.name}.{group.rank()}.safetensors", found)
        print("asked", model.expert_stats().asked)
