"""The exception for bad input: it names the value, the place and the remedy."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Prefixes of MLX's errors about files.
FROM_MLX = "[load", "[read", "[safetensor", "[json.exception"
LONGEST, END = 1200, 300  # characters of a message, and of its end, which holds the remedy


class FlashMoEError(ValueError):
    """A user-facing error: a bad argument, a damaged file, a model that cannot be streamed."""

    def __init__(self, message: str) -> None:
        """Store a message; shorten the middle of one that a damaged file makes too long."""
        if (excess := len(message) - LONGEST) > 0:
            message = f"{message[: LONGEST - END]} [{excess} characters left out] {message[-END:]}"
        super().__init__(message)


def shown(value: object) -> str:
    """Return a value for a message, abbreviated if it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


# What other libraries raise about bad files; a RuntimeError may be a bug of ours.
ABOUT_FILES = ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError


@contextmanager
def named(
    place: str | Path,
    fault: str,
    remedy: str,
    kinds: tuple[type[Exception], ...] = ABOUT_FILES,
) -> Iterator[None]:
    """Convert other libraries' errors about files to FlashMoEError.

    Args:
        place: where the files are.
        fault: what is wrong with them.
        remedy: what to do, without a full stop.
        kinds: exceptions to convert, besides MLX's and Rust's errors about files.

    Raises:
        FlashMoEError: instead of such an error.
    """
    try:
        yield
    except (FlashMoEError, MemoryError):
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # from Rust; not a subclass of Exception
        unread = isinstance(error, RuntimeError) and str(error).startswith(FROM_MLX)
        if not (isinstance(error, kinds) or panic or unread):
            raise
        what = "a file cannot be read" if unread else fault
        reason = " ".join(str(error).split()[:40])
        raise FlashMoEError(
            f"{place}: {what} ({type(error).__name__}: {reason}). {remedy}."
        ) from error
