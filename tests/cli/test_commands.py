"""Start and end of each command: Ctrl-C at any moment, errors by kind, closed output."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.bench import io as bench_io
from flashmoe_mlx.bench import main as bench
from flashmoe_mlx.cli import chat, chat_session, doctor, doctor_checks, generate, plan
from flashmoe_mlx.convert import cli, run

MODULES = {
    "flashmoe-bench": "flashmoe_mlx.bench.main",
    "flashmoe-chat": "flashmoe_mlx.cli.chat",
    "flashmoe-convert": "flashmoe_mlx.convert.cli",
    "flashmoe-doctor": "flashmoe_mlx.cli.doctor",
    "flashmoe-generate": "flashmoe_mlx.cli.generate",
    "flashmoe-plan": "flashmoe_mlx.cli.plan",
}
# A line in each command's work, and the command's arguments.
WORK = {
    "flashmoe-bench": (bench.main, bench_io, "_check", ["io"]),
    "flashmoe-chat": (chat.main, chat_session, "run", []),
    "flashmoe-convert": (cli.main, run, "convert", ["--hf-path", "x"]),
    "flashmoe-doctor": (doctor.main, doctor_checks, "examine_all", []),
    "flashmoe-generate": (generate.main, generate, "run", []),
    "flashmoe-plan": (plan.main, plan, "check", ["--check"]),
}


def strike(tmp_path: Path, command: list[str], code: str) -> None:
    """Run a command with our `sitecustomize`; it may end with bad input."""
    (tmp_path / "sitecustomize.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "STRUCK": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, timeout=120, env=environment
    )
    assert done.returncode in (0, 2), done.stderr


def script(tmp_path: Path, name: str) -> str:
    """Write a command's script like pip."""
    path = tmp_path / name
    path.write_text(f"import sys\nfrom {MODULES[name]} import main\nsys.exit(main())\n")
    return str(path)


# Send Ctrl-C to a child before each of some imports, from the package's first import on.
STRIKE = """
import os, signal, sys

class Striker:
    count = 0
    def find_spec(self, name, path=None, target=None):
        if name.startswith("flashmoe_mlx.") and name.split(".")[1] not in ("commands", "errors"):
            Striker.count = Striker.count or 1
        if Striker.count:
            Striker.count += 1
            if Striker.count % STEP == 2:
                strike(name)

def strike(name):
    place = os.path.join(os.environ["STRUCK"], f"{Striker.count}-{name}")
    if os.fork() == 0:
        signal.alarm(30)
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT), 2)
        os.kill(os.getpid(), signal.SIGINT)
        return
    code = os.waitstatus_to_exitcode(os.wait()[1])
    os.rename(place, f"{place}={code}")

sys.meta_path.insert(0, Striker())
"""


@pytest.mark.parametrize(
    ("name", "by_module", "step"),
    [
        ("flashmoe-generate", True, 40),  # doctor and bench import the same packages
        ("flashmoe-convert", False, 20),
        ("flashmoe-convert", True, 40),
        ("flashmoe-plan", False, 10),
    ],
)
def test_ctrl_c_while_it_imports(name, by_module, step, tmp_path):
    command = ["-m", MODULES[name]] if by_module else [script(tmp_path, name)]
    # flashmoe-generate imports after its first checks; this file is refused after that.
    arguments = ["Hello", "--plot", "x.bmp"] if name == "flashmoe-generate" else ["--help"]
    strike(tmp_path, [*command, *arguments], STRIKE.replace("STEP", str(step)))
    struck = sorted(tmp_path.glob("*-*=*"))
    wrong = [s.name + s.read_text() for s in struck if s.read_text() != f"\n{name}: interrupted\n"]
    assert len(struck) > 5 and wrong == []
    assert {path.name.rpartition("=")[2] for path in struck} == {"130"}


LATE = """
import atexit, os, signal, threading
strike = lambda: os.kill(os.getpid(), signal.SIGINT)
REGISTER
"""


@pytest.mark.parametrize(
    "register",
    [
        "atexit.register(strike)",
        "threading._register_atexit(strike)",
        "threading.Thread(target=lambda: (threading.main_thread().join(), strike())).start()",
    ],
)
def test_ctrl_c_while_it_shuts_down(register, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LATE.replace("REGISTER", register))
    done = subprocess.run(
        [sys.executable, script(tmp_path, "flashmoe-plan"), "--check"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "\nflashmoe-plan: interrupted\n")
    assert "Flash-MoE" in done.stdout


def test_a_command_does_not_wait_for_pytorch(tmp_path):
    """transformers imports it if it is installed, which takes seconds."""
    (torch := tmp_path / "torch").mkdir()
    (torch / "__init__.py").write_text("open(__file__ + '.imported', 'w')")
    (info := tmp_path / "torch-2.11.0.dist-info").mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def imports(*command: str) -> bool:
        (mark := torch / "__init__.py.imported").unlink(missing_ok=True)
        subprocess.run([sys.executable, *command], env=environment, capture_output=True)
        return mark.exists()

    assert imports("-c", "import mlx_lm")
    refused = "--plot", "x.bmp"  # after the imports
    command = "-m", "flashmoe_mlx", "generate", "Hello", *refused
    assert not imports(*command)
    assert imports(*command, "--trust-remote-code")


def as_plan(tmp_path: Path, work: str, **options) -> subprocess.CompletedProcess[str]:
    """Run `work` in a process that looks like flashmoe-plan."""
    path = tmp_path / "flashmoe-plan"
    path.write_text(
        "import os, signal, sys\nimport flashmoe_mlx\n"
        "from flashmoe_mlx.commands import as_command\n"
        "strike = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        f"def work():\n{work}\nsys.exit(as_command('flashmoe-plan', work))\n"
    )
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, **options)


