"""Check that installed packages are new enough, and that MLX has a back-end."""

import functools
import importlib
import sys
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from packaging.requirements import Requirement

from .errors import FlashMoEError

NAME = "flashmoe-mlx"


@functools.cache
def check_packages() -> None:
    """Compare installed versions with this package's metadata, once per process.

    pip does not repeat this check when it later changes another package.

    Raises:
        FlashMoEError: a package is missing or too old. Our commands print it and exit with 2.
    """
    try:
        wanted = [Requirement(line) for line in metadata.requires(NAME) or ()]
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return
    if faults := {each: fault for each in wanted if (fault := _fault(each))}:
        names = " ".join(f'"{each.name}{each.specifier}"' for each in faults)
        _refuse(f"{'; '.join(faults.values())}. Install them: pip install -U {names}")


def check_mlx() -> None:
    """Check the packages, and import MLX.

    Raises:
        FlashMoEError: a package is missing or too old, or MLX has no back-end. Our commands print
            it and exit with 2.
    """
    check_packages()
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:  # on Linux, MLX without a back-end extra
        _refuse(
            f"MLX cannot be imported ({error}). Install its back-end: "
            'pip install "mlx[cpu]" numba, or with an NVIDIA GPU "mlx[cuda13]" or "mlx[cuda12]"'
        )


def _fault(wanted: Requirement) -> str | None:
    if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
        return None
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return f"{wanted.name} is not installed, but {wanted.specifier or 'any version'} is needed"
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted.name} {found} is installed, but {wanted.specifier} is needed"


def _refuse(text: str) -> NoReturn:
    command = Path(sys.argv[0]).name
    if command.startswith("flashmoe-") or command == "-m":
        print(f"{NAME if command == '-m' else command}: error: {text}", file=sys.stderr)
        raise SystemExit(2)
    raise FlashMoEError(text)
