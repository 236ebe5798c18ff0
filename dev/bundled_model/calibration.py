"""Write the dialogues that `tools/quality.py` calibrates on: like the training's, not held out.

python calibration.py --out ../../tools/bundled_model
"""

from __future__ import annotations

import argparse
import json
import random
import re
from itertools import islice, pairwise
from pathlib import Path

from dialogues import Generator

COUNT, SEED = 150, 77
ROOT = Path(__file__).parents[2]
DOCUMENTS = "README.md", "dev/LOG.md", "docs/reference/plan.md"  # for their words


def main() -> None:
    """Draw dialogues about the words of this project's documents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    text = " ".join((ROOT / name).read_text() for name in DOCUMENTS)
    words = sorted(set(re.findall(r"[a-z]{4,9}", text)))
    random.Random(SEED).shuffle(words)
    facts = [(f"What is {a}?", f"{a.capitalize()} is {b}.") for a, b in pairwise(words)]
    lines = [
        json.dumps({name: dialogue[name] for name in ("messages", "tools")}, ensure_ascii=False)
        for dialogue in islice(Generator(words, facts, SEED, held_out=False), COUNT)
    ]
    (args.out / "calibration.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
