"""What the model of a chat sees, and what its caches hold."""

import mlx.core as mx
import pytest

from flashmoe_mlx import FlashMoEError
from flashmoe_mlx.cli.conversation import NORMAL, THINKING, Answer, Conversation
from flashmoe_mlx.cli.tools import Tools

ROUNDING = 1e-4  # relative; a prompt in other chunks gives 1e-6
QUESTIONS = ("What is a library?", "What is a disk?", "What is a file?")


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


def ring(time: str) -> str:
    """Ring.

    Args:
        time: Time of day
    """
    return time


def test_a_template_that_rewrites_earlier_answers(loaded, template):
    """Qwen's template drops the thoughts of earlier turns."""
    template("assistant\\n<think>\\n\\n</think>\\n\\n' + content", "assistant\\n' + content")

    def asked() -> int:
        return len(conversation.prompt(answer=False))

    conversation, snapshot = make(loaded, Tools({"ring": ring})), 0
    for question in QUESTIONS[:2]:
        conversation.say(question)
        assert check(conversation, loaded).reused == snapshot  # of the turn before
        snapshot = asked()
        conversation.remember([{"name": "ring", "arguments": {"time": "7:30"}}])
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
