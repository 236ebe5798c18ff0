"""Stream Qwen3.5 mixture-of-experts models from disk inside MLX and mlx-lm."""

from .commands import take_interrupts

take_interrupts()  # first, as the other imports take long

import importlib
from typing import TYPE_CHECKING, Any

from .requirements import check_packages

check_packages()  # before they are imported

from .errors import FlashMoEError
from .models.qwen3_5.args import ModelArgs

if TYPE_CHECKING:
    from mlx_lm import batch_generate, generate, stream_generate

    from .loader import BUNDLED_MODEL, load
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

# Where names come from that are imported when they are first asked for: mlx-lm brings transformers,
# which takes longer than a small conversion.
_LATER = {
    "BUNDLED_MODEL": ".loader",
    "ExpertStats": ".store.stats",
    "Model": ".models.qwen3_5.model",
    "batch_generate": "mlx_lm",
    "generate": "mlx_lm",
    "load": ".loader",
    "stream_generate": "mlx_lm",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_LATER[name], __name__), name)
    return value


def __dir__() -> list[str]:
    """Return all names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
