"""Whether the installed packages are as new as this one needs. Imports none of them."""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from .errors import FlashMoEError

NAME = "flashmoe-mlx"


def check_packages() -> None:
    """Compare what is installed with what this package's own metadata asks for.

    Pip does so when it installs, but not when another package is changed later.

    Raises:
        FlashMoEError: a package is missing or too old; in one of our commands it is printed
            instead, and the command exits with 2.
    """
    try:
        wanted = [Requirement(line) for line in metadata.requires(NAME) or ()]
    except metadata.PackageNotFoundError:  # a source tree that was not installed
        return
    faults = [fault for each in wanted if (fault := _fault(each))]
    if not faults:
        return
    error = FlashMoEError(f"{'; '.join(faults)}. Install them: pip install -U {NAME}")
    command = Path(sys.argv[0]).name
    if command.startswith("flashmoe-") or command == "-m":
        print(f"{NAME if command == '-m' else command}: error: {error}", file=sys.stderr)
        raise SystemExit(2)
    raise error


def _fault(wanted: Requirement) -> str | None:
    """Say what is wrong with a package, if anything is."""
    if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
        return None
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return f"{wanted.name} is not installed, but {wanted.specifier or 'any version'} is needed"
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return f"{wanted.name} {found} is installed, but {wanted.specifier} is needed"
