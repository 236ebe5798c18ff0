"""Rules of the kernel text beyond what Apple's compiler or the CPU checks.

The same text must run on Metal, on CUDA and here; README.md has the reasons.
"""

import re

from .errors import BenchError
from .recording import Launch

MATH = (
    "abs|fabs|exp|exp2|log|log2|log10|sqrt|rsqrt|sin|cos|tan|tanh|pow|powr|fma|min|max|fmin|fmax|"
    "clamp|floor|ceil|round|rint|trunc"
)
FORBIDDEN = {
    r"\bstatic\b(?!_)": "static variables are shared by all lanes",
    r"\bgoto\b": "goto",
    r"\bvirtual\b": "virtual functions",
    r"\b(double|atomic\w*)\b": "double and atomics are not supported",
    r"\bthreads_per_grid\b": "threads_per_grid does not exist on CUDA",
    r"\b__\w+": "compiler built-ins are not Metal",
    r"\[\s*[&=]?\s*\]\s*(\([^)]*\))?\s*(mutable\s*)?\{|\[[&=]\w*\]\s*\(": "lambdas",
    r"\bconst\s+(device|constant)\s+\w+\s*\*\s*\w+\s*=\s*\w+\s*;": (
        "write `auto p = input;`: a tiny input arrives as `constant`"
    ),
    r"(?<![\w.])(\d+\.\d*|\.\d+|\d+(?=[eE][-+]?\d))([eE][-+]?\d+)?(?![\w.]*[fFhH\w])": (
        "write 1.0f: a literal without suffix is a double on CUDA"
    ),
    rf"(?<![\w:.])({MATH})\s*\(": "write metal:: before math functions",
}


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match.group(0))


def _code(source: str) -> str:
    """Blank comments and preprocessor lines, keeping line numbers."""
    source = re.sub(r"//[^\n]*|/\*.*?\*/", _blank, source, flags=re.S)
    source = re.sub(r"^\s*#[^\n]*", _blank, source, flags=re.M)
    return re.sub(r"^template \[\[host_name.*?;$", _blank, source, flags=re.M | re.S)


def _bodies(code: str) -> list[tuple[str, int, str]]:
    """Return (name, line, body) of every function defined in the text."""
    found = []
    for match in re.finditer(r"\b(\w+)\s*\([^;{}]*\)\s*\{", code):
        if match.group(1) in ("if", "for", "while", "switch"):
            continue
        depth, end = 1, match.end()
        while depth and end < len(code):
            depth += {"{": 1, "}": -1}.get(code[end], 0)
            end += 1
        found.append(
            (match.group(1), code.count("\n", 0, match.start()) + 1, code[match.end() : end])
        )
    return found


def _findings(code: str) -> list[tuple[int, str]]:
    found = []
    for pattern, reason in FORBIDDEN.items():
        for match in re.finditer(pattern, code):
            found.append((code.count("\n", 0, match.start()) + 1, reason))
    for name, line, body in _bodies(code):
        if re.search(rf"\b{name}\s*(<[^;()]*>)?\s*\(", body):
            found.append((line, f"{name} calls itself: Metal has no recursion"))
    return sorted(found)


def check_rules(launch: Launch) -> None:
    """Raise BenchError with every line that breaks a rule, or for a ragged grid."""
    lines = launch.source.split("\n")
    broken = [
        f"line {n}: {why}: {lines[n - 1].strip()}" for n, why in _findings(_code(launch.source))
    ]
    if any(g % t for g, t in zip(launch.grid, launch.threadgroup, strict=True)):
        geometry = f"grid {launch.grid}, threadgroup {launch.threadgroup}"
        broken.append(
            f"{geometry}: make the grid a multiple of it; CUDA runs lanes beyond the grid"
        )
    if broken:
        raise BenchError("rules", f"{launch.name}:\n  " + "\n  ".join(broken))
