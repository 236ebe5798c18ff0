"""`flashmoe-chat`: what the model sees, tool calls, commands, and a terminal."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import chat_session as recorder
import mlx.core as mx
import pytest
from chat_session import PAGE, PROMPT, Terminal, plain

from flashmoe_mlx import FlashMoEError, load
from flashmoe_mlx.cli import console
from flashmoe_mlx.cli.chat import build_parser
from flashmoe_mlx.cli.chat_session import MOST_ROUNDS, Session, run
from flashmoe_mlx.cli.console import HISTORY, Console
from flashmoe_mlx.cli.conversation import CALL, NORMAL, THINKING, Answer, Conversation
from flashmoe_mlx.cli.tools import Tools, call_text, load_tools, parse_call
from flashmoe_mlx.custom_kernels.kept import NOWHERE, cache_dir
from flashmoe_mlx.loader import BUNDLED_MODEL

COMMAND = [sys.executable, "-m", "flashmoe_mlx.cli.chat"]
TOOLS = recorder.ROOT / recorder.TOOLS
ROUNDING = 1e-4  # relative; a prompt in other chunks gives 1e-6
QUESTIONS = ("What is a library?", "What is a disk?", "What is a file?")


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load(BUNDLED_MODEL)
    with model:
        yield model, tokenizer


@pytest.fixture(scope="module")
def tools() -> Tools:
    return load_tools(TOOLS)


@pytest.fixture
def template(loaded):
    """Set the chat template for one test."""
    tokenizer = loaded[1]
    original = tokenizer.chat_template

    def replace(old: str, new: str) -> None:
        assert old in tokenizer.chat_template
        tokenizer.chat_template = tokenizer.chat_template.replace(old, new)

    yield replace
    tokenizer.chat_template = original


# ---- what the model sees -------------------------------------------------------------------------


def make(loaded, tools: Tools | None = None, **options) -> Conversation:
    schemas = tools.schemas if tools else None
    return Conversation(*loaded, tools=schemas, **{"max_tokens": 12} | options)


def answered(conversation: Conversation, stop=lambda: False) -> Answer:
    for _ in conversation.answer(stop):
        pass
    assert conversation.last
    return conversation.last


def check(conversation: Conversation, loaded) -> Answer:
    """Answer; the tokens are those of a fresh cache, and the caches stand for what was said."""
    fresh = make(loaded, **conversation._generation)
    fresh.tools, fresh.system = conversation.tools, conversation.system
    fresh.messages = list(conversation.messages)
    prompt = loaded[1].apply_chat_template(
        [{"role": "system", "content": fresh.system}] * bool(fresh.system) + fresh.messages,
        tools=fresh.tools or None, add_generation_prompt=True,
    )  # fmt: skip
    found, expected = answered(conversation), answered(fresh)
    assert expected.reused == 0 and found.reused + found.read == len(prompt)
    assert conversation.cache.tokens == prompt + found.tokens
    assert found.tokens == expected.tokens
    for ours, theirs in zip(states(conversation), states(fresh), strict=True):
        error = mx.linalg.norm(ours - theirs) / mx.linalg.norm(theirs)
        assert error.item() < ROUNDING
    return found


def states(conversation: Conversation) -> list[mx.array]:
    """Return all arrays of the caches, without the room for later tokens."""
    arrays = []
    for entry in conversation.cache.entries:
        kept = entry.keys_and_values() if hasattr(entry, "offset") else entry.cache
        arrays += [array.astype(mx.float32).reshape(-1) for array in kept]
    return arrays


def offsets(conversation: Conversation) -> set[int]:
    return {entry.offset for entry in conversation.cache.entries if hasattr(entry, "offset")}


def test_later_turns_read_only_new_text(loaded):
    conversation = make(loaded)
    conversation.system = "You are a helpful assistant."
    for number, question in enumerate(QUESTIONS):
        conversation.say(question)
        before = len(conversation.cache.tokens)
        answer = check(conversation, loaded)
        assert answer.reused == before and (before > 0) == (number > 0)
        conversation.remember()


def test_a_template_that_rewrites_earlier_answers(loaded, template):
    """Qwen's template drops the thoughts of earlier turns."""
    template("assistant\\n<think>\\n\\n</think>\\n\\n' + content", "assistant\\n' + content")

    def asked() -> int:
        return len(conversation.prompt(answer=False))

    conversation, snapshot = make(loaded, Tools({"leave": leave})), 0
    for question in QUESTIONS[:2]:
        conversation.say(question)
        assert check(conversation, loaded).reused == snapshot  # of the turn before
        snapshot = asked()
        conversation.remember([{"name": "leave", "arguments": {"code": 3}}])
        conversation.messages.append({"role": "tool", "content": "{}"})
        assert check(conversation, loaded).reused == snapshot
        conversation.remember()


