"""Use stock `mlx_lm.server` through the `openai` package, and record the session.

    python tools/serve_session.py DIR --out docs/reference/serving-session.md [--minutes 10]

DIR is a conversion of the bundled model. Runs two servers, one with all experts in memory and one
with a quarter of them. The session has tool calls, JSON, a chat whose second turn reuses the prompt
cache, cancelled streams, 16 clients whose answers must equal one client's, and continuous load
while the tool samples the server's memory. A failed check ends the tool with a message and exit
code 1. Linux only.
"""

import argparse
import contextlib
import inspect
import io
import json
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any

import openai
from openai import OpenAI
from serve_load import Body, Outcome, load, requests, slope, watched_load
from stock_server import StockServer, answer, assembled

from flashmoe_mlx.profile.machine import facts, versions

CLIENTS, TIMES = 16, 5
# Allocate large arrays by mmap, so that freeing them returns memory to the system (serve.md).
SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "131072"}
WARM_UP = 0.2  # share of the samples that the slope of memory leaves out
QUESTION = "Create a file with path = notes.txt"
TABLE = (
    "Return this table as a JSON list of objects:\ntitle | price\nRed lamp | 12\nBlue chair | 40"
)


def chat(client: OpenAI, content: str | list[Any], **more: Any) -> Any:
    """Request a greedy answer; `content` is a question or a whole conversation."""
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    return client.chat.completions.create(
        model="default_model", messages=messages, temperature=0, **({"max_tokens": 128} | more)
    )


FIELDS = "Return JSON with the fields name and city."
PATH = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
CREATE_FILE = {"name": "create_file", "description": "Create a file.", "parameters": PATH}
TOOLS = [{"type": "function", "function": CREATE_FILE}]


def a_tool_call(client: OpenAI, server: StockServer) -> None:
    """A tool call, and an answer from the tool's result."""
    reply = chat(client, QUESTION, tools=TOOLS).choices[0]
    call = reply.message.tool_calls[0]
    print(reply.finish_reason, call.function.name, call.function.arguments)
    assert call.function.name == "create_file"
    assert json.loads(call.function.arguments) == {"path": "notes.txt"}
    conversation = [
        {"role": "user", "content": QUESTION},
        reply.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"path": "notes.txt", "size": 12}'},
    ]
    print(chat(client, conversation, tools=TOOLS).choices[0].message.content)


def a_streamed_tool_call(client: OpenAI, server: StockServer) -> None:
    """The same call as a stream of fragments."""
    chunks = [c.model_dump() for c in chat(client, QUESTION, tools=TOOLS, stream=True)]
    for chunk in chunks:
        choice = chunk["choices"][0]
        print(choice["delta"]["tool_calls"], choice["finish_reason"])
    whole = chat(client, QUESTION, tools=TOOLS).model_dump()
    assert assembled(chunks) == answer(whole)
    print(assembled(chunks))


def an_answer_in_json(client: OpenAI, server: StockServer) -> None:
    """JSON on request."""
    value = json.loads(chat(client, TABLE).choices[0].message.content)
    print(value)
    assert value == [{"title": "Red lamp", "price": 12}, {"title": "Blue chair", "price": 40}]


def a_chat_with_a_prompt_cache(client: OpenAI, server: StockServer) -> None:
    """A chat whose later turns reuse the server's prompt cache."""
    conversation: list[Any] = []
    places = {"Tim Berg": "Rome", "Ada Lovelace": "London"}
    sentences = [f"{name} lives in {city}. {FIELDS}" for name, city in places.items()]
    for question in ["Who are you?", *sentences]:
        conversation.append({"role": "user", "content": question})
        reply = chat(client, conversation)
        text, usage = reply.choices[0].message.content, reply.usage
        cached = usage.prompt_tokens_details.cached_tokens
        print(f"{text}\n  {usage.prompt_tokens} prompt tokens, {cached} of them cached")
        conversation.append({"role": "assistant", "content": text})
    assert cached > 0


