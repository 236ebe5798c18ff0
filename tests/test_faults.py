"""Faults at random moments: `tests/stress/faults.py` with few repetitions."""

import os
import random

import pytest
from fault_server import Row, Server, failed_alone, failed_batch
from fault_table import FAULTS
from faults import HEADER, line, scene, table_row

from flashmoe_mlx.store import files
from flashmoe_mlx.store.reader import Arrival

NAMES = [fault.name for fault in FAULTS]


@pytest.fixture(scope="module")
def stage():
    with scene(tokens=4) as stage:
        yield stage


def row(stage, name: str, times: int, seed: int = 0):
    fault = FAULTS[NAMES.index(name)]
    return table_row(stage, fault, times, random.Random(f"{seed} {name}"))


@pytest.mark.parametrize("name", NAMES)
def test_fault(stage, name):
    found = row(stage, name, times=1)
    assert found.ok, f"\n{HEADER}\n{line(found)}\n" + "\n".join(found.messages)


def test_server(stage, tmp_path):
    """A single request fails and the next one succeeds; after a failed batch, /health is 503."""
    alone, batch = Row("alone"), Row("batch")
    with Server(stage.directory, tmp_path) as server:
        clean = "".join(server.pieces(seed=1))
        assert clean == "".join(server.pieces())
        failed_alone(server, clean, alone, random.Random(0))
        failed_batch(server, clean, batch, random.Random(0))
    assert clean and alone.ok and batch.ok, f"\n{alone}\n{batch}"


def test_the_table_sees_leaks(stage, monkeypatch):
    """Files that stay open when threads cannot start are counted."""
    descriptors = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "close_files", descriptors.extend)
        found = row(stage, "load: no threads", times=1)
    assert found.named == 1 and not found.ok
    assert found.held[1][0] > found.held[0][0]
    for descriptor in descriptors:
        os.close(descriptor)


def test_the_table_sees_incomplete_reads(stage, monkeypatch):
    """The table counts wrong tokens from a reader that ignores its errors."""
    advance = Arrival.advance
    monkeypatch.setattr(Arrival, "advance", lambda self, nbytes, error: advance(self, nbytes, None))
    found = row(stage, "ENODEV from then on", times=2)
    assert found.injected == 2 and found.wrong and not found.named and not found.ok
