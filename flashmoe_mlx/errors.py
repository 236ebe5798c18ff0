"""The one exception that bad input raises: it names the value, the place and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How what MLX says about files begins.
FROM_MLX = "[load", "[read", "[safetensor", "[json.exception"
LONGEST, END = 1200, 300  # characters of a message; of its end, where the remedy is


class FlashMoEError(ValueError):
    """A user-facing error: a bad argument, a damaged file, a model that cannot be streamed."""

    def __init__(self, message: str) -> None:
        """Take a message, and leave out the middle of one that a damaged file made too long."""
        if (excess := len(message) - LONGEST) > 0:
            message = f"{message[: LONGEST - END]} [{excess} characters left out] {message[-END:]}"
        super().__init__(message)


# What other libraries raise about files that do not fit; a RuntimeError may be a fault of ours.
ABOUT_FILES = ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError


@contextmanager
def named(
    place: str | Path,
    fault: str,
    remedy: str,
    kinds: tuple[type[Exception], ...] = ABOUT_FILES,
) -> Iterator[None]:
    """Give what other libraries raise about some files a place and a remedy.

    Args:
        place: where the files are.
        fault: what is wrong with them.
        remedy: what to do, without a full stop.
        kinds: what is raised about them. MLX's and Rust's errors about files are always caught.

    Raises:
        FlashMoEError: in place of such an error.
    """
    try:
        yield
    except (FlashMoEError, MemoryError):
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # Rust's, which is no Exception
        unread = isinstance(error, RuntimeError) and str(error).startswith(FROM_MLX)
        if not (isinstance(error, kinds) or panic or unread):
            raise
        what = "a file cannot be read" if unread else fault
        reason = " ".join(str(error).split()[:40])
        raise FlashMoEError(
            f"{place}: {what} ({type(error).__name__}: {reason}). {remedy}."
        ) from error
