"""Run a server, and end when it no longer serves, so that a supervisor starts both again.

    python docs/examples/watched_server.py http://127.0.0.1:8080/health \\
        mlx_lm.server --model DIR --trust-remote-code --port 8080

`mlx_lm.server` stays, and answers 503, when the thread that generates has died.
"""

import signal
import subprocess
import sys
import time
from urllib.error import HTTPError
from urllib.request import urlopen


def well(url: str) -> bool:
    """Say whether a server is well, or does not listen yet."""
    try:
        urlopen(url, timeout=60).close()
    except OSError as error:
        return not isinstance(error, HTTPError)  # 503; others mean that it does not listen yet
    return True


def main(url: str, *command: str) -> int:
    """Run the command while it is well, and return its exit code, or 1 if it was ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`
    server = subprocess.Popen(command)
    try:
        while server.poll() is None and well(url):
            time.sleep(1)
        return 1 if server.poll() is None else server.returncode
    finally:
        server.kill()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
