"""The parts of prompt engineering, each against a computation of its own: likelihoods token by token, bandits
and evolution in plain numpy.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from fedcustom.core.errors import RecipeError
from fedcustom.data.encode import Cut, shorten
from fedcustom.data.examples import Example, LearningTask
from fedcustom.methods.prompt_engineering import bandit
from fedcustom.methods.prompt_engineering.answers import (
    medoid,
    nearest,
    pooled_log_probabilities,
    similarity_weights,
)
from fedcustom.methods.prompt_engineering.bandit import Tally
from fedcustom.methods.prompt_engineering.edits import (
    cross,
    crossed,
    delete_word,
    offspring,
    paraphrase,
    swap_words,
)
from fedcustom.methods.prompt_engineering.evolution import (
    Distribution,
    merge_distributions,
    population_size,
    rank_weights,
    search,
    with_variance,
)
from fedcustom.methods.prompt_engineering.scorer import log_softmax
from fedcustom.methods.prompt_engineering.templates import (
    Candidate,
    check_template,
    label_sets,
    read_templates,
)
from fedcustom.models.likelihood import continuation_scores, prompt_ids
from fedcustom.models.load import Base, load_base
from fedcustom.models.settings import ModelSettings
from helpers.likelihoods import label_log_probability

TASK = LearningTask("classification", ("animal", "food", "place"))
PROMPTS = [
    "the old cat sees",
    "a",
    "kind food thing soup and then the small garden near a river :",
    "the dog",
]
LABELS = [" animal", " something to eat", " place", " a"]


def loaded(tiny: dict[str, str], kind: str) -> Base:
    return load_base(ModelSettings(base=tiny[kind]), TASK, 0, head=False)


# --- likelihoods ---


@pytest.mark.parametrize(
    ("kind", "virtual"), [("llama", 0), ("llama", 3), ("gpt2", 0), ("gpt2", 3), ("bart", 0)]
)
def test_continuations_are_scored_as_if_alone(tiny: dict[str, str], kind: str, virtual: int) -> None:
    base = loaded(tiny, kind)
    prefix = torch.randn(virtual, 32, generator=torch.Generator().manual_seed(0)) if virtual else None
    labels = [label.strip() for label in LABELS] if kind == "bart" else LABELS
    found = continuation_scores(base, PROMPTS, labels, batch_size=3, prefix=prefix)
    wanted = [[label_log_probability(base, prompt, label, prefix) for label in labels] for prompt in PROMPTS]
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_continuations_of_one_token(tiny: dict[str, str]) -> None:
    base = loaded(tiny, "llama")
    labels = [" a", " the"]
    assert all(len(base.tokenizer(label)["input_ids"]) == 1 for label in labels)
    found = continuation_scores(base, PROMPTS, labels, batch_size=2)
    wanted = [[label_log_probability(base, prompt, label, None) for label in labels] for prompt in PROMPTS]
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_models_that_take_no_positions(tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They get prompts of one length at a time, and the same scores come out."""
    import fedcustom.models.likelihood as likelihood

    base = loaded(tiny, "llama")
    usual = continuation_scores(base, PROMPTS, LABELS, batch_size=4)
    monkeypatch.setattr(likelihood, "_takes_positions", lambda base: False)
    np.testing.assert_allclose(continuation_scores(base, PROMPTS, LABELS, batch_size=4), usual, atol=2e-4)


def test_texts_are_cut_after_so_many_tokens(tiny: dict[str, str]) -> None:
    base = loaded(tiny, "llama")
    ((short, lost),) = shorten(base.tokenizer, [Example("the old cat sees a house")], Cut(3))
    assert "the old cat sees a house".startswith(short)
    assert len(base.tokenizer(short, add_special_tokens=False)["input_ids"]) == 3
    assert sum(lost.values()) == len(base.tokenizer("the old cat sees a house")["input_ids"]) - 3
    assert list(shorten(base.tokenizer, [Example("the cat")], Cut(50))) == [("the cat", {})]
    assert list(shorten(base.tokenizer, [], Cut(5))) == []
    assert prompt_ids(base, [""]) == [[base.tokenizer.bos_token_id]]


# --- templates ---


