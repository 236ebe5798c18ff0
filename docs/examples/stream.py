"""Stream an answer, then print the counters of the experts.

    python docs/examples/stream.py [MODEL] [QUESTION]

MODEL is a directory or a Hub name (default: the bundled model).
"""

import sys

from flashmoe_mlx import load, stream_generate
from flashmoe_mlx.loader import BUNDLED_MODEL


def main(path: str = str(BUNDLED_MODEL), question: str = "What is a library?") -> None:
    """Stream one answer."""
    model, tokenizer = load(path)
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    try:
        for response in stream_generate(model, tokenizer, prompt, max_tokens=64):
            print(response.text, end="", flush=True)
        print(f"\n{response.generation_tps:.1f} tokens/s; {model.expert_stats()}")
    finally:
        model.close()  # its files and reader threads


if __name__ == "__main__":
    main(*sys.argv[1:])
