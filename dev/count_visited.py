"""Print the files of this package that decoding one token runs, its experts streamed.

python dev/count_visited.py

The bundled model is converted, and keeps a quarter of its experts in memory. A file counts if one
of its Python functions is called, in any thread; what numba or a GPU runs is not seen.
"""

import contextlib
import io
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx

from flashmoe_mlx import BUNDLED_MODEL, load
from flashmoe_mlx.convert import convert

ROOT = Path(__file__).parents[1]
OURS = "flashmoe_mlx", "custom_kernels", "convert"
WARM_UP = 20  # tokens


class Visits:
    """Notes the files whose functions are called while it is active."""

    def __init__(self) -> None:
        self.active, self.files = False, set[str]()
        threading.setprofile(self)  # for threads that start from now on
        sys.setprofile(self)

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Take one event of Python's profiler."""
        if self.active and event == "call":
            self.files.add(frame.f_code.co_filename)

    def ours(self) -> list[str]:
        """Return the files of this package."""
        paths = [Path(file).resolve() for file in self.files]
        names = [p.relative_to(ROOT).as_posix() for p in paths if p.is_relative_to(ROOT)]
        return sorted(name for name in names if name.split("/")[0] in OURS)


def main() -> None:
    """Convert, load, warm up, and watch one step."""
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(io.StringIO()):
            convert(BUNDLED_MODEL, Path(work) / "model")
        visits = Visits()
        model = stack.enter_context(load(Path(work) / "model", expert_cache="4MB")[0])
        cache, tokens = model.make_cache(), range(100, 100 + WARM_UP + 1)
        for token in tokens:
            visits.active = token == tokens[-1]
            mx.eval(model(mx.array([[token]]), cache=cache))
        visits.active = False
        sys.setprofile(None)
    files = visits.ours()
    print("\n".join([*files, f"{len(files)} files"]))


if __name__ == "__main__":
    main()
