"""Small stores over files whose bytes identify their expert, and reads that wait for a gate."""

import os
import threading

import numpy as np

from flashmoe_mlx.format.layout import ExpertLayout, Field, LayerLayout
from flashmoe_mlx.format.names import FIELDS
from flashmoe_mlx.store.sizing import BUFFERED, CachePlan, IoPlan
from flashmoe_mlx.store.store import ExpertStore

EXPERTS, RECORD = 10, 4 * 9


def make_store(tmp_path, slots: int, scattered: bool = False, layers: int = 2) -> ExpertStore:
    """Return a store over one file per layer; tensor f of expert e holds the number 100 e + f.

    `scattered` writes like a stock checkpoint, tensor by tensor, so that an expert has nine ranges.
    """
    tensors = []
    for layer in range(layers):
        path = tmp_path / f"{layer}.bin"
        values = np.arange(EXPERTS)[:, None] * 100 + np.arange(9) + 10000 * layer
        path.write_bytes((values.T if scattered else values).astype(np.uint32).tobytes())
        tensors.append(
            LayerLayout(
                layer,
                EXPERTS,
                tuple(
                    Field(name, "U32", (1, 1), 4, path, 4 * f * EXPERTS, 4)
                    if scattered
                    else Field(name, "U32", (1, 1), 4, path, 4 * f, RECORD)
                    for f, name in enumerate(FIELDS)
                ),
            )
        )
    layout = ExpertLayout("packed", tmp_path, tuple(tensors))
    return ExpertStore(layout, CachePlan(slots, slots * RECORD * layers, "a test"), io_threads=3)


def contents(store: ExpertStore, layer: int, slot: int) -> list[int]:
    return [bank[slot, 0, 0].item() for bank in store.banks[layer].arrays]


def record(layer: int, expert: int) -> list[int]:
    return [10000 * layer + 100 * expert + f for f in range(9)]


def big_layout(tmp_path, sizes: list[int], scattered: bool = False) -> ExpertLayout:
    """Return one layer of random experts; tensor f of each has `sizes[f]` bytes."""
    path, total, fields, offset = tmp_path / "big.bin", sum(sizes), [], 0
    path.write_bytes(np.random.default_rng(0).bytes(total * EXPERTS))
    for name, size in zip(FIELDS, sizes, strict=True):
        stride = size if scattered else total
        fields.append(Field(name, "U32", (1, size // 4), size, path, offset, stride))
        offset += size * EXPERTS if scattered else size
    return ExpertLayout("packed", tmp_path, (LayerLayout(0, EXPERTS, tuple(fields)),))


def big_store(layout: ExpertLayout, threads: int, slots: int, io: IoPlan = BUFFERED) -> ExpertStore:
    return ExpertStore(layout, CachePlan(slots, 0, "a test", io), threads)


def assert_whole(store: ExpertStore, experts: list[int], slots: list[int]) -> None:
    """Compare every byte of experts in layer 0 with the file."""
    for field, array in zip(store.layout.layers[0].fields, store.banks[0].arrays, strict=True):
        data = field.file.read_bytes()
        for expert, slot in zip(experts, slots, strict=True):
            start = field.offset + expert * field.stride
            assert np.array(array[slot]).tobytes() == data[start : start + field.nbytes]


class Gate:
    """Records reads, and delays them until the gate opens.

    The delay has a limit: a failing test would otherwise hang when it closes the store.
    """

    def __init__(self, monkeypatch) -> None:
        self.opened = threading.Event()
        self.reads: list[int] = []
        self._preadv = os.preadv
        monkeypatch.setattr("os.preadv", self.preadv)

    def preadv(self, descriptor, rows, offset):
        self.reads.append(offset)
        self.opened.wait(timeout=20)
        return self._preadv(descriptor, rows, offset)
