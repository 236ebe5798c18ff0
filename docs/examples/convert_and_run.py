"""Repack a checkpoint, check every byte of the result, and run it with a small expert cache.

python docs/examples/convert_and_run.py [SOURCE [OUT]]
"""

import sys
import tempfile
from pathlib import Path

from flashmoe_mlx import generate, load
from flashmoe_mlx.convert import convert
from flashmoe_mlx.convert.verify.verify import verify
from flashmoe_mlx.loader import BUNDLED_MODEL


def main(source: str, out: str) -> None:
    """Convert to 4 bits, verify, generate."""
    convert(source, out, quantize=True, q_bits=4)
    problems = verify(Path(out))
    assert not problems, problems
    model, tokenizer = load(out, expert_cache="auto" if source != str(BUNDLED_MODEL) else "2MiB")
    messages = [{"role": "user", "content": "What is a library?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    print(generate(model, tokenizer, prompt, max_tokens=24))
    print(model.expert_cache(), model.expert_stats(), sep="\n")
    model.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        given = sys.argv[1:]
        main(*given, *[str(BUNDLED_MODEL), f"{folder}/model"][len(given) :])
