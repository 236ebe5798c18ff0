"""Fetch free English text from Debian packages and reduce it to clean paragraphs.

    python corpus.py --work DIR      # needs apt-get, dpkg and a Debian 12 package mirror

Writes DIR/text.jsonl ({"source", "split", "text"}; one document a line) and DIR/answers.jsonl
({"split", "question", "answer"}; short definitions). A document goes to the held-out split by the
hash of its name, so that no held-out paragraph was ever trained on; paragraphs are deduplicated.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import re
import subprocess
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from definitions import all_answers, package_descriptions

# The stories of a fantasy game: most of the dialogue and narration that we have.
CAMPAIGNS = [
    "did",
    "dm",
    "dw",
    "ei",
    "httt",
    "l",
    "low",
    "nr",
    "sof",
    "sota",
    "sotbe",
    "thot",
    "trow",
    "tsg",
    "ttb",
    "utbs",
]

# Package -> the part of its files that is English prose ("" = all of them).
PACKAGES: dict[str, str] = {
    "debian-reference-en": "",
    "developers-reference": "",
    "debian-faq": "",
    "debian-handbook": "en-US",
    "debian-policy": "",
    "debian-history": "",
    "doc-debian": "",
    "harden-doc": "en",
    "maint-guide": "en",
    "installation-guide-amd64": "/en/",
    "apt-doc": "",
    "aptitude-doc-en": "",
    "fai-doc": "",
    "anarchism": "",
    "bible-kjv-text": "",
    "sword-text-web": "",
    "sword-comm-tdavid": "",
    "sword-comm-mhcc": "",
    "sword-comm-scofield": "",
    "dict-gcide": "",
    "dict-jargon": "",
    "dict-devil": "",
    "dict-foldoc": "",
    "dict-wn": "",
    "display-dhammapada": "",
    "fortunes": "",
    "wesnoth-1.16-data": r"\.cfg$",
    **{f"wesnoth-1.16-{c}": r"\.cfg$" for c in CAMPAIGNS},
    "nethack-common": "",
    "freeciv-data": "",
    "angband-data": "",
    "crossfire-doc": "",
    "sgt-puzzles": r"\.html$|doc",
    "gimp-help-en": "",
    "libreoffice-help-en-us": "",
    "libreoffice-help-common": "",
    "gnome-user-docs": "/C/",
    "git-doc": "",
    "manpages": r"/man\d",
    "manpages-dev": r"/man\d",
    "perl-doc": "",
    "python3.11-doc": "",
    "postgresql-doc-15": "",
    "apache2-doc": r"\.en|/en/|\.html$",
    "rust-doc": r"/html/(book|reference|nomicon|cargo|rustc|edition-guide|embedded-book)/",
    "linux-doc-6.1": r"\.html$",
    "cmake-doc": "",
    "c++-annotations-txt": "",
    "zsh-doc": "",
    "vim-doc": "",
    "bash-doc": "",
    "guile-3.0-doc": "",
    "autoconf-doc": "",
    "wireshark-doc": "",
    "exim4-doc-html": "",
    "bind9-doc": "",
    "kstars-data": r"\.(html|docbook|txt)$",
    "maxima-doc": "",
    "lilypond-doc-html": r"[a-z-]\.html$",
    "grass-doc": "",
    "mercurial-common": r"\.txt",
    "fp-docs-3.2.2": r"\.html$",
    "r-doc-html": "",
    "octave-doc": r"\.html$",
    "linuxcnc-doc-en": r"\.html$",
    "python-django-doc": "",
    "python-sqlalchemy-doc": "",
}
CAP = 9_000_000  # characters kept of one package, so that no single manual dominates
CAPS = {"reference": 30_000_000, "sword-comm-tdavid": 3_000_000, "sword-comm-mhcc": 2_000_000}
HELD_OUT = 250  # one document in so many is held out
SKIP = re.compile(
    r"/(copyright|changelog[^/]*|COPYING[^/]*|LICEN[CS]E[^/]*|AUTHORS[^/]*)$|[.-]"
    r"(ca|cs|da|de|es|fr|hu|it|ja|ko|nl|pl|pt|ro|ru|sv|tr|vi|zh|nb|fi|el|sr)[._/]"
)
PROSE = re.compile(
    r"\.(html?|txt|text|page|docbook|xml|rst|md|pod|cfg|dz|bzz|czz|info|ruleset)$|"
    r"/man/man\d/|/doc/|/games/fortunes/[^.]*$|/vim\d*/doc/|/bible/"
)
STOPWORDS = set(
    [
        "the",
        "a",
        "an",
        "of",
        "to",
        "and",
        "in",
        "is",
        "that",
        "for",
        "it",
        "as",
        "with",
        "be",
        "on",
        "are",
        "this",
        "by",
        "you",
        "or",
        "not",
        "his",
        "he",
        "was",
        "which",
        "from",
        "at",
        "can",
        "will",
        "have",
        "has",
        "if",
        "they",
        "i",
        "but",
        "your",
        "all",
        "when",
    ]
)
QUOTES = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u00a0": " ",
        "\u2026": "...",
        "\u00ad": "",
        "\u2212": "-",
        "`": "'",
    }
)


def fetch(work: Path) -> None:
    """Download and unpack every package of PACKAGES under work/."""
    debs, tree = work / "debs", work / "x"
    debs.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "-o", "Acquire::Languages=en", "update"], check=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=debs, check=True)
    for deb in debs.glob("*.deb"):
        target = tree / deb.name.split("_")[0]
        if not target.exists():
            subprocess.run(["dpkg", "-x", deb, target], check=True)


def read(path: Path) -> str:
    """The text of a plain, gzip, dictzip or SWORD file."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    elif path.suffix in (".bzz", ".czz"):
        data = b"\n\n".join(zlib_streams(data))
    return data.decode("utf-8", "replace")


