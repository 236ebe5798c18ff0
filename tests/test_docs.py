"""The documents name existing files, links, commands, options and modules."""

import argparse
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlx_lm import server

from flashmoe_mlx.bench import main as bench
from flashmoe_mlx.cli import chat, doctor, plan
from flashmoe_mlx.cli.generate import build_parser as generate_parser
from flashmoe_mlx.cli.generate import main as generate_main
from flashmoe_mlx.cli.options import UNSUPPORTED
from flashmoe_mlx.cli.plan_model import SYSTEM_BYTES
from flashmoe_mlx.convert import cli
from flashmoe_mlx.errors import FlashMoEError
from flashmoe_mlx.settings import StreamConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("dev/**/*.md"),
        ROOT / "tests/metal_cpu/README.md",
    )
)
LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
BLOCK = re.compile(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", re.S | re.M)
# A path in this repository, starting with one of its folders.
FILE = re.compile(
    r"(?:flashmoe_mlx|custom_kernels|convert|tools|(?<!/)dev|tests|docs|\.ci)/[\w./*-]*"
)
VALUES = {"buffered", "custom", "direct", "off"}  # settings, in their table
MOST_WORDS = 900  # in the README, besides code
FOLDERS = "flashmoe_mlx", "custom_kernels", "convert", "tools", "dev"
PARSERS = {
    "flashmoe-generate": generate_parser,
    "flashmoe-chat": chat.build_parser,
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
    """Return GitHub's anchors of the headings."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", markdown), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files(document):
    for span in SPAN.findall(BLOCK.sub("", text(document))):
        for name in FILE.findall(span):
            assert list(ROOT.glob(name.rstrip("./"))), name


def commands(markdown: str) -> Iterator[list[str]]:
    """Yield our commands in code blocks, as words."""
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
    """Return the options of a command, or of its subcommand."""
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


def test_folders():
    """The map in CONTRIBUTING.md has exactly one line per folder of code."""
    found = re.search(r"## Map of the code\n(.*?)\n## ", text("CONTRIBUTING.md"), re.S)
    assert found
    named = re.findall(r"^\| `([\w/]+)/` \| ", found[1], re.M)
    there = {
        path.parent.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sorted(named) == sorted(there)


def test_quoted_messages_exist_in_the_source():
    sources = (
        path.read_text(encoding="utf-8") for f in FOLDERS for path in (ROOT / f).rglob("*.py")
    )
    said = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # implicitly concatenated literals
    rows = re.findall(r"^\| `([^`]+)` \|", text("docs/guides/troubleshooting.md"), re.M)
    assert len(rows) > 10
    for message in rows:
        for part in re.split(r" ?\.\.\. ?|\(manifest\.json|\(Input/output error\)", message):
            assert part.strip() in said, part


def test_the_quoted_prediction_is_flashmoe_plans(capsys):
    (quoted,) = re.findall(r"^decode .*$", text("docs/guides/large-models.md"), re.M)
    plan.main(["--check"])
    assert capsys.readouterr().out.splitlines()[-1] in text("docs/guides/large-models.md")
    plan.main(["--model", "397b", "--bits", "4", "--top-k", "4", "--machine", "m3-max-48"])
    assert quoted in capsys.readouterr().out


def tables(markdown: str) -> list[list[list[str]]]:
    """Return the cells of tables with an empty upper left cell, by row, headings first."""
    found = re.findall(r"^(\| \|.*\n)\|[-|]+\|\n((?:\|.*\n)+)", markdown, re.M)
    lines = [[heading, *body.splitlines()] for heading, body in found]
    return [[[c.strip(" `") for c in row.strip()[1:-1].split("|")] for row in t] for t in lines]


def planned(flags: str) -> dict:
    return plan.plan(plan.build_parser().parse_args(flags.split()))


def needs(model: str, bits: int) -> list[float]:
    """Return GB: the least memory, the memory for all experts, and the disk space."""
    found = planned(f"{model} --bits {bits} --machine m5-max-128")
    trunk, experts, token = (found[f"{n}_bytes"] / 1e9 for n in ("trunk", "expert", "token"))
    system = SYSTEM_BYTES / 1e9
    return [system + trunk + token, system + trunk + experts, trunk + experts]


def speed(flags: str) -> str:
    """Return tokens/s and the cache in GB, in the format of docs/guides/large-models.md."""
    try:
        found = planned(flags)
    except FlashMoEError:
        return "too small"
    size = brief(found["chosen"]["bank"] / 1e9)
    return (
        f"{brief(found['decode_tokens_per_s'])} "
        f"({'all' if found['chosen']['bank_hits'] == 1 else size})"
    )


def brief(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def test_tables_of_models_are_flashmoe_plans():
    sizes, room, speeds = tables(text("docs/guides/large-models.md"))
    assert [row[0] for row in sizes[2:]] == [
        "experts on disk, 4-bit / 2-bit",
        "expert bytes per token, 4-bit, trained top-k",
    ]
    for column, model in enumerate(("397b", "122b", "35b"), 1):
        four, two = (planned(f"--model {model} --bits {b} --machine m5-max-128") for b in (4, 2))
        experts = f"{four['expert_bytes'] / 1e9:.0f} / {two['expert_bytes'] / 1e9:.0f} GB"
        token = f"{four['token_bytes'] / 1e9:.2f} GB"
        assert [row[column] for row in sizes[2:]] == [experts, token]
    for column, model in enumerate(room[0][1:], 1):
        expected = zip(needs(model, 4), needs(model, 2), strict=True)
        cells = [f"{brief(four)} ({brief(two)}) GB" for four, two in expected]
        assert [row[column] for row in room[1:]] == cells
    for flags, *cells in speeds[1:]:
        assert cells == [speed(f"{model} {flags}") for model in speeds[0][1:]], flags


def test_help_hides_unsupported_options():
    for name in UNSUPPORTED:
        assert f"--{name.replace('_', '-')}" in generate_parser()._option_string_actions
        assert f"--{name.replace('_', '-')}" not in generate_parser().format_help()


def test_sample_output_of_the_readme(capsys):
    """The command prints this output, except for the figures."""
    (_, commands), (_, shown) = BLOCK.findall(text("README.md"))[:2]
    command, *arguments = words(commands.split("&& .venv/bin/")[-1])
    assert command == "flashmoe-generate"
    generate_main(arguments)
    said = capsys.readouterr().out
    assert said.splitlines()[0] == shown.splitlines()[0]  # the answer, to the letter
    assert without_figures(said) == without_figures(shown)


def test_second_command_of_the_readme_runs_the_tests():
    """The first two sh blocks run unchanged, and .ci/run evaluates the second."""
    _, second, *_ = (block for kind, block in BLOCK.findall(text("README.md")) if kind == "sh")
    assert second == (
        'python3 -m venv .venv && .venv/bin/pip install -q -e ".[cpu,test]" && .venv/bin/pytest\n'
    )


def test_readme_is_short():
    assert len(BLOCK.sub("", text("README.md")).split()) <= MOST_WORDS


def without_figures(output: str) -> list[str]:
    output = re.sub(r", waited [\d.]+ s", "", output)  # left out if it rounds to zero
    return re.sub(r"\d+(\.\d+)?", "0", output).splitlines()


def columns_of(document: str, heading: str, count: int) -> list[str]:
    """Return the first `count` columns of the table with a heading, each as one text."""
    head = rf"^\| {heading} \|.*\n\|[-|]+\n((?:\|.*\n)+)"
    body = re.search(head, text(document), re.M)
    assert body
    rows = (row.split("|")[1 : count + 1] for row in body[1].splitlines())
    return [" ".join(column) for column in zip(*rows, strict=True)]


def test_options_of_the_readme_are_those_of_generate():
    (flags,) = columns_of("README.md", "Option", 1)
    assert sorted(re.findall(r"--[\w-]+", flags)) == streaming_options()


def streaming_options() -> list[str]:
    streaming = next(g for g in generate_parser()._action_groups if g.title == "streaming")
    return sorted(a.option_strings[0] for a in streaming._group_actions)


def test_settings_table():
    """The table has exactly the settings, each in its three forms."""
    columns = columns_of("docs/reference/settings.md", "`flashmoe-generate`", 3)
    flags, variables, entries = (re.findall(r"(?<=`)[\w-]+", column) for column in columns)
    assert sorted(set(flags) - VALUES) == streaming_options()
    fields = [field.name for field in dataclasses.fields(StreamConfig)]
    assert sorted(entries) == sorted(fields)
    sources = [
        path.read_text(encoding="utf-8") for f in FOLDERS for path in (ROOT / f).rglob("*.py")
    ]
    # FLASHMOE_DEBUG_ is for developers: CONTRIBUTING.md.
    named = set(re.findall(r"\bFLASHMOE_(?!DEBUG_)[A-Z]\w*", "".join(sources)))
    assert set(variables) - VALUES == named | {f"FLASHMOE_{name.upper()}" for name in fields}