def test_an_answer_that_is_broken_off_stays(loaded):
    conversation = make(loaded)
    conversation.say(QUESTIONS[0])
    left = iter(range(8))
    answer = answered(conversation, lambda: next(left, None) is None)
    assert answer.stopped and answer.finish is None and answer.tokens
    said = answer.text(NORMAL)
    conversation.remember()
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    conversation.say(QUESTIONS[1])
    assert check(conversation, loaded).reused > 0


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4])
def test_stopped_while_the_prompt_is_read(calls, loaded):
    conversation = make(loaded)
    conversation.say("x " * 20)
    left = iter(range(calls))
    answer = answered(conversation, lambda: next(left, None) is None)
    assert answer.stopped and answer.read + len(answer.tokens) == len(conversation.cache.tokens)
    assert offsets(conversation) == {len(conversation.cache.tokens)}
    conversation.remember()
    conversation.say(QUESTIONS[1])
    check(conversation, loaded)


def test_an_exception_drops_the_caches(loaded):
    def strike() -> bool:
        raise KeyboardInterrupt

    conversation = make(loaded)
    conversation.say(QUESTIONS[0])
    check(conversation, loaded)
    conversation.remember()
    conversation.say(QUESTIONS[1])
    with pytest.raises(KeyboardInterrupt):
        answered(conversation, strike)
    assert conversation.cache.tokens == []
    assert check(conversation, loaded).reused == 0


def test_a_new_system_prompt_and_a_reset(loaded):
    conversation = make(loaded)
    conversation.say(QUESTIONS[0])
    check(conversation, loaded)
    conversation.remember()
    conversation.system = "You are a pirate."
    conversation.say(QUESTIONS[1])
    check(conversation, loaded)
    conversation.reset()
    assert conversation.system == "You are a pirate." and conversation.messages == []
    conversation.say(QUESTIONS[0])
    assert check(conversation, loaded).reused == 0


def test_a_prompt_that_opens_a_thought(loaded, template):
    template(
        "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}",
        "{{- '<|im_start|>assistant\\n<think>\\n' }}",
    )
    conversation = make(loaded, max_tokens=4)
    conversation.say(QUESTIONS[0])
    assert check(conversation, loaded).parts[0][0] == THINKING
    conversation.last = Answer([[THINKING, "Hm.\n"], [NORMAL, "\n\nYes."]])
    conversation.remember()
    assert conversation.messages[-1] == {
        "role": "assistant", "content": "\n\nYes.", "reasoning_content": "Hm.",
    }  # fmt: skip


def test_a_template_that_fails(loaded, template):
    template("{%- if tools %}", "{{- raise_exception('odd') }}{%- if tools %}")
    conversation = make(loaded)
    conversation.say(QUESTIONS[0])
    with pytest.raises(FlashMoEError, match=r"chat template fails .*odd.* Change --chat-template"):
        answered(conversation)


# ---- the session, through a pipe -----------------------------------------------------------------


