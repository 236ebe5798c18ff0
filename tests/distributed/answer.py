"""One rank: load models, share them with the other ranks, and save their answers.

    python answer.py OUT WAY DIRECTORY...

WAY is shard, pipeline, or stock-shard or stock-pipeline for mlx-lm's own models in float32.
"""

import sys
from pathlib import Path

import mlx.core as mx
from families import TOP_K
from mlx_lm.utils import load_model
from test_families import answers, streamed, token_bytes

mx.disable_compile()  # on a CPU MLX would run a C++ compiler for each function
out, way, *directories = sys.argv[1:]
group = mx.distributed.init()
for directory in map(Path, directories):
    model = load_model(directory)[0]
    if way.startswith("stock"):
        model.set_dtype(mx.float32)
    else:
        model = streamed(directory, TOP_K * token_bytes(model))
    if way.endswith("pipeline"):
        model.model.pipeline(group)
    else:
        model.shard(group)
    found = answers(model)
    name = f"{out}/{directory.name}.{way}.{group.rank()}.safetensors"
    mx.save_safetensors(name, {key: x for key, x in found.items() if not isinstance(x, str)})
    if not way.startswith("stock"):
        stats = model.expert_stats()
        print(
            directory.name,
            stats.asked,
            stats.bytes_read,
            len(model._store.layout.layers) if model._store else 0,
        )
        model.close()
