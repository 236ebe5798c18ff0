"""A session of `flashmoe-chat`: commands, answers, tool calls, Ctrl-C."""

import errno
import io
import re
import signal
import sys

import chat_session as recorder
import pytest

from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.cli import console
from flashmoe_mlx.cli.chat import build_parser
from flashmoe_mlx.cli.chat_session import MOST_ROUNDS, Session, run
from flashmoe_mlx.cli.console import Console
from flashmoe_mlx.cli.conversation import CALL, NORMAL, Answer, Conversation
from flashmoe_mlx.cli.tools import Tools, call_text, load_tools
from flashmoe_mlx.custom_kernels.kept import NOWHERE

TOOLS = recorder.ROOT / recorder.TOOLS


@pytest.fixture(scope="module")
def tools() -> Tools:
    return load_tools(TOOLS)


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


def test_a_compiler_that_ctrl_c_ends_breaks_off(type_in, monkeypatch):
    """MLX's compiler gets the signal as well, and then MLX cannot load what it should write."""

    def struck(self: Conversation, stop):
        self.last = Answer([[NORMAL, "So"]])
        yield NORMAL, "So"
        if self.messages[-1]["content"] == "one":
            signal.raise_signal(signal.SIGINT)
        raise RuntimeError("Could not load C++ shared library")

    monkeypatch.setattr(Scripted, "answer", struck)
    with pytest.raises(RuntimeError, match="Could not load"):  # nobody pressed Ctrl-C
        type_in(["one", "two"], "")


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
