"""Read prompt cache files as untrusted data: check all metadata before use."""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import load_prompt_cache

from ..errors import FlashMoEError
from ..format.headers import read_header

CLASSES = ("ArraysCache", "KVCache", "QuantizedKVCache", "RotatingKVCache")
_ARRAY = re.compile(r"\d{1,4}(\.\d{1,2}){1,3}")  # layer, then places in the cache's state
_ENTRY = re.compile(r"0|0\.\w{1,64}|1\.\d{1,4}|2\.0|2\.\d{1,5}\.[01]")
_MODEL = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


def read_prompt_cache(path: str) -> tuple[list[Any], dict[str, Any]]:
    """Read a file that mlx_lm.cache_prompt wrote: (a cache per layer, metadata).

    The metadata has "model" and "tokenizer_config", with at most an `eos_token`: a file cannot
    request code execution.

    Raises:
        FlashMoEError: the file is not a prompt cache, or its metadata has other entries.
    """
    read_header(Path(path))  # before MLX reads the file
    try:
        loaded: Any = mx.load(path, return_metadata=True)
        _check_names(*loaded)
        caches, metadata = load_prompt_cache(path, return_metadata=True)
        if len(lengths := {c.offset for c in caches if hasattr(c, "offset")}) > 1:
            raise ValueError(f"its layers hold {', '.join(map(str, sorted(lengths)))} tokens")
        return caches, _checked(metadata)
    except FlashMoEError:
        raise
    except Exception as error:  # an untrusted file can cause any
        raise FlashMoEError(
            f"{path}: cannot be read as a prompt cache ({type(error).__name__}: {error}). "
            "Make one with mlx_lm.cache_prompt."
        ) from error


def check_fits(path: str, caches: list[Any], model: Any) -> None:
    """Compare a file's caches with the model.

    Raises:
        FlashMoEError: a cache does not fit its layer.
    """
    try:
        checks = model if hasattr(model, "check_caches") else model.model
        checks.check_caches(caches, rows=1)
    except FlashMoEError as error:
        raise FlashMoEError(f"{path}: {error}") from error


def _check_names(arrays: dict[str, mx.array], entries: dict[str, str]) -> None:
    """Refuse names that would create huge lists, and unknown cache classes."""
    for name in arrays:
        if not _ARRAY.fullmatch(name):
            raise ValueError(f"an array called {name[:40]!r}")
    for name, value in entries.items():
        if not _ENTRY.fullmatch(name):
            raise ValueError(f"an entry called {name[:40]!r}")
        if name.startswith("1.") and value not in CLASSES:
            raise ValueError(f"a cache of class {value[:40]!r}, not one of {', '.join(CLASSES)}")


def _checked(metadata: dict[str, str]) -> dict[str, Any]:
    """Return the model and the only tokenizer setting that a file may give."""
    model = metadata["model"]
    if not (_MODEL.fullmatch(model) or Path(model).is_dir()):
        raise ValueError(
            f"made with {model[:80]!r}, which is neither a local directory nor a Hub name"
        )
    settings = json.loads(metadata.get("tokenizer_config", "{}"))
    if not isinstance(settings, dict):
        raise ValueError("its tokenizer_config is not an object")
    settings.pop("trust_remote_code", None)  # mlx_lm.cache_prompt stores its flag; ours applies
    if unknown := settings.keys() - {"eos_token"}:
        raise ValueError(f"its tokenizer_config sets {', '.join(sorted(unknown))[:80]}")
    if not isinstance(settings.get("eos_token", ""), str):
        raise ValueError(f"its eos_token is {str(settings['eos_token'])[:40]!r}")
    return {"model": model, "tokenizer_config": settings}
