"""Check that a conversion can be loaded, before and after it is written.

mlx-lm and transformers take seconds to import, so functions import what needs them.
"""

from pathlib import Path

from ...format.headers import TensorInfo, checkpoint_headers
from ...format.model_files import read_config
from ...models.qwen3_5.args import ModelArgs
from ..plan.parts import Plan
from ..source.checkpoint import Place, Source


def check_plan(source: Source, plan: Plan, with_tokenizer: bool) -> None:
    """Check the planned trunk and the source's tokenizer; raises FlashMoEError."""
    planned = {
        spec.name: (tensor.source[0], TensorInfo(spec.dtype, spec.shape, 0, spec.nbytes))
        for file in plan.trunk
        for tensor in file.tensors
        for spec in tensor.outputs
    }
    _check(source.directory, planned, ModelArgs.from_dict(plan.config), with_tokenizer)


def check_written(out: Path) -> None:
    """Check the written trunk (its headers) and tokenizer; raises FlashMoEError."""
    _check(out, checkpoint_headers(out), ModelArgs.from_dict(read_config(out)), True)


def _check(
    directory: Path, headers: dict[str, Place], args: ModelArgs, with_tokenizer: bool
) -> None:
    from ...loader import check_tokenizer
    from ...models.trunk_checks import check_trunk

    check_trunk(directory, headers, args)
    if with_tokenizer:
        check_tokenizer(directory, args.vocab_size)
