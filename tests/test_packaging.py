"""Wheel and sdist contain every file of the source tree, and no private file."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "flashmoe_mlx": "flashmoe_mlx",
    "custom_kernels": "flashmoe_mlx/custom_kernels",
    "convert": "flashmoe_mlx/convert",
}
SHIPPED = (".py", ".metal", ".cuh", ".toml", "py.typed")
LITTER = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")

# Split, so that the test does not match this file.
FORBIDDEN = re.compile("/wor" r"k/|/roo" r"t/|\b(TO" r"DO|FIX" r"ME|NotImplement" r"edError)\b")
CHECKED = (".py", ".metal", ".cuh", ".toml", ".md")


def source_files() -> dict[str, bytes]:
    """Map the name in the wheel to the content, for every file that the wheel must contain."""
    return {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}": path.read_bytes()
        for folder, target in PACKAGES.items()
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
        if path.name.endswith(SHIPPED) or "bundled" in path.parts
    }


def copy_sources(destination: Path) -> Path:
    """Copy the sources, so that builds write nothing into the repository."""
    destination.mkdir()
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, destination / folder, ignore=LITTER)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, destination)
    return destination


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a "wheel" or an "sdist" with the installed setuptools, offline."""
    code = f"from setuptools.build_meta import build_{kind} as b; import sys; b(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (made,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# Strict, except for untyped parts of mlx-lm; skip the sources of other packages.
MYPY = """
[mypy]
strict = true
follow_imports = silent
untyped_calls_exclude = mlx_lm
[mypy-transformers.*,huggingface_hub.*,numba.*,llvmlite.*,safetensors.*,numpy.*,tqdm.*]
follow_imports = skip
ignore_missing_imports = true
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("build") / "source")


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> dict[str, bytes]:
    return contents(build("wheel", tree, tmp_path_factory.mktemp("wheel")))


def test_wheel_holds_every_file(wheel):
    shipped = {name: data for name, data in wheel.items() if ".dist-info/" not in name}
    expected = source_files()
    assert sorted(shipped) == sorted(expected)
    assert shipped == expected


def test_wheel_has_a_license_and_the_readme(wheel):
    name = next(name for name in wheel if name.endswith(".dist-info/METADATA"))
    assert any(name.endswith("/licenses/LICENSE") for name in wheel)
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() in wheel[name].decode()


def test_types_reach_users(wheel, tmp_path):
    """The script in python-api.md passes mypy --strict with the wheel, and a mistake fails."""
    for name, data in wheel.items():
        path = tmp_path / "wheel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    page = (ROOT / "docs/reference/python-api.md").read_text(encoding="utf-8")
    script = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.S | re.M))
    wrong = "cache: int = model.expert_cache()\n"
    (tmp_path / "user.py").write_text(script + wrong, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(MYPY, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"]
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"MYPYPATH": str(tmp_path / "wheel")},
    )  # fmt: skip
    first, last = found.stdout.splitlines()
    line = script.count("\n") + 1
    assert first.startswith(f"user.py:{line}: error: Incompatible types in assignment"), first
    assert last == "Found 1 error in 1 file (checked 1 source file)"


def test_sdist_builds_the_same_wheel(wheel, tmp_path):
    (tmp_path / "sdist").mkdir()
    # A separate tree: building a wheel leaves a stale list of sources.
    sdist = build("sdist", copy_sources(tmp_path / "source"), tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "wheel").mkdir()
    assert contents(build("wheel", unpacked, tmp_path / "wheel")) == wheel


def test_commands_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for command, target in project["scripts"].items():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), command


def tracked_files() -> list[Path]:
    """List the repository's files: from git, or in an unpacked sdist from known folders."""
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0:
        return [path for name in git.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    folders = (*PACKAGES, "tests", "tools", "dev", "docs")
    return [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]


def test_no_private_paths_and_no_unfinished_work():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked_files()
        if path.suffix in CHECKED
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert not found, "\n".join(found)
