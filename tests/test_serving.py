"""Stock `mlx_lm.server` serves a converted directory to clients; experts stream."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlx_lm
import pytest
from mlx_lm import server as stock
from mlx_lm import utils
from serve_load import Sample, load, requests, slope
from shared_folders import PATCHED
from stock_server import StockServer, Usage, answer, assembled

from flashmoe_mlx.models.qwen3_5.geometry import GEOMETRIES

ROOT = Path(__file__).parents[1]
CLIENTS = 16
QUESTION = {
    "messages": [{"role": "user", "content": "What is a package?"}],
    "temperature": 0,
    "max_tokens": 24,
}
NO_END = {
    "max_tokens": 100_000,
    "logit_bias": {"4087": -100, "4089": -100},
}  # tokens of a text, and of a turn


@pytest.fixture(scope="module")
def server(models, tmp_path_factory) -> Iterator[StockServer]:
    """Run a server with a quarter of the experts in its cache."""
    folder = tmp_path_factory.mktemp("server")
    settings = {
        "FLASHMOE_EXPERT_CACHE": "2MiB",
        "HF_HUB_CACHE": str(folder),  # without one, the server fails to list models
    }
    with StockServer(models["packed4"], folder / "log", settings=settings) as server:
        server.patience = 120
        yield server


@pytest.fixture(scope="module")
def cases() -> dict[str, dict]:
    """Return a held-out request of each kind."""
    kinds = "tool", "result"
    return dict(zip(kinds, requests(dict.fromkeys(kinds, 1)), strict=True))


def test_answers_as_stock(server, load_stock):
    """The server's answer equals stock's in float32, with everything in memory."""
    model, tokenizer = load_stock("packed4")
    prompt = tokenizer.apply_chat_template(QUESTION["messages"], add_generation_prompt=True)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=24)
    assert answer(server.ask(QUESTION))[0] == expected.strip()


def test_lists_the_model(server, models):
    with urllib.request.urlopen(f"{server.address}/v1/models", timeout=30) as reply:
        assert str(models["packed4"]) in [m["id"] for m in json.load(reply)["data"]]


def test_tool_call_streamed_or_not(server, cases):
    text, calls, reason = whole = answer(server.ask(cases["tool"]))
    assert reason == "tool_calls" and not text
    ((name, arguments),) = calls
    (offered,) = [
        tool["function"] for tool in cases["tool"]["tools"] if tool["function"]["name"] == name
    ]
    assert arguments.keys() <= offered["parameters"]["properties"].keys()
    assert set(offered["parameters"]["required"]) <= arguments.keys()
    assert assembled(server.stream(cases["tool"])) == whole


def test_text_streamed_or_not(server, cases):
    text, calls, reason = whole = answer(server.ask(cases["result"]))
    assert text and not calls and reason == "stop"
    assert assembled(server.stream(cases["result"])) == whole


def test_json(server):
    table = "title | price\nRed lamp | 12\nBlue chair | 40"
    question = f"Return this table as a JSON list of objects:\n{table}"
    messages = [{"role": "user", "content": question}]
    text, _, reason = answer(server.ask({"messages": messages, "temperature": 0}))
    assert reason == "stop"
    assert json.loads(text) == [
        {"title": "Red lamp", "price": 12}, {"title": "Blue chair", "price": 40},
    ]  # fmt: skip


def test_a_later_turn_finds_the_earlier_in_the_cache(server):
    def cached(reply: dict) -> int:
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"]

    first = server.ask(QUESTION)
    said = [first["choices"][0]["message"], {"role": "user", "content": "And what is a disk?"}]
    second = QUESTION | {"messages": QUESTION["messages"] + said}
    reply = server.ask(second)
    assert first["usage"]["total_tokens"] - 4 < cached(reply) < reply["usage"]["prompt_tokens"]
    assert answer(server.ask(second)) == answer(reply)


def test_a_closed_stream_stops_and_others_go_on(server):
    alone = answer(server.ask(QUESTION))
    stream = server.stream(QUESTION | NO_END)
    assert len([next(stream) for _ in range(10)]) == 10
    assert answer(server.ask(QUESTION)) == alone  # batched with it
    stream.close()
    # The server runs a request with a seed after all others, so the endless one must have ended.
    assert answer(server.ask(QUESTION | {"seed": 1})) == alone
    assert server.health() == 200


def test_16_clients_get_the_same_answers_as_one(server):
    bodies = requests({"tool": 1, "json": 12, "no_tool": 3}, most_tokens=8)
    alone = [answer(server.ask(body)) for body in bodies]
    assert len(bodies) == CLIENTS and len({text for text, _, _ in alone}) > CLIENTS / 2

    def ask(body: dict) -> object:
        return answer(server.ask(body))

    outcome = load(ask, bodies, alone, CLIENTS, iter([*range(CLIENTS)] * 2))
    assert (outcome.asked, outcome.errors, outcome.differing) == (2 * CLIENTS, [], [])


def test_four_clients_of_each_family(patched, tmp_path):
    """One server loads each family's model in turn, and answers batches as single requests."""
    directories = [patched / f"{name}-converted" for name in PATCHED]
    settings = {"HF_HUB_CACHE": str(tmp_path)}
    questions = requests({"json": 4}, most_tokens=8)
    with StockServer(directories[0], tmp_path / "log", settings=settings) as server:
        server.patience = 120
        for directory in directories:
            bodies = [question | {"model": str(directory)} for question in questions]
            alone = [answer(server.ask(body)) for body in bodies]
            assert all(text for text, _, _ in alone) and len({text for text, _, _ in alone}) > 1
            outcome = load(lambda body: answer(server.ask(body)), bodies, alone, 4, iter(range(4)))
            assert (outcome.asked, outcome.errors, outcome.differing) == (4, [], [])


