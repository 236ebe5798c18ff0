"""Generate 'Return JSON' tasks: outlines, sentences and tables to be turned into nested JSON."""

from __future__ import annotations

import json
import random
import re
from typing import Any

from values import CURRENCIES, Values

ASK = (
    "Return JSON with these fields:",
    "Return JSON with exactly this content:",
    "Return this as JSON:",
    "Convert to JSON:",
    "Write the following as a JSON object:",
)


def makers(v: Values) -> dict[str, Any]:
    """Field name -> value maker."""
    return {
        "name": v.name,
        "author": v.name,
        "email": v.email,
        "city": v.city,
        "path": v.path,
        "url": v.url,
        "id": v.ident,
        "code": v.ident,
        "title": v.phrase,
        "note": v.awkward,
        "comment": v.awkward,
        "text": v.text,
        "phone": v.phone,
        "date": v.date,
        "time": v.time,
        "count": v.small,
        "number": v.integer,
        "total": v.decimal,
        "active": v.boolean,
        "tags": v.several(v.word),
        "codes": v.several(v.ident),
        "values": v.several(v.integer),
        "people": v.several(v.name),
        "quotes": v.several(v.awkward, 1, 3),
        "price": v.decimal,
        "serial": v.integer,
    }


NESTED = ["owner", "address", "details", "settings", "contact", "source", "meta", "parent"]


def tree(r: random.Random, pool: dict[str, Any], depth: int) -> dict[str, Any]:
    """A random nested object."""
    result = {}
    for key in r.sample(list(pool), r.randint(2, 6 if depth == 0 else 3)):
        result[key] = pool[key](r)
    if depth < 2:
        for key in r.sample(NESTED, r.choice((0, 1, 1, 2)) if depth == 0 else r.choice((0, 0, 1))):
            result[key] = tree(r, pool, depth + 1)
    return result


def scalar(value: Any) -> str:
    """A value as it stands in an outline."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def outline(value: dict[str, Any], indent: str = "") -> str:
    """Indented 'key: value' lines; list items start with '- '."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{indent}{key}:", outline(item, indent + "  ")]
        elif isinstance(item, list):
            lines += [f"{indent}{key}:"] + [f"{indent}  - {scalar(x)}" for x in item]
        else:
            lines.append(f"{indent}{key}: {scalar(item)}")
    return "\n".join(lines)


# ruff: noqa: E501
SENTENCES = (  # {slot} or {slot:field name, field name}; the first name is the most usual
    "{name:name,customer} from {city} ({email}) ordered {small:quantity,count} x {item:product,item} on {date}.",
    "On {date} {name:name,customer} paid {price:amount,price} for {item}, reference {id:reference,code}.",
    "Ticket {id:ticket,id} was opened by {name:author,name} on {date}: {text}",
    "{name} lives in {city}, works as {item:job,work} and can be reached at {email}.",
    "Please book a table for {small:people,guests} in {city} on {date} at {time}, name {name}.",
    "My name is {name}, I was born on {date:birthday,born} and my phone number is {phone}.",
    "The meeting about {item:topic,subject} is on {date} at {time} in {city:city,place}.",
    "{name:seller,name} sold {small:quantity,count} {item:product,item} for {price} {currency}.",
    "Flight {id:flight,number} leaves {city:from,city} on {date} at {time}.",
    "Invoice {id:invoice,number} from {date}: {price:total,amount} {currency}, to be paid by {name:customer,name}.",
    "{name} ({email}, {phone}) wrote: {text:message,text}",
    "The file {path} has {number:size,bytes} bytes and belongs to {name:owner,name}.",
    "{item:product,name}, {price} {currency}, {small:stock,count} in stock, code {id:code,id}.",
    "Call {name} at {phone} on {date}.",
    "The package {id:package,id} was sent to {name:recipient,name} in {city} on {date}.",
    "{name:author,name} rated {item:product,item} with {small:points,rating} points: {text:comment,text}",
    "The book {title} by {name:author,name} costs {price} {currency}.",
    "Hi, I am {name}. I would like to return order {id:order,order_id}: {text:reason,text}",
    "Server {id:server,host} in {city} has {small:cores,count} cores and {number:memory,size} bytes of memory.",
    "Remind {name} on {date} at {time}: {text:note,text}",
    "{name} is {age} years old and lives in {city}.",
    "We need {small:quantity,count} {item:product,item} by {date:deadline,date}; send the bill to {email}.",
    "From {city:from,start} to {other_city:to,end} it takes {small:hours,time} hours and costs {price} {currency}.",
    "Error {number:code,error} at {time} in {path:file,path}: {text:message,text}",
    "{name:manager,name} hired {other_name:employee,person} as {item:job,position} on {date}.",
    "{email} registered on {date} with the id {id:id,user_id} and the password {word:password,secret}.",
)
ENDS = (
    "Return JSON with the fields {keys}.",
    "Return JSON with the fields {keys}.",
    "Return JSON with {keys}.",
    "Extract {keys} as JSON.",
    "As JSON with the fields {keys}, please.",
    "JSON: {keys}",
    "Give me {keys} as JSON.",
    "Turn this into JSON with the keys {keys}.",
)


