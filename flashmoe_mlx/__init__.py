"""Stream Qwen3.5 mixture-of-experts models from disk inside MLX and mlx-lm."""

from .requirements import check_packages

check_packages()  # before they are imported

from mlx_lm import batch_generate, generate, stream_generate

from .config import ModelArgs
from .errors import FlashMoEError
from .expert_store import ExpertStats
from .loader import BUNDLED_MODEL, load
from .model import Model

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
