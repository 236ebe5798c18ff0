"""Short questions with English answers, taken from dictionaries and package descriptions."""

from __future__ import annotations

import gzip
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ARTICLE = re.compile(r"(a|an|the|any|one|some|someone|something|anything) ")
KINDS = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}
ASK = (
    "What is {x}?",
    "What is {x}?",
    "Tell me what {x} is.",
    "Can you explain what {x} is?",
    "Please explain: what is {x}?",
    "what is {x}",
    "Explain {x} to me in one sentence.",
)
ASK_WORD = (
    'What does "{x}" mean?',
    "Define {x}.",
    'What is the meaning of "{x}"?',
    "What does {x} mean?",
    'Explain the word "{x}".',
    'Give me a definition of "{x}".',
)
ASK_PACKAGE = (
    "What is the package {x}?",
    "What is {x}?",
    "What does the program {x} do?",
    "Describe the Debian package {x}.",
    "What is {x} good for?",
    "Tell me about {x}.",
)


def dictionary(path: Path) -> str:
    """The text of a dictzip file."""
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def entries(text: str) -> Iterator[tuple[str, str]]:
    """(headword, body) of a dict file whose headwords stand in the first column."""
    head, body = "", []
    for line in text.splitlines():
        if line and not line[0].isspace():
            if head and body:
                yield head, "\n".join(body)
            head, body = line.strip(), []
        else:
            body.append(line)
    if head and body:
        yield head, "\n".join(body)


def unwrap(text: str) -> str:
    """Join words that a line break cut at a hyphen."""
    return re.sub(r"(\w-)\n\s+(?=\w)", r"\1", text)


def with_article(word: str) -> str:
    """'cat' -> 'a cat'; names stay as they are."""
    if word[0].isupper():
        return word
    return ("an " if word[0] in "aeiou" else "a ") + word


def wordnet(tree: Path, rng: random.Random) -> Iterator[tuple[str, str]]:
    """One question and answer per WordNet entry, from its first sense."""
    for word, body in entries(dictionary(tree / "dict-wn/usr/share/dictd/wn.dict.dz")):
        match = re.match(r"\s+(n|v|adj|adv) 1?:? ?(.*)", re.sub(r"\s+", " ", " " + unwrap(body)))
        if not match or word.startswith("00-"):
            continue
        kind, rest = match.groups()
        gloss = re.split(r'; "| \[(?:syn|ant|also)| \d+: |; \'', rest)[0].strip(" ;:.")
        example = re.search(r'; "([^"]{20,120})"', rest)
        if not 12 <= len(gloss) <= 220 or "{" in gloss:
            continue
        if kind == "n" and ARTICLE.match(gloss):
            name = with_article(word)
            question = rng.choice(ASK if rng.random() < 0.7 else ASK_WORD)
            answer = f"{name[0].upper()}{name[1:]} is {gloss}."
            question = question.format(x=name if question in ASK else word)
        elif kind == "v":
            question = rng.choice(ASK_WORD).format(x=word)
            answer = f"To {word} means to {gloss}."
        else:
            question = rng.choice(ASK_WORD).format(x=word)
            answer = f'The {KINDS[kind]} "{word}" means {gloss}.'
        if example and rng.random() < 0.6:
            sentence = example[1].strip(" ;,.")
            answer += f' For example: "{sentence[0].upper()}{sentence[1:]}."'
        yield question, answer


def foldoc(tree: Path, rng: random.Random) -> Iterator[tuple[str, str]]:
    """One question and answer per computing term: the first sentences of its first paragraph."""
    for term, body in entries(dictionary(tree / "dict-foldoc/usr/share/dictd/foldoc.dict.dz")):
        first = re.sub(r"<[^>]*>|[{}]", "", body.strip().split("\n\n")[0])
        text = first_sentences(re.sub(r"^\d+\. ", "", re.sub(r"\s+", " ", first).strip()), 300)
        if not text or len(term) > 40:
            continue
        if re.match(r"(A|An|The|Any|One) ", text):
            text = f"{term} is {text[0].lower()}{text[1:]}"
        question = ASK if rng.random() < 0.6 else ASK_WORD
        yield rng.choice(question).format(x=term), text


def first_sentences(text: str, limit: int) -> str:
    """As many whole sentences as fit in limit characters; '' if not even one does."""
    best = ""
    for match in re.finditer(r"[.!?](?= [A-Z\"(]|$)", text):
        if match.end() > limit:
            break
        best = text[: match.end()]
    return best if len(best) >= 40 and best[0].isupper() else ""


def package_descriptions() -> Iterator[tuple[str, str]]:
    """(package, description paragraphs) from apt's English translation lists."""
    lists = sorted(Path("/var/lib/apt/lists").glob("*_main_i18n_Translation-en*"))
    if not lists:
        raise FileNotFoundError(
            "no Translation-en under /var/lib/apt/lists: run "
            "apt-get -o Acquire::Languages=en update"
        )
    for path in lists:
        command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
        raw = subprocess.run(command, check=True, capture_output=True).stdout.decode()
        for block in raw.split("\n\n"):
            match = re.match(r"Package: (\S+)\n.*?\nDescription-en: .*?\n(.*)", block, re.DOTALL)
            if match:
                lines = [line[1:] for line in match[2].splitlines()]
                text = "\n".join("" if line == "." else line for line in lines)
                yield (
                    match[1],
                    "\n\n".join(
                        re.sub(r"\s+", " ", p)
                        for p in text.split("\n\n")
                        if not re.match(r"\s+[*-]", p)
                    ),
                )


def packages(rng: random.Random) -> Iterator[tuple[str, str]]:
    """One question and answer per described package."""
    for name, text in package_descriptions():
        if re.match(r"lib(rust|ghc|golang)|node-|golang-|librust", name) and rng.random() < 0.8:
            continue
        answer = first_sentences(text.split("\n\n")[0], 320)
        if answer:
            yield rng.choice(ASK_PACKAGE).format(x=name), answer


SMALL_TALK = (
    (
        ("Hello", "Hi", "Hello!", "Hi there", "Good morning", "Hey"),
        ("Hello! How can I help you today?", "Hello! What would you like to know?"),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself."),
        (
            "I am a very small language model. "
            "I can answer short questions, call tools and write JSON.",
        ),
    ),
    (
        ("Thank you", "Thanks!", "Thank you very much."),
        ("You are welcome!", "You are welcome. Is there anything else?"),
    ),
    (
        ("What can you do?", "How can you help me?", "help"),
        ("I can explain words, call the tools that you offer me, and return JSON.",),
    ),
    (("Goodbye", "Bye!", "See you"), ("Goodbye! Have a nice day.",)),
)


def all_answers(tree: Path, seed: int = 1) -> Iterator[tuple[str, str]]:
    """Every (question, answer) pair."""
    rng = random.Random(seed)
    yield from wordnet(tree, rng)
    yield from foldoc(tree, rng)
    yield from packages(rng)
    for questions, answers in SMALL_TALK:
        for question in questions:
            for answer in answers:
                yield from [(question, answer)] * 40