class Scripted(Conversation):
    """A conversation whose answers are given."""

    answers: tuple[str, ...] = ()
    finish = "stop"

    def answer(self, stop=lambda: False):
        given = [m for m in self.messages if m["role"] == "assistant"]
        text = self.answers[len(given) % len(self.answers)]
        self.last = Answer(finish=self.finish, seconds=(1, 1))
        for index, piece in enumerate(re.split(r"</?tool_call>", text)):
            self.last.parts.append([CALL if index % 2 else NORMAL, piece])
            yield self.last.parts[-1][0], piece
        self.last.closed = text.count("<tool_call>") == text.count("</tool_call>")
        self.messages[0]["seen"] = True


@pytest.fixture
def talk(loaded, monkeypatch, capsys):
    """Run a session on bytes from a pipe; return its output, its notes, and the conversation."""

    def run(typed: bytes, *answers: str, tools: Tools | None = None, finish: str = "stop"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        schemas = tools.schemas if tools else None
        conversation = Scripted(*loaded, tools=schemas)
        conversation.answers, conversation.finish = answers, finish
        Session(*loaded, conversation, tools or Tools()).run()
        return *capsys.readouterr(), conversation

    return run


def call(name: str, **arguments: str) -> str:
    given = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{given}</function>\n</tool_call>"


def results(conversation: Conversation) -> list[str]:
    return [m["content"] for m in conversation.messages if m["role"] == "tool"]


ALARM = call("set_alarm", time="07:30", color="blue")


def test_a_pipe_gets_answers_without_decoration(talk):
    out, notes, conversation = talk(b"one\n\ntwo\r\n/exit\nthree\n", "1", "2")
    assert (out, notes) == ("1\n2\n", "")
    assert [m["content"] for m in conversation.messages] == ["one", "1", "two", "2"]


def test_commands(talk):
    out, notes, conversation = talk(
        b"one\n/system Be brief.\n/system\n/stats\n/help\n/reset\n", "1"
    )
    assert notes == "System prompt: Be brief.\n" * 2 + "The conversation is forgotten.\n"
    for line in ("Experts: ", "Expert cache: ", "Peak memory: ", "Last answer: ", "/reset "):
        assert f"\n{line}" in out
    assert "Conversation: 2 messages, 0 tokens" in out
    assert conversation.messages == [] and conversation.system == "Be brief."


def test_a_message_of_several_lines(talk):
    _, _, conversation = talk(b'"""\n/a\n\n  b\n"""\n"""c"""\n', "1")
    assert [m["content"] for m in conversation.messages][::2] == ["/a\n\n  b", "c"]


@pytest.mark.parametrize(
    ("typed", "error"),
    [
        (b"/quit now\n", r'^/quit is not a command. Type /help .* between two lines of """.$'),
        (b'"""\nnever closed\n', r'^the input ends before the closing """. Add it.$'),
        (b"fine\n\xff\xfe\n", r"^line 2 of standard input is not UTF-8. Give UTF-8 text.$"),
    ],
)
def test_bad_input_ends_a_script(typed, error, talk):
    with pytest.raises(FlashMoEError, match=error):
        talk(typed, "1")


def test_calls_are_asked_for_one_by_one(talk, tools):
    two = f"First.{ALARM}\n{call('book_hotel', city='Oslo', date='2027-01-02')}"
    out, notes, conversation = talk(b"go\ny\nno\n", two, "Done.", tools=tools)
    assert out == "First.\n\nDone.\n"
    assert 'call set_alarm(time="07:30", color="blue")? [y/N]\n' in notes
    assert 'call book_hotel(city="Oslo", date="2027-01-02")? [y/N]\n' in notes
    assert results(conversation) == [
        '{"time": "07:30", "color": "blue"}',
        "The user declined this call.",
    ]
    first = conversation.messages[1]
    assert first["content"] == "First.\n"
    assert [c["function"]["name"] for c in first["tool_calls"]] == ["set_alarm", "book_hotel"]
    assert notes.startswith("The model may ask to call: book_hotel, get_weather, set_alarm. ")


def test_a_script_that_ends_declines(talk, tools):
    assert results(talk(b"go\n", ALARM, "Done.", tools=tools)[2]) == [
        "The user declined this call."
    ]


def fail(text: str) -> str:
    """Fail.

    Args:
        text: Why
    """
    raise ValueError(f"because of {text}")


def leave(code: int) -> str:
    """Leave.

    Args:
        code: Exit code
    """
    sys.exit(code)


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        (call("fail", text="rain"), 'Error: ValueError: because of rain'),
        (call("leave", code="3"), 'Error: SystemExit: 3'),
        (call("fly"), 'Error: there is no function fly. Choose among fail, leave.'),
        (call("fail"), 'Error: fail: missing a required argument: \'text\''),
        (call("leave", code="1", why="x"), r'Error: leave: got an unexpected keyword '
         "argument 'why'"),
        (call("leave", code="null"), 'Error: leave: code = null does not fit its type'),
        (call("leave", code="three"), r'Error: The model.s tool call cannot be read \(.*three'),
        ("<tool_call>hello</tool_call>", r'Error: The model.s tool call cannot be read \('),
        ("<tool_call>\n<function=fail>", r'Error: The model.s tool call has no </tool_call>'),
    ],
)  # fmt: skip
def test_calls_that_fail_are_reported_to_the_model(answer, result, talk):
    tools = Tools({"fail": fail, "leave": leave})
    typed = b"go\ny\n" if result.startswith(("Error: Val", "Error: Sys")) else b"go\n"
    out, notes, conversation = talk(typed, answer, "Well.", tools=tools)
    (found,) = results(conversation)
    assert found == result or re.match(result, found)
    assert out == "Well.\n" and "Traceback" not in notes
    prompt = conversation.prompt()  # the template takes it
    if "cannot be read" in found:  # and the model sees what it wrote
        assert answer in conversation._tokenizer.decode(prompt)


