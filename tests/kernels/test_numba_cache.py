"""Compiled code on disk: the right code per name, whole or missing, in any writable folder."""

import json
import os
import pickle
import re
import resource
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from numba.core.caching import IndexDataCacheFile

from flashmoe_mlx.cli import doctor
from flashmoe_mlx.custom_kernels.cpu import numba_cache, prefill

WRITERS, KERNELS = 8, 12


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Clear the warnings."""
    monkeypatch.setattr(numba_cache, "damaged", [])
    monkeypatch.setattr(numba_cache, "complaints", [])


def cache_at(path) -> IndexDataCacheFile:
    return IndexDataCacheFile(str(path), "kernels", "stamp")


def test_each_kernel_is_found_under_its_own_name(tmp_path):
    """numba's own `save` loses some, and confuses others."""
    assert prefill and IndexDataCacheFile.save is numba_cache._save

    def write(writer: int) -> None:
        cache = cache_at(tmp_path)
        for kernel in range(KERNELS):
            cache.save((writer, kernel), [writer, kernel] * 1000)

    with ThreadPoolExecutor(WRITERS) as pool:
        for done in [pool.submit(write, writer) for writer in range(WRITERS)]:
            done.result()
    for writer in range(WRITERS):
        for kernel in range(KERNELS):
            assert cache_at(tmp_path).load((writer, kernel)) == [writer, kernel] * 1000


def test_code_comes_before_the_name(tmp_path, monkeypatch):
    cache = cache_at(tmp_path)

    def killed(overloads):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_save_index", killed)
        with pytest.raises(KeyboardInterrupt):
            cache.save("one", "its code")
    assert cache_at(tmp_path).load("one") is None
    cache.save("two", "other code")
    cache.save("one", "its code")
    cache.save("two", "newer code")
    assert [cache_at(tmp_path).load(key) for key in ("one", "two")] == ["its code", "newer code"]


# ---- damage --------------------------------------------------------------------------------------


class Trap:
    """Raises when it is unpickled."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __reduce__(self):
        return _raise, (self.error,)


def _raise(error: type[Exception]) -> None:
    raise error("a trap")


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def edited(change):
    """Return damage that applies `change` to a file's bytes."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flipped(place: float):
    """Return damage that flips one bit."""

    def change(data: bytes) -> bytes:
        at = int(place * (len(data) - 1))
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return edited(change)


DAMAGE = {
    "empty": edited(lambda data: b""),
    "zeroed": edited(lambda data: bytes(len(data))),
    "zeroes at the end": edited(lambda data: data[:50] + bytes(len(data) - 50)),
    "garbage": edited(lambda data: b"\xff\x00garbage" * 9),
    "text": edited(lambda data: b"hello\n"),
    "one byte": edited(lambda data: data[:1]),
    "half": edited(lambda data: data[: len(data) // 2]),
    "all but one byte": edited(lambda data: data[:-1]),
    "longer": edited(lambda data: data + b"\0"),
    "an older version's": edited(lambda data: data[: -numba_cache.SEAL]),
    "other types": edited(lambda data: pickle.dumps("0") + pickle.dumps(3)),
    "ValueError": edited(lambda data: pickle.dumps(Trap(ValueError))),
    "ImportError": edited(lambda data: pickle.dumps(Trap(ImportError))),
    "MemoryError": edited(lambda data: pickle.dumps(Trap(MemoryError))),
    "bit at 0": flipped(0),
    "bit in code": flipped(0.5),  # unpickles well
    "bit at the end": flipped(1),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["index", "data"])
def test_a_damaged_file_is_missing_and_written_again(kind, damage, tmp_path, capsys):
    cache = cache_at(tmp_path)
    cache.save("key", "code " * 100)
    (path,) = tmp_path.glob("*.nbi" if kind == "index" else "*.nbc")
    DAMAGE[damage](path)
    assert cache_at(tmp_path).load("key") is None
    assert capsys.readouterr().err.startswith(f"[flashmoe] {path}: compiled code is damaged")
    cache.save("key", "code again")
    assert cache_at(tmp_path).load("key") == "code again"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("sealed", [ValueError, RecursionError, ModuleNotFoundError])
def test_any_error_of_unpickling(sealed, tmp_path):
    cache = cache_at(tmp_path)
    cache.save("key", Trap(sealed))
    assert cache_at(tmp_path).load("key") is None
    cache.save("key", "code")
    assert cache_at(tmp_path).load("key") == "code"


@pytest.mark.parametrize("what", [as_directory, as_loop])
def test_a_file_that_cannot_be_replaced_is_missing(what, tmp_path):
    cache = cache_at(tmp_path)
    cache.save("key", "code")
    for path in tmp_path.glob("*.nb?"):
        what(path)
    assert cache_at(tmp_path).load("key") is None


def test_other_files_of_a_damaged_index_are_not_mistaken(tmp_path):
    cache = cache_at(tmp_path)
    for key in "abc":
        cache.save(key, f"code of {key}")
    (index,) = tmp_path.glob("*.nbi")
    index.write_bytes(b"")
    cache.save("c", "code of c")
    assert [cache_at(tmp_path).load(key) for key in "abc"] == [None, None, "code of c"]


@pytest.mark.parametrize("lock", [as_directory, as_loop])
def test_a_lock_that_cannot_be_opened(lock, tmp_path):
    cache = cache_at(tmp_path)
    cache.save("key", "code")
    (path,) = tmp_path.glob("*.lock")
    lock(path)
    cache.save("key", "newer code")
    assert cache_at(tmp_path).load("key") == "newer code"


def test_files_are_synced_before_they_get_their_names(tmp_path, monkeypatch):
    calls = []
    sync, replace = os.fsync, os.replace

    def fsync(file: int) -> None:
        status = os.fstat(file)
        calls.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size > 0}")
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).suffix), replace(a, b)))
    cache_at(tmp_path).save("key", "code")
    assert calls == ["True", ".nbc", "folder", "True", ".nbi", "folder"]