def busy(server: StockServer, seconds: float = 1.0) -> tuple[float, float]:
    """Return the cores used and MB/s read during `seconds`."""
    before = server.usage()
    time.sleep(seconds)
    after = server.usage()
    return (after.cpu - before.cpu) / seconds, (after.read - before.read) / 1e6 / seconds


def an_answer_broken_off(client: OpenAI, server: StockServer) -> None:
    """A client that closes its stream stops the server's work on it, without effect on others."""
    alone = chat(client, TABLE).choices[0].message.content
    endless = {"max_tokens": 100_000, "logit_bias": {"4087": -100, "4089": -100}}  # no end of turn
    stream = chat(client, "What is a library?", stream=True, **endless)
    for _ in range(20):
        next(stream)
    print("streaming:      {:.2f} cores, {:.1f} MB/s read".format(*busy(server)))
    assert chat(client, TABLE).choices[0].message.content == alone  # concurrently
    stream.close()
    time.sleep(2)  # the server notices when it writes
    cores, read = busy(server)
    print(f"2 s after close: {cores:.2f} cores, {read:.1f} MB/s read")
    assert cores < 0.1 and read < 0.1
    assert chat(client, TABLE).choices[0].message.content == alone
    print("the next answer is right")


SCENES: list[Callable[[OpenAI, StockServer], None]] = [
    a_tool_call,
    a_streamed_tool_call,
    an_answer_in_json,
    a_chat_with_a_prompt_cache,
    an_answer_broken_off,
]


def play(client: OpenAI, server: StockServer, sources: bool) -> Iterator[str]:
    """Run the scenes and yield their report."""
    for scene in SCENES:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            scene(client, server)
        head, body = inspect.getsource(scene).split('"""\n', 1)
        title = head.split('"""')[1]
        yield f"### {title.removesuffix('.')}\n"
        if sources:
            yield f"```python\n{textwrap.dedent(body)}```\n"
        yield f"```\n{said.getvalue()}```\n"


def asker(client: OpenAI) -> Callable[[Body], object]:
    """Return a function that sends a request and returns text, tool calls and finish reason."""

    def ask(body: Body) -> object:
        reply = client.chat.completions.create(model="default_model", **body)
        return answer(reply.model_dump())

    return ask


def summary(outcome: Outcome) -> str:
    """Return a line about many requests.

    Raises:
        SystemExit: a request failed, or its answer differs from one client's.
    """
    if outcome.errors or outcome.differing:
        raise SystemExit(f"{outcome.errors[:3]} {outcome.differing[:20]}")
    rate = outcome.asked / outcome.seconds
    return f"{outcome.asked} requests without errors, all answers equal; {rate:.2f} requests/s"


