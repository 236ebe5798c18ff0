"""Generate 'Return JSON' tasks: outlines, sentences and tables to be turned into nested JSON."""

from __future__ import annotations

import json
import random
from typing import Any

from values import Values

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


def sentence(r: random.Random, v: Values) -> tuple[str, Any]:
    """Facts in an English sentence and the fields to take from it."""
    name, city, mail = v.name(r), v.city(r), v.email(r)
    count, item, code, date = v.small(r), v.phrase(r, 1, 2), v.ident(r), v.date(r)
    price, said = v.decimal(r), v.text(r)
    facts = r.choice(
        (
            (
                f"{name} from {city} ({mail}) ordered {count} x {item} on {date}.",
                {
                    "name": name,
                    "city": city,
                    "email": mail,
                    "quantity": count,
                    "product": item,
                    "date": date,
                },
            ),
            (
                f"On {date} {name} paid {price} for {item}, reference {code}.",
                {"name": name, "amount": price, "item": item, "reference": code, "date": date},
            ),
            (
                f"Ticket {code} was opened by {name} on {date}: {said}",
                {"ticket": code, "author": name, "date": date, "text": said},
            ),
            (
                f"{name} lives in {city}, works as {item} and can be reached at {mail}.",
                {"person": {"name": name, "city": city}, "work": item, "contact": {"email": mail}},
            ),
        )
    )
    text, answer = facts
    keys = ", ".join(
        f"{k} ({', '.join(x)})" if isinstance(x, dict) else k for k, x in answer.items()
    )
    return f"{text}\nReturn JSON with the fields {keys}.", answer


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
    if roll < 0.6:
        answer: Any = tree(r, pool, 0)
        prompt = f"{r.choice(ASK)}\n{outline(answer)}"
    elif roll < 0.8:
        prompt, answer = sentence(r, v)
    else:
        prompt, answer = table(r, v, pool)
    return prompt, json.dumps(answer, ensure_ascii=False)