def test_a_call_that_is_cut_off_ends_the_turn(talk, tools):
    answer = "<tool_call>\n<function=fail>"
    _, notes, conversation = talk(b"go\n", answer, tools=tools, finish="length")
    assert notes.endswith("(cut off by --max-tokens)\n")
    assert [m["content"] for m in conversation.messages] == ["go", answer]


def test_rounds_of_calls_end(talk, tools):
    _, notes, conversation = talk(b"go\n" + b"y\n" * MOST_ROUNDS, ALARM, tools=tools)
    assert len(results(conversation)) == MOST_ROUNDS
    assert notes.endswith(f"The turn ends after {MOST_ROUNDS} rounds of tool calls.\n")


def test_without_tools_a_call_is_text(talk):
    out, _, conversation = talk(b"go\n", f"See:{ALARM}")
    assert "set_alarm" in out and results(conversation) == []
    assert conversation.messages[1]["content"] == f"See:{ALARM}"


def test_a_call_shows_no_control_characters():
    text = call_text("f", {"x": 'a"\n\x1b[2K\x9b', "n": 1.5, "many": ["é", True]})
    assert text == r'f(x="a\"\n\u001b[2K\x9b", n=1.5, many=["é", true])'


# ---- the session, at a terminal ------------------------------------------------------------------

CTRL_C = KeyboardInterrupt


@pytest.fixture
def type_in(talk, monkeypatch):
    """Run a session on lines that a user types; an exception stands for a key."""

    def run(typed: list, *answers: str, tools: Tools | None = None):
        lines = iter([*typed, EOFError])

        def read(prompt: str) -> str:
            if isinstance(line := next(lines), str):
                return line
            raise line

        def as_terminal(self: Console) -> None:
            self.terminal, self._colour, self._lines = True, False, 0

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(Console, "__init__", as_terminal)
        monkeypatch.setattr(Console, "_waiting", lambda self: False)
        monkeypatch.setattr(console, "cache_dir", lambda: NOWHERE)
        return talk(b"", *answers, tools=tools)

    return run


