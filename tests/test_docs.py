"""What the documents name exists: files, links, commands and their options, modules."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlx_lm import server

from flashmoe_mlx import bench, doctor, plan
from flashmoe_mlx.convert import cli
from flashmoe_mlx.generate_cli import build_parser as generate_parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tests/metal_cpu/README.md")
)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", re.S | re.M)
# A path of this repository, with a folder of it in front.
FILE = re.compile(r"(?:flashmoe_mlx|custom_kernels|convert|tools|tests|docs|\.ci)/[\w./*-]*")
FOLDERS = "flashmoe_mlx", "custom_kernels", "convert", "tools"
PARSERS = {
    "flashmoe-generate": generate_parser,
    "flashmoe-convert": cli.parser,
    "flashmoe-convert verify": cli.verify_parser,
    "flashmoe-plan": plan.build_parser,
    "flashmoe-doctor": doctor.build_parser,
    "flashmoe-bench": bench.build_parser,
}


def text(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links(document):
    for target in LINK.findall(text(document)):
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(markdown: str) -> set[str]:
    """Return the names that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", markdown), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files(document):
    for span in SPAN.findall(BLOCK.sub("", text(document))):
        for name in FILE.findall(span):
            assert list(ROOT.glob(name.rstrip("./"))), name


def commands(markdown: str) -> Iterator[list[str]]:
    """Yield the commands of ours that stand in code, as words."""
    spans = SPAN.findall(BLOCK.sub("", markdown))
    blocks = [block for kind, block in BLOCK.findall(markdown) if kind in ("sh", "bash")]
    lines = [line for block in blocks for line in block.splitlines()]
    for code in (*spans, *lines):
        for part in re.split(r"&&|\|\|?|;", code):
            if (
                start := re.search(r"(?:^|[\s/])((?:flashmoe-\w+|mlx_lm\.server)(?:\s.*|$))", part)
            ) and (": error:" not in part):
                yield words(start[1])


def words(code: str) -> list[str]:
    try:
        return shlex.split(code, comments=True)
    except ValueError:  # half of a quotation
        return code.split()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options(document):
    for name, *given in commands(text(document)):
        known = options(name, given)
        for word in given:
            if word.startswith("-") and len(word) > 1 and not re.fullmatch(r"-[\d.]+", word):
                assert word.split("=")[0].rstrip(",") in known, f"{name} {' '.join(given)}"


def options(name: str, given: list[str]) -> set[str]:
    """Return the options that a command, or its first word's own parser, takes."""
    if name == "mlx_lm.server":
        return set(re.findall(r'"(--[\w-]+)"', Path(server.__file__).read_text(encoding="utf-8")))
    if name == "flashmoe-mlx":  # the package
        return {"-U"}
    assert name in PARSERS, name
    parser = PARSERS[name if given[:1] != ["verify"] else f"{name} verify"]()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and given:
            assert given[0] in action.choices, given
            parser = action.choices[given[0]]
    return set(parser._option_string_actions)


def test_modules():
    """The file map of CONTRIBUTING.md has a line for each module, and no other."""
    found = re.search(r"## File map\n(.*?)\n## ", text("CONTRIBUTING.md"), re.S)
    assert found
    named: list[str] = []
    for folder, block in re.findall(r"### `([\w/]+)/`\n.*?```\n(.*?)```", found[1], re.S):
        for line in block.splitlines():
            name = line.split()[0]
            assert len(line.split()) > 1, f"{name} does what?"
            named.append(f"{folder}/{name}")
    there = [
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for kind in ("*.py", "*.metal", "*.cuh")
        for path in (ROOT / folder).rglob(kind)
    ]
    assert sorted(named) == sorted(there)


def test_messages_of_troubleshooting_are_the_programs():
    sources = (
        path.read_text(encoding="utf-8") for f in FOLDERS for path in (ROOT / f).glob("*.py")
    )
    said = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # literals that go on on the next line
    rows = re.findall(r"^\| `([^`]+)` \|", text("docs/troubleshooting.md"), re.M)
    assert len(rows) > 10
    for message in rows:
        for part in re.split(r" ?\.\.\. ?|\(manifest\.json|\(Input/output error\)", message):
            assert part.strip() in said, part


def test_predictions_are_those_of_the_plan(capsys):
    quoted = re.findall(r"^decode .*$", text("docs/models.md"), re.M)
    plan.main(["--check"])
    assert capsys.readouterr().out.splitlines()[-1] in text("docs/models.md")
    for model, line in zip(("397b", "122b", "35b"), quoted, strict=True):
        plan.main(f"--model {model} --bits 4 --top-k 4 --machine m3-max-48".split())
        assert line in capsys.readouterr().out
