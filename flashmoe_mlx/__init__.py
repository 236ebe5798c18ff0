"""Stream mixture-of-experts models from disk inside MLX and mlx-lm."""

from .commands import CHECKS_ITSELF, VERSION, running, take_interrupts

take_interrupts()  # first: the other imports are slow

import importlib
from typing import TYPE_CHECKING, Any

if running() not in (None, *CHECKS_ITSELF):  # these import the packages at once
    from .requirements import check_packages

    check_packages()

from .errors import FlashMoEError

if TYPE_CHECKING:
    from .loader import BUNDLED_MODEL, load
    from .models.generation import batch_generate, generate, stream_generate
    from .models.qwen3_5.args import ModelArgs
    from .models.qwen3_5.model import Model
    from .store.stats import ExpertStats

__version__ = VERSION
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

# Imported on first use: MLX, mlx-lm and transformers take seconds.
_LAZY = {
    "BUNDLED_MODEL": ".loader",
    "ExpertStats": ".store.stats",
    "ModelArgs": ".models.qwen3_5.args",
    "Model": ".models.qwen3_5.model",
    "batch_generate": ".models.generation",
    "generate": ".models.generation",
    "load": ".loader",
    "stream_generate": ".models.generation",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use.

    Raises:
        FlashMoEError: an installed package is missing or too old.
    """
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .requirements import check_mlx

    check_mlx()
    value = globals()[name] = getattr(importlib.import_module(_LAZY[name], __name__), name)
    return value


def __dir__() -> list[str]:
    """Return all names, including those not imported yet."""
    return sorted({*globals(), *__all__})
