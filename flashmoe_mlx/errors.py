"""The one exception that bad input raises: it names the value, the place and the remedy."""


class FlashMoEError(ValueError):
    """A user-facing error: a bad argument, a damaged file, a model that cannot be streamed."""