def test_load_counts_errors():
    def ask(body: dict) -> str:
        if body["n"] == 1:
            raise OSError("closed")
        return "right" if body["n"] else "wrong"

    bodies = [{"n": n} for n in range(4)]
    outcome = load(ask, bodies, ["right"] * 4, clients=2, work=iter(range(4)))
    assert outcome.asked == 4 and outcome.differing == [0]
    assert outcome.errors == ["request 1: OSError('closed')"]


@pytest.mark.parametrize(("period", "least", "most"), [(2, 2, 3), (8, 4, 6)])
def test_slope(period, least, most):
    """100 MiB that grow by 60 per hour, with noise of 1 MiB; correlated noise widens the error."""
    noise = [int(n % period >= period / 2) for n in range(96)]
    samples = [Sample(5.0 * n, Usage(100 + n / 12 + noise[n], 8, 4, 0.0, 0)) for n in range(96)]
    growth, error = slope(samples)
    assert growth == pytest.approx(60, abs=error)
    assert least < error < most


def test_quoted_messages_of_mlx_lm_exist():
    said = "".join(
        re.sub(r'"\s*\n\s*f?"', "", Path(module.__file__).read_text()) for module in (stock, utils)
    )
    text = " ".join((ROOT / "docs/guides/troubleshooting.md").read_text().split())
    for message in (
        "requires importing and running a custom module (",
        "tool text was likely truncated mid-generation",
        "Received tools but model does not support tool calling",
        "generation thread died",
    ):
        assert message in said and message in text


def test_the_size_of_a_state():
    """The table in docs/guides/serve.md: float32 states, bfloat16 keys and values."""
    rows = (ROOT / "docs/guides/serve.md").read_text()
    models = [GEOMETRIES[name] for name in ("397b", "122b", "35b")]
    fixed = [
        g.num_hidden_layers * 3 // 4
        * g.linear_num_value_heads * g.linear_value_head_dim * g.linear_key_head_dim * 4 / 1e6
        for g in models
    ]  # fmt: skip
    growing = [
        g.num_hidden_layers // 4 * 2 * g.num_key_value_heads * g.head_dim * 2 / 1e3 for g in models
    ]
    for sizes in fixed, growing:
        assert " | ".join(f"{size:.0f}" for size in sizes) in rows
