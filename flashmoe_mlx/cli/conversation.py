"""A conversation: its messages, and the model's answers token by token.

The model always sees the whole conversation through its chat template; the cache only saves time.
"""

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import TextStateMachine, generate_step, make_text_state_machine
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import FlashMoEError
from .chat_cache import ChatCache

NORMAL, THINKING, CALL = "normal", "reasoning", "tool"  # kinds of text, as mlx-lm names them


class Stopped(Exception):
    """The user broke off the answer before its first token."""


@dataclass
class Answer:
    """What the model said.

    Attributes:
        parts: [kind, text] in order; a part of kind `CALL` is the text of one tool call.
        tokens: ids, with the one that ended the answer.
        closed: False if the last part is a tool call that was cut off.
        stopped: whether the user broke it off.
        finish: "stop", "length", or None if it was broken off.
        read, reused: tokens of the prompt that were processed, and those taken from the cache.
        seconds: for the prompt, and for the answer.
    """

    parts: list[list[str]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    closed: bool = True
    stopped: bool = False
    finish: str | None = None
    read: int = 0
    reused: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)

    def text(self, kind: str) -> str:
        """Return all text of one kind."""
        return "".join(text for name, text in self.parts if name == kind)

    def calls(self) -> list[str]:
        """Return the texts of complete tool calls."""
        ended = self.parts if self.closed else self.parts[:-1]
        return [text for name, text in ended if name == CALL]

    def cut_call(self) -> str:
        """Return the text of a tool call that was cut off, or nothing."""
        return self.parts[-1][1] if self.parts and not self.closed else ""

    def speed(self) -> float:
        """Return tokens per second, without the first, which belongs to the prompt."""
        return (len(self.tokens) - 1) / self.seconds[1] if self.seconds[1] else 0.0


