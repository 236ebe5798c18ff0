"""mlx-lm's `generate`, `stream_generate` and `batch_generate`, which ignore `max_kv_size`.

mlx-lm applies it only to models without a `make_cache`, and a GatedDeltaNet needs one.
"""

from collections.abc import Iterator
from typing import Any

import mlx_lm
from mlx_lm.generate import BatchResponse, GenerationResponse
from mlx_lm.models.cache import make_prompt_cache

from ..errors import FlashMoEError
from .qwen3_5.model import Model
from .streamed import StreamedModule


def generate(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> str:
    """Return the text that follows a prompt: `mlx_lm.generate` with `max_kv_size`.

    Raises:
        FlashMoEError: `max_kv_size` is out of range, or cannot be combined with another option.
    """
    return mlx_lm.generate(model, tokenizer, prompt, **_with_cache(model, options))


def stream_generate(
    model: Any, tokenizer: Any, prompt: Any, **options: Any
) -> Iterator[GenerationResponse]:
    """Yield the text that follows a prompt: `mlx_lm.stream_generate` with `max_kv_size`.

    Raises:
        FlashMoEError: `max_kv_size` is out of range, or cannot be combined with another option.
    """
    return mlx_lm.stream_generate(model, tokenizer, prompt, **_with_cache(model, options))


def batch_generate(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> BatchResponse:
    """Return the texts that follow several prompts: `mlx_lm.batch_generate`.

    Raises:
        FlashMoEError: `max_kv_size` is given.
    """
    if options.get("max_kv_size") is not None:
        raise FlashMoEError(
            f"max_kv_size = {options['max_kv_size']}: a batch in mlx-lm does not keep the first "
            "tokens. Leave it out, or call generate for each prompt."
        )
    return mlx_lm.batch_generate(model, tokenizer, prompts, **options)


def _with_cache(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Replace `max_kv_size` by a prompt cache of that size; mlx-lm does so for other models."""
    if (size := options.get("max_kv_size")) is None or not isinstance(model, StreamedModule):
        return options
    for name in ("prompt_cache", "kv_bits"):
        if options.get(name) is not None:
            raise FlashMoEError(
                f"max_kv_size = {size} cannot be combined with {name}. Leave one of them out."
            )
    return options | {"max_kv_size": None, "prompt_cache": _bounded_cache(model, size)}


def _bounded_cache(model: Any, size: int) -> list[Any]:
    if isinstance(model, Model):
        return model.make_cache(size)
    if hasattr(model, "make_cache"):  # mlx-lm would ignore the size
        raise FlashMoEError(
            f"max_kv_size = {size}: mlx-lm cannot bound the caches that this model makes. Leave "
            "it out."
        )
    cache: list[Any] = make_prompt_cache(model, max_kv_size=size)
    return cache
