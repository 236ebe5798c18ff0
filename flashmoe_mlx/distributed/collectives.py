"""Text between ranks, by sums and gathers of arrays."""

import json
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import FlashMoEError

Group = mx.distributed.Group
LONGEST = 1 << 20  # bytes of a value
NO_SENDS = "not supported", "no CUDA implementation"  # in MLX's errors


def gather_json(group: Group, value: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks.

    Raises:
        FlashMoEError: what arrives is not JSON: MLX's ring may return undefined bytes after a
            connection was lost.
    """
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.array(mx.distributed.all_gather(mx.array([data.size]), group=group))
    try:
        if not 0 < sizes.min() <= sizes.max() <= LONGEST:
            raise ValueError(f"sizes {sizes.tolist()}")
        padded = np.zeros((1, int(sizes.max())), np.uint8)
        padded[0, : data.size] = data
        rows = np.array(mx.distributed.all_gather(mx.array(padded), group=group))
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
    except ValueError as error:
        raise FlashMoEError(
            f"rank {group.rank()} of {group.size()}: another rank ended, or lost its connection "
            f"(undefined bytes arrived: {error}). Start all ranks again."
        ) from error


def check_sends(group: Group) -> None:
    """Send a number to the next rank, as the stages of a pipeline do.

    Raises:
        FlashMoEError: the group's back-end cannot, as NCCL's.
    """
    rank, size = group.rank(), group.size()
    try:
        sent = mx.distributed.send(mx.zeros(1), (rank + 1) % size, group=group)
        if rank % 2:
            mx.eval(mx.distributed.recv((1,), mx.float32, (rank - 1) % size, group=group))
        mx.eval(sent)
        if not rank % 2:
            mx.eval(mx.distributed.recv((1,), mx.float32, (rank - 1) % size, group=group))
    except RuntimeError as error:
        if not any(refusal in str(error) for refusal in NO_SENDS):
            raise
        raise FlashMoEError(
            f"--pipeline: these ranks cannot send arrays to each other ({error}). Start them "
            "without --pipeline: each rank then holds a part of all layers' experts."
        ) from error
