"""A session of `flashmoe-chat`: reads messages, shows answers, asks before tool calls."""

import argparse
import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from ..commands import sentence
from ..errors import FlashMoEError
from ..loader import BUNDLED_MODEL, load
from ..profile.stats import TokenTimes
from ..store.memory import peak_bytes
from .console import DIM, RED, Console
from .conversation import CALL, NORMAL, THINKING, Answer, Conversation
from .live import Live
from .options import chat_options
from .streaming_options import streaming
from .tools import Tools, call_text, failure, load_tools, parse_call

MOST_ROUNDS = 8  # of tool calls in one turn
DECLINED = "The user declined this call."
INTERRUPTED = failure("the user interrupted this call")
HELP = '''\
/stats        expert reads, cache, memory, tokens and speed
/reset        forget the conversation
/system TEXT  set the system prompt; without TEXT, show it
/exit         leave (also Ctrl-D, or Ctrl-C twice)
"""           begins and ends a message of several lines
Ctrl-C        breaks off an answer; pressed again, at once'''


def run(args: argparse.Namespace) -> None:
    """Load what the arguments name, and talk until the input ends.

    Raises:
        FlashMoEError: an argument, the model or the tools file is unusable; or a line is, if
            input is a pipe.
    """
    if sys.stdin is None:
        raise FlashMoEError("standard input is closed. Give a terminal, a pipe or a file.")
    template = chat_options(args.chat_template_config)
    tools = load_tools(args.tools) if args.tools else Tools()
    if args.seed is not None:
        mx.random.seed(args.seed)
    trust = {"trust_remote_code": True} if args.trust_remote_code else {}
    place = BUNDLED_MODEL if args.model is None else args.model
    model, tokenizer = load(place, **streaming(args), tokenizer_config=trust)
    with model:
        _check_template(place, tokenizer, tools)
        conversation = Conversation(
            model, tokenizer, tools=tools.schemas, template=template, max_tokens=args.max_tokens,
            sampler=make_sampler(args.temp, args.top_p),
        )  # fmt: skip
        conversation.system = args.system_prompt
        Session(model, tokenizer, conversation, tools).run()


def _check_template(place: object, tokenizer: Any, tools: Tools) -> None:
    if not tokenizer.has_chat_template:
        raise FlashMoEError(
            f"{place}: its tokenizer has no chat template. Choose a model that was trained to "
            "chat, or continue text with flashmoe-generate --ignore-chat-template."
        )
    if tools.functions and not tokenizer.has_tool_calling:
        raise FlashMoEError(
            f"--tools: mlx-lm finds no tool calls in the chat template of {place}. Leave --tools "
            "out, or choose another model."
        )


