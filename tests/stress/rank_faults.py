"""Faults of one of two ranks at random moments: all ranks end, name the cause, give no wrong token.

    python tests/stress/rank_faults.py [--times 50] [--way shard|pipeline] [--door script|server]
        [--faults EIO,SIGKILL] [--at-once 2] [--seed 0]

Faults: a failing disk, a rank killed or stopped, `mlx.launch` terminated; a rank with another
model, version or top-k. Every second trial hits rank 0. Exits with 1 if a rank outlives its limit,
ends well, names no cause, or gives a token that one process alone would not give.
"""

import argparse
import collections
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "distributed")]

import mlx.core as mx  # noqa: E402
from ranks import environment, free_ports, start  # noqa: E402

from flashmoe_mlx.convert import convert  # noqa: E402
from flashmoe_mlx.distributed.expert_parallel import LOADING  # noqa: E402
from flashmoe_mlx.loader import BUNDLED_MODEL  # noqa: E402

SCRIPT = TESTS / "distributed" / "fail.py"
TIMEOUT = 6  # seconds, of the watchdog
AT_EXIT = 15  # seconds; MLX's ring tries to reach the other rank for ten, and Python starts to end
PATIENCE = 180  # seconds, for ranks to start or a disk to fail
LATEST = 8  # seconds after a rank joined
READS = {"script": 1500, "server": 300}  # before a disk fails; the same question reads ever less
ENDED = "another rank ended|rank . ended|rank . was silent|took more than"
CAUSES = {
    "EIO": "Input/output error", "SIGKILL": ENDED, "SIGSTOP": ENDED, "SIGTERM": "",
    "model": "has model = ", "version": "has version of mlx-lm = ", "top-k": "has top-k = ",
}  # fmt: skip
SIGNALS = {name: getattr(signal, name) for name in CAUSES if name.startswith("SIG")}
TOKEN = re.compile(r"^TOKEN (\d+) (\d+)$", re.MULTILINE)
QUESTION = {"prompt": "What is a disk?", "max_tokens": 12, "temperature": 0}
OTHER_VERSION = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version(name) + (".post1" if name == "mlx-lm" else "")
"""


@dataclass(frozen=True)
class Trial:
    """One fault in two ranks.

    Attributes:
        models: the right one, and another.
        right: what one process answers.
    """

    fault: str
    victim: int
    way: str
    door: str
    models: tuple[Path, Path]
    right: list[str]
    chance: random.Random

    def run(self) -> tuple[str, float]:
        """Let the fault happen; return what went wrong, or nothing, and seconds until the end."""
        with tempfile.TemporaryDirectory() as folder:
            ranks = Ranks(self, Path(folder))
            try:
                wrong = ranks.suffer() or ranks.judge()
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            finally:
                for process in ranks.processes:
                    process.kill()
            if wrong:
                wrong += "".join(f"\n--- {text[-1500:]}" for text in ranks.printed())
            return wrong, ranks.seconds


@dataclass
class Ranks:
    """The two ranks of a trial, or `mlx.launch` with both.

    Attributes:
        folder: names all their processes, whose environments have it.
        seconds: from the fault until all have ended.
    """

    trial: Trial
    folder: Path
    processes: list[subprocess.Popen] = field(default_factory=list)
    lines: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0
    failed_at: float = float("inf")
    wrong_texts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Start them."""
        self.port = free_ports(1) if self.trial.door == "server" else []
        self.processes = self._launched() if self.trial.fault == "SIGTERM" else self._started()
        for process in self.processes:
            self.lines.append([])
            threading.Thread(target=self._read, args=(process, self.lines[-1]), daemon=True).start()
        if self.port:
            threading.Thread(target=self._ask, daemon=True).start()

    def _command(self, model: Path, reads: int) -> list[Any]:
        return [SCRIPT, model, self.trial.way, reads, *self.port]

    def _started(self) -> list[subprocess.Popen]:
        """Start two ranks, of which the victim has a fault or will fail."""
        fault, chance, (model, other) = self.trial.fault, self.trial.chance, self.trial.models
        commands, envs = [self._command(model, 0)] * 2, [variables(), variables()]
        victim = self.trial.victim
        if fault == "EIO":
            commands[victim] = self._command(model, chance.randrange(1, READS[self.trial.door]))
        if fault == "model":
            commands[victim] = self._command(other, 0)
        if fault == "top-k":
            envs[victim]["FLASHMOE_EXPERTS_PER_TOKEN"] = str(chance.randrange(1, 4))
        if fault == "version":
            (self.folder / "sitecustomize.py").write_text(OTHER_VERSION)
            envs[victim]["PYTHONPATH"] = f"{self.folder}:{TESTS}"
        return start(self.folder, 2, commands[0], envs, last=commands[1])

    def _launched(self) -> list[subprocess.Popen]:
        """Start two ranks by `mlx.launch`."""
        launch = Path(sys.executable).with_name("mlx.launch")
        # Not ports that another process gets at random.
        port = self.trial.chance.randrange(20000, 30000, 2)
        options = "--backend", "ring", "-n", "2", "--starting-port", str(port), "--", sys.executable
        command = [launch, *options, *map(str, self._command(self.trial.models[0], 0))]
        env = environment(self.folder, 0) | variables()
        return [subprocess.Popen(command, env=env, **PIPES)]

    def _read(self, process: subprocess.Popen, lines: list[str]) -> None:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("FAULT"):
                self.failed_at = time.monotonic()

    def _ask(self) -> None:
        """Ask the server again and again; note answers that one process does not give."""
        while self._alive():
            with suppress(OSError, ValueError):
                text = ask(self.port[0])
                if [text] != self.trial.right:
                    self.wrong_texts.add(text)
            time.sleep(0.05)

    def printed(self) -> list[str]:
        """Return what each has printed."""
        return ["".join(lines) for lines in self.lines]

    def _alive(self) -> set[int]:
        """Return the processes that have not ended, by their environment."""
        for process in self.processes:
            process.poll()
        found, mark = set(), str(self.folder).encode()
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                found |= {int(entry.parent.name)} if mark in entry.read_bytes() else set()
        return found

    def suffer(self) -> str:
        """Wait for the fault's moment, and for the end of all ranks."""
        fault, limit = SIGNALS.get(self.trial.fault), TIMEOUT + AT_EXIT
        stopped = set()
        if fault:
            victim = self.processes[self.trial.victim % len(self.processes)]
            wait_for(lambda: all("JOINED\n" in text for text in self.printed()), PATIENCE)
            time.sleep(self.trial.chance.uniform(0, LATEST))
            begun = ["TOKEN" in text or "HTTP" in text for text in self.printed()]
            if not (any(begun) if self.port else all(begun)):
                limit = LOADING * TIMEOUT + AT_EXIT
            self.failed_at = time.monotonic()
            victim.send_signal(fault)
            stopped = {victim.pid} if fault == signal.SIGSTOP else set()
        elif self.trial.fault == "EIO":
            if not wait_for(lambda: self.failed_at < float("inf"), PATIENCE):
                return "the disk was not read often enough to fail"
        else:
            self.failed_at, limit = time.monotonic(), PATIENCE
        if not wait_for(lambda: self._alive() <= stopped, limit):
            return f"not all ranks ended in {limit} s"
        self.seconds = time.monotonic() - self.failed_at
        if stopped:
            victim.send_signal(signal.SIGCONT)
            if not wait_for(lambda: not self._alive(), limit):
                return "the stopped rank did not end after it went on"
        return ""

    def judge(self) -> str:
        """Say what is wrong with how the ranks ended, if anything."""
        time.sleep(0.2)  # the threads read the rest
        for number, (process, text) in enumerate(zip(self.processes, self.printed(), strict=True)):
            killed = self.trial.fault == "SIGKILL" and number == self.trial.victim
            if process.returncode == 0:
                return f"rank {number} ended well"
            if not killed and not re.search(CAUSES[self.trial.fault], text):
                return f"rank {number} named no cause"
            for place, token in re.findall(TOKEN, text):
                if self.trial.right[int(place)] != token:
                    return f"token {place} was {token}, not {self.trial.right[int(place)]}"
        return f"wrong answers: {self.wrong_texts}" if self.wrong_texts else ""


