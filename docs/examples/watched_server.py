"""Run a server and exit when it is unhealthy, so that a supervisor restarts both.

    python docs/examples/watched_server.py http://127.0.0.1:8080/health \\
        mlx_lm.server --model DIR --trust-remote-code --port 8080

`mlx_lm.server` keeps running and answers 503 after its generation thread has died.
"""

import signal
import subprocess
import sys
import time
from urllib.error import HTTPError
from urllib.request import urlopen


def well(url: str) -> bool:
    """Return whether a server is healthy, or does not listen yet."""
    try:
        urlopen(url, timeout=60).close()
    except OSError as error:
        return not isinstance(error, HTTPError)  # 503; other errors: not listening yet
    return True


def main(url: str, *command: str) -> int:
    """Run the command while it is healthy; return its exit code, or 1 if it was stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs `finally`
    server = subprocess.Popen(command)
    try:
        while server.poll() is None and well(url):
            time.sleep(1)
        return 1 if server.poll() is None else server.returncode
    finally:
        server.kill()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
