"""Record a session of flashmoe-chat in a pseudo-terminal, into docs/guides/chat.md.

Run by hand: `python tools/chat_session.py`. tests/cli/test_chat_terminal.py repeats it.
"""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/guides/chat.md"
TOOLS = "docs/examples/tools.py"
COMMAND = ["flashmoe-chat", "--tools", TOOLS]
PROMPT, QUESTION = ">>> ", "[y/N] "
# What the user types, and what the terminal shows before it.
TYPED = (
    (PROMPT, "Who are you?"),
    (PROMPT, "What is the weather in Paris?"),
    (QUESTION, "y"),
    (PROMPT, "And in London?"),
    (QUESTION, "n"),
    (PROMPT, "Tim Berg lives in Rome. Return JSON with the fields name and city."),
    (PROMPT, "/exit"),
)
ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[78])|\r|\a")
PATIENCE = 120  # seconds


class Terminal:
    """A command in a pseudo-terminal, which a script reads and types into."""

    def __init__(self, command: list[str], columns: int = 100, **environment: str) -> None:
        """Start it."""
        self._screen, theirs = pty.openpty()
        self.resize(columns)
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, cwd=ROOT,
            env=os.environ | {"TERM": "xterm", **environment},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(theirs)
        self.shown = b""
        self._seen = 0

    def resize(self, columns: int) -> None:
        """Change the width, as a window does."""
        fcntl.ioctl(self._screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def wait_for(self, text: str) -> str:
        """Read until `text` is shown; return what came since the last call, with it."""
        end = time.monotonic() + PATIENCE
        while (place := self.shown.find(text.encode(), self._seen)) < 0:
            if time.monotonic() > end or not self._read():
                raise TimeoutError(f"{text!r} never came:\n{self.shown[self._seen :]!r}")
        start, self._seen = self._seen, place + len(text.encode())
        return self.shown[start : self._seen].decode(errors="replace")

    def _read(self) -> bool:
        if not select.select([self._screen], [], [], PATIENCE)[0]:
            return False
        try:
            data = os.read(self._screen, 65536)
        except OSError:  # Linux, when the command has ended
            return False
        self.shown += data
        return bool(data)

    def type(self, text: str | bytes) -> None:
        """Type keys."""
        os.write(self._screen, text.encode() if isinstance(text, str) else text)

    def end(self) -> int:
        """Read the rest, and return the exit code."""
        while self._read():
            pass
        code = self.process.wait(PATIENCE)
        os.close(self._screen)  # not before: it would hang up on a command that is ending
        return code

    def kill(self) -> None:
        """End the command, whatever it does."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def plain(shown: str) -> str:
    """Return the text without escape sequences."""
    return ESCAPES.sub("", shown)


def record(arguments: list[str], **environment: str) -> str:
    """Return what a terminal shows while the session is typed."""
    script = [sys.executable, "-m", "flashmoe_mlx.cli.chat", *arguments]
    quiet = ["sh", "-c", 'exec "$@" 2>/dev/null', "sh", *script]  # the status line would stay
    terminal = Terminal(quiet, NO_COLOR="1", **environment)
    for before, keys in TYPED:
        terminal.wait_for(before)
        terminal.type(f"{keys}\n")
    assert terminal.end() == 0
    return plain(terminal.shown.decode())


def main() -> None:
    """Record the session into the page."""
    shown = record(COMMAND[1:])
    page = PAGE.read_text(encoding="utf-8")
    block = f"```console\n$ {' '.join(COMMAND)}\n{shown}```\n"
    page, found = re.subn(r"```console\n.*?```\n", lambda _: block, page, count=1, flags=re.S)
    assert found, "the page has no console block"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
