"""Install the wheel outside the checkout, and run every command as a user would.

    python tools/walk.py FOLDER

FOLDER must not exist; the tool creates a virtual environment, a home and a working directory in it
(6 GB). Each command runs in Python's development mode with warnings as errors; a wrong exit code or
a warning ends the tool with the command's output. pip needs its index.

Then the commands of the README run unchanged, except those that create the environment. A local
server stands in for the Hub and has the bundled model under each name; SRC is that model too.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = "http://127.0.0.1:8080"  # the default of mlx_lm.server
WARNED = re.compile(r"\w*Warning\b|Exception ignored|Traceback")
API = """
import flashmoe_mlx
print(flashmoe_mlx.__file__)
model, tokenizer = flashmoe_mlx.load("packed", expert_cache="1MiB")
with model:
    print(flashmoe_mlx.generate(model, tokenizer, "Hello", max_tokens=8))
"""
# Our commands run with warnings as errors, stock mlx-lm's without.
COMMANDS = (
    "flashmoe-generate --prompt Hello --max-tokens 8",
    "flashmoe-convert --hf-path {bundled} --mlx-path packed -q --q-bits 4 --dry-run",
    "flashmoe-convert --hf-path {bundled} --mlx-path packed -q --q-bits 4",
    "flashmoe-convert --hf-path {bundled} --mlx-path linked --link",
    "flashmoe-convert verify packed",
    "flashmoe-generate --model packed --prompt Hello --max-tokens 8 --expert-cache 1MiB --stats",
    "flashmoe-doctor packed",
    "flashmoe-doctor",
    "flashmoe-bench io --model packed --rounds 2 --threads 1 8",
    "flashmoe-bench kernels --geometry tiny",
    "flashmoe-bench decode --geometry tiny --runs 1 --tokens 8",
    "flashmoe-plan",
    "flashmoe-plan --model 397b --machine m3-max-48",
    "flashmoe-plan --check",
    "api.py",
    "mlx_lm.generate --model packed --trust-remote-code --prompt Hello --max-tokens 8",
    "mlx_lm.generate --model linked --trust-remote-code --prompt Hello --max-tokens 8",
)


def main() -> None:
    """Build, install, and run all commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder to create")
    folder = parser.parse_args().folder.absolute()
    here = folder / "here"
    here.mkdir(parents=True)
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    pip = [python, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, sources(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    extra = "" if sys.platform == "darwin" else "[cpu]"
    subprocess.run([*pip, "install", f"{wheel}{extra}"], check=True)
    (here / "api.py").write_text(API)
    code = "from flashmoe_mlx import BUNDLED_MODEL as path; print(path)"
    found = subprocess.run([python, "-c", code], cwd=here, capture_output=True, check=True)
    bundled = Path(found.stdout.decode().strip())
    for command in COMMANDS:
        walk(folder, command.format(bundled=bundled))
    walk_readme(folder, bundled)


def sources(folder: Path) -> Path:
    """Copy the repository's files, so that the build writes nothing into the checkout."""
    copy = folder / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in names.stdout.decode().split("\0")[:-1]:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


def walk(folder: Path, command: str) -> None:
    """Run one command, print its time, and exit if it fails."""
    name, *arguments = command.split()
    script = folder / "venv/bin" / name if (folder / "venv/bin" / name).exists() else name
    strict = [] if name.startswith("mlx_lm") else ["-X", "dev", "-W", "error"]
    start = time.perf_counter()
    result = subprocess.run(
        [folder / "venv/bin/python", *strict, script, *arguments],
        cwd=folder / "here", capture_output=True, text=True,
        env={"HOME": str(folder), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    said = result.stdout + result.stderr
    print(f"{time.perf_counter() - start:6.1f} s  {command}", flush=True)
    if result.returncode or (strict and WARNED.search(said)):
        sys.exit(f"exit code {result.returncode}\n{said}")


def walk_readme(folder: Path, bundled: Path) -> None:
    """Run the lines of README's code blocks in order, and exit if one fails."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", readme, re.S)
    commands = [
        command
        for language, text in blocks
        for command in ([f"python -c {shlex.quote(text)}"] if language == "python" else lines(text))
        if not command.startswith("python3 -m venv")
    ]
    here = folder / "readme"
    here.mkdir()
    (here / "SRC").symlink_to(bundled)
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server import HubServer

    with HubServer() as hub:
        for name in set(re.findall(r"mlx-community/[\w.-]+", readme)):
            hub.add(name, bundled)
        path = f"{folder / 'venv/bin'}:{os.environ['PATH']}"
        settings = {"HOME": str(folder), "PATH": path, "HF_ENDPOINT": hub.url}
        for command in commands:
            start = time.perf_counter()
            run = serve if command.startswith("mlx_lm.server") else run_once
            code, said = run(command, here, settings)
            print(f"{time.perf_counter() - start:6.1f} s  {command.splitlines()[0]}", flush=True)
            if code or "Traceback" in said:
                sys.exit(f"exit code {code}\n{said}")


def lines(block: str) -> list[str]:
    """Return the lines of a code block, comments included, without blank lines."""
    return [line for line in block.splitlines() if line.strip()]


def run_once(command: str, here: Path, settings: dict[str, str]) -> tuple[int, str]:
    """Run a command; return its exit code and output."""
    result = subprocess.run(
        ["bash", "-c", command], cwd=here, env=settings, capture_output=True, text=True
    )
    return result.returncode, result.stdout + result.stderr


def serve(command: str, here: Path, settings: dict[str, str]) -> tuple[int, str]:
    """Run a server for one request; return 0 if it answers, and its log."""
    log = here / "server.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=here, env=settings, stdout=out, stderr=out
        )
    body = {"messages": [{"role": "user", "content": "What is a library?"}], "max_tokens": 8}
    request = urllib.request.Request(
        f"{SERVER}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    reply = json.load(response)
                return int(not reply["choices"][0]["message"]["content"]), log.read_text()
            except urllib.error.HTTPError as error:  # the server is up, and refused the request
                return error.code, log.read_text()
            except OSError:
                if server.poll() is not None:
                    return server.returncode or 1, log.read_text()
                time.sleep(0.2)
    finally:
        server.terminate()
        server.wait(30)


if __name__ == "__main__":
    main()
