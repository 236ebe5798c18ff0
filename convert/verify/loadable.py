"""Whether what a conversion makes can be loaded, said before it is written and once it is.

mlx-lm and transformers take seconds to import, so the checks are imported when they are needed.
"""

from pathlib import Path

from ...format.headers import TensorInfo, checkpoint_headers
from ...format.model_files import read_config
from ...models.qwen3_5.args import ModelArgs
from ..plan.parts import Plan
from ..source.checkpoint import Source


def check_plan(source: Source, plan: Plan, with_tokenizer: bool) -> None:
    """Check the trunk that is planned, and the tokenizer that is copied.

    Raises:
        FlashMoEError: the result could not be loaded.
    """
    from ...loader import check_tokenizer
    from ...models.trunk_checks import check_trunk

    args = ModelArgs.from_dict(plan.config)
    planned = {
        spec.name: (tensor.source[0], TensorInfo(spec.dtype, spec.shape, 0, spec.nbytes))
        for file in plan.trunk
        for tensor in file.tensors
        for spec in tensor.outputs
    }
    check_trunk(source.directory, planned, args)
    if with_tokenizer:
        check_tokenizer(source.directory, args.vocab_size)


def check_written(out: Path) -> None:
    """Check the trunk and the tokenizer of a directory, from headers.

    Raises:
        FlashMoEError: it cannot be loaded.
    """
    from ...loader import check_tokenizer
    from ...models.trunk_checks import check_trunk

    args = ModelArgs.from_dict(read_config(out))
    check_trunk(out, checkpoint_headers(out), args)
    check_tokenizer(out, args.vocab_size)