def test_filling() -> None:
    candidate = Candidate("Text: {input}\nOne of {labels}:", ("a cat", "a dog"))
    assert candidate.fill("x {labels} {input}") == "Text: x {labels} {input}\nOne of a cat, a dog:"
    assert Candidate("about {label}.", ("a", "b")).describe() == ["about a.", "about b."]


def test_templates_that_do_not_fit() -> None:
    for text, encoder, said in [
        ("no placeholder", False, "must hold {input} once"),
        ("{input} {input}", False, "must hold {input} once"),
        ("{label} {input}", False, "has no use for"),
        ("{input}", True, "must hold {label} once"),
        ("{label} of {labels}", True, "has no use for"),
    ]:
        with pytest.raises(RecipeError, match=said.replace("{", r"\{").replace("}", r"\}")):
            check_template(text, encoder=encoder, where="method.instructions")


def test_files_of_templates(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("Say {input}\\nAnswer:\n\n  {input} :  \n", encoding="utf-8")
    assert read_templates(str(path)) == ["Say {input}\nAnswer:", "{input} :"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not a text in UTF-8"):
        read_templates(str(path))
    with pytest.raises(RecipeError, match="No such file"):
        read_templates(str(tmp_path / "missing.txt"))


def test_label_sets() -> None:
    labels = ["big_dog", "cat"]
    assert label_sets(labels, {}) == [("big dog", "cat")]
    assert label_sets(labels, {"cat": ["a", "b", "c"], "big_dog": "x"}) == [
        ("x", "a"),
        ("x", "b"),
        ("x", "c"),
    ]
    with pytest.raises(RecipeError, match=r"verbalisers.kat: there is no such label.*did you mean 'cat'"):
        label_sets(labels, {"kat": "a"})
    with pytest.raises(RecipeError, match="'big_dog' and 'cat' are both written 'pet'"):
        label_sets(labels, {"cat": "pet", "big_dog": "pet"})


# --- bandits ---

TALLIES = st.dictionaries(
    st.integers(0, 40),
    st.integers(1, 50).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.floats(-100, 0)).map(lambda t: Tally(*t))
    ),
    min_size=1,
    max_size=12,
)


@given(TALLIES)
@settings(max_examples=30, deadline=None)
def test_halving_keeps_the_better_half(tallies: dict[int, Tally]) -> None:
    kept = bandit.halve(tallies, sorted(tallies))
    assert len(kept) == math.ceil(len(tallies) / 2)
    worst = min(tallies[i].reward / tallies[i].count for i in kept)
    assert all(tallies[i].reward / tallies[i].count <= worst for i in tallies if i not in kept)


@given(st.integers(1, 200), st.integers(1, 40))
@settings(max_examples=30, deadline=None)
def test_halvings_leave_one(candidates: int, rounds: int) -> None:
    left, ends = candidates, 0
    for number in range(1, rounds + 1):
        if bandit.is_stage_end(number, rounds, candidates):
            left, ends = math.ceil(left / 2), ends + 1
    needed = math.ceil(math.log2(candidates)) if candidates > 1 else 0
    assert ends == min(needed, rounds)
    assert left == 1 or rounds < needed


@given(TALLIES, st.floats(0, 3))
@settings(max_examples=30, deadline=None)
def test_upper_bounds(tallies: dict[int, Tally], exploration: float) -> None:
    total = max(2, sum(t.count for t in tallies.values()))
    for i, bound in bandit.upper_bounds(tallies, exploration).items():
        t = tallies[i]
        assert bound == pytest.approx(
            t.reward / t.count + exploration * math.sqrt(2 * math.log(total) / t.count)
        )
    assert bandit.upper_bounds({0: Tally()}, 1.0) == {0: math.inf}


def test_thompson_draws_are_the_posterior() -> None:
    tallies = {0: Tally(10, 7, 0), 1: Tally(40, 10, 0)}
    draws = [bandit.posterior_draws(tallies, [3, number]) for number in range(2000)]
    assert bandit.posterior_draws(tallies, [3, 5]) == draws[5]
    for i, (a, b) in {0: (8, 4), 1: (11, 31)}.items():
        values = [draw[i] for draw in draws]
        assert np.mean(values) == pytest.approx(a / (a + b), abs=0.01)
        assert np.quantile(values, 0.9) == pytest.approx(beta.ppf(0.9, a, b), abs=0.02)


