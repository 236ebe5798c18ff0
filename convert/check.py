"""Check that the trunk and the tokenizer load: as planned, and as written."""

from pathlib import Path
from typing import Any

from ..format.headers import TensorInfo, checkpoint_headers
from ..format.model_files import read_config
from ..models.qwen3_5.args import ModelArgs, is_own
from ..progress import bar
from .plan.parts import Plan
from .source.checkpoint import Place, Source


def check_plan(source: Source, plan: Plan, with_tokenizer: bool) -> None:
    """Check the planned trunk and the source's tokenizer; raises FlashMoEError."""
    planned = {
        spec.name: (tensor.source[0], TensorInfo(spec.dtype, spec.shape, 0, spec.nbytes))
        for file in plan.trunk
        for tensor in file.tensors
        for spec in tensor.outputs
    }
    _check_loads(source.directory, planned, plan.config, with_tokenizer)


def check_written(out: Path) -> None:
    """Check the written trunk (its headers) and tokenizer; raises FlashMoEError."""
    _check_loads(out, checkpoint_headers(out), read_config(out), True)


def _check_loads(
    directory: Path, headers: dict[str, Place], config: dict[str, Any], with_tokenizer: bool
) -> None:
    # mlx-lm and transformers take seconds to import: say so on a terminal.
    with bar(None, what=f"checking {directory}"):
        from ..loader import check_tokenizer
        from ..models.trunk_checks import check_trunk

        vocabulary = None
        if is_own(config):
            args = ModelArgs.from_dict(config)
            vocabulary = args.vocab_size
            check_trunk(directory, headers, args)
        else:
            from .source.generic import check_generic_trunk

            check_generic_trunk(directory, config, {n: info for n, (_, info) in headers.items()})
        if with_tokenizer:
            check_tokenizer(directory, vocabulary)
