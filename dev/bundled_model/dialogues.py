"""Generate dialogues: tool calls, tool results, JSON answers, short questions.

Every dialogue is {"kind", "messages", "tools"}; the last message is the assistant's. Training and
held-out dialogues come from different seeds and from disjoint names, words and tool nouns.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from everyday_tools import Everyday, everyday_tools
from json_tasks import json_task
from parameters import Param, parameters
from talk import small_talk
from values import Values

VERBS = [
    "get",
    "set",
    "add",
    "show",
    "play",
    "search",
    "remove",
    "create",
    "update",
    "delete",
    "find",
    "book",
    "cancel",
    "send",
    "order",
    "list",
    "schedule",
    "check",
    "print",
    "export",
    "import",
    "archive",
    "rename",
    "copy",
    "move",
    "open",
    "close",
    "start",
    "stop",
    "share",
    "translate",
    "convert",
    "compare",
    "count",
    "calculate",
    "reserve",
    "rate",
    "review",
    "approve",
    "track",
    "register",
    "lock",
    "upload",
    "download",
]
NOUNS = [
    "invoice",
    "recipe",
    "flight",
    "hotel",
    "meeting",
    "ticket",
    "report",
    "file",
    "playlist",
    "contact",
    "reminder",
    "photo",
    "alarm",
    "song",
    "document",
    "event",
    "package",
    "payment",
    "account",
    "task",
    "note",
    "message",
    "room",
    "table",
    "device",
    "lamp",
    "camera",
    "backup",
    "printer",
    "survey",
    "contract",
    "customer",
    "product",
    "order",
    "library",
    "license",
    "server",
    "database",
    "network",
    "calendar",
    "budget",
    "parcel",
    "taxi",
    "train",
    "menu",
    "article",
]
HELD_OUT_NOUNS = [
    "shipment",
    "appointment",
    "folder",
    "garden",
    "bridge",
    "voucher",
    "sensor",
    "lecture",
]

DECLINED = "The user declined this call."


class Generator:
    """Makes dialogues of all kinds from one seed."""

    def __init__(
        self, words: list[str], answers: list[tuple[str, str]], seed: int, held_out: bool
    ) -> None:
        self.r = random.Random(seed)
        self.v = Values(words, held_out)
        self.pool = parameters(self.v)
        self.nouns = HELD_OUT_NOUNS + NOUNS[:10] if held_out else NOUNS
        self.answers = answers
        self.everyday = everyday_tools(self.v)

    def noun(self) -> str:
        """What a tool is about: a usual noun, or any word, so that new tools do not surprise."""
        return self.r.choice(self.nouns) if self.r.random() < 0.7 else self.v.word(self.r)

    def other_param(self) -> Param:
        """A string, integer or number parameter with a name never seen before."""
        word = self.v.word(self.r)
        name = word if self.r.random() < 0.6 else f"{word}_{self.v.word(self.r)}"
        spoken, v = name.replace("_", " "), self.v
        kind, make = self.r.choice(
            (
                ("string", v.name),
                ("string", v.phrase),
                ("string", v.ident),
                ("string", v.city),
                ("integer", v.small),
                ("integer", v.integer),
                ("number", v.decimal),
            )
        )
        text = self.r.choice((f"The {spoken}", spoken.capitalize(), f"Which {spoken} to use"))
        phrase = self.r.choice((f"the {spoken} is {{v}}", f"{spoken} {{v}}", f"{{v}} as {spoken}"))
        return name, {"type": kind, "description": text}, phrase, make

    def tool(self, noun: str | None = None) -> tuple[dict[str, Any], list[Param]]:
        """A random tool schema with its parameters."""
        verb, noun = self.r.choice(VERBS), noun or self.noun()
        params = self.r.sample(self.pool, self.r.randint(1, 6))
        params = [self.other_param() if self.r.random() < 0.2 else p for p in params]
        params = list({p[0]: p for p in params}.values())
        required = [p[0] for p in params[: self.r.randint(1, len(params))]]
        join = self.r.choice(("_", "_", "-", "."))
        name = f"{verb}{noun.capitalize()}" if self.r.random() < 0.2 else f"{verb}{join}{noun}"
        function = {
            "name": name,
            "description": f"{verb.capitalize()} {article(noun)}.",
            "parameters": {
                "type": "object",
                "properties": {p[0]: p[1] for p in params},
                "required": required,
            },
        }
        return {"type": "function", "function": function}, params

    def tools(self) -> list[tuple[dict[str, Any], list[Param]]]:
        """One to four tools with different names, often about the same thing."""
        noun = self.noun() if self.r.random() < 0.4 else None
        chosen: dict[str, tuple[dict[str, Any], list[Param]]] = {}
        for _ in range(self.r.randint(1, 4)):
            schema, params = self.tool(noun)
            chosen[schema["function"]["name"]] = schema, params
        return list(chosen.values())

    def spoken(self, value: Any) -> str:
        """A value as a user would write it."""
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list):
            texts = [self.spoken(x) for x in value]
            if any("," in x or " and " in x for x in texts):
                return "; ".join(texts)
            return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]
        if isinstance(value, dict):
            return ", ".join(f"{k} {self.spoken(x)}" for k, x in value.items())
        return str(value)

    def request(self, schema: dict[str, Any], params: list[Param]) -> tuple[str, dict[str, Any]]:
        """A user's wish, and the call that fulfils it."""
        function = schema["function"]
        required = function["parameters"]["required"]
        used = [p for p in params if p[0] in required or self.r.random() < 0.4]
        arguments = {p[0]: p[3](self.r) for p in used}
        shown = used if self.r.random() < 0.4 else self.r.sample(used, len(used))
        wish = function["description"].rstrip(".")
        style = self.r.random()
        if style < 0.6:
            parts = [p[2].format(v=self.spoken(arguments[p[0]])) for p in shown]
            text = f"{wish} {', '.join(parts)}."
            opening = self.r.choice(("", "", "Please ", "Could you ", "I want you to "))
            text = opening + (text[0].lower() + text[1:] if opening else text)
        elif style < 0.8:
            lines = [f"{p[0]}: {self.spoken(arguments[p[0]])}" for p in shown]
            text = f"{wish}.\n" + "\n".join(lines)
        else:
            parts = [f"{p[0].replace('_', ' ')} = {self.spoken(arguments[p[0]])}" for p in shown]
            text = f"{wish} with {'; '.join(parts)}"
        return text, {"name": function["name"], "arguments": arguments}

    def tool_call(self) -> dict[str, Any]:
        """One request, answered by one call; now and then two requests and two calls."""
        tools = self.tools()
        wanted = self.r.sample(tools, 2 if len(tools) > 1 and self.r.random() < 0.15 else 1)
        texts, calls = zip(*(self.request(*tool) for tool in wanted), strict=True)
        messages = [
            {"role": "user", "content": "\nAlso: ".join(texts)},
            {"role": "assistant", "content": "", "tool_calls": as_calls(calls)},
        ]
        return {"kind": "tool", "messages": messages, "tools": [t[0] for t in tools]}

    def tool_result(self) -> dict[str, Any]:
        """A call whose result the assistant reports."""
        dialogue = self.tool_call()
        call = dialogue["messages"][-1]["tool_calls"][0]
        dialogue["messages"][-1]["tool_calls"] = [call]
        dialogue["messages"][0]["content"] = dialogue["messages"][0]["content"].split("\nAlso: ")[0]
        fields = self.r.sample(self.pool, self.r.randint(1, 4))
        result = {p[0]: p[3](self.r) for p in fields}
        parts = [f"the {k.replace('_', ' ')} is {self.spoken(x)}" for k, x in result.items()]
        listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        dialogue["messages"] += [
            {"role": "tool", "content": json.dumps(result, ensure_ascii=False)},
            {"role": "assistant", "content": f"Done: {listed}."},
        ]
        return {**dialogue, "kind": "result"}

    def plain(self, with_tools: bool) -> dict[str, Any]:
        """A question answered in English, although tools may be on offer."""
        question, answer = self.r.choice(self.answers)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if self.r.random() < 0.1:
            system = {"role": "system", "content": "You are a helpful assistant."}
            messages.insert(0, system)
        tools = [t[0] for t in self.tools()] if with_tools else None
        return {
            "kind": "no_tool" if with_tools else "question",
            "messages": messages,
            "tools": tools,
        }

    def json_answer(self) -> dict[str, Any]:
        """A JSON task."""
        prompt, answer = json_task(self.r, self.v)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return {"kind": "json", "messages": messages, "tools": None}

    def talk(self) -> dict[str, Any]:
        """A greeting, or a question about the model itself."""
        question, answer = small_talk(self.r)
        return {
            "kind": "talk",
            "messages": [user(question), says(answer)],
            "tools": self.offered(self.some_everyday()) if self.r.random() < 0.3 else None,
        }

    def some_everyday(self) -> list[Everyday]:
        """One to five everyday tools."""
        return self.r.sample(self.everyday, self.r.randint(1, 5))

    def offered(self, tools: list[Everyday]) -> list[dict[str, Any]]:
        """Their schemas."""
        return [tool.schema(self.r) for tool in tools]

    def everyday_turn(self, tool: Everyday, finish: bool) -> list[dict[str, Any]]:
        """A request and its call; if `finish`, also what came of it and the report."""
        text, call = tool.request(self.r)
        turn = [user(text), says("", [call])]
        roll = self.r.random()
        if not finish:
            return turn
        if roll < 0.2:
            result = DECLINED
            report = f"You declined, so I did not call {call['name']}."
        elif roll < 0.35:
            result = f"Error: {self.v.phrase(self.r, 2, 6)}"
            report = f"The call of {call['name']} failed: {result.removeprefix('Error: ')}."
        else:
            result = str(tool.result(self.r))
            report = f"The result is {result}."
        return [*turn, {"role": "tool", "content": result}, says(report)]

    def everyday_call(self) -> dict[str, Any]:
        """An everyday request, answered by a call, half of the time with its result."""
        tools = self.some_everyday()
        turn = self.everyday_turn(self.r.choice(tools), finish=self.r.random() < 0.5)
        return {"kind": "everyday", "messages": turn, "tools": self.offered(tools)}

    def conversation(self) -> dict[str, Any]:
        """Several turns of all kinds, half of the time with everyday tools on offer."""
        tools = self.some_everyday() if self.r.random() < 0.6 else []
        messages: list[dict[str, Any]] = []
        for _ in range(self.r.randint(2, 5)):
            roll = self.r.random()
            if tools and roll < 0.6:
                messages += self.everyday_turn(self.r.choice(tools), finish=True)
            elif roll < 0.75:
                messages += self.talk()["messages"]
            elif roll < 0.9:
                messages += self.json_answer()["messages"]
            else:
                question, answer = self.r.choice(self.answers)
                messages += [user(question), says(answer)]
        if self.r.random() < 0.15:
            messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
        return {
            "kind": "conversation",
            "messages": messages,
            "tools": self.offered(tools) or None,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Endless dialogues in the proportions of training."""
        kinds = (
            (0.22, self.tool_call),
            (0.08, self.tool_result),
            (0.10, self.everyday_call),
            (0.05, lambda: self.plain(with_tools=True)),
            (0.28, self.json_answer),
            (0.03, self.talk),
            (0.16, self.conversation),
            (0.08, lambda: self.plain(with_tools=False)),
        )
        shares, makers = zip(*kinds, strict=True)
        while True:
            yield self.r.choices(makers, shares)[0]()


def user(text: str) -> dict[str, Any]:
    """What the user says."""
    return {"role": "user", "content": text}


def says(text: str, calls: Any = ()) -> dict[str, Any]:
    """What the assistant says, or calls."""
    message = {"role": "assistant", "content": text}
    return {**message, "tool_calls": as_calls(calls)} if calls else message


def article(noun: str) -> str:
    """'an invoice', 'a recipe'."""
    return ("an " if noun[0] in "aeio" else "a ") + noun


def as_calls(calls: Any) -> list[dict[str, Any]]:
    """Calls in the form of the chat API."""
    return [{"type": "function", "function": dict(call)} for call in calls]
