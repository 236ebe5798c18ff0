"""Functions of a user's file that the model may call: their JSON schemas, and their calls.

Loading the file runs it: it is the user's own code.
"""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
)

from ..errors import FlashMoEError

Function = Callable[..., Any]
SCALARS = (str, int, float, bool, NoneType)
HINTS = "str, int, float, bool, list[...], Literal, an Enum, or one of them | None"
SPREAD = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Tools:
    """The functions on offer.

    Attributes:
        functions: by name.
        schemas: what the chat template shows the model.
    """

    def __init__(self, functions: dict[str, Function] | None = None, path: str = "") -> None:
        """Describe functions; `path` is their file, for error messages.

        Raises:
            FlashMoEError: a function cannot be described.
        """
        self.functions = functions or {}
        self.schemas = [_schema(path, function) for function in self.functions.values()]

    def run(self, name: str, arguments: dict[str, Any]) -> str:
        """Call a function; return its result, or the error, as text for the model."""
        try:
            function = self.functions[name]
            result = function(**_fitted_arguments(function, arguments))
            return result if isinstance(result, str) else _as_json(result)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit: the function is not ours
            return failure(f"{type(error).__name__}: {error}")

    def fault(self, name: str, arguments: dict[str, Any]) -> str | None:
        """Say why a call cannot be made, or return None."""
        if name not in self.functions:
            return f"there is no function {name}. Choose among {', '.join(self.functions)}."
        try:
            _fitted_arguments(self.functions[name], arguments)
        except (TypeError, ValueError) as error:
            return f"{name}: {error}"
        return None


def load_tools(path: Path) -> Tools:
    """Run a Python file, and offer its public functions.

    Raises:
        FlashMoEError: it cannot be run, has no public function, or one cannot be described.
    """
    module = _run(path)
    functions: dict[str, Function] = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }
    if not functions:
        raise FlashMoEError(
            f"--tools {path}: defines no public function. Write one whose name does not begin "
            "with an underscore."
        )
    return Tools(functions, str(path))


def failure(text: str) -> str:
    """Return the result of a call that was not made or failed, for the model."""
    return f"Error: {text}"


def call_text(name: str, arguments: dict[str, Any]) -> str:
    """Write a call as in Python, with control characters escaped."""
    given = ", ".join(f"{key}={_as_json(value)}" for key, value in arguments.items())
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in f"{name}({given})"
    )


def parse_call(parser: Callable[..., Any], text: str, schemas: list[Any]) -> list[dict[str, Any]]:
    """Parse the text of a tool call: {"name", "arguments"} of each call in it.

    Args:
        parser: mlx-lm's, from the tokenizer.
        text: between the marks of a call.
        schemas: of all functions, which tell the arguments' types.

    Raises:
        ValueError: it is not a call.
    """
    try:
        found = parser(text, schemas)
        calls = found if isinstance(found, list) else [found]
        return [{"name": str(c["name"]), "arguments": dict(c["arguments"])} for c in calls]
    except Exception as error:  # a parser can raise any
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise FlashMoEError(f"--tools {path}: not a file. Give a Python file with functions.")
    name = "flashmoe_chat_tools"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FlashMoEError(f"--tools {path}: not a Python file. Its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # type hints written as text are looked up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise FlashMoEError(
            f"--tools {path}: fails when it is run ({type(error).__name__}: {error}). "
            f"Make python {path} work first."
        ) from error
    return module


def _schema(path: str, function: Function) -> dict[str, Any]:
    """Return a function's schema, in the form that chat templates expect."""
    place = f"--tools {path}:{function.__code__.co_firstlineno}: {function.__name__}"
    if not inspect.getdoc(function):
        raise FlashMoEError(
            f"{place} has no docstring. Say in one what it does, and describe each parameter "
            "under Args:, or begin its name with an underscore."
        )
    if inspect.iscoroutinefunction(function):
        raise FlashMoEError(f"{place} is async. Write def, and asyncio.run(...) inside it.")
    _check_parameters(place, function)
    try:
        schema = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
        raise FlashMoEError(
            f"{place}: {error}. Describe each parameter under Args: in the docstring, as in "
            "city: Name of the city."
        ) from error
    schema["function"].pop("return", None)  # models are not trained on it
    return schema


def _check_parameters(place: str, function: Function) -> None:
    hints = _hints(place, function)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in SPREAD or parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise FlashMoEError(f"{place}: {parameter} cannot be given by name. Name each one.")
        if name not in hints:
            raise FlashMoEError(f"{place}: parameter {name} has no type hint. Write one: {HINTS}.")
        if not _supported(hints[name]):
            raise FlashMoEError(
                f"{place}: parameter {name} has the type hint {hints[name]}, which JSON cannot "
                f"carry. Write {HINTS}."
            )


def _hints(place: str, function: Function) -> dict[str, Any]:
    try:
        return get_type_hints(function)
    except Exception as error:  # they are expressions
        raise FlashMoEError(
            f"{place}: its type hints cannot be read ({error}). Write {HINTS}."
        ) from error


def _supported(hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType, list):
        return all(_supported(part) for part in parts)
    if origin is Literal:
        return all(isinstance(part, SCALARS) for part in parts)
    return hint in (*SCALARS, list) or (isinstance(hint, type) and issubclass(hint, Enum))


def _fitted_arguments(function: Function, arguments: dict[str, Any]) -> dict[str, Any]:
    """Convert JSON values to a function's types.

    Raises:
        TypeError: an argument is missing, or unknown.
        ValueError: a value does not fit its type.
    """
    inspect.signature(function).bind(**arguments)
    hints = get_type_hints(function)
    fitted = {}
    for name, value in arguments.items():
        try:
            fitted[name] = _fitted(value, hints[name])
        except ValueError as error:
            raise ValueError(f"{name} = {_as_json(value)} does not fit its type") from error
    return fitted


def _fitted(value: Any, hint: Any) -> Any:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_fit(value, parts)
    if origin is Literal:
        fits = any(value == part and type(value) is type(part) for part in parts)
    elif origin is list:
        if isinstance(value, list):
            return [_fitted(item, parts[0]) for item in value]
        fits = False
    elif issubclass(hint, Enum):
        return hint(value)
    elif hint is float and type(value) is int:
        return float(value)
    else:
        fits = type(value) is hint  # True is no int
    if not fits:
        raise ValueError
    return value


def _first_fit(value: Any, hints: tuple[Any, ...]) -> Any:
    for hint in hints:
        try:
            return _fitted(value, hint)
        except ValueError:
            continue
    raise ValueError


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