# ---- a kernel in a process of its own ------------------------------------------------------------

KERNEL = """
from numba import njit
@njit(cache=True)
def add(a, b):
    return a + b
"""
RUN = """
import importlib.util, sys
from flashmoe_mlx.custom_kernels.cpu import numba_cache
numba_cache.make_cache_safe()
spec = importlib.util.spec_from_file_location("flashmoe_mlx.tiny", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.add(20, 22), sum(module.add.stats.cache_hits.values()), module.add.stats.cache_path)
"""


class Place:
    """A kernel, and the folders of its code: `package`, `home` and `temporary`."""

    def __init__(self, root: Path) -> None:
        self.root, self.package = root, root / "package/__pycache__"
        self.temporary = root / "tmp"
        self.temporary.mkdir()
        (root / "package").mkdir()
        (root / "package/tiny.py").write_text(KERNEL)
        self.settings = {"HOME": str(root / "home"), "TMPDIR": str(self.temporary)}

    def refuse_package_and_home(self) -> None:
        """By files in their place: permissions do not bind root."""
        self.package.touch()
        (self.root / "home").touch()

    def run(self, **options) -> tuple[str, str, str, str]:
        """Return the sum, cache hits, the cache folder and standard error."""
        unset = ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(self.root / "package/tiny.py")],
            env=kept | self.settings, capture_output=True, text=True, cwd=self.root, **options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return (*done.stdout.split(), done.stderr)


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


def test_a_power_loss(place):
    """Zero every file, or flip a bit in the code, which unpickling does not notice."""
    assert place.run() == ("42", "0", str(place.package), "")
    for change in (DAMAGE["zeroed"], flipped(0.7)):
        for path in place.package.glob("*.nb?"):
            change(path)
        total, hits, _, said = place.run()
        assert (total, hits) == ("42", "0") and said.count("\n") == 1
        assert re.match(r"\[flashmoe\] \S+tiny\S+: compiled code is damaged", said)
    assert place.run() == ("42", "1", str(place.package), "")


def test_a_read_only_package(place):
    place.package.touch()
    total, _, folder, said = place.run()
    assert (total, said) == ("42", "") and folder.startswith(str(place.root / "home/"))


def test_no_folder_but_the_temporary_one(place):
    place.refuse_package_and_home()
    for hits in "01":
        total, found, folder, said = place.run()
        assert (total, found) == ("42", hits) and said.count("\n") == 1
        assert folder.startswith(str(place.temporary / f"flashmoe-mlx-{os.getuid()}/"))
        assert said.startswith(f"[flashmoe] {place.package} and {place.root}/home/.cache/numba/")
        assert (
            f"are cached in {place.temporary}/flashmoe-mlx-" in said and "NUMBA_CACHE_DIR" in said
        )


def test_no_folder_at_all(place):
    place.refuse_package_and_home()
    (place.temporary / f"flashmoe-mlx-{os.getuid()}").touch()
    total, hits, _, said = place.run()
    assert (total, hits) == ("42", "0") and said.count("\n") == 1
    assert "so CPU kernels are compiled in each run, which takes a minute" in said


def test_an_unknown_home(place):
    """As in a container with an unnamed user: no folder "~" appears in the working directory."""
    place.package.touch()
    place.settings["HOME"] = "~"
    total, _, folder, said = place.run()
    assert total == "42" and folder.startswith(str(place.temporary)) and said.count("\n") == 1
    assert not (place.root / "~").exists()


def test_the_users_own_folder_comes_first(place):
    place.refuse_package_and_home()
    place.settings["NUMBA_CACHE_DIR"] = str(place.root / "mine")
    total, _, folder, said = place.run()
    assert (total, said) == ("42", "") and folder.startswith(str(place.root / "mine"))


def test_a_disk_that_takes_no_file(place):
    """The kernel runs and warns once, leaves no partial file, and later runs work."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    total, hits, _, said = place.run(preexec_fn=limit)
    assert (total, hits) == ("42", "0") and said.count("\n") == 1
    assert "cannot cache compiled CPU kernels (File too large): each run compiles them" in said
    assert [path.suffix for path in place.package.iterdir()] == [".lock"]
    assert place.run() == ("42", "0", str(place.package), "")


# ---- flashmoe-doctor -----------------------------------------------------------------------------

QUICK = ["--geometry", "tiny", "--sample-mib", "4"]


def test_doctor_blames_the_folder_and_not_the_kernels(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    numba_cache.complaints.append("/a and /b are not writable, so CPU kernels are cached in /tmp.")
    with pytest.raises(SystemExit) as ended:
        doctor.main([*QUICK, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code == 1 and found["problems"] == numba_cache.complaints
    assert all(kernel["ok"] or "GPU" in kernel["message"] for kernel in found["kernels"])


def test_doctor_without_a_writable_cache(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SystemExit) as ended:
        doctor.main(QUICK)
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"advice    {tmp_path}/file/flashmoe-mlx cannot be written: each run times" in said
