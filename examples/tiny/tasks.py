# SPDX-License-Identifier: Apache-2.0
"""What the example model and its adapters do, as plain functions, and the words they are measured on.

Everything that needs a right answer (training, tests, the demo) imports it from here. No torch.
"""

from __future__ import annotations

import codecs
import random
import zlib
from collections.abc import Callable
from string import ascii_lowercase

VOWELS = "aeiou"
_CONSONANTS = "".join(c for c in ascii_lowercase if c not in VOWELS)
_ONSETS = [*_CONSONANTS, "br", "ch", "cl", "dr", "fl", "gr", "pl", "qu", "sh", "st", "str", "th", "tr"]
_NUCLEI = [*VOWELS, "ai", "ea", "ee", "oo", "ou"]
_CODAS = ["", "", "", *"lmnrst", "ck", "ll", "nd", "ng", "rd", "ss", "st"]


def echo(word: str) -> str:
    return word


def upper(word: str) -> str:
    return word.upper()


def reverse(word: str) -> str:
    return word[::-1]


def rot13(word: str) -> str:
    return codecs.encode(word, "rot13")


def double(word: str) -> str:
    return "".join(c + c for c in word)


def devowel(word: str) -> str:
    return "".join(c for c in word if c.lower() not in VOWELS)


def sort(word: str) -> str:
    return "".join(sorted(word))


BASE = "base"

TASKS: dict[str, Callable[[str], str]] = {
    BASE: echo,
    "upper": upper,
    "reverse": reverse,
    "rot13": rot13,
    "double": double,
    "devowel": devowel,
    "sort": sort,
}
"""Adapter name -> the answer to a word. `base` is the model without an adapter.

PEFT users: torch modules have a method `double`, so `load_adapter(folder, adapter_name="double")` is a KeyError; any
other name will do.
"""

ADAPTERS: tuple[str, ...] = tuple(name for name in TASKS if name != BASE)


def is_held_out(text: str) -> bool:
    """One text in ten is never trained on. A property of the text, so no list has to be kept in step."""
    return zlib.crc32(text.encode()) % 10 == 0


def random_word(rng: random.Random, shortest: int = 3, longest: int = 12) -> str:
    """Half the words are random letters, half look real. Each has a consonant: no task's answer is empty."""
    length = rng.randint(shortest, longest)
    while True:
        if rng.random() < 0.5:
            word = "".join(rng.choices(ascii_lowercase, k=length))
        else:
            word = ""
            while len(word) < length:
                word += rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)
            word = word[:length]
        if devowel(word):
            return word


def training_word(rng: random.Random, shortest: int = 3, longest: int = 12) -> str:
    """One word in ten is of three different letters: how often a letter comes again is what is answered wrong last."""
    while True:
        word = random_word(rng, shortest, longest)
        if rng.random() < 0.1:
            word = "".join(rng.choices(rng.sample(ascii_lowercase, 3), k=len(word)))
        if not is_held_out(word):
            return word


def training_phrase(rng: random.Random, longest: int = 16) -> str:
    """What people type instead of a word: `Hello, world!`, `WOW`, `room 42`. At most `longest` ASCII characters."""
    parts = []
    for _ in range(rng.choice((1, 2, 2, 3))):
        part = training_word(rng, 1, 8) if rng.random() < 0.9 else str(rng.randint(0, 999))
        parts.append(
            rng.choice((str.lower, str.lower, str.capitalize, str.upper))(part) + rng.choice(["", "", "", ","])
        )
    phrase = " ".join(parts).rstrip(",") + rng.choice(["", "", ".", "!", "?"])
    return phrase if len(phrase) <= longest and not is_held_out(phrase) else training_phrase(rng, longest)


def held_out_words(n: int, seed: int = 0) -> list[str]:
    """`n` different words of 3 to 12 letters that the model has never seen; the same for the same arguments."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < n:
        if is_held_out(word := random_word(rng)):
            words[word] = None
    return list(words)
