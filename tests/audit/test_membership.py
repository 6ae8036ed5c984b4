"""Membership in the released model: an over-fitted model tells, and of texts that nobody had it guesses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcustom.audit.attack import CannotAttack, Deadline, OutOfTime, RoundView, Target
from fedcustom.audit.membership import Membership, Sides, probabilities, scores
from fedcustom.data.examples import ClientData, Example, FederatedData, LearningTask
from fedcustom.methods import Answer, Client, State, Work
from fedcustom.recipe.recipe import load_recipe
from helpers.methods import LABELS, make
from helpers.rows import make_rows

CLIENTS, PER_CLIENT, ROUNDS, EPOCHS = 1, 60, 1, 60
LATER = Deadline(float("inf"))


def with_random_labels(count: int) -> list[Example]:
    """Texts, no two alike, whose labels can be learnt by heart alone."""
    rows = {row["text"]: row for row in make_rows(8 * count, 3)}
    labels = np.random.default_rng(5).integers(len(LABELS), size=len(rows)).tolist()
    found = [Example(text, label=label) for text, label in zip(rows, labels, strict=True)]
    assert len(found) >= count
    return found[:count]


def target(folder: str, trained: list[Example], held: list[Example]) -> Target:
    """Full fine-tuning of few texts."""
    parts = {f"c{n}": trained[PER_CLIENT * n : PER_CLIENT * (n + 1)] for n in range(CLIENTS)}
    training = {
        "learning_rate": 2e-3, "local_epochs": EPOCHS, "batch_size": 4, "logit_adjustment": 0,
        "schedule": "constant",
    }  # fmt: skip
    recipe = load_recipe(
        {
            "model": {"base": folder},
            "data": {"source": "x.jsonl"},
            "clients": {"partition": "iid", "count": CLIENTS},
            "method": {"name": "full"},
            "training": {"local_epochs": EPOCHS},
        }
    )
    built = make(folder, "full", clients=CLIENTS, training=training)
    clients = {name: ClientData(name, part) for name, part in parts.items()}
    data = FederatedData(LearningTask("classification", LABELS), clients, held, [], True)
    return Target(recipe, data, built, cohorts={n: list(parts) for n in range(1, ROUNDS + 1)})


def finished(run: Target) -> State:
    state = run.method.initialise()
    for number, cohort in run.cohorts.items():
        tasks = run.method.configure(state, number, {name: Work(epochs=EPOCHS) for name in cohort})
        clients = {name: Client(name, run.data.clients[name]) for name in cohort}
        answers = [Answer(n, t, run.method.execute(t, clients[n])) for n, t in tasks.items()]
        state = run.method.aggregate(state, answers).state
    return state


@pytest.fixture(scope="module")
def overfitted(tiny: dict[str, str]) -> tuple[Target, State]:
    texts = with_random_labels(2 * CLIENTS * PER_CLIENT)
    run = target(tiny["bert"], texts[: CLIENTS * PER_CLIENT], texts[CLIENTS * PER_CLIENT :])
    return run, finished(run)


def view(run: Target, state: State) -> RoundView:
    return RoundView(0, "finished", run.method.initialise(), state, [], list(run.data.clients))


def test_an_overfitted_model_tells(overfitted: tuple[Target, State]) -> None:
    run, state = overfitted
    assert Membership().inapplicable(run) is None
    area, one, tenth = Membership().attack(run, view(run, state), LATER)
    assert (area.measure, one.measure, tenth.measure) == ("AUC", "TPR at 1 % FPR", "TPR at 0.1 % FPR")
    assert area.low is not None
    assert area.low > 0.6
    assert area.trials == 2 * CLIENTS * PER_CLIENT
    assert one.chance == 0.01
    assert one.low is not None
    assert one.low <= one.success
    assert "fewer than 100" in one.meaning


def test_of_texts_that_nobody_had_it_guesses(overfitted: tuple[Target, State], tiny: dict[str, str]) -> None:
    """The same model, asked of texts of which none was trained on."""
    _, state = overfitted
    texts = with_random_labels(4 * CLIENTS * PER_CLIENT)[2 * CLIENTS * PER_CLIENT :]
    run = target(tiny["bert"], texts[: CLIENTS * PER_CLIENT], texts[CLIENTS * PER_CLIENT :])
    area, *_ = Membership().attack(run, view(run, state), LATER)
    assert area.low is not None
    assert area.high is not None
    assert area.low <= 0.5 <= area.high


def test_candidates_are_as_many_and_not_alike(overfitted: tuple[Target, State]) -> None:
    run, state = overfitted
    sides = Sides.of(run, list(run.data.clients))
    assert len(sides.members) == len(sides.others) == CLIENTS * PER_CLIENT
    assert sides.split == "development"
    assert not {e.text for _, e in sides.members} & {e.text for _, e in sides.others}
    found = probabilities(run, state, sides.texts)
    assert found[: len(sides.members)].mean() > 0.9
    assert ((found >= 0) & (found <= 1)).all()
    with pytest.raises(CannotAttack, match="0 texts were trained on"):
        Sides.of(run, [])


def test_no_time(overfitted: tuple[Target, State]) -> None:
    run, state = overfitted
    with pytest.raises(OutOfTime):
        Membership().attack(run, view(run, state), Deadline(0.0))


numbers = st.lists(st.floats(0.01, 100), min_size=2, max_size=20).map(np.array)


@given(numbers, numbers)
def test_scores_are_shares_of_others(members: np.ndarray, others: np.ndarray) -> None:
    """Below the largest of the others, a score is what counting gives."""
    inside, beside = scores(members, others)
    for place, ratio in enumerate(members):
        share = float((others <= ratio).mean())
        assert inside[place] == pytest.approx(share + max(0.0, ratio - others.max()))
    for place, ratio in enumerate(others):
        rest = np.delete(others, place)
        assert beside[place] == pytest.approx(float((rest <= ratio).mean()))


def test_methods_that_train_nothing(overfitted: tuple[Target, State]) -> None:
    run, _ = overfitted
    nothing: Any = object()
    other = Target(run.recipe, run.data, nothing)
    assert Membership().inapplicable(other) == "method full trains no tensors"
