"""The file of `--tools`: functions, their schema, and values from a call."""

import json
import re

import pytest

from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.cli.tools import Tools, load_tools, parse_call

DOC = '"""Do.\n\n    Args:\n        x: Any\n    """'


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("", r"defines no public function\. Write one"),
        ("def _f(): pass", r"defines no public function\. Write one"),
        ("x = ", r"fails when it is run \(SyntaxError: .*\. Make python .*x\.py work first\.$"),
        ("raise SystemExit(3)", r"fails when it is run \(SystemExit: 3\)"),
        ("def f(x: int): pass", r"x\.py:1: f has no docstring\. Say in one"),
        (f"def f(x):\n    {DOC}", r"x\.py:1: f: parameter x has no type hint\. Write one: str,"),
        (f"def f(x: set):\n    {DOC}", r"type hint <class 'set'>, which JSON cannot carry\. Write"),
        (f"def f(x: Odd):\n    {DOC}", r"(type hints cannot be read|name 'Odd' is not defined)"),
        (f"def f(*x: int):\n    {DOC}", r"\*x: int cannot be given by name\. Name each one\."),
        (f"async def f(x: int):\n    {DOC}", r"f is async\. Write def"),
        (f"def f(y: int):\n    {DOC}", r"no description for the argument 'y'\. Describe each"),
    ],
)
def test_tools_files_that_are_refused(source, error, tmp_path):
    path = tmp_path / "x.py"
    path.write_text(source)
    with pytest.raises(FlashMoEError, match=error) as caught:
        load_tools(path)
    assert str(caught.value).startswith(f"--tools {path}")


def test_a_tools_file_that_does_not_exist(tmp_path):
    with pytest.raises(FlashMoEError, match=r"not a file\. Give a Python file"):
        load_tools(tmp_path)


SOURCE = '''
from enum import Enum
from typing import Literal, Optional

class Colour(Enum):
    RED = "red"
    BLUE = "blue"

def paint(
    colour: Colour, coats: int, thick: float = 1.0, wet: bool = False,
    where: list[str] | None = None, how: Literal["brush", 3] = 3, note: Optional[str] = None,
):
    """Paint a wall.

    Args:
        colour: Colour of the wall
        coats: How often
        thick: In mm
        wet: Whether it is wet
        where: Walls
        how: Tool
        note: Free text
    """
    return [str(colour), coats, thick, wet, where, how, note]
'''


@pytest.fixture(scope="module")
def paint(tmp_path_factory) -> Tools:
    path = tmp_path_factory.mktemp("tools") / "paint.py"
    path.write_text(SOURCE)
    return load_tools(path)


def test_types_become_a_schema(paint):
    (schema,) = paint.schemas
    assert schema["function"].keys() == {"name", "description", "parameters"}
    parameters = schema["function"]["parameters"]
    assert parameters["required"] == ["colour", "coats"]
    kinds = {name: found["type"] for name, found in parameters["properties"].items()}
    assert kinds == {
        "colour": "string", "coats": "integer", "thick": "number", "wet": "boolean",
        "where": "array", "how": ["string", "integer"], "note": "string",
    }  # fmt: skip
    assert parameters["properties"]["colour"]["enum"] == ["red", "blue"]


def test_json_values_become_python_values(paint):
    given = {"colour": "red", "coats": 2, "thick": 3, "where": ["left"], "how": "brush"}
    result = ["Colour.RED", 2, 3.0, False, ["left"], "brush", None]
    assert paint.fault("paint", given) is None
    assert json.loads(paint.run("paint", given)) == result


@pytest.mark.parametrize(
    "wrong",
    [
        {"colour": "green"}, {"coats": True}, {"coats": "2"}, {"coats": None}, {"wet": 1},
        {"where": "left"}, {"where": [1]}, {"how": "hand"}, {"thick": "thin"},
    ],
)  # fmt: skip
def test_values_that_do_not_fit(wrong, paint):
    (name,) = wrong
    fault = paint.fault("paint", {"colour": "red", "coats": 1} | wrong)
    assert fault and re.fullmatch(rf"paint: {name} = .* does not fit its type", fault)


@pytest.mark.parametrize("found", [None, {}, {"name": "f"}, {"name": "f", "arguments": 3}])
def test_a_parser_that_returns_no_call(found):
    with pytest.raises(ValueError):
        parse_call(lambda text, schemas: found, "x", [])
