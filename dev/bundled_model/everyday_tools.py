# ruff: noqa: E501
"""Tools as people write them, with the ways in which people ask for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from values import CURRENCIES, Make, Values


@dataclass(frozen=True)
class Everyday:
    """A function: its schema's parts, phrases with {parameter}, and what it returns."""

    name: str
    description: str
    parameters: dict[str, tuple[str, str, Make]]  # name -> JSON type, description, maker
    phrases: tuple[str, ...]
    result: Callable[[random.Random], Any]
    optional: tuple[str, ...] = ()  # parameters that phrases may leave out

    def schema(self, r: random.Random) -> dict[str, Any]:
        """The JSON schema; descriptions are sometimes missing, as in real life."""
        bare = r.random() < 0.15
        properties = {
            name: {"type": kind} if bare else {"type": kind, "description": text}
            for name, (kind, text, _) in self.parameters.items()
        }
        required = [name for name in self.parameters if name not in self.optional]
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": {"type": "object", "properties": properties, "required": required},
        }
        return {"type": "function", "function": function}

    def request(self, r: random.Random) -> tuple[str, dict[str, Any]]:
        """A user's wish, and the call that fulfils it."""
        phrase = r.choice(self.phrases)
        used = {n: make(r) for n, (_, _, make) in self.parameters.items() if f"{{{n}}}" in phrase}
        text = phrase.format(**used)
        if r.random() < 0.15:
            text = text[0].lower() + text[1:].rstrip("?.")
        return text, {"name": self.name, "arguments": used}


