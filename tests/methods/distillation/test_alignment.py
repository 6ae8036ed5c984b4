"""Tokens of two tokenizers: alignment and vocabulary mapping against brute force."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcustom.methods.distillation.alignment import (
    Vocabulary,
    VocabularyMap,
    Words,
    align,
    map_rows,
    one_to_one,
)
from helpers.tiny_models import tiny_tokenizer

WORD = st.text("abc ", max_size=4)
PIECES = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4)


@cache
def levenshtein(first: str, second: str) -> int:
    """By its definition."""
    if not first or not second:
        return len(first) + len(second)
    return min(
        levenshtein(first[1:], second) + 1,
        levenshtein(first, second[1:]) + 1,
        levenshtein(first[1:], second[1:]) + (first[0] != second[0]),
    )


def all_paths(rows: int, columns: int) -> list[list[tuple[int, int]]]:
    if (rows, columns) == (1, 1):
        return [[(0, 0)]]
    found = []
    for i, j in ((rows - 1, columns - 1), (rows - 1, columns), (rows, columns - 1)):
        if i and j:
            found += [[*path, (rows - 1, columns - 1)] for path in all_paths(i, j)]
    return found


@given(WORD, st.lists(WORD, min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_distances_are_levenshteins(text: str, others: list[str]) -> None:
    distances = [levenshtein(text, other) for other in others]
    assert Words(others).distances(text).tolist() == distances
    assert Words(others).nearest(text) == int(np.argmin(distances))


@given(PIECES, PIECES)
@settings(max_examples=30, deadline=None)
def test_the_path_is_the_best_of_all(teacher: list[str], student: list[str]) -> None:
    def cost(path: list[tuple[int, int]]) -> int:
        return sum(levenshtein(teacher[i], student[j]) for i, j in path)

    paths = all_paths(len(teacher), len(student))
    found = align(teacher, student)
    assert found in paths
    assert cost(found) == min(map(cost, paths))


def test_alignment_of_a_text() -> None:
    teacher, student = ["un", "believ", "able", " story"], ["un", "believable", " st", "ory"]
    path = align(teacher, student)
    assert (0, 0) in path
    partners = one_to_one(path, len(student))
    assert partners[0] == 0
    for j, i in enumerate(partners):
        if i >= 0:
            assert Counter(pair[0] for pair in path)[i] == 1 == Counter(pair[1] for pair in path)[j]
    same = ["a", "a", "b", "a"]
    assert one_to_one(align(same, same), 4).tolist() == [0, 1, 2, 3]
    assert align([], ["a"]) == []
    assert one_to_one([], 2).tolist() == [-1, -1]
    # two teacher's tokens that belong to one of the student's leave it without a partner
    assert one_to_one([(0, 0), (1, 0), (2, 1)], 2).tolist() == [-1, 2]


@given(st.lists(WORD, min_size=2, max_size=8), st.lists(WORD, min_size=2, max_size=8))
@settings(max_examples=30, deadline=None)
def test_tokens_map_to_the_nearest(teacher: list[str], student: list[str]) -> None:
    mapping = VocabularyMap(
        Vocabulary(["</s>", *teacher], {"eos_token_id": 0}),
        Vocabulary([*student, "<end>"], {"eos_token_id": len(student)}),
    )
    tokens = np.arange(len(teacher) + 2)
    expected = [len(student)]
    for piece in teacher:
        if piece in student:
            expected.append(student.index(piece))
        elif not piece:
            expected.append(-1)
        else:
            expected.append(int(np.argmin([levenshtein(piece, other) for other in student])))
    expected.append(-1)  # an output of the model that its tokenizer does not know
    assert mapping(tokens).tolist() == expected
    assert mapping(tokens.reshape(-1, 1)).shape == (len(tokens), 1)


def test_special_tokens_go_by_their_role() -> None:
    teacher = Vocabulary(["<s>", "</s>", "a"], {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
    student = Vocabulary(["[PAD]", "[SEP]", "a"], {"pad_token_id": 0, "eos_token_id": 1})
    # The teacher's token 1 ends and pads; the first role counts. The student has no beginning.
    assert VocabularyMap(teacher, student)(np.array([0, 1, 2])).tolist() == [-1, 1, 2]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_rows_keep_their_mass(rows: int, kept: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.stack([generator.permutation(6)[:kept] for _ in range(rows)])
    probabilities = generator.dirichlet(np.ones(kept + 1), rows)[:, :kept]
    table = [2, 2, 0, -1, 0, 1]

    class Table(VocabularyMap):
        def __init__(self) -> None:
            pass

        def __call__(self, tokens: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
            return np.array(table)[tokens]

    tokens, merged = map_rows(labels, probabilities, Table())
    for row in range(rows):
        expected: Counter[int] = Counter()
        for label, probability in zip(labels[row], probabilities[row], strict=True):
            if table[label] >= 0:
                expected[table[label]] += probability
        found = {int(t): p for t, p in zip(tokens[row], merged[row], strict=True) if p > 0}
        assert found == pytest.approx(dict(expected))
        assert sum(p > 0 for p in merged[row]) == len(found)  # no token twice


def test_a_real_vocabulary() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = Vocabulary.of(tokenizer)
    ids = tokenizer("the cat sees")["input_ids"]
    assert "".join(vocabulary.pieces[i] for i in ids) == "the cat sees"
    assert vocabulary.special["eos_token_id"] == 2
