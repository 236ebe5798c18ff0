"""Reading lines from a terminal or a pipe, and writing with or without colour."""

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

from ..custom_kernels.kept import cache_dir
from ..errors import FlashMoEError

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'
BOLD, DIM, RED = "1", "2", "31"
HISTORY, LONGEST_HISTORY = "chat_history", 1000  # file, lines
# A model's text must not move the cursor or change the terminal's state.
_CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Console:
    """A terminal with history and colour, or plain streams.

    Attributes:
        terminal: whether input and output are a terminal.
    """

    def __init__(self) -> None:
        """Look at the standard streams."""
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        dumb = os.environ.get("TERM", "dumb") == "dumb"
        self._colour = self.terminal and not dumb and not os.environ.get("NO_COLOR")
        self._lines = 0
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]

    def write(self, text: str, style: str = "") -> None:
        """Write a piece of the model's text."""
        print(self._styled(text, style), end="", flush=True)

    def line(self, text: str = "", style: str = "") -> None:
        """Write a line to standard output."""
        print(self._styled(text, style), flush=True)

    def note(self, text: str, style: str = DIM) -> None:
        """Write a line about the session: to standard error if output is not a terminal."""
        if self.terminal:
            self.line(text, style)
        else:
            print(text, file=sys.stderr, flush=True)

    def _bold(self, prompt: str) -> str:
        """Mark a prompt; readline must not count the escape sequences between \\1 and \\2."""
        return f"\1\x1b[{BOLD}m\2{prompt}\1\x1b[0m\2" if self._colour else prompt

    def _styled(self, text: str, style: str) -> str:
        text = text.translate(_CONTROL) if self.terminal else text
        return f"\x1b[{style}m{text}\x1b[0m" if style and text and self._colour else text

    def message(self) -> tuple[str, bool] | None:
        '''Read a message: a line, lines that arrive together, or lines between two of """.

        Returns (message, whether it stood between two of """), or None at the end of the input.

        Raises:
            FlashMoEError: it is not UTF-8; or the input ends before the second """.
            KeyboardInterrupt: Ctrl-C.
        '''
        if (text := self._read(PROMPT)) is None:
            return None
        while self._waiting() and (more := self._read(MORE)) is not None:
            text += f"\n{more}"
        if quoted := text.lstrip().startswith(QUOTES):
            text = self._quoted(text.lstrip().removeprefix(QUOTES))
        self._keep(text)
        return text, quoted

    def _quoted(self, text: str) -> str:
        while not text.rstrip().endswith(QUOTES):
            if (more := self._read(MORE)) is None:
                raise FlashMoEError(f"the input ends before the closing {QUOTES}. Add it.")
            text += f"\n{more}"
        return text.rstrip().removesuffix(QUOTES).strip("\n")

    def ask(self, question: str) -> bool:
        """Ask yes or no; anything but y or yes is no. A pipe answers with its next line."""
        if self.terminal:
            _discard_typed()
            reply = self._read(f"{self._bold(question)} [y/N] ")
        else:
            print(f"{question} [y/N]", file=sys.stderr, flush=True)
            reply = self._read("")
        return (reply or "").strip().lower() in ("y", "yes")

    def _read(self, prompt: str) -> str | None:
        try:
            line = input(prompt) if self.terminal else sys.stdin.readline()
        except EOFError:
            return None
        self._lines += 1
        if not self.terminal:
            if not line:
                return None
            line = line.rstrip("\r\n")
        try:
            line.encode()
        except UnicodeEncodeError:
            place = "" if self.terminal else f" {self._lines} of standard input"
            raise FlashMoEError(f"line{place} is not UTF-8. Give UTF-8 text.") from None
        return line

    def _waiting(self) -> bool:
        return self.terminal and bool(select.select([sys.stdin], [], [], 0)[0])

    def _keep(self, text: str) -> None:
        if self.terminal and text.strip():
            import readline

            readline.add_history(text)

    @contextlib.contextmanager
    def history(self) -> Iterator[None]:
        """Keep the lines typed in the block for the next session; do without if that fails."""
        if not self.terminal:
            yield
            return
        import readline  # prints to standard output on some systems when imported

        path = cache_dir() / HISTORY
        readline.set_auto_history(False)  # answers to questions are not messages
        readline.parse_and_bind("set enable-bracketed-paste on")
        with contextlib.suppress(OSError):
            if path.is_file():  # a pipe would block
                readline.read_history_file(path)
        try:
            with _keeping_typed():
                yield
        finally:
            _save_history(path)


@contextlib.contextmanager
def _keeping_typed() -> Iterator[None]:
    """Let Ctrl-C not discard what was typed: readline would wait for the lost end of a paste."""
    import termios

    try:
        before = termios.tcgetattr(sys.stdin)
        during = [*before]
        during[3] |= termios.NOFLSH
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, during)
    except (OSError, ValueError, termios.error):
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _save_history(path: Path) -> None:
    import readline

    readline.set_history_length(LONGEST_HISTORY)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() or not path.exists():
            readline.write_history_file(path)


def _discard_typed() -> None:
    """Drop what was typed before a question was seen: it is not its answer."""
    import termios

    with contextlib.suppress(OSError, termios.error):
        termios.tcflush(sys.stdin, termios.TCIFLUSH)
