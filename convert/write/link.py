"""`--link`: symlinks to the files that a conversion would copy, and to the weights."""

from pathlib import Path
from typing import Any

from ...errors import FlashMoEError
from ..plan.parts import Plan
from ..source.checkpoint import INDEX, Source
from ..source.hub import CARD, WEIGHTS
from .files import link_file
from .output import small_files, write_small


def check_linkable(source: Source) -> None:
    """Check that a source is a stock MLX checkpoint.

    Raises:
        FlashMoEError: it is not.
    """
    if source.layout is None or source.layout.kind != "stock":
        raise FlashMoEError(
            f"{source.directory}: --link needs an MLX checkpoint with stacked experts, and this is "
            "a directory that flashmoe-convert wrote. Use it as it is."
        )


def link_source(source: Source, plan: Plan, out: Path) -> dict[str, Any]:
    """Symlink the source's files, and return the manifest's content."""
    directory = source.directory.resolve()
    weights = (*directory.glob("*" + WEIGHTS), directory / INDEX, directory / CARD)
    for path in sorted(weights):
        if path.is_file():
            link_file(path, out / path.name)
    for name, content in small_files(source, plan).items():
        if isinstance(content, Path):
            link_file(directory / name, out / name)
        elif name != INDEX:
            write_small(out / name, content)
    return {"link": str(directory)}