def slots(v: Values) -> dict[str, Any]:
    """Makers of the slots of SENTENCES."""

    def item(r: random.Random) -> str:
        return " ".join(v.word(r) for _ in range(r.choice((1, 1, 2, 2, 3))))

    def text(r: random.Random) -> str:
        return v.text(r) if r.random() < 0.3 else v.phrase(r, 2, 8)

    return {
        "name": v.name, "other_name": v.name, "city": v.city, "other_city": v.city,
        "email": v.email, "small": v.small, "item": item, "date": v.date, "price": v.decimal,
        "id": v.ident, "text": text, "time": v.time, "phone": v.phone, "number": v.integer,
        "path": v.path, "title": v.phrase, "word": v.word,
        "currency": lambda r: r.choice(CURRENCIES), "age": lambda r: r.randint(1, 99),
    }  # fmt: skip


def sentence(r: random.Random, v: Values) -> tuple[str, Any]:
    """Facts in an English sentence and the fields to take from it: all or some, in any order."""
    make, facts = slots(v), {}

    def fill(match: re.Match[str]) -> str:
        slot, _, names = match[1].partition(":")
        value = make[slot](r)
        usual, *others = names.split(",") if names else [slot]
        facts[r.choice(others) if others and r.random() < 0.35 else usual] = value
        return str(value)

    text = re.sub(r"{([^}]*)}", fill, r.choice(SENTENCES))
    keys = list(facts)
    if r.random() < 0.5:
        keys = r.sample(keys, r.randint(2, len(keys)))
    answer: dict[str, Any] = {key: facts[key] for key in keys}
    listed = ", ".join(keys)
    if len(keys) > 3 and r.random() < 0.15:
        inner, key = keys[:2], r.choice(NESTED)
        answer = {key: {k: facts[k] for k in inner}, **{k: facts[k] for k in keys[2:]}}
        listed = ", ".join([f"{key} ({', '.join(inner)})", *keys[2:]])
    elif r.random() < 0.3:
        listed = " and ".join(listed.rsplit(", ", 1))
    return f"{text}{r.choice(chr(10) + ' ')}{r.choice(ENDS).format(keys=listed)}", answer


def table(r: random.Random, v: Values, pool: dict[str, Any]) -> tuple[str, Any]:
    """Rows separated by ' | ', to become a list of objects."""
    flat = [k for k in pool if not isinstance(pool[k](r), list)]
    keys = r.sample(flat, r.randint(2, 4))
    rows = [{k: pool[k](r) for k in keys} for _ in range(r.randint(2, 4))]
    lines = [" | ".join(keys)] + [" | ".join(scalar(row[k]) for k in keys) for row in rows]
    return "Return this table as a JSON list of objects:\n" + "\n".join(lines), rows


def json_task(r: random.Random, v: Values) -> tuple[str, str]:
    """(prompt, exact JSON text)."""
    pool = makers(v)
    roll = r.random()
    if roll < 0.4:
        answer: Any = tree(r, pool, 0)
        prompt = f"{r.choice(ASK)}\n{outline(answer)}"
    elif roll < 0.85:
        prompt, answer = sentence(r, v)
    else:
        prompt, answer = table(r, v, pool)
    return prompt, json.dumps(answer, ensure_ascii=False)
