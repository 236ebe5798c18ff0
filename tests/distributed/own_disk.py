"""One rank, or one machine alone: load a directory and save what the model answers.

    python own_disk.py OUT DIRECTORY

With ranks that each have a directory of their own, DIRECTORY ends in {rank}.
"""

import sys

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

import flashmoe_mlx

mx.disable_compile()  # on a CPU MLX would run a C++ compiler for each function
out, directory = sys.argv[1:]
group = mx.distributed.init()
model, _ = flashmoe_mlx.load(directory.format(rank=group.rank()), expert_cache="8MiB")
if group.size() > 1:
    model.shard(group)
with model:
    cache = make_prompt_cache(model)
    logits = [model(mx.arange(17)[None], cache=cache)[:, -1:]]
    for _ in range(12):
        logits.append(model(logits[-1].argmax(-1), cache=cache))
        mx.eval(logits)
    mx.save_safetensors(f"{out}/{group.rank()}.safetensors", {"logits": mx.concatenate(logits)})
    stats = model.expert_stats()
    print("asked", stats.asked, "read", stats.bytes_read)
