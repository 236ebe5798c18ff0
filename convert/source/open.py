"""Open the checkpoint to convert, of any family."""

from pathlib import Path

from ...format.modules import in_float_mode
from .checkpoint import MODEL_TYPES, Source, open_qwen, read_config


def open_source(directory: Path, name: str, revision: str | None = None) -> Source:
    """Open a checkpoint; `name` is for errors and reports.

    Raises:
        FlashMoEError: it is not a complete checkpoint of a mixture of experts that mlx-lm has.
    """
    config = read_config(directory)
    if config.get("model_type") in MODEL_TYPES and not in_float_mode(config):
        return open_qwen(directory, name, revision, config)
    from .generic import open_generic  # imports mlx-lm

    return open_generic(directory, name, revision, config)