class Conversation:
    """Messages, and the state of the model that has read them.

    Attributes:
        messages: all but the system prompt, in the form of the chat API.
        system: the system prompt, or None.
        tools: JSON schemas of the functions on offer.
        last: the last answer, or None.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TokenizerWrapper,
        *,
        tools: list[dict[str, Any]] | None = None,
        template: dict[str, Any] | None = None,
        **generation: Any,
    ) -> None:
        """Start empty.

        Args:
            model: from `load`.
            tokenizer: from `load`.
            tools: JSON schemas of functions.
            template: keywords for the chat template.
            generation: `max_tokens`, `sampler`, and other keywords of mlx-lm's `stream_generate`.
        """
        self._model, self._tokenizer, self._template = model, tokenizer, template or {}
        self._generation = generation
        self._kinds = make_text_state_machine(tokenizer)
        self.tools = tools or []
        self.system: str | None = None
        self.cache = ChatCache(model)
        self.reset()

    def reset(self) -> None:
        """Forget all messages; keep the system prompt and the tools."""
        self.messages: list[dict[str, Any]] = []
        self.last: Answer | None = None
        self.cache.clear()

    def prompt(self, *, answer: bool = True) -> list[int]:
        """Return the conversation as token ids, with the start of an answer if `answer`.

        Raises:
            FlashMoEError: the chat template fails.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            return self._tokenizer.apply_chat_template(
                system + self.messages, tools=self.tools or None, add_generation_prompt=answer,
                **self._template,
            )  # fmt: skip
        except Exception as error:  # a template can raise any
            raise FlashMoEError(
                f"the model's chat template fails on this conversation ({type(error).__name__}: "
                f"{error}). Change --chat-template-config or the system prompt, or type /reset."
            ) from error

    def answer(
        self, stop: Callable[[], bool] = lambda: False
    ) -> Generator[tuple[str, str], None, None]:
        """Generate an answer; yield (kind, text) for each token. `last` is the whole answer.

        The caller adds the answer to the messages (`remember`).

        Args:
            stop: says whether to break off; asked after each token and chunk of the prompt.

        Raises:
            FlashMoEError: the chat template fails, or an expert cannot be read. After any
                exception the whole conversation is processed again.
        """
        self.last = answer = Answer()
        prompt, start = list[int](), time.perf_counter()
        try:
            prompt = self.prompt()
            answer.reused = self.cache.reuse(prompt)
            answer.read = len(prompt) - answer.reused
            yield from self._generate(prompt, answer, stop, start)
        except Stopped:
            self.cache.processed(prompt)
            answer.read = len(self.cache.tokens) - answer.reused
            answer.seconds = time.perf_counter() - start, 0.0
        except BaseException:  # layers may differ in what they have processed
            self.cache.clear()
            raise

    def _generate(
        self, prompt: list[int], answer: Answer, stop: Callable[[], bool], start: float
    ) -> Iterator[tuple[str, str]]:
        def check(*_: int) -> None:
            if stop():
                answer.stopped = True
                raise Stopped

        self._prefill(prompt, check)
        state = self._kinds.make_state(self._first_kind(prompt))
        left = prompt[len(self.cache.tokens) :]
        first = 0.0
        responses = stream_generate(
            self._model, self._tokenizer, left, prompt_cache=self.cache.entries,
            prompt_progress_callback=check, **self._generation,
        )  # fmt: skip
        for response in responses:
            first = first or time.perf_counter()
            answer.tokens.append(response.token)
            answer.finish = response.finish_reason
            answer.seconds = first - start, time.perf_counter() - first
            state, segments = TextStateMachine.split(state, response.text)
            yield from _added(answer, segments)
            if answer.finish is None and stop():
                answer.stopped = True
                break
        responses.close()
        _, text, kind = TextStateMachine.flush(state)
        answer.closed = kind != CALL
        yield from _added(answer, [(kind, text)])
        self.cache.processed(prompt + answer.tokens)

    def _prefill(self, prompt: list[int], check: Callable[..., None]) -> None:
        """Process the prompt up to the start of the answer, and take a snapshot there.

        In a round of tool calls the older snapshot stays: a template may rewrite the whole turn
        as soon as the user says more.
        """
        if self.messages[-1]["role"] != "user":
            return
        stable = _shared(prompt[:-1], self.prompt(answer=False))
        if (new := prompt[len(self.cache.tokens) : stable]) != []:
            for _ in generate_step(
                mx.array(new), self._model, max_tokens=0, prompt_cache=self.cache.entries,
                prompt_progress_callback=check,
            ):  # fmt: skip
                pass
        self.cache.processed(prompt)
        self.cache.save()

    def _first_kind(self, prompt: list[int]) -> str:
        """Return the kind of text that the answer begins with: the prompt may open a thought."""
        tokenizer = self._tokenizer
        if tokenizer.has_thinking:
            opened = tokenizer.rfind_think_start(prompt)
            if opened > tokenizer.rfind_think_end(prompt):
                return THINKING
        return tokenizer.response_initial_state or NORMAL

    def say(self, text: str) -> None:
        """Add a message of the user."""
        self.messages.append({"role": "user", "content": text})

    def remember(self, calls: list[dict[str, Any]] | None = None, unread: str = "") -> None:
        """Add the last answer to the messages.

        Args:
            calls: {"name", "arguments"} of its tool calls.
            unread: text of tool calls that could not be parsed; it stays as the model wrote it.
        """
        assert self.last
        message: dict[str, Any] = {
            "role": "assistant", "content": self.last.text(NORMAL) + unread,
        }  # fmt: skip
        if thought := self.last.text(THINKING):
            message["reasoning_content"] = thought.strip("\n")
        if calls:
            message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        self.messages.append(message)


def _shared(first: list[int], second: list[int]) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _added(answer: Answer, segments: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Append segments to an answer and yield them; the first goes on with the last part."""
    for index, (kind, text) in enumerate(segments):
        if index or not answer.parts:
            answer.parts.append([kind, ""])
        answer.parts[-1][1] += text
        yield kind, text
