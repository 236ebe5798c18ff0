"""Answer several questions in one batch: an expert that several need is read once.

python docs/examples/batch.py [MODEL]
"""

import sys

from flashmoe_mlx import batch_generate, load
from flashmoe_mlx.loader import BUNDLED_MODEL

QUESTIONS = ["What is a library?", "What is a disk?", "What is a token?"]


def main(path: str = str(BUNDLED_MODEL)) -> None:
    """Answer all questions."""
    model, tokenizer = load(path)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)
        for q in QUESTIONS
    ]
    answers = batch_generate(model, tokenizer, prompts, max_tokens=32)
    for question, text in zip(QUESTIONS, answers.texts, strict=True):
        print(f"{question} {text.strip()}")
    print(model.expert_stats())
    model.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