def zlib_streams(data: bytes) -> Iterator[bytes]:
    """A SWORD module is one zlib stream after the other."""
    while data:
        stream = zlib.decompressobj()
        try:
            yield stream.decompress(data) + stream.flush()
        except zlib.error:
            return
        data = stream.unused_data.lstrip(b"\0")  # unused blocks are zeros


def strip_markup(text: str, name: str) -> str:
    """Reduce a file to paragraphs separated by empty lines."""
    if re.search(r"\.cfg(\.gz)?$", name):
        strings = re.findall(r'_\s*"((?:[^"]|"")*)"', text)
        return "\n\n".join(s.replace('""', '"').replace("\n", " ") for s in strings)
    if re.search(r"/man\d/", name):
        text = re.sub(r"(?m)^\.(PP|P|TP|IP|SH|SS|LP|RS|RE).*$", "\n", text)
        text = re.sub(r"(?m)^\.(B|I|BR|IR|RB|RI|BI|IB) ", "", text)
        text = re.sub(r"(?m)^[.'].*$", "", text)
        return re.sub(r"\\f.|\\&|\\[(]..|\\\||\\", "", text)
    if "<" in text and re.search(r"(?i)</?(p|div|para|w|verse)[ >/]", text):
        text = re.sub(
            r"(?is)<!--.*?-->|<(script|style|pre|nav|head|screen|programlisting|table)\b"
            r".*?</\1>",
            "\n\n",
            text,
        )
        text = re.sub(
            r"(?i)</?(p|div|li|ul|ol|dl|dd|dt|td|tr|h\d|br|blockquote|para|title|note|w|q|"
            r"section|sect\d|listitem|item|body|verse|chapter|lg|l)\b[^>]*>",
            "\n\n",
            text,
        )
        text = html.unescape(re.sub(r"<[^>]*>", "", text))
        return "\n\n".join(re.sub(r"\s+", " ", p) for p in text.split("\n\n"))
    if "/fortunes/" in name:
        text = re.sub(r"(?m)^%$", "\n", text)
    text = re.sub(r"\[(1913 Webster|PJC|WordNet[^]]*)\]|\s+--[A-Z][^\n]*", "", text)
    return re.sub(r"[{}]|<[^>\n]*>", "", text)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like English sentences."""
    if not 60 <= len(paragraph) <= 6000 or paragraph[-1] not in ".!?\"')":
        return False
    if not (paragraph[0].isupper() or paragraph[0] in "\"'"):
        return False
    words = paragraph.lower().split()
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    known = sum(w.strip(".,;:") in STOPWORDS for w in words)
    return (
        letters > 0.88 * len(paragraph)
        and known >= 0.2 * len(words)
        and max(map(len, words)) < 32
        and all(ord(c) < 0x250 for c in paragraph)
    )


def clean(text: str, name: str) -> list[str]:
    """The prose paragraphs of one file, whitespace folded."""
    paragraphs = re.split(r"\n\s*\n", strip_markup(text, name).translate(QUOTES))
    folded = (re.sub(r"\s+", " ", p).strip() for p in paragraphs)
    return [p for p in folded if is_prose(p)]


def read_package(package: str, tree: Path) -> list[tuple[str, list[str]]]:
    """(document name, paragraphs) of every English file of a package."""
    documents = []
    for path in sorted((tree / package).rglob("*")):
        name = str(path.relative_to(tree))
        plain = name.removesuffix(".gz")
        if (
            path.is_file()
            and not path.is_symlink()
            and not SKIP.search(name)
            and PROSE.search(plain)
            and re.search(PACKAGES[package], plain)
        ):
            paragraphs = clean(read(path), plain)
            if paragraphs:
                documents.append((name, paragraphs))
    return documents


def reference_documents(work: Path) -> list[tuple[str, list[str]]]:
    """Package descriptions and dictionary sentences as documents of 40 paragraphs."""
    described = [p for _, text in package_descriptions() for p in text.split("\n\n")]
    defined = [answer for _, answer in all_answers(work / "x")]
    paragraphs = [p for p in described if is_prose(p)] + defined
    return [("reference", paragraphs)]


def split_of(name: str) -> str:
    """'heldout' for one document in HELD_OUT, by the hash of its name."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "heldout" if digest % HELD_OUT == 0 else "train"


