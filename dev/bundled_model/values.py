"""Random argument values: names, ids, paths, texts. Training and held-out lists are disjoint."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

FIRST = [
    "Anna",
    "Björn",
    "Chloé",
    "Dmitri",
    "Elena",
    "Fatima",
    "Giulia",
    "Hiroshi",
    "Ingrid",
    "José",
    "Katarzyna",
    "Lukas",
    "Mehmet",
    "Ngozi",
    "Olivia",
    "Pavel",
    "Quentin",
    "Rosa",
    "Søren",
    "Tomás",
    "Ursula",
    "Viktor",
    "Wei",
    "Ximena",
    "Yusuf",
    "Zoë",
    "Amélie",
    "Brian",
    "Carmen",
    "David",
    "Emma",
    "Frank",
    "Grace",
    "Helga",
    "Ivan",
    "Julia",
    "Kofi",
    "Leila",
    "Marta",
    "Noah",
    "Oskar",
    "Priya",
    "Renée",
    "Sara",
    "Thabo",
    "Ulrich",
    "Vera",
    "Walter",
    "Xenia",
    "Yara",
    "Zdeněk",
    "Łucja",
    "Şebnem",
    "Åsa",
    "Мария",
    "花子",
    "Beatriz",
    "Carl",
    "Dora",
    "Erik",
    "Fiona",
    "Gustav",
    "Hanna",
    "Isak",
    "Jorge",
    "Kim",
    "Lena",
    "Mia",
    "Nils",
    "Otto",
    "Petra",
]
LAST = [
    "Abe",
    "Bergström",
    "Castañeda",
    "Dvořák",
    "Eriksen",
    "Fernández",
    "García",
    "Hoffmann",
    "Ivanov",
    "Jansen",
    "Kowalski",
    "Lindqvist",
    "Müller",
    "Nguyễn",
    "O'Brien",
    "Petrov",
    "Quispe",
    "Rossi",
    "Schäfer",
    "Tanaka",
    "Ueda",
    "Vasquez",
    "Weiß",
    "Xu",
    "Yılmaz",
    "Zhang",
    "Ødegård",
    "Smith",
    "Jones",
    "Brown",
    "Taylor",
    "Wilson",
    "Martin",
    "Clark",
    "Lewis",
    "Walker",
    "Hall",
    "Young",
    "King",
    "Wright",
    "Green",
    "Baker",
    "Adams",
    "Nelson",
    "Carter",
    "Mitchell",
    "Ncube",
    "Okafor",
    "Patel",
    "Hansen",
    "Meyer",
    "Novak",
    "Silva",
    "Costa",
    "Popescu",
    "Horvath",
    "Nagy",
    "Laine",
    "Virtanen",
    "Kaya",
    "Demir",
]
CITIES = [
    "Berlin",
    "Lisbon",
    "Osaka",
    "Zürich",
    "Kraków",
    "Nairobi",
    "Toronto",
    "Santiago",
    "Hanoi",
    "Malmö",
    "Paris",
    "London",
    "Madrid",
    "Vienna",
    "Dublin",
    "Oslo",
    "Prague",
    "Athens",
    "Cairo",
    "Lima",
    "Quito",
    "Sydney",
    "Boston",
    "Denver",
    "Austin",
    "Montréal",
    "Reykjavík",
    "Córdoba",
    "Gdańsk",
    "İzmir",
    "Jakarta",
    "Mumbai",
    "Seoul",
    "Tallinn",
    "Riga",
    "Vilnius",
    "Sarajevo",
    "Sofia",
    "Tbilisi",
    "Yerevan",
    "Accra",
    "Dakar",
    "Lagos",
    "Tunis",
]
DOMAINS = [
    "example.org",
    "mail.net",
    "acme.io",
    "uni-bonn.de",
    "posteo.eu",
    "corp.co.uk",
    "lab.fi",
    "shop.jp",
]
EXTENSIONS = ["txt", "csv", "pdf", "json", "md", "png", "tar.gz", "log", "py", "yaml"]
UNITS, CURRENCIES = (
    ["kg", "g", "lb", "m", "km", "cm", "l", "ml"],
    ["EUR", "USD", "GBP", "JPY", "CHF", "SEK", "PLN", "INR"],
)

Make = Callable[[random.Random], Any]


class Values:
    """Value makers over one share of the word lists: every fifth item is for the held-out set."""

    def __init__(self, words: list[str], held_out: bool) -> None:
        def share(items: list[str]) -> list[str]:
            return [x for i, x in enumerate(items) if (i % 5 == 0) == held_out]

        self.words, self.first, self.last = share(words), share(FIRST), share(LAST)
        self.cities = share(CITIES)

    def word(self, r: random.Random) -> str:
        """One English word."""
        return r.choice(self.words)

    def phrase(self, r: random.Random, low: int = 1, high: int = 5) -> str:
        """A few words, sometimes with capitals, digits or punctuation."""
        words = [self.word(r) for _ in range(r.randint(low, high))]
        style = r.random()
        if style < 0.2:
            words = [w.capitalize() for w in words]
        elif style < 0.3:
            words.append(str(r.randint(1, 9999)))
        elif style < 0.4:
            words[0] = words[0].capitalize() + r.choice(",:;")
        return " ".join(words)

    def awkward(self, r: random.Random) -> str:
        """A text that needs care: quotes, backslashes, tabs of code, signs."""
        a, b = self.phrase(r, 1, 3), self.phrase(r, 1, 3)
        return r.choice(
            (
                f'{a} "{b}"',
                f'He said "{a}" and "{b}".',
                f"C:\\{self.word(r)}\\{self.word(r)}",
                f"{a} & {b} (100%)",
                f'"{a}" isn\'t \\{self.word(r)}',
                f"{a} <{b}>",
                f"{self.word(r)}={r.randint(0, 99)}; {b}",
                f"\\\\{self.word(r)}\\{self.ident(r)}",
                f"{a} / {b} #{r.randint(1, 999)}",
                f'The "{self.word(r)}" of {self.name(r)}',
            )
        )

    def text(self, r: random.Random) -> str:
        """A phrase, sometimes an awkward one."""
        return self.awkward(r) if r.random() < 0.35 else self.phrase(r, 2, 8)

    def name(self, r: random.Random) -> str:
        """A person's name."""
        return f"{r.choice(self.first)} {r.choice(self.last)}"

    def city(self, r: random.Random) -> str:
        """A city."""
        return r.choice(self.cities)

    def ident(self, r: random.Random) -> str:
        """A mixed-case identifier."""
        letters, digits = string.ascii_letters, string.digits
        style = r.randrange(5)
        if style == 0:
            return "".join(r.choice(letters + digits) for _ in range(r.randint(5, 12)))
        if style == 1:
            head = "".join(r.choice(string.ascii_uppercase) for _ in range(r.randint(2, 4)))
            return f"{head}-{r.randint(1000, 9999999)}"
        if style == 2:
            return "".join(r.choice("0123456789abcdef") for _ in range(r.choice((8, 12))))
        if style == 3:
            return f"{self.word(r)}_{r.choice(letters)}{r.randint(10, 999)}"
        return "-".join(
            "".join(r.choice(string.ascii_uppercase + digits) for _ in range(4))
            for _ in range(r.randint(2, 3))
        )

    def email(self, r: random.Random) -> str:
        """An e-mail address."""
        name = f"{self.word(r)}{r.choice('._-')}{self.word(r)}"
        return f"{name}{r.choice(['', str(r.randint(1, 99))])}@{r.choice(DOMAINS)}"

    def path(self, r: random.Random) -> str:
        """A file path."""
        parts = [self.word(r) for _ in range(r.randint(1, 3))]
        root = r.choice(("/", "/home/", "/var/", "./", "~/"))
        return f"{root}{'/'.join(parts)}{r.choice('_-')}{r.randint(1, 99)}.{r.choice(EXTENSIONS)}"

    def url(self, r: random.Random) -> str:
        """A web address."""
        return f"https://{self.word(r)}.{r.choice(DOMAINS)}/{self.word(r)}?id={r.randint(1, 9999)}"

    def phone(self, r: random.Random) -> str:
        """A telephone number."""
        return f"+{r.randint(1, 99)} {r.randint(100, 999)} {r.randint(1000000, 9999999)}"

    def date(self, r: random.Random) -> str:
        """An ISO date."""
        return f"{r.randint(1980, 2035)}-{r.randint(1, 12):02d}-{r.randint(1, 28):02d}"

    def time(self, r: random.Random) -> str:
        """A time of day."""
        return f"{r.randint(0, 23):02d}:{r.randint(0, 59):02d}"

    def integer(self, r: random.Random) -> int:
        """A whole number, small or long."""
        return r.choice(
            (r.randint(1, 12), r.randint(10, 999), r.randint(1000, 10**7), r.randint(10**9, 10**12))
        )

    def small(self, r: random.Random) -> int:
        """A small whole number."""
        return r.randint(1, 60)

    def decimal(self, r: random.Random) -> float:
        """A number with decimals."""
        return round(r.uniform(-200 if r.random() < 0.2 else 0, 5000), r.randint(1, 3))

    def boolean(self, r: random.Random) -> bool:
        """Yes or no."""
        return r.random() < 0.5

    def several(self, make: Make, low: int = 1, high: int = 4) -> Make:
        """A maker of lists of what another maker makes."""
        return lambda r: [make(r) for _ in range(r.randint(low, high))]
