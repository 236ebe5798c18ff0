"""The modes: each runs a launch differently and raises BenchError for errors it detects."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .errors import BenchError
from .launching import Conditions, run
from .recording import Launch
from .rules import check_rules
from .toolchain import CHECKED, FAST, QUICK, ZERO, compile_kernel
from .translate import to_cpp

Outputs = list[bytes]
OFTEN = 8
_launches: Counter[str] = Counter()


def _plain_build(text: str, strict: bool) -> Path:
    """Compile without checks; optimize only kernels launched often, since that takes long."""
    _launches[text] += 1
    return compile_kernel(text, FAST if _launches[text] > OFTEN else QUICK, strict)


def fast(launch: Launch, strict: bool = True) -> Outputs:
    """Run without checks; arrays end at a guard page. The first times they also start at one."""
    text = to_cpp(launch)
    library = _plain_build(text, strict)
    if _launches[text] <= OFTEN:
        run(launch, library, Conditions(at_end=False))
    return run(launch, library, Conditions(at_end=True))


def rules(launch: Launch, strict: bool = True) -> Outputs:
    """Check the text and the geometry against the rules, then run."""
    check_rules(launch)
    return _plain(launch, strict)


def types(launch: Launch, strict: bool = True) -> Outputs:
    """Compile with address spaces, and with implicit narrowing an error; then run."""
    return _plain(launch, strict)


def _plain(launch: Launch, strict: bool) -> Outputs:
    return run(launch, _plain_build(to_cpp(launch), strict), Conditions())


def checked(launch: Launch, strict: bool = True) -> Outputs:
    """Check every load and store (bounds, initialization, races) and undefined behavior."""
    return run(launch, compile_kernel(to_cpp(launch), CHECKED, strict), Conditions(checked=True))


def order(launch: Launch, strict: bool = True) -> Outputs:
    """Run in several orders and initial contents: results must be bit-identical."""
    text = to_cpp(launch)
    pattern, zero = _plain_build(text, strict), compile_kernel(text, ZERO, strict)
    base = Conditions()
    first = run(launch, pattern, base)
    others = {
        "the order of lanes (reversed)": (pattern, replace(base, order="reversed")),
        "the order of lanes (random)": (pattern, replace(base, order="random")),
        "what outputs or threadgroup memory held before": (pattern, replace(base, fill=0)),
        "an uninitialized local variable": (zero, base),
    }
    for cause, (library, how) in others.items():
        _compare(launch, first, run(launch, library, how), cause)
    return first


def _compare(launch: Launch, first: Outputs, other: Outputs, cause: str) -> None:
    for number, (a, b) in enumerate(zip(first, other, strict=True)):
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            raise BenchError(
                "order",
                f"{launch.name}: output {number} depends on {cause}, from byte {at} of {len(a)} on",
            )


MODES: dict[str, Callable[[Launch, bool], Outputs]] = {
    "rules": rules,
    "types": types,
    "fast": fast,
    "checked": checked,
    "order": order,
}