class Session:
    """Talks with one user."""

    def __init__(
        self, model: Any, tokenizer: Any, conversation: Conversation, tools: Tools
    ) -> None:
        """Take what `run` loaded."""
        self._model, self._tokenizer = model, tokenizer
        self._conversation, self._tools = conversation, tools
        self._console = Console()
        # Tool calls are shown as questions; without tools they are only text.
        self._styles = {NORMAL: "", THINKING: DIM} | ({} if tools.functions else {CALL: ""})

    def run(self) -> None:
        """Answer messages until the input ends or the user leaves."""
        if names := ", ".join(self._tools.functions):
            self._console.note(f"The model may ask to call: {names}. You decide about each call.")
        if self._console.terminal:
            self._console.note("/help lists the commands; Ctrl-D leaves.")
        with self._console.history():
            while (message := self._next()) is not None:
                if not self._handle(*message):
                    return
            if self._console.terminal:
                self._console.line()  # the shell's prompt begins a line

    def _next(self) -> tuple[str, bool] | None:
        """Return the next message; on a terminal, survive one Ctrl-C and unreadable lines."""
        interrupted = False
        while True:
            try:
                return self._console.message()
            except FlashMoEError as error:
                self._complain(error)
            except KeyboardInterrupt:
                if interrupted or not self._console.terminal:
                    raise
                interrupted = True
                self._console.note("\nPress Ctrl-C again to leave.")

    def _handle(self, text: str, quoted: bool) -> bool:
        """Obey a command or answer a message; return False to leave."""
        if not text.strip():
            return True
        if quoted or not text.startswith("/"):
            self._turn(text)
            return True
        name, _, rest = text.partition(" ")
        if name == "/exit":
            return False
        commands = {
            "/help": lambda: self._console.line(HELP),
            "/stats": self._stats,
            "/reset": self._reset,
            "/system": lambda: self._system(rest.strip()),
        }
        if command := commands.get(name.strip()):
            command()
        else:
            self._complain(FlashMoEError(
                f"{name.split()[0]} is not a command. Type /help for the list; to say something "
                'that begins with /, put it between two lines of """.'
            ))  # fmt: skip
        return True

    def _complain(self, error: Exception) -> None:
        """Show an error on a terminal; end a script with it."""
        if not self._console.terminal:
            raise error
        if (said := sentence(error, "Close other programs, or type /reset.")) is None:
            raise error
        self._console.note(said, RED)

    # ---- commands --------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._conversation.reset()
        self._console.note("The conversation is forgotten.")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
        self._console.note(f"System prompt: {self._conversation.system or 'none'}")

    def _stats(self) -> None:
        conversation, last = self._conversation, self._conversation.last
        lines = [
            str(self._model.expert_stats()),
            str(self._model.expert_cache()),
            f"Peak memory: {peak_bytes() / 2**20:.0f} MiB resident",
            f"Conversation: {len(conversation.messages)} messages, "
            f"{len(conversation.cache.tokens)} tokens in the prompt cache",
        ]
        if last:
            lines += [
                f"Last prompt: {last.read} tokens in {last.seconds[0]:.2f} s, and "
                f"{last.reused} from the prompt cache",
                f"Last answer: {len(last.tokens)} tokens, {last.speed():.1f} tokens/s",
            ]
        self._console.line("\n".join(lines))

    # ---- answers ---------------------------------------------------------------------------------

    def _turn(self, text: str) -> None:
        """Answer a message, with rounds of tool calls. If that fails, it was never said."""
        messages = self._conversation.messages
        before = len(messages)
        self._conversation.say(text)
        try:
            for _ in range(MOST_ROUNDS):
                if not self._round():
                    return
        except Exception as error:
            del messages[before:]
            self._complain(error)
            return
        self._console.note(f"The turn ends after {MOST_ROUNDS} rounds of tool calls.")

    def _round(self) -> bool:
        """Show an answer and make its calls; return whether the model is to see results."""
        answer = self._show()
        calls, unread, faults = self._read_calls(answer)
        self._conversation.remember(calls, unread)
        for fault in faults:
            self._console.note(fault)
            self._conversation.messages.append({"role": "tool", "content": failure(fault)})
        return self._make(calls) and bool(calls or faults)

    def _show(self) -> Answer:
        """Print an answer while it is generated. Ctrl-C breaks it off."""
        console, conversation = self._console, self._conversation
        watched = console.terminal and sys.stderr.isatty()
        times = TokenTimes(len(conversation.prompt()) if watched else 0)
        live = Live(times, self._model.expert_stats) if watched else None
        try:
            with _breaking_off(console.terminal) as stop, contextlib.ExitStack() as stack:
                pieces = stack.enter_context(contextlib.closing(conversation.answer(stop)))
                if live:
                    stack.enter_context(live.shown())
                for kind, text in pieces:
                    if kind in self._styles:
                        console.write(text, self._styles[kind])
                    if live:
                        times.note()
                        live.note()
        except (KeyboardInterrupt, RuntimeError) as error:
            # Ctrl-C also ends a compiler that MLX has started, and MLX raises a RuntimeError.
            pressed = isinstance(error, KeyboardInterrupt) or stop()
            if not (pressed and console.terminal and conversation.last):
                raise
            conversation.last.stopped = True
        assert conversation.last
        self._finish(conversation.last)
        return conversation.last

    def _finish(self, answer: Answer) -> None:
        shown = any(text.strip() for kind, text in answer.parts if kind in self._styles)
        if shown or all(kind != CALL for kind, _ in answer.parts):  # a script counts lines
            self._console.line()
        if answer.stopped:
            self._console.note("(broken off)")
        elif answer.finish == "length":
            self._console.note("(cut off by --max-tokens)")

    # ---- tool calls ------------------------------------------------------------------------------

    def _read_calls(self, answer: Answer) -> tuple[list[dict[str, Any]], str, list[str]]:
        """Return an answer's calls, the text of those that cannot be read, and the faults."""
        calls: list[dict[str, Any]] = []
        unread, faults = "", list[str]()
        start, end = self._tokenizer.tool_call_start, self._tokenizer.tool_call_end
        for text in answer.calls():
            if answer.stopped or not self._tools.functions:
                unread += f"{start}{text}{end}"
                continue
            try:
                calls += parse_call(self._tokenizer.tool_parser, text, self._tools.schemas)
            except ValueError as error:
                unread += f"{start}{text}{end}"
                faults.append(f"The model's tool call cannot be read ({error}).")
        if cut := answer.cut_call():
            unread += f"{start}{cut}"
            if answer.finish == "stop" and self._tools.functions:
                faults.append(f"The model's tool call has no {end}.")
        return calls, unread, faults

    def _make(self, calls: list[dict[str, Any]]) -> bool:
        """Make the calls to which the user agrees; return False after Ctrl-C."""
        going_on = True
        for call in calls:
            try:
                result = self._call(**call) if going_on else DECLINED
            except KeyboardInterrupt:
                self._console.line()
                going_on, result = False, INTERRUPTED
            self._conversation.messages.append(
                {"role": "tool", "name": call["name"], "content": result}
            )
        return going_on

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        if fault := self._tools.fault(name, arguments):
            self._console.note(f"The model calls {call_text(name, arguments)}: {fault}")
            return failure(fault)
        if not self._console.ask(f"call {call_text(name, arguments)}?"):
            return DECLINED
        result = self._tools.run(name, arguments)
        self._console.note(result)
        return result


@contextlib.contextmanager
def _breaking_off(terminal: bool) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C in the block only note that it was pressed; pressed again, it interrupts.

    Where the input is a pipe, it interrupts the first time. Yields a function that says whether
    it was pressed.
    """
    pressed: list[int] = []

    def note(number: int, _: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    if not terminal:
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
