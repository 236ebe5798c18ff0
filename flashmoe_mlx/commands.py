"""How each command starts and ends: Ctrl-C at any moment, and one line for what its user can mend.

The package imports this first. An exception raised while a C extension is being set up, or while
the interpreter shuts down, may surface anywhere or nowhere, so Ctrl-C ends the process there.
"""

import contextlib
import errno
import functools
import os
import sys
from _signal import SIGINT, default_int_handler  # type: ignore[import-not-found]
from _signal import getsignal as get_handler  # `signal` itself takes 5 ms to import
from _signal import signal as set_handler
from collections.abc import Callable, Iterator
from types import FrameType

from .errors import FlashMoEError

_MODULES = {  # of the commands, as `python -m` takes them
    "flashmoe_mlx.bench.main": "flashmoe-bench",
    "flashmoe_mlx.convert.cli": "flashmoe-convert",
    "flashmoe_mlx.cli.doctor": "flashmoe-doctor",
    "flashmoe_mlx.cli.generate": "flashmoe-generate",
    "flashmoe_mlx.cli.plan": "flashmoe-plan",
}
FAILED, INTERRUPTED = 2, 130  # exit codes
OUT_OF_MEMORY = "[malloc", "out of memory", "insufficient memory"  # MLX's, by back-end
PERMISSION = "Change its permissions, or choose another place."
SPACE = "Free some space."
REMEDIES = {  # of what a machine refuses; other errors of the system are faults of ours
    errno.EIO: "The disk failed: copy the file from elsewhere, or choose another place.",
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: "Choose a place whose file system takes larger files.",
    errno.EACCES: PERMISSION,
    errno.EPERM: PERMISSION,
    errno.EROFS: "Choose a place that can be written.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.ENFILE: "Close other programs.",
    errno.ENODEV: "Attach the disk again.",
    errno.ENXIO: "Attach the disk again.",
    errno.ESTALE: "Mount the file system again.",
    errno.ENOMEM: "Close other programs.",
}


@functools.cache
def running() -> str | None:
    """Return the name of the command that this process runs, or None in any other program."""
    name = os.path.basename("".join(getattr(sys, "argv", [])[:1]))  # none where Python is embedded
    if name == "-m":  # python -m flashmoe_mlx.cli.generate, while it imports the package
        module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
        name = _MODULES.get("".join(module), "")
    return name if name in _MODULES.values() else None


def take_interrupts() -> None:
    """Have Ctrl-C end this process at once while a command starts; other programs keep theirs."""
    if running() and get_handler(SIGINT) is default_int_handler:
        set_handler(SIGINT, _leave)


def as_command(
    name: str, work: Callable[[], int | None], memory_advice: str = "Close other programs."
) -> int:
    """Do a command's work and return its exit code.

    That is what `work` returns; 2 after one line about bad input, or about a disk or memory that
    fails; 130 after Ctrl-C. What remains is a fault of ours and keeps its traceback.

    Args:
        name: of the command.
        work: parses the arguments, too. May raise KeyboardInterrupt with a line of its own.
        memory_advice: what to do if memory is short.
    """
    interrupts: list[int] = []
    try:
        with _interruptible(interrupts):
            return _flushed(work)
    except (Exception, KeyboardInterrupt) as error:
        reader_left = isinstance(error, BrokenPipeError) and _reader_left()  # as `head` does
        _settle_output()
        if reader_left:
            return 0
        if sentence := _sentence(error, memory_advice):
            _say(f"{name}: error: {' '.join(sentence.split())}")
            return FAILED
        if isinstance(error, KeyboardInterrupt) or interrupts:  # what it was turned into
            _say(str(error) if isinstance(error, KeyboardInterrupt) and error.args else _bye(name))
            return INTERRUPTED
        raise


def _flushed(work: Callable[[], int | None]) -> int:
    try:
        code = work() or 0
    except SystemExit:  # argparse's, for --help or bad usage
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether Python or MLX was refused memory."""
    refused = any(words in str(error).lower() for words in OUT_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and refused)


def _sentence(error: BaseException, memory_advice: str) -> str | None:
    """Say what is wrong if it is of a kind that the user can mend."""
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
    """Have Ctrl-C raise KeyboardInterrupt in the block, so that work is left in order."""

    def interrupt(number: int, _: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    if get_handler(SIGINT) is not _leave:  # another program called `main`
        yield
        return
    try:
        set_handler(SIGINT, interrupt)
        yield
    finally:
        set_handler(SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    try:
        os.write(2, f"{_bye(running() or 'flashmoe')}\n".encode())
    finally:
        os._exit(INTERRUPTED)


def _bye(name: str) -> str:
    return f"\n{name}: interrupted"


def _reader_left() -> bool:
    """Say whether it was standard output whose pipe broke, and not a connection of ours."""
    import select  # late, as nothing may delay `take_interrupts`

    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


def _settle_output() -> None:
    """Flush the output; drop what cannot be written, which would be complained about at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)
