"""Change saved prompt caches at random; each must be rejected or continue as in stock mlx-lm.

    python tests/stress/fuzz_caches.py --cases 5000 --minutes 10

A case is right if loading raises FlashMoEError, or if the next tokens equal those of stock mlx-lm
with the same file. A traceback, a signal or other tokens are errors. The kernels check their
bounds.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
from convert_mutations import bytes_of_header, other_size, read_raw, write_raw

from flashmoe_mlx.format.headers import ITEM_SIZE

PROMPT = [3, 141, 59, 26, 5, 35, 89, 79]
STEPS = 4
Tensors = dict[str, tuple[str, list[int], bytes]]  # name: dtype, shape, data
File = tuple[Tensors, dict[str, Any]]


def read(path: Path) -> File:
    """Read a safetensors file according to its header."""
    text, data = read_raw(path)
    header = json.loads(text)
    metadata = header.pop("__metadata__", {})
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }, metadata


def write(path: Path, file: File) -> None:
    """Write tensors contiguously, without checking their shapes."""
    header: dict[str, Any] = {"__metadata__": file[1]} if file[1] is not None else {}
    end = 0
    for name, (dtype, shape, data) in file[0].items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    write_raw(path, json.dumps(header).encode(), b"".join(data for _, _, data in file[0].values()))


def resize(shape: list[int], item: int) -> bytes:
    """Return zeros of a shape, or an empty array if the shape is too large."""
    count = int(np.prod([max(n, 0) for n in shape], dtype=np.float64))
    return bytes(count * item) if count * item < 1 << 24 else b""


def change_shape(file: File, rng: random.Random) -> None:
    name = rng.choice(list(file[0]))
    dtype, shape, data = file[0][name]
    new = list(shape)
    kind = rng.randrange(5)
    if kind == 0 and new:
        new[rng.randrange(len(new))] = rng.choice([0, 1, 2, 3, 4, 5, 7, 64, 257, 1000])
    elif kind == 1:
        rng.shuffle(new)
    elif kind == 2:
        new.insert(rng.randint(0, len(new)), rng.choice([1, 2]))
    elif kind == 3 and new:
        new.pop(rng.randrange(len(new)))
    else:
        new = [-1 if rng.random() < 0.5 else 1 << rng.randrange(70), *new[1:]]
    whole = resize(new, ITEM_SIZE[dtype])
    file[0][name] = dtype, new, whole if rng.random() < 0.8 else data


def change_dtype(file: File, rng: random.Random) -> None:
    name = rng.choice(list(file[0]))
    _, shape, data = file[0][name]
    dtype = rng.choice(list(ITEM_SIZE))
    whole = resize(shape, ITEM_SIZE[dtype])
    file[0][name] = dtype, shape, whole if rng.random() < 0.8 else data


def narrow(file: File, rng: random.Random) -> None:
    """Store a float32 array in bfloat16, as a GPU saves it."""
    names = [n for n, (dtype, *_) in file[0].items() if dtype == "F32"]
    name = rng.choice(names)
    _, shape, data = file[0][name]
    bits = np.frombuffer(data, np.uint32) >> 16
    file[0][name] = "BF16", shape, bits.astype(np.uint16).tobytes()


def swap(file: File, rng: random.Random) -> None:
    a, b = rng.choices(list(file[0]), k=2)
    file[0][a], file[0][b] = file[0][b], file[0][a]


def drop(file: File, rng: random.Random) -> None:
    del file[0][rng.choice(list(file[0]))]


def rename(file: File, rng: random.Random) -> None:
    name = rng.choice(list(file[0]))
    new = rng.choice(["0.0.0", "7.0", "99999999999.1", "3", "", "a.b", "0.0.0.0.0", "3.7", "-1.0"])
    file[0][new] = file[0].pop(name)


def set_integer(file: File, rng: random.Random) -> None:
    names = [n for n, (dtype, shape, _) in file[0].items() if dtype == "I32" and not shape]
    if names:
        value = rng.choice([0, 1, -1, 7, 255, 256, 257, 2**31 - 1, -(2**31)])
        file[0][rng.choice(names)] = "I32", [], value.to_bytes(4, "little", signed=True)


def change_metadata(file: File, rng: random.Random) -> None:
    values = [
        "KVCache", "ArraysCache", "QuantizedKVCache", "RotatingKVCache", "ChunkedKVCache",
        "CacheList", "load_prompt_cache", "", "none", "scalar", "string", "0.1", "3.2", "3.0", 5,
        None, [], "{", '{"trust_remote_code": true}', '{"eos_token": []}', '{"eos_token": "x"}',
        "[]", "a/b", "/", "../..", "\x00", "9" * 5000,
    ]  # fmt: skip
    keys = [*file[1], "1.9", "1.99999999", "2.99999", "0", "1", "2", "3", "0.x", "0.model.x"]
    file[1][rng.choice(keys)] = rng.choice(values)


def drop_metadata(file: File, rng: random.Random) -> None:
    file[1].pop(rng.choice(list(file[1])))


CHANGES: list[Callable[[File, random.Random], None]] = [
    change_shape, change_shape, change_dtype, narrow, swap, drop, rename, set_integer,
    change_metadata, change_metadata, drop_metadata,
]  # fmt: skip


class Cases(harness.Cases):
    """Saved caches of the bundled model, with random changes."""

    def __init__(self, folder: Path) -> None:
        import mlx.core as mx
        import mlx_lm
        from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

        from flashmoe_mlx import BUNDLED_MODEL, load

        self.case, self.mx = folder / "case" / "case.safetensors", mx
        self.case.parent.mkdir()
        self.ours, _ = load(BUNDLED_MODEL)
        self.stock, _ = mlx_lm.load(
            str(BUNDLED_MODEL), tokenizer_config={"trust_remote_code": True}
        )
        self.stock.set_dtype(mx.float32)
        metadata = {"model": str(BUNDLED_MODEL), "tokenizer_config": "{}"}
        self.files = []
        for name, bits in (("plain", None), ("quantized", 8)):
            cache = make_prompt_cache(self.ours)
            self.ours(mx.array([PROMPT]), cache=cache)
            if bits:
                cache = [c.to_quantized(64, bits) if hasattr(c, "keys") else c for c in cache]
            path = folder / f"{name}.safetensors"
            save_prompt_cache(str(path), cache, metadata)
            self.files.append(read(path))

    def run(self, seed: int) -> str:
        """Run a case and return "refused" or "equal"; raise otherwise."""
        from mlx_lm.models.cache import load_prompt_cache

        from flashmoe_mlx import FlashMoEError
        from flashmoe_mlx.models.prompt_cache import check_fits, read_prompt_cache

        path, made = self.case, self.make(seed)
        try:
            cache, _ = read_prompt_cache(str(path))
            check_fits(str(path), cache, self.ours)
            ours = self.tokens(self.ours, cache)
        except FlashMoEError:
            return "refused"
        stock = self.tokens(self.stock, load_prompt_cache(str(path)))
        if ours != stock:
            raise AssertionError(f"tokens {ours}, stock's {stock}, after {made}")
        return "equal"

    def make(self, seed: int) -> list[str]:
        """Write case number `seed`, and return the names of its changes."""
        rng = random.Random(seed)
        tensors, metadata = rng.choice(self.files)
        file = dict(tensors), dict(metadata)
        changes = rng.choices(CHANGES, k=rng.choice([1, 1, 1, 2, 3]))
        for change in changes:
            if file[0] and file[1]:
                change(file, rng)
        write(self.case, file)
        if rng.random() < 0.1:
            changes.append(rng.choice((bytes_of_header, other_size)))
            changes[-1](self.case.parent, rng)
        return [change.__name__ for change in changes]

    def tokens(self, model: Any, cache: list[Any]) -> list[int]:
        """Return the next greedy tokens."""
        mx, token, tokens = self.mx, PROMPT[-1], []
        for _ in range(STEPS):
            token = mx.argmax(model(mx.array([[token]]), cache=cache)[0, -1]).item()
            tokens.append(token)
        return tokens


if __name__ == "__main__":
    harness.main(__doc__, Cases)
