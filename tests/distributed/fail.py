"""One rank: answer, or serve, until something fails.

    python fail.py MODEL WAY READS [PORT]

After READS reads this rank's disk fails; 0: never; -1: its router chooses otherwise instead. WAY is
shard or pipeline. With PORT it runs mlx-lm's server.
"""

import errno
import os
import sys

import mlx.core as mx
from mlx_lm import stream_generate

import flashmoe_mlx
from flashmoe_mlx.distributed.expert_parallel import ExpertParallel

model_path, way, reads, *port = sys.argv[1:]
group = mx.distributed.init()
print("JOINED", flush=True)
left, preadv = int(reads), os.preadv


def failing(*args):
    global left
    left -= 1
    if left == 0 or left < 0 < int(reads):
        print("\nFAULT", flush=True)
        raise OSError(errno.EIO, "Input/output error")
    return preadv(*args)


os.preadv = failing
mx.disable_compile()  # on a CPU MLX would run a C++ compiler for each function
if int(reads) < 0:
    note = ExpertParallel.note
    ExpertParallel.note = lambda self, layer, ids: note(self, layer, ids + 1)
if port:
    from mlx_lm import server

    pipeline = ["--pipeline"] if way == "pipeline" else []
    sys.argv[1:] = ["--model", model_path, "--trust-remote-code", "--port", *port, *pipeline]
    sys.exit(server.main())
model, tokenizer = flashmoe_mlx.load(model_path, expert_cache="2MiB")
if way == "pipeline":
    model.model.pipeline(group)
elif group.size() > 1:
    model.shard(group)
prompt = [1 + n % 500 for n in range(40)]
print("READY", flush=True)
while True:
    for place, response in enumerate(stream_generate(model, tokenizer, prompt, max_tokens=12)):
        print(f"TOKEN {place} {response.token}", flush=True)
    print("ANSWER", flush=True)