def test_ctrl_c_that_another_exception_replaces(tmp_path):
    """C extensions do this, and packages that wrap exceptions of their imports."""
    work = "    try: strike()\n    except KeyboardInterrupt: raise ImportError('no wonder')"
    done = as_plan(tmp_path, work)
    assert (done.returncode, done.stderr) == (130, "\nflashmoe-plan: interrupted\n")


def test_ctrl_c_leaves_work_in_order_and_a_second_one_leaves_at_once(tmp_path):
    work = "    try: strike()\n    finally: print('in order')"
    done = as_plan(tmp_path, work)
    assert (done.returncode, done.stdout) == (130, "in order\n")
    work = "    import atexit; atexit.register(lambda: (strike(), print('waited')))\n    strike()"
    done = as_plan(tmp_path, work)
    assert (done.returncode, done.stdout) == (130, "")


def test_ctrl_c_that_was_ignored_stays_so(tmp_path):
    """Shells start background jobs with Ctrl-C ignored."""
    done = as_plan(
        tmp_path, "    strike()\n    print('done')",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_the_end_collects_no_garbage(tmp_path):
    """With transformers imported, the collection at exit takes most of a second."""
    register = "    import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 1000))"
    assert as_plan(tmp_path, register).stdout == "True\n"


@pytest.mark.parametrize("name", ["program.py", "flashmoe-mine", "plan"])
def test_other_programs_keep_their_ctrl_c(name, tmp_path):
    (tmp_path / name).write_text(
        "import signal, flashmoe_mlx\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    run = [sys.executable, str(tmp_path / name)]
    assert subprocess.run(run, capture_output=True, text=True).stdout == "True\n"


@pytest.mark.parametrize("argv", ["sys.argv = []", "del sys.argv", "sys.argv = ['']"])
def test_a_program_without_arguments(argv):
    """For example a program that embeds Python."""
    code = f"import sys; {argv}; import flashmoe_mlx.commands as c; print(c.running())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "None\n"


# ---- errors by kind ------------------------------------------------------------------------------


def ended(name: str, error: BaseException, monkeypatch, capsys) -> tuple[object, str]:
    """Return a command's exit code and standard error when its work raises `error`."""

    def work(*args, **options):
        raise error

    main, module, function, arguments = WORK[name]
    monkeypatch.setattr(module, function, work)
    try:
        code: object = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    return code, capsys.readouterr().err


KINDS = {
    "bad input": (FlashMoEError("x = 1\n is wrong."), "x = 1 is wrong."),
    "disk": (OSError(errno.EIO, "Input/output error", "a/b"), "a/b: Input/output error. The disk"),
    "space": (OSError(errno.ENOSPC, "No space left"), "No space left. Free some space."),
    "permission": (PermissionError(errno.EACCES, "denied", b"c"), "c: denied. Change its"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "d"), "d: Read-only file system."),
    "descriptors": (OSError(errno.EMFILE, "Too many", "e"), "e: Too many. Raise the limit"),
    "unplugged": (OSError(errno.ENODEV, "No such device", "f"), "f: No such device. Attach"),
    "Python's memory": (MemoryError(), "memory is short (MemoryError). "),
    "MLX's memory": (RuntimeError("[malloc] Unable"), "memory is short ([malloc] Unable). "),
    "GPU's memory": (RuntimeError("CUDA: Out of memory"), "memory is short (CUDA: Out of"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WORK)
def test_errors_that_users_can_fix_give_one_line_and_exit_code_2(name, kind, monkeypatch, capsys):
    error, line = KINDS[kind]
    code, said = ended(name, error, monkeypatch, capsys)
    assert code == 2 and said.startswith(f"{name}: error: {line}") and said.count("\n") == 1


@pytest.mark.parametrize("name", WORK)
def test_ctrl_c_gives_exit_code_130(name, monkeypatch, capsys):
    code, said = ended(name, KeyboardInterrupt(), monkeypatch, capsys)
    assert code == 130 and said.strip() == f"{name}: interrupted"


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("ours"), TypeError("ours"), ValueError("ours"), OSError("ours"),
        OSError(errno.EBADF, "ours"), FileNotFoundError(errno.ENOENT, "ours", "x"),
        BrokenPipeError(errno.EPIPE, "a socket's"),
    ],
)  # fmt: skip
def test_bugs_keep_their_traceback(fault, monkeypatch, capsys):
    with pytest.raises(type(fault)):
        ended("flashmoe-plan", fault, monkeypatch, capsys)


# ---- closed output -------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--check"], ["--help"]])
def test_a_reader_that_goes_away(arguments):
    """A reader like `head` causes no traceback, neither at once nor at exit."""
    ours, theirs = os.pipe()
    os.close(ours)
    command = [sys.executable, "-m", "flashmoe_mlx.cli.plan", *arguments]
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["--check"], ["--model", "35b", "--machine", "m3-max-48"]])
def test_output_on_a_full_disk(arguments, tmp_path):
    command = [sys.executable, "-m", "flashmoe_mlx.cli.plan", *arguments]
    with open(tmp_path / "output", "w") as output:
        done = subprocess.run(
            command, stdout=output, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99)),
        )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"flashmoe-plan: error: File too large\. Choose [^\n]*\n", done.stderr)
