"""Perturbed test texts: typing errors and other noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .examples import Example

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def typos(text: str, rate: float, generator: np.random.Generator) -> str:
    """In a share ``rate`` of the words of two letters or more: two letters swapped, one left out, one
    doubled, or one hit beside its key.
    """
    return _by_word(text, lambda word: _mistyped(word, generator) if generator.random() < rate else word)


def characters(text: str, rate: float, generator: np.random.Generator) -> str:
    """A share ``rate`` of the characters, spaces left alone, replaced by letters at random."""
    return "".join(
        LETTERS[generator.integers(26)] if not letter.isspace() and generator.random() < rate else letter
        for letter in text
    )


def words(text: str, rate: float, generator: np.random.Generator) -> str:
    """A share ``rate`` of the words left out, but never all."""
    there = text.split(" ")
    kept = [word for word in there if generator.random() >= rate]
    return " ".join(kept) if any(kept) else text


PERTURBATIONS: dict[str, Callable[[str, float, np.random.Generator], str]] = {
    "typos": typos,
    "characters": characters,
    "words": words,
}


def perturbed(examples: Sequence[Example], kind: str, rate: float, seed: Sequence[int]) -> list[Example]:
    """The examples with their texts perturbed; labels, targets and references stay. Each text's changes are a
    pure function of the seed and its place.
    """
    change = PERTURBATIONS[kind]
    number = list(PERTURBATIONS).index(kind)
    return [
        example.with_text(change(example.text, rate, np.random.default_rng([*seed, number, place])))
        for place, example in enumerate(examples)
    ]


def _by_word(text: str, change: Callable[[str], str]) -> str:
    return " ".join(change(word) if len(word) > 1 else word for word in text.split(" "))


def _mistyped(word: str, generator: np.random.Generator) -> str:
    kind, place = generator.integers(4), int(generator.integers(len(word) - 1))
    if kind == 0:
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    if kind == 1:
        return word[:place] + word[place + 1 :]
    if kind == 2:
        return word[: place + 1] + word[place:]
    return word[:place] + _beside(word[place], generator) + word[place + 1 :]


def _beside(letter: str, generator: np.random.Generator) -> str:
    """A key to the left or right of a letter's; another letter for what is no key of these."""
    for row in ROWS:
        place = row.find(letter.lower())
        if place >= 0:
            beside = row[max(0, place - 1) : place] + row[place + 1 : place + 2]
            return beside[generator.integers(len(beside))]
    return LETTERS[generator.integers(26)]
