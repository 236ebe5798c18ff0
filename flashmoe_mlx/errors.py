"""The one exception that bad input raises: it names the value, the place and the remedy."""

LONGEST, END = 1200, 300  # characters of a message; of its end, where the remedy is


class FlashMoEError(ValueError):
    """A user-facing error: a bad argument, a damaged file, a model that cannot be streamed."""

    def __init__(self, message: str) -> None:
        """Take a message, and leave out the middle of one that a damaged file made too long."""
        if (excess := len(message) - LONGEST) > 0:
            message = f"{message[: LONGEST - END]} [{excess} characters left out] {message[-END:]}"
        super().__init__(message)