def split_long(documents: list[tuple[str, list[str]]]) -> Iterator[tuple[str, list[str]]]:
    """Cut whole books into documents of 40 paragraphs, so that both splits see all sources."""
    for name, paragraphs in documents:
        for start in range(0, len(paragraphs), 40):
            yield f"{name}#{start}", paragraphs[start : start + 40]


def limit(package: str) -> int:
    """Characters to keep of a package."""
    return CAPS.get(package, CAP)


def write_text(work: Path) -> None:
    """Write text.jsonl: held-out documents first, so that duplicates fall out of training."""
    with ProcessPoolExecutor() as pool:
        found = list(pool.map(read_package, PACKAGES, [work / "x"] * len(PACKAGES)))
    sources = [*zip(PACKAGES, found, strict=True), ("reference", reference_documents(work))]
    seen: set[bytes] = set()
    kept: dict[str, int] = {}
    with (work / "text.jsonl").open("w") as out:
        for wanted in ("heldout", "train"):
            for package, documents in sources:
                for name, paragraphs in split_long(documents):
                    if split_of(name) != wanted or kept.get(package, 0) > limit(package):
                        continue
                    fresh = []
                    for paragraph in paragraphs:
                        key = hashlib.md5(paragraph[:200].encode()).digest()
                        if key not in seen:
                            seen.add(key)
                            fresh.append(paragraph)
                    text = "\n\n".join(fresh)
                    kept[package] = kept.get(package, 0) + len(text)
                    if len(text) > 200:
                        row = {"source": package, "split": wanted, "text": text}
                        out.write(json.dumps(row, ensure_ascii=False) + "\n")
    for package, size in sorted(kept.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:8.2f} M characters  {package}")
    print(f"{sum(kept.values()) / 1e6:8.2f} M characters in all")


def write_answers(work: Path) -> None:
    """Write answers.jsonl: short questions with definitions as answers."""
    count = 0
    with (work / "answers.jsonl").open("w") as out:
        for question, answer in all_answers(work / "x"):
            split = "heldout" if split_of(answer) == "heldout" else "train"
            row = {"split": split, "question": question, "answer": answer}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    print(f"{count} questions with answers")


def main() -> None:
    """Fetch, clean, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for packages and output")
    parser.add_argument("--no-fetch", action="store_true", help="packages are already unpacked")
    args = parser.parse_args()
    if not args.no_fetch:
        fetch(args.work)
    write_text(args.work)
    write_answers(args.work)


if __name__ == "__main__":
    main()
