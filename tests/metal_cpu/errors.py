"""The bench's exception."""


class BenchError(Exception):
    """A kernel did something wrong, or the bench cannot run it; `kind` says which.

    Kinds: compile, rules, out of bounds, uninitialized, race, divergence, undefined,
    read-only, static state, limits, timeout, order (results differ between runs that must agree),
    wrong (results differ from the reference), record and bench (the bench itself).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