def test_ctrl_c_at_a_question_ends_the_turn(type_in, tools):
    two = f"{ALARM}{ALARM}"
    out, _, conversation = type_in(["go", CTRL_C, "on"], two, "Yes.", tools=tools)
    assert results(conversation) == [
        "Error: the user interrupted this call",
        "The user declined this call.",
    ]
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["go", "on"]
    assert out.endswith("Yes.\n\n")  # Ctrl-D ends the line of the prompt


def test_ctrl_c_twice_leaves_and_once_does_not(type_in):
    out, _, conversation = type_in(["one", CTRL_C, "two", CTRL_C, "three"], "1", "2", "3")
    assert out.count("Press Ctrl-C again to leave.") == 2
    assert [m["content"] for m in conversation.messages] == ["one", "1", "two", "2", "three", "3"]
    with pytest.raises(KeyboardInterrupt):
        type_in(["one", CTRL_C, CTRL_C, "two"], "1")


def test_a_second_ctrl_c_breaks_off_at_once(type_in, monkeypatch):
    def struck(self: Conversation, stop):
        self.last = Answer([[NORMAL, "So"]])
        yield NORMAL, "So"
        signal.raise_signal(signal.SIGINT)
        assert stop()
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second Ctrl-C raises")

    monkeypatch.setattr(Scripted, "answer", struck)
    before = signal.getsignal(signal.SIGINT)
    out, _, conversation = type_in(["one", "two"], "")
    assert out.count("So\n(broken off)\n") == 2
    assert [m["content"] for m in conversation.messages] == ["one", "So", "two", "So"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EIO, "Input/output error", "x"), "x: Input/output error. The disk failed"),
        (MemoryError(), "memory is short (MemoryError). Close other programs, or type /reset."),
    ],
)
def test_an_answer_that_fails_was_not_asked_for(error, sentence, type_in, monkeypatch):
    def failing(self: Conversation, stop):
        if len(self.messages) == 1:
            self.last = Answer()
            raise error
        yield from ()

    monkeypatch.setattr(Scripted, "answer", failing)
    out, _, conversation = type_in(["one"], "")
    assert f"\n{sentence}" in out and conversation.messages == []


def test_a_bug_keeps_its_traceback(type_in, monkeypatch):
    def failing(self: Conversation, stop):
        raise TypeError("ours")
        yield

    monkeypatch.setattr(Scripted, "answer", failing)
    with pytest.raises(TypeError, match="ours"):
        type_in(["one"], "")


def test_a_closed_input_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(FlashMoEError, match="standard input is closed"):
        run(build_parser().parse_args([]))


# ---- the tools file ------------------------------------------------------------------------------

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


# ---- in a terminal -------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path) -> str:
    """A cache folder with the compiled kernels, and without the user's history."""
    (tmp_path / "flashmoe-mlx").mkdir()
    for path in cache_dir().glob("*"):
        if path.name != HISTORY:
            (tmp_path / "flashmoe-mlx" / path.name).symlink_to(path)
    return str(tmp_path)


@pytest.fixture
def terminal(home):
    """Start the command in a pseudo-terminal."""
    started = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal([*COMMAND, *arguments], XDG_CACHE_HOME=home))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_the_page_shows_a_session(home):
    """Besides the model's own words: a call made, one declined, /reset, /exit."""
    page = PAGE.read_text(encoding="utf-8")
    block = re.search(r"```console\n\$ (.*?)\n(.*?)```\n", page, re.S)
    assert block and block[1].split() == recorder.COMMAND
    shown = recorder.record(recorder.COMMAND[1:], XDG_CACHE_HOME=home)

    def fixed(text: str) -> list[str]:
        return [x for x in text.splitlines() if x.startswith((PROMPT, "call ", "{", "/help"))]

    assert fixed(block[2]) == fixed(shown)
    assert len(fixed(shown)) == len(recorder.TYPED) + 2
    example = re.search(r"```python\n(.*?)```\n", page, re.S)
    assert example and example[1] in TOOLS.read_text(encoding="utf-8")
    kept = Path(home, "flashmoe-mlx", HISTORY).read_text(encoding="utf-8").splitlines()
    assert kept == [keys for before, keys in recorder.TYPED if before == PROMPT]


