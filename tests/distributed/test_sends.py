"""A pipeline needs ranks that can send to each other."""

import re

import mlx.core as mx
import pytest

from flashmoe_mlx.distributed.collectives import check_sends
from flashmoe_mlx.errors import FlashMoEError


class Two:
    """A group of two ranks."""

    def __init__(self, rank: int) -> None:
        self.rank = lambda: rank

    def size(self) -> int:
        return 2


@pytest.mark.parametrize(
    "refusal", ["[nccl] {} not supported in NCCL backend.", "{} has no CUDA implementation."]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_cannot_send_are_named(monkeypatch, rank, refusal):
    def send(x, to, group):
        assert to == 1 - rank
        raise RuntimeError(refusal.format("Send"))

    def recv(*_, group):
        raise RuntimeError(refusal.format("Recv"))

    monkeypatch.setattr(mx.distributed, "send", send)
    monkeypatch.setattr(mx.distributed, "recv", recv)
    cause = re.escape(refusal.removeprefix("[nccl] ").removeprefix("{} "))
    with pytest.raises(FlashMoEError, match=f"--pipeline: these ranks cannot send .*{cause}"):
        check_sends(Two(rank))


def test_a_lost_connection_is_another_error(monkeypatch):
    def send(*_, group):
        raise RuntimeError("[ring] Couldn't send: connection reset")

    monkeypatch.setattr(mx.distributed, "send", send)
    with pytest.raises(RuntimeError, match="connection reset"):
        check_sends(Two(0))
