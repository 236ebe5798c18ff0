"""Without clang: skip on a user's machine, fail in CI."""

import os

import pytest

from . import toolchain


def require_bench() -> None:
    """Call this at the top of a test module that uses the bench."""
    reason = toolchain.missing()
    if reason is None:
        return
    if os.environ.get("CI", "").lower() in ("true", "1") and toolchain.could_run():
        pytest.fail(f"CI must run the Metal bench: {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)