def test_a_terminal(terminal):
    """Ctrl-C during an answer, another turn, paste, a narrow window, bad bytes, Ctrl-D."""
    # At this temperature answers go on and on.
    chat = terminal("--temp", "9", "--max-tokens", "-1", "--seed", "1")
    chat.wait_for(PROMPT)
    chat.type("What is a library?\n")
    chat.wait_for("[flashmoe] ")  # the status line
    chat.resize(40)
    chat.wait_for("[flashmoe] ")
    chat.type("\x03")
    chat.wait_for("(broken off)")
    chat.wait_for(PROMPT)
    chat.type("\x1b[200~two\nlines\x1b[201~\n")
    chat.wait_for("[flashmoe] ")
    chat.type("\x03")
    chat.wait_for("(broken off)")
    chat.wait_for(PROMPT)
    chat.type("/stats\n")
    assert re.search(r"Conversation: 4 messages, \d\d+ tokens", plain(chat.wait_for(PROMPT)))
    chat.type("/what\n")
    assert "/what is not a command." in plain(chat.wait_for(PROMPT))
    chat.type(b"\xff\xfe\n")
    chat.wait_for("is not UTF-8")
    chat.wait_for(PROMPT)
    chat.type(b"\x1b[200~" + b"pasted\r" * 300 + b"\x1b[201~\x03")  # the paste stays whole
    chat.type("\n")
    chat.wait_for("Press Ctrl-C again to leave.")
    chat.wait_for(PROMPT)
    chat.type("/reset\n")
    chat.wait_for("forgotten")
    chat.wait_for(PROMPT)
    chat.type("half a li")
    chat.wait_for("half a li")
    chat.type("\x03")
    chat.type("\n")  # readline notices Ctrl-C at the next key if it was busy with the last one
    chat.wait_for("Press Ctrl-C again to leave.")
    chat.wait_for(PROMPT)
    chat.type("\x04")
    assert chat.end() == 0
    assert "Traceback" not in chat.shown.decode(errors="replace")


def broken(folder: Path) -> None:
    folder.write_text("a file in the place of the folder")


def pipe(folder: Path) -> None:
    folder.mkdir()
    os.mkfifo(folder / HISTORY)


def garbage(folder: Path) -> None:
    folder.mkdir()
    (folder / HISTORY).write_bytes(b"\xff\x00\n" * 9)


def nowhere(folder: Path) -> None:
    folder.symlink_to(NOWHERE)


@pytest.mark.parametrize("make_folder", [broken, pipe, garbage, nowhere])
def test_a_broken_history_is_done_without(make_folder, tmp_path, monkeypatch):
    make_folder(tmp_path / "cache")
    monkeypatch.setattr(console, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    talking = Console()
    talking.terminal = True
    with talking.history():
        done = True
    assert done


def test_help_is_fast_because_it_imports_little():
    code = (
        "import sys\nfrom flashmoe_mlx.cli.chat import build_parser\nbuild_parser()\n"
        "print([m for m in ('mlx_lm', 'transformers', 'numba') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_options_are_checked(capsys):
    for wrong in (["--temp", "-1"], ["--max-tokens", "0"], ["--top-p", "2"], ["--seed", "x"]):
        with pytest.raises(SystemExit):
            build_parser().parse_args(wrong)
        assert wrong[0] in capsys.readouterr().err