def memory_table(outcome: Outcome, minutes: float) -> Iterator[str]:
    """Yield ten samples, and the slope after the warm-up."""
    samples = outcome.samples
    yield "| minute | resident, MiB | descriptors | threads |\n|---|---|---|---|"
    for sample in samples[:: max(1, len(samples) // 10)]:
        u = sample.usage
        yield f"| {sample.seconds / 60:.1f} | {u.rss:.1f} | {u.descriptors} | {u.threads} |"
    warm = [s for s in samples if s.seconds >= WARM_UP * minutes * 60]
    growth, error = slope(warm)
    rss = [s.usage.rss for s in warm]
    half = len(rss) // 2
    yield (
        f"\nThe last {minutes * (1 - WARM_UP):g} minutes, {len(warm)} samples: {min(rss):.0f} to "
        f"{max(rss):.0f} MiB, mean {mean(rss[:half]):.1f} in the first half and "
        f"{mean(rss[half:]):.1f} in the second; slope {growth:+.0f} MiB per hour, twice its "
        f"standard error {error:.0f}."
    )


def under_load(client: OpenAI, server: StockServer, minutes: float) -> Iterator[str]:
    """Yield the report on one and on many clients."""
    ask, bodies = asker(client), requests()
    start = time.monotonic()
    alone = [ask(body) for body in bodies]
    rate = len(bodies) / (time.monotonic() - start)
    yield f"* One client: {len(bodies)} different requests in turn, {rate:.2f} requests/s."
    places = iter([*range(len(bodies))] * TIMES)
    yield f"* {CLIENTS} clients: {summary(load(ask, bodies, alone, CLIENTS, places))}."
    watched = watched_load(server, ask, bodies, alone, CLIENTS, 60 * minutes)
    yield f"* {CLIENTS} clients for {minutes:g} minutes: {summary(watched)}.\n"
    yield from memory_table(watched, minutes)


def loaded(client: OpenAI, server: StockServer, minutes: float) -> Iterator[str]:
    """Yield the report on load, and the server's usage before and after it."""
    before = server.usage()
    yield from under_load(client, server, minutes)
    after = server.usage()
    yield (
        f"\nRead under load: {(after.read - before.read) / 1e9:.2f} GB. Afterwards: /health "
        f"{server.health()}, {after.descriptors} descriptors and {after.threads} threads; before: "
        f"{before.descriptors} and {before.threads}.\n"
    )


def sessions(model: Path, caches: list[str], minutes: float, stack: ExitStack) -> Iterator[str]:
    """Yield the report: the scenes on each server in turn, then load on all at once."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    parties = []
    for cache in caches:
        settings = SETTINGS | {"FLASHMOE_EXPERT_CACHE": cache}
        server = stack.enter_context(StockServer(model, folder / f"log {cache}", settings=settings))
        client = OpenAI(base_url=f"{server.address}/v1", api_key="none")
        parties.append((stack.enter_context(client), server))
        chat(client, "Hello", max_tokens=4)  # loads the model
    for number, (cache, party) in enumerate(zip(caches, parties, strict=True)):
        yield f"## FLASHMOE_EXPERT_CACHE={cache}\n"
        yield from play(*party, sources=not number)
    with ThreadPoolExecutor() as pool:
        work = [pool.submit(lambda party: [*loaded(*party, minutes)], party) for party in parties]
        for cache, job in zip(caches, work, strict=True):
            yield f"## {CLIENTS} clients at once, FLASHMOE_EXPERT_CACHE={cache}\n"
            yield from job.result()


HEADER = """# A recorded session

Written by `tools/serve_session.py`; do not edit. `mlx_lm.server --model DIR --trust-remote-code`
runs the bundled model, converted to 4 bits by flashmoe-convert, and the `openai` package is its
client. Below each block of code is its output; `chat` requests at most 128 tokens at temperature 0.
Two servers, one with all experts in memory and one with a quarter of them, run under load at the
same time as other programs, so that the memory figures count and the speeds do not. Both run with
`MALLOC_MMAP_THRESHOLD_=131072`.
"""


def machine() -> str:
    """Describe the machine and the package versions."""
    here = facts()
    vectors = "AVX-512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "AVX2"
    return (
        f"{here['cores']} cores, {vectors}, Linux, no GPU; Python {here['python']}, "
        f"{versions(here)}, openai {openai.__version__}."
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="the bundled model, converted")
    parser.add_argument("--out", type=Path, help="Markdown file (default: standard output)")
    parser.add_argument("--minutes", type=float, default=10, help="minutes of load (default: 10)")
    parser.add_argument("--expert-caches", nargs="+", default=["auto", "2MiB"],
                        help="expert cache of each server (default: auto 2MiB)")  # fmt: skip
    args = parser.parse_args()
    parts = [HEADER, machine() + "\n"]
    with ExitStack() as stack:
        for part in sessions(args.model, args.expert_caches, args.minutes, stack):
            print(part, flush=True, file=sys.stderr)
            parts.append(part)
    (args.out.write_text if args.out else print)("\n".join(parts))


if __name__ == "__main__":
    main()
