"""The pool of parameters that the tools of generated dialogues draw from."""

from __future__ import annotations

from typing import Any

from values import CURRENCIES, UNITS, Make, Values

Param = tuple[str, dict[str, Any], str, Make]  # name, schema, phrase with {v}, maker


def parameters(v: Values) -> list[Param]:
    """The pool of parameters that a tool may have."""

    def s(name: str, text: str, phrase: str, make: Make) -> Param:
        return name, {"type": "string", "description": text}, phrase, make

    def t(name: str, kind: str, text: str, phrase: str, make: Make) -> Param:
        return name, {"type": kind, "description": text}, phrase, make

    def many(name: str, text: str, phrase: str, make: Make) -> Param:
        item = {"type": "integer" if make in (v.integer, v.small) else "string"}
        schema = {"type": "array", "description": text, "items": item}
        return name, schema, phrase, v.several(make)

    def choice(name: str, text: str, phrase: str, values: list[str]) -> Param:
        schema = {"type": "string", "description": text, "enum": values}
        return name, schema, phrase, lambda r: r.choice(values)

    def record(name: str, text: str, phrase: str, fields: dict[str, Make]) -> Param:
        kinds = {
            k: {
                "type": "integer"
                if m in (v.integer, v.small)
                else "number"
                if m == v.decimal
                else "boolean"
                if m == v.boolean
                else "string"
            }
            for k, m in fields.items()
        }
        schema = {"type": "object", "description": text, "properties": kinds}
        return name, schema, phrase, lambda r: {k: m(r) for k, m in fields.items()}

    return [
        s("name", "Full name of the person", "for {v}", v.name),
        s("customer", "Name of the customer", "the customer is {v}", v.name),
        s("email", "E-mail address", "the e-mail address is {v}", v.email),
        s("city", "City", "in {v}", v.city),
        s("destination", "Where to go", "to {v}", v.city),
        s("path", "Path of the file", "the path is {v}", v.path),
        s("url", "Web address", "from {v}", v.url),
        s("id", "Identifier", "with the id {v}", v.ident),
        s("order_id", "Identifier of the order", "order number {v}", v.ident),
        s("token", "Access token", "use the token {v}", v.ident),
        s("title", "Title", "titled '{v}'", v.phrase),
        s("note", "Free text", "with the note: {v}", v.text),
        s("message", "Text of the message", "the message reads: {v}", v.text),
        s("query", "What to look for", "matching '{v}'", v.phrase),
        s("phone", "Telephone number", "phone {v}", v.phone),
        s("date", "Date, YYYY-MM-DD", "on {v}", v.date),
        s("deadline", "Last day, YYYY-MM-DD", "no later than {v}", v.date),
        s("time", "Time of day, HH:MM", "at {v}", v.time),
        choice("currency", "Currency code", "in {v}", CURRENCIES),
        choice("unit", "Unit of measurement", "measured in {v}", UNITS),
        choice("priority", "How urgent it is", "with {v} priority", ["low", "normal", "high"]),
        choice("format", "Output format", "as {v}", ["pdf", "csv", "html", "text"]),
        choice("color", "Color", "in {v}", ["red", "green", "blue", "black", "white"]),
        t("quantity", "integer", "How many", "{v} of them", v.small),
        t("limit", "integer", "Greatest number of results", "at most {v} results", v.small),
        t("page", "integer", "Page number", "page {v}", v.small),
        t("account", "integer", "Account number", "from account {v}", v.integer),
        t("size", "integer", "Size in bytes", "{v} bytes long", v.integer),
        t("price", "number", "Price", "for a price of {v}", v.decimal),
        t("weight", "number", "Weight", "weighing {v}", v.decimal),
        t("latitude", "number", "Latitude", "latitude {v}", v.decimal),
        t("urgent", "boolean", "Whether it is urgent", "urgent: {v}", v.boolean),
        t("notify", "boolean", "Whether to notify people", "notify everyone: {v}", v.boolean),
        many("tags", "Tags", "tagged {v}", v.word),
        many("people", "Names of the people", "together with {v}", v.name),
        many("recipients", "E-mail addresses", "send it to {v}", v.email),
        many("files", "Paths of the files", "using the files {v}", v.path),
        many("ids", "Numbers of the items", "for the items {v}", v.integer),
        many("lines", "Lines of text", "with these lines: {v}", v.text),
        record(
            "address",
            "Postal address",
            "deliver to {v}",
            {"street": v.phrase, "city": v.city, "zip": v.integer},
        ),
        record(
            "range", "Smallest and largest value", "within {v}", {"min": v.small, "max": v.integer}
        ),
        record("owner", "Who owns it", "owned by {v}", {"name": v.name, "id": v.ident}),
        record(
            "options",
            "Further options",
            "with the options {v}",
            {"retries": v.small, "verbose": v.boolean, "label": v.phrase},
        ),
    ]
