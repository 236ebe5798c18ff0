"""Stream Qwen3.5 mixture-of-experts models from disk inside MLX and mlx-lm."""

from .commands import take_interrupts

take_interrupts()  # first: the other imports are slow

import importlib
from typing import TYPE_CHECKING, Any

from .requirements import check_packages

check_packages()  # before they are imported

from .errors import FlashMoEError
from .models.qwen3_5.args import ModelArgs

if TYPE_CHECKING:
    from .loader import BUNDLED_MODEL, load
    from .models.generation import batch_generate, generate, stream_generate
    from .models.qwen3_5.model import Model
    from .store.stats import ExpertStats

__version__ = "0.1.0"
__all__ = [
    "BUNDLED_MODEL",
    "ExpertStats",
    "FlashMoEError",
    "Model",
    "ModelArgs",
    "batch_generate",
    "generate",
    "load",
    "stream_generate",
]

# Imported on first use: mlx-lm imports transformers, which takes longer than a small conversion.
_LAZY = {
    "BUNDLED_MODEL": ".loader",
    "ExpertStats": ".store.stats",
    "Model": ".models.qwen3_5.model",
    "batch_generate": ".models.generation",
    "generate": ".models.generation",
    "load": ".loader",
    "stream_generate": ".models.generation",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name], __name__), name)
    return value


def __dir__() -> list[str]:
    """Return all names, including those not imported yet."""
    return sorted({*globals(), *__all__})