PIPES: dict[str, Any] = {
    "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True
}  # fmt: skip


def variables() -> dict[str, str]:
    """Return the settings of all ranks."""
    found = {"COLLECTIVE_TIMEOUT": str(TIMEOUT), "SHARDING": "exact", "EXPERT_CACHE": "2MiB"}
    return {f"FLASHMOE_{name}": value for name, value in found.items()}


def wait_for(condition: Any, seconds: float) -> bool:
    """Wait until a condition holds; return whether it does."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def ask(port: int) -> str:
    """Return a server's answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(QUESTION).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        return json.load(reply)["choices"][0]["text"]


def write_models(folder: Path) -> tuple[Path, Path]:
    """Write the bundled model, as converted, and one of the same sizes with another last norm."""
    convert(BUNDLED_MODEL, folder / "bundled")
    shutil.copytree(folder / "bundled", folder / "other")
    for file in (folder / "other").glob("model*.safetensors"):
        tensors, metadata = mx.load(str(file), return_metadata=True)
        for name in tensors:
            if name.endswith("model.norm.weight"):
                tensors[name] *= 1.25
        mx.eval(tensors)
        mx.save_safetensors(str(file), tensors, metadata=metadata)
    return folder / "bundled", folder / "other"


def right_answer(model: Path, door: str) -> list[str]:
    """Return the tokens, or the text, that one process alone answers."""
    port = free_ports(1) if door == "server" else []
    with tempfile.TemporaryDirectory() as folder:
        (alone,) = start(Path(folder), 1, [SCRIPT, model, "shard", 0, *port], [variables()])
        try:
            if not port:
                text = "".join(iter(alone.stdout.readline, "ANSWER\n"))
                return [token for _, token in re.findall(TOKEN, text)]
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until:
                with suppress(OSError):
                    return [ask(port[0])]
                time.sleep(0.2)
            raise SystemExit("the server did not start")
        finally:
            alone.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="trials of each fault")
    parser.add_argument("--way", choices=["shard", "pipeline"], default="shard")
    parser.add_argument("--door", choices=["script", "server"], default="script")
    parser.add_argument("--faults", default=",".join(CAUSES))
    parser.add_argument("--at-once", type=int, default=2, help="trials")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = collections.Counter[str]()

    def chances() -> list[random.Random]:
        return [random.Random(args.seed + number) for number in range(args.times)]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.at_once) as pool:
        models = write_models(Path(folder))
        right = right_answer(models[0], args.door)
        for fault in args.faults.split(","):
            trials = [
                Trial(
                    fault, n % 2, args.way, args.door, models, right, random.Random(args.seed + n)
                )
                for n in range(args.times)
            ]
            slowest = 0.0
            for number, (wrong, seconds) in enumerate(pool.map(Trial.run, trials)):
                slowest, failed[fault] = max(slowest, seconds), failed[fault] + bool(wrong)
                if wrong:
                    print(f"{fault}, trial {number}: {wrong}", flush=True)
            good = args.times - failed[fault]
            print(f"{args.door}, {args.way}, {fault}: {good} of {args.times} as they should be; "
                  f"ended in at most {slowest:.1f} s", flush=True)  # fmt: skip
    sys.exit(sum(failed.values()) > 0)


if __name__ == "__main__":
    main()
