"""One process or rank on the GPU's path, by the Metal bench: save the logits of models.

    python gpu_answer.py OUT MODEL:CACHE...

CACHE is the expert cache in bytes. OUT gets MODEL.CACHE.RANK.safetensors, with the logits `logits`
and in `whole` how many decode steps ran in one trace.
"""

import sys
from pathlib import Path

import mlx.core as mx
from family_helpers import streamed
from metal_cpu import metal_on_cpu
from mlx_lm.models.cache import KVCache, make_prompt_cache

from flashmoe_mlx.custom_kernels import device
from flashmoe_mlx.models.qwen3_5.step import DecodeStep

PROMPT, BATCH, STEPS = [1, 200, 3, 40, 5, 6, 77], [[5, 6], [7, 8], [9, 9]], [5, 99, 3, 17, 250]


def logits_of(model) -> mx.array:
    """Return a batch's logits, then a prompt's and each step's: `[positions, V]`."""
    model(mx.array(BATCH), cache=(cache := make_prompt_cache(model)))
    batch = model(mx.array([[1], [2], [3]]), cache=cache)
    cache = make_prompt_cache(model)
    rows = [model(mx.array([PROMPT]), cache=cache)]
    rows += [model(mx.array([[token]]), cache=cache) for token in STEPS]
    return mx.concatenate([batch[:, 0], *(row[0] for row in rows)]).astype(mx.float32)


def main(out: str, *jobs: str) -> None:
    mx.disable_compile()  # on a CPU MLX would run a C++ compiler for each function
    device._gpu_is_default = lambda: True
    device._cpu_module = lambda: None
    KVCache.step = 4
    group, whole, run = mx.distributed.init(), [], DecodeStep.run

    def noted(self, h, *rest):
        y = run(self, h, *rest)
        whole.append(y is not None)
        return y

    DecodeStep.run = noted
    for job in jobs:
        path, _, cache = job.rpartition(":")
        whole.clear()
        model = streamed(Path(path), expert_cache=int(cache))
        if group.size() > 1:
            model.shard(group)
        with metal_on_cpu() as session:
            found = {"logits": logits_of(model)}
            mx.eval(found)
            assert session.launches
        found["whole"] = mx.array(sum(whole))
        mx.save_safetensors(f"{out}/{Path(path).name}.{cache}.{group.rank()}.safetensors", found)
        mx.eval(mx.distributed.all_sum(mx.array(1.0)))  # no rank leaves before the others
        model.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