def test_the_best_is_known_to_be_good() -> None:
    tallies = {0: Tally(3, 3, -0.1), 1: Tally(400, 360, -50), 2: Tally(400, 300, -50), 3: Tally()}
    assert bandit.best(tallies) == 1
    assert bandit.best({0: Tally(10, 5, -9), 1: Tally(10, 5, -3)}) == 1
    assert bandit.best({4: Tally(), 2: Tally()}) == 2
    assert bandit.highest({0: 1.0, 1: 3.0, 2: 3.0}, 2) == [1, 2]
    assert bandit.highest({0: 3.0, 1: 3.0, 2: 3.0}, 2) == [0, 1]


@pytest.mark.parametrize("rule", ["successive_halving", "ucb", "thompson"])
def test_bandits_find_the_best_of_known_arms(rule: str) -> None:
    """Twelve arms with known chances, the best 15 points ahead, in a simulation without any model."""
    chances, found = [0.2 + 0.03 * (i % 7) for i in range(11)] + [0.53], 0
    for trial in range(20):
        generator = np.random.default_rng(trial)
        tallies, alive = {i: Tally() for i in range(12)}, list(range(12))
        for number in range(1, 13):
            asked = alive
            if rule == "ucb":
                asked = bandit.highest(bandit.upper_bounds(tallies, 0.5), 4)
            elif rule == "thompson":
                asked = bandit.highest(bandit.posterior_draws(tallies, [trial, number]), 4)
            for i in asked:
                tallies[i] += Tally(60, float(generator.binomial(60, chances[i])), 0.0)
            if rule == "successive_halving" and bandit.is_stage_end(number, 12, 12):
                alive = bandit.halve(tallies, alive)
        found += bandit.best({i: tallies[i] for i in alive}) == 11
    assert found >= 18


# --- edits ---

TEMPLATE = "Read the text: {input}\nThe topic of this text, one of {labels}, is:"
SEEDS = st.integers(0, 2**31)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_edits_leave_placeholders_alone(seed: int) -> None:
    generator = np.random.default_rng(seed)
    words = TEMPLATE.split()
    shorter = delete_word(TEMPLATE, generator)
    swapped = swap_words(TEMPLATE, generator)
    other = paraphrase(TEMPLATE, {"text": ["passage"], "input": ["wrong"]}, generator)
    for text in (shorter, swapped, other):
        assert text.count("{input}") == text.count("{labels}") == 1
    assert len(shorter) < len(TEMPLATE)
    assert len(shorter.split()) in (len(words), len(words) - 1)
    assert sorted(swapped) == sorted(TEMPLATE)
    assert other in (TEMPLATE.replace("text", "passage", 1), "passage".join(TEMPLATE.rsplit("text", 1)))


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_crossing(seed: int) -> None:
    left, right = "Classify {input} now as", "the topic of {input} is"
    child = cross(left, right, np.random.default_rng(seed))
    assert child.count("{input}") == 1
    assert left.startswith(child.split()[0]) or child == left
    assert child.split()[-1] in ("as", "is")
    a, b = Candidate(left, ("x", "y")), Candidate(right, ("y", "z"))
    mixed = crossed(a, b, np.random.default_rng(seed))
    assert len(set(mixed.labels)) == 2
    assert all(label in pair for label, pair in zip(mixed.labels, [("x", "y"), ("y", "z")], strict=True))


def test_offspring_are_new_and_repeatable() -> None:
    given_ = [Candidate(TEMPLATE, ("a", "b")), Candidate("{input} is about", ("c", "d"))]
    made = offspring(given_, given_, 6, {"text": ["passage"]}, np.random.default_rng(1), crossover=True)
    again = offspring(given_, given_, 6, {"text": ["passage"]}, np.random.default_rng(1), crossover=True)
    assert made == again
    texts = [(c.template, c.labels) for c in [*given_, *made]]
    assert len(made) == 6
    assert len(set(texts)) == len(texts)
    # Where edits give nothing new any more, fewer come.
    bare = [Candidate("{input}")]
    assert offspring(bare, bare, 3, {}, np.random.default_rng(0), crossover=False) == []


# --- answers ---


