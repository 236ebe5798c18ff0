"""Write the held-out evaluation files: heldout.jsonl (cases) and heldout.txt (English).

python heldout.py --work DIR --out ../../tools/bundled_model
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from tokenizer import generator, rows

COUNTS = {"tool": 100, "json": 100, "everyday": 40, "no_tool": 20, "result": 30}
CHARACTERS = 80_000
SEED = 20


def case(dialogue: dict[str, Any]) -> dict[str, Any]:
    """Messages up to the last answer, and what that answer must be."""
    *messages, last = dialogue["messages"]
    expected: dict[str, Any] = {}
    if dialogue["kind"] in ("tool", "everyday") and "tool_calls" in last:
        expected = {"calls": [call["function"] for call in last["tool_calls"]]}
    elif dialogue["kind"] == "json":
        expected = {"json": json.loads(last["content"])}
    elif dialogue["kind"] in ("result", "everyday"):
        expected = {"text": last["content"]}
    return {"kind": dialogue["kind"], "messages": messages, "tools": dialogue["tools"], **expected}


def main() -> None:
    """Draw cases from the held-out generator and paragraphs from the held-out documents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    wanted, lines = dict(COUNTS), []
    for dialogue in generator(args.work, SEED, "heldout"):
        if wanted.get(dialogue["kind"], 0) > 0 and len(json.dumps(dialogue)) < 3500:
            wanted[dialogue["kind"]] -= 1
            lines.append(json.dumps(case(dialogue), ensure_ascii=False))
        if not any(wanted.values()):
            break
    (args.out / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    documents = [row["text"] for row in rows(args.work, "text", "heldout")]
    random.Random(SEED).shuffle(documents)
    text = ""
    for document in documents:
        if len(text) + len(document[:2500]) < CHARACTERS:
            text += document[:2500].rsplit("\n\n", 1)[0] + "\n\n\n"
    (args.out / "heldout.txt").write_text(text)


if __name__ == "__main__":
    main()