def everyday_tools(v: Values) -> list[Everyday]:
    """All of them."""

    def sky(r: random.Random) -> str:
        state = r.choice(("sunny", "cloudy", "rain", "snow", "windy", "clear", "fog"))
        return f"{r.randint(-15, 38)} degrees, {state}"

    def minutes(r: random.Random) -> int:
        return r.randint(1, 120)

    def number(r: random.Random) -> int:
        return r.randint(0, 9999)

    def money(r: random.Random) -> float:
        return round(r.uniform(1, 5000), r.choice((1, 2)))

    def currency(r: random.Random) -> str:
        return r.choice(CURRENCIES)

    def thing(r: random.Random) -> str:
        return " ".join(v.word(r) for _ in range(r.randint(1, 3)))

    def done(r: random.Random) -> str:
        return r.choice(("ok", "done", "saved", "sent"))

    city = ("string", "The name of the city", v.city)
    first, second = ("number", "The first number", number), ("number", "The second number", number)
    person = ("string", "The name of the person", v.name)
    return [
        Everyday(
            "get_weather", "Get the current weather in a city.", {"city": city},
            (
                "What is the weather in {city}?", "How is the weather in {city}?",
                "What's the weather like in {city}?", "Will it rain in {city}?",
                "Is it cold in {city} today?", "Weather in {city}", "Tell me the weather in {city}.",
                "And in {city}?",
            ), sky,
        ),
        Everyday(
            "get_time", "Get the current time in a city.", {"city": city},
            (
                "What time is it in {city}?", "Tell me the time in {city}.", "Time in {city}?",
                "How late is it in {city}?",
            ), v.time,
        ),
        Everyday(
            "add", "Add two numbers.", {"a": first, "b": second},
            (
                "What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b}", "How much is {a} + {b}?",
                "Compute {a} + {b}.", "Calculate {a} plus {b}.",
            ), number,
        ),
        Everyday(
            "multiply", "Multiply two numbers.", {"a": first, "b": second},
            (
                "What is {a} times {b}?", "Multiply {a} by {b}.", "{a} * {b}",
                "How much is {a} x {b}?", "Compute {a} * {b}.",
            ), number,
        ),
        Everyday(
            "convert_currency", "Convert an amount of money into another currency.",
            {
                "amount": ("number", "The amount", money),
                "source": ("string", "The currency to convert from", currency),
                "target": ("string", "The currency to convert to", currency),
            },
            (
                "Convert {amount} {source} to {target}.", "How much is {amount} {source} in {target}?",
                "What are {amount} {source} in {target}?", "Change {amount} {source} into {target}.",
            ), money,
        ),
        Everyday(
            "set_timer", "Set a timer.", {"minutes": ("integer", "Minutes until it rings", minutes)},
            (
                "Set a timer for {minutes} minutes.", "Start a timer of {minutes} minutes.",
                "Wake me in {minutes} minutes.", "Timer: {minutes} minutes",
            ), done,
        ),
        Everyday(
            "send_email", "Send an e-mail.",
            {
                "to": ("string", "Address of the recipient", v.email),
                "subject": ("string", "Subject line", thing),
            },
            (
                "Send an email to {to} about {subject}.", "Write to {to} about {subject}.",
                "Mail {to} with the subject {subject}.",
            ), done,
        ),
        Everyday(
            "search_web", "Search the web.", {"query": ("string", "What to search for", thing)},
            (
                "Search the web for {query}.", "Look up {query}.", "Find something about {query}.",
                "Search for {query}.", "What do you find about {query}?",
            ), lambda r: v.phrase(r, 3, 8),
        ),
        Everyday(
            "read_file", "Read a text file.", {"path": ("string", "Path of the file", v.path)},
            (
                "Read {path}.", "Show me {path}", "What is in {path}?", "Open the file {path}.",
                "Print the content of {path}",
            ), lambda r: v.phrase(r, 3, 8),
        ),
        Everyday(
            "list_files", "List the files in a folder.",
            {"folder": ("string", "Path of the folder", lambda r: f"/{v.word(r)}/{v.word(r)}")},
            ("List the files in {folder}.", "What is in {folder}?", "Show the folder {folder}"),
            lambda r: ", ".join(f"{v.word(r)}.txt" for _ in range(r.randint(1, 4))),
        ),
        Everyday(
            "find_contact", "Find the telephone number of a person.", {"name": person},
            (
                "What is the phone number of {name}?", "Find the number of {name}.",
                "How can I call {name}?", "Look up {name} in my contacts.",
            ), v.phone,
        ),
        Everyday(
            "book_table", "Book a table in a restaurant.",
            {
                "people": ("integer", "How many people", v.small), "city": city,
                "date": ("string", "Date, YYYY-MM-DD", v.date),
            },
            (
                "Book a table for {people} in {city} on {date}.",
                "I need a table for {people} people in {city} on {date}.",
                "Reserve a table in {city} on {date} for {people}.",
            ), v.ident,
        ),
        Everyday(
            "get_stock_price", "Get the price of a stock.",
            {
                "symbol": (
                    "string", "Symbol of the stock",
                    lambda r: "".join(r.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(r.randint(2, 4))),
                )
            },
            ("What is the price of {symbol}?", "How much is {symbol} stock?", "Price of {symbol}"),
            money,
        ),
        Everyday(
            "turn_on", "Turn on a device.", {"device": ("string", "Name of the device", thing)},
            ("Turn on the {device}.", "Switch the {device} on.", "Please turn on the {device}."), done,
        ),
        Everyday(
            "turn_off", "Turn off a device.", {"device": ("string", "Name of the device", thing)},
            ("Turn off the {device}.", "Switch the {device} off.", "Please turn off the {device}."), done,
        ),
        Everyday(
            "add_note", "Save a note.", {"text": ("string", "Text of the note", thing)},
            ("Note: {text}", "Save a note: {text}.", "Remember: {text}.", "Write down {text}."), done,
        ),
        Everyday(
            "get_distance", "Get the distance between two cities in kilometers.",
            {
                "start": ("string", "Where the way starts", v.city),
                "end": ("string", "Where it ends", v.city),
            },
            (
                "How far is it from {start} to {end}?", "What is the distance from {start} to {end}?",
                "Distance between {start} and {end}", "How many kilometers from {start} to {end}?",
            ), number,
        ),
        Everyday(
            "create_event", "Create a calendar event.",
            {
                "title": ("string", "Title of the event", thing),
                "date": ("string", "Date, YYYY-MM-DD", v.date),
                "time": ("string", "Time, HH:MM", v.time),
            },
            (
                "Create an event {title} on {date} at {time}.", "Put {title} on {date} at {time}.",
                "Schedule {title} on {date}.", "Add {title} to my calendar on {date} at {time}.",
            ), done, optional=("time",),
        ),
        Everyday(
            "roll_dice", "Roll dice.", {"sides": ("integer", "Sides of each", v.small), "count": ("integer", "How many", v.small)},
            ("Roll {count} dice with {sides} sides.", "Throw {count} dice.", "Roll {count} dice."),
            number, optional=("sides",),
        ),
        Everyday(
            "translate", "Translate a text into another language.",
            {
                "text": ("string", "The text", thing),
                "language": ("string", "Language to translate into", lambda r: r.choice(("French", "German", "Spanish", "Italian", "Polish", "Japanese"))),
            },
            ("Translate {text} into {language}.", "How do you say {text} in {language}?", "What is {text} in {language}?"),
            thing,
        ),
    ]  # fmt: skip