def test_pooling_answers() -> None:
    generator = np.random.default_rng(0)
    answers = [log_softmax(generator.normal(size=(5, 3))) for _ in range(4)]
    similarities = generator.uniform(-1, 1, size=(4, 5))
    weights = similarity_weights(similarities, 0.2)
    pooled = pooled_log_probabilities(answers, weights)
    for query in range(5):
        raw = np.exp(similarities[:, query] / 0.2)
        shares = raw / raw.sum()
        product = np.prod([np.exp(answers[k][query]) ** shares[k] for k in range(4)], axis=0)
        np.testing.assert_allclose(np.exp(pooled[query]), product / product.sum(), rtol=1e-9)


def test_the_medoid_and_the_nearest() -> None:
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(6, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = generator.uniform(size=6)
    sums = [sum(weights[j] * float(vectors[i] @ vectors[j]) for j in range(6)) for i in range(6)]
    assert medoid(vectors, weights) == int(np.argmax(sums))
    scores = generator.normal(size=(3, 6))
    for row, found in zip(scores, nearest(scores, 2), strict=True):
        assert list(found) == sorted(range(6), key=lambda i: row[i])[-2:]


# --- evolution ---


@pytest.mark.parametrize("full", [False, True])
def test_search_goes_down(full: bool) -> None:
    target = np.linspace(-1, 1, 12)
    begun = Distribution.isotropic(12, 0.5, full=full)
    found = search(begun, lambda z: float(((z - target) ** 2).sum()), generations=60, population=11, seed=1)
    assert ((found.mean - target) ** 2).sum() < 0.05 * (target**2).sum()
    again = search(begun, lambda z: float(((z - target) ** 2).sum()), generations=60, population=11, seed=1)
    np.testing.assert_array_equal(found.mean, again.mean)
    trace = np.trace(found.covariance) if full else found.covariance.sum()
    assert trace == pytest.approx(12)


@pytest.mark.parametrize("full", [False, True])
def test_search_starts_from_the_distribution(full: bool) -> None:
    """The points of the first generation have the mean and covariance that were given."""
    variance = np.array([4.0, 1.0, 0.25])
    matrix = np.diag(variance)
    if full:
        matrix[0, 1] = matrix[1, 0] = 1.2
    start = with_variance(np.array([1.0, -2.0, 3.0]), matrix if full else variance)
    points: list[np.ndarray] = []

    def loss(point: np.ndarray) -> float:
        points.append(point.copy())
        return 0.0

    search(start, loss, generations=1, population=4000, seed=0)
    np.testing.assert_allclose(np.mean(points, axis=0), [1, -2, 3], atol=0.15)
    np.testing.assert_allclose(np.cov(np.stack(points).T), matrix, atol=0.3)


@pytest.mark.parametrize("full", [False, True])
def test_merging_distributions(full: bool) -> None:
    generator = np.random.default_rng(2)
    found, variances = [], []
    for _ in range(3):
        root = generator.normal(size=(4, 4))
        variance = root @ root.T + np.eye(4) if full else generator.uniform(0.5, 2, size=4)
        found.append(with_variance(generator.normal(size=4), variance))
        variances.append(variance)
        np.testing.assert_allclose(found[-1].variance(), variance, rtol=1e-12)
    weights = np.array([0.5, 0.3, 0.2])
    merged = merge_distributions(found, weights)
    np.testing.assert_allclose(merged.mean, sum(w * f.mean for w, f in zip(weights, found, strict=True)))
    np.testing.assert_allclose(merged.variance(), sum(w * v for w, v in zip(weights, variances, strict=True)))
    trace = np.trace(merged.covariance) if full else merged.covariance.sum()
    assert trace == pytest.approx(4)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None)
def test_rank_weights(losses: list[float]) -> None:
    weights = rank_weights(losses)
    assert weights.sum() == pytest.approx(1)
    assert (weights > 0).all()
    order = np.argsort(losses, kind="stable")
    assert (np.diff(weights[order]) < 0).all()
    if len(losses) > 1:
        top = math.log(len(losses) + 0.5)
        assert weights[order[0]] / weights[order[1]] == pytest.approx(top / (top - math.log(2)))


def test_population() -> None:
    assert [population_size(d) for d in (10, 100, 500)] == [10, 17, 22]
