"""Headers of safetensors files: where each tensor lies, checked before any tensor is read."""

import math
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import FlashMoEError
from .json_file import list_files, open_regular, parse, unreadable

MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
MAX_NAME = 1000
ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file; `offset` counts from the start of the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file.

    Raises:
        FlashMoEError: the file is missing or truncated, or its header does not match it.
    """
    try:
        file, size = open_regular(path, "Put the checkpoint's file there.")
    except FileNotFoundError as error:
        raise FlashMoEError(
            f"{path}: missing ({error.strerror}). Download or convert it again."
        ) from error
    with file:
        try:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise FlashMoEError(
                    f"{path}: not a whole safetensors file ({size} bytes, header of {length}). "
                    "Download or convert it again."
                )
            raw = file.read(length)
        except OSError as error:
            raise unreadable(path, error) from error
    try:
        header = parse(raw)
        _check_metadata(header.pop("__metadata__", None))
        tensors = {name: _tensor(name, entry, 8 + length) for name, entry in header.items()}
        end = _check_gapless(tensors, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlashMoEError(
            f"{path}: damaged safetensors header ({error}). Download or convert it again."
        ) from error
    if end != size:
        raise FlashMoEError(
            f"{path}: truncated or altered: {size} bytes long, but its header describes {end}. "
            "Download or convert it again."
        )
    return tensors


def _check_metadata(found: Any) -> None:
    """Refuse metadata that MLX cannot read: it must map names to strings."""
    if found is not None and not (
        isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    ):
        raise ValueError("__metadata__ is not an object of strings")


def _check_gapless(tensors: dict[str, TensorInfo], end: int) -> int:
    """Check that tensors are contiguous from byte `end`, and return the end of the last one."""
    for name, tensor in sorted(tensors.items(), key=lambda t: (t[1].offset, t[1].nbytes)):
        if tensor.offset != end:
            fault = "overlaps the tensor before it" if tensor.offset < end else "follows a gap"
            raise ValueError(
                f"tensor {name!r} at byte {tensor.offset} {fault}, which ends at {end}"
            )
        end += tensor.nbytes
    return end


def _tensor(name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME:  # Python refuses to read numbers of thousands of digits
        raise ValueError(f"tensor {name[:40]!r}... has a name of {len(name)} characters")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(n) is not int or n.bit_length() > 63 for n in (begin, end, *shape)):
        raise ValueError(
            f"tensor {name!r} has a shape or offsets that are not whole numbers below 2^63"
        )
    if entry["dtype"] not in ITEM_SIZE:
        raise ValueError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r}")
    nbytes = math.prod(shape) * ITEM_SIZE[entry["dtype"]]
    if not 0 <= begin <= end or end - begin != nbytes or min(shape, default=0) < 0:
        raise ValueError(f"tensor {name!r} of {nbytes} bytes has offsets {begin}..{end}")
    return TensorInfo(entry["dtype"], shape, data_start + begin, nbytes)


def list_weight_files(directory: Path) -> list[Path]:
    """Return every `model*.safetensors` in a directory, the files that stock mlx-lm loads.

    Raises:
        FlashMoEError: the directory cannot be listed.
    """
    return [path for path in list_files(directory) if fnmatch(path.name, "model*.safetensors")]


def weight_files(directory: Path) -> list[Path]:
    """Return every `model*.safetensors` in a directory.

    Raises:
        FlashMoEError: the directory has none.
    """
    files = list_weight_files(directory)
    if not files:
        raise FlashMoEError(
            f"{directory}: no model*.safetensors found. Give the directory of a "
            "checkpoint, or the name of one on the Hugging Face Hub."
        )
    return files


def checkpoint_headers(directory: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Read the headers of a directory's weight files: tensor name to (file, place).

    Raises:
        FlashMoEError: a file is missing or damaged, or two hold the same tensor.
    """
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for file in weight_files(directory):
        for name, info in read_header(file).items():
            if name in found:
                raise FlashMoEError(
                    f"{file}: {name} is in {found[name][0].name} too. Remove the file that does "
                    "not belong to the checkpoint."
                )
            found[name] = file, info
    return found
