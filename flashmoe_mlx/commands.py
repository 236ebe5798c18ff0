"""Start and end of each command: Ctrl-C at any moment, and one-line errors that users can fix.

The package imports this first. An exception during the set-up of a C extension or during shutdown
may get lost, so Ctrl-C ends the process there.
"""

import contextlib
import errno
import functools
import gc
import os
import sys
from _signal import SIGINT, default_int_handler  # type: ignore[import-not-found]
from _signal import getsignal as get_handler  # `signal` itself takes 5 ms to import
from _signal import signal as set_handler
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import TYPE_CHECKING

from .errors import FlashMoEError

if TYPE_CHECKING:  # argparse takes time to import
    from argparse import ArgumentParser

VERSION = "0.1.0"
COMMANDS = {  # by name: module, and purpose
    "flashmoe-generate": ("flashmoe_mlx.cli.generate", "answer one prompt"),
    "flashmoe-chat": ("flashmoe_mlx.cli.chat", "chat, with functions of yours as tools"),
    "flashmoe-convert": ("flashmoe_mlx.convert.cli", "convert a model, so that experts stream"),
    "flashmoe-doctor": ("flashmoe_mlx.cli.doctor", "check this machine, and a model"),
    "flashmoe-plan": ("flashmoe_mlx.cli.plan", "compute memory and speed before a download"),
    "flashmoe-bench": ("flashmoe_mlx.bench.main", "measure disk, kernels and tokens per second"),
}
CHECKS_ITSELF = "flashmoe-chat", "flashmoe-generate"  # import other packages after --help
FAILED, INTERRUPTED = 2, 130  # exit codes
OUT_OF_MEMORY = "[malloc", "out of memory", "insufficient memory"  # in MLX's errors
PERMISSION = "Change its permissions, or choose another place."
SPACE = "Free some space."
REMEDIES = {  # other OSErrors are bugs of ours
    errno.EIO: "The disk failed: copy the file from elsewhere, or choose another place.",
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: "Choose a file system that supports larger files.",
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EROFS: "Choose a writable place.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.ENFILE: "Close other programs.",
    errno.ENODEV: "Attach the disk again.",
    errno.ENXIO: "Attach the disk again.",
    errno.ESTALE: "Mount the file system again.",
    errno.ENOMEM: "Close other programs.",
}


@functools.cache
def running() -> str | None:
    """Return the command that this process runs, or None in any other program."""
    name = os.path.basename("".join(getattr(sys, "argv", [])[:1]))  # no argv in embedded Python
    if name == "-m":  # python -m, during the import of the package
        words = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        name = _of_module(words)
    return name if name in COMMANDS else None


def _of_module(words: list[str]) -> str:
    """Return the command that `python -m WORDS` runs, or an empty text."""
    if words[:1] == ["flashmoe_mlx"]:
        return f"flashmoe-{''.join(words[1:2])}"
    return next((name for name, (module, _) in COMMANDS.items() if [module] == words[:1]), "")


def add_version(parser: "ArgumentParser") -> None:
    """Add the option `--version`."""
    text = f"%(prog)s {VERSION}"
    parser.add_argument("--version", action="version", version=text, help="print the version")


def take_interrupts() -> None:
    """Let Ctrl-C end a command at once while it starts; other programs keep their handler."""
    if running() and get_handler(SIGINT) is default_int_handler:
        set_handler(SIGINT, _leave)


def as_command(
    name: str, work: Callable[[], int | None], memory_advice: str = "Close other programs."
) -> int:
    """Run a command and return its exit code.

    The code is the result of `work`; 2 after a one-line error about bad input, disk or memory; 130
    after Ctrl-C. Any other exception is a bug of ours and keeps its traceback.

    Args:
        name: of the command.
        work: parses arguments and runs. A KeyboardInterrupt may carry its own message.
        memory_advice: what to do if memory is short.
    """
    interrupts: list[int] = []
    try:
        with _interruptible(interrupts):
            return _flushed(work)
    except (Exception, KeyboardInterrupt) as error:
        reader_left = isinstance(error, BrokenPipeError) and _reader_left()  # as `head` does
        _flush_output()
        if reader_left:
            return 0
        if said := sentence(error, memory_advice):
            _say(f"{name}: error: {' '.join(said.split())}")
            return FAILED
        if isinstance(error, KeyboardInterrupt) or interrupts:  # perhaps as another error
            _say(str(error) if isinstance(error, KeyboardInterrupt) and error.args else _bye(name))
            return INTERRUPTED
        raise
    finally:
        if running():
            gc.freeze()  # or Python collects transformers' objects at exit, for most of a second


def _flushed(work: Callable[[], int | None]) -> int:
    try:
        code = work() or 0
    except SystemExit:  # argparse's, for --help or bad usage
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an allocation of Python or MLX failed."""
    refused = any(words in str(error).lower() for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and refused)


def sentence(error: BaseException, memory_advice: str) -> str | None:
    """Return the message for an error that the user can fix, else None."""
    if isinstance(error, FlashMoEError):
        return str(error)
    if is_out_of_memory(error):
        return f"memory is short ({str(error) or type(error).__name__}). {memory_advice}"
    if isinstance(error, OSError) and error.errno in REMEDIES:
        place = (
            f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        )
        return f"{place}{error.strerror}. {REMEDIES[error.errno]}"
    return None


@contextlib.contextmanager
def _interruptible(interrupts: list[int]) -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the block, so that work cleans up."""

    def interrupt(number: int, _: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if get_handler(SIGINT) is not _leave:  # called from another program
        yield
        return
    try:
        set_handler(SIGINT, interrupt)
        yield
    finally:
        set_handler(SIGINT, _leave)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Let Ctrl-C end a command at once while the block imports packages."""
    before = get_handler(SIGINT)
    if getattr(before, "__module__", None) != __name__:  # ignored, or another program's
        yield
        return
    try:
        set_handler(SIGINT, _leave)
        yield
    finally:
        set_handler(SIGINT, before)


@contextlib.contextmanager
def without_torch(foreign_code: bool) -> Iterator[None]:
    """Hide PyTorch from transformers in a process of ours: it takes seconds to import.

    Tokenizers do not need it; foreign code, such as a user's functions, may.
    """
    if foreign_code or running() is None or "torch" in sys.modules:
        yield
        return
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    modules["torch"] = None
    try:
        yield
    finally:
        del modules["torch"]


def _leave(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, f"{_bye(running() or 'flashmoe')}\n".encode())
    finally:
        os._exit(INTERRUPTED)


def _bye(name: str) -> str:
    return f"\n{name}: interrupted"


def _reader_left() -> bool:
    """Say whether the broken pipe is standard output, and not a connection of ours."""
    import select  # not at the top: it would delay `take_interrupts`

    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


def _flush_output() -> None:
    """Flush the output, or discard it if nobody reads it: Python would complain at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
