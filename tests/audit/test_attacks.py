"""Each attack succeeds on a planted leak, and is at chance on noise in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedcustom.audit.attack import (
    CannotAttack,
    Deadline,
    Keeper,
    OutOfTime,
    Received,
    RoundView,
    Summed,
    Target,
)
from fedcustom.audit.candidates import Candidates, likeness, matched_pairs
from fedcustom.audit.changes import summed_change
from fedcustom.audit.results import Finding
from fedcustom.audit.sums import Sums
from fedcustom.audit.tokens import Tokens, changed_rows
from fedcustom.data.examples import ClientData
from fedcustom.methods import Answer, Client, WeightTuning, Work
from fedcustom.methods.messages import Update
from fedcustom.methods.protocol import UNFINISHED
from fedcustom.methods.tuning.summed_head import SumTerms
from fedcustom.recipe.recipe import load_recipe
from helpers.audit import LATER, PER_CLIENT, by_measure, seen, target
from helpers.methods import LABELS, make


def with_noise(view: RoundView, kept: Callable[[str], bool] = lambda name: False) -> RoundView:
    """The round with normal numbers of the same size in place of what clients sent and of the new state."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * tensor.float().std()

    def noisy(update: Update) -> Update:
        changed = {n: t if kept(n) else noise(t) for n, t in update.tensors.items()}
        return replace(update, tensors=changed)

    after = {n: noise(t) for n, t in view.after.tensors.items()}
    return replace(
        view,
        received=[replace(message, update=noisy(message.update)) for message in view.received],
        after=replace(view.after, tensors=after),
    )


# --- candidates ---


@pytest.mark.parametrize("method", ["lora", "prefix", "full", "bitfit"])
def test_candidates_find_members(tiny: dict[str, str], method: str) -> None:
    run = target(tiny["bert"], method, training={"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.0})
    view = seen(run, 2, list(run.data.clients)[:10])
    assert Candidates().inapplicable(run) is None
    found = by_measure(Candidates().attack(run, view, LATER))
    update = found["client's update: AUC"]
    assert update.low is not None
    assert update.low > 0.5
    assert update.candidates > 0.8 * 2 * 10 * PER_CLIENT  # those with a partner of their label
    assert all(each.epsilon is None for each in found.values())  # others had a part in the state
    first = by_measure(Candidates().attack(run, replace(view, number=1), LATER))
    assert first["state difference: AUC"].epsilon is not None
    assert first["client's update: AUC"].epsilon is None


def test_gradients_are_compared_with_the_state_in_its_own_coordinates(tiny: dict[str, str]) -> None:
    """Of a variant that sends its factors in others: one step on one text moves the state along the text's
    gradient.
    """
    run = target(
        tiny["bert"], "lora", variant="fedsvd",
        training={"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.0},
    )  # fmt: skip
    method, (name, *_) = run.method, run.data.clients
    assert isinstance(method, WeightTuning)
    state = seen(run, 1, list(run.data.clients)[:4]).after
    (example,) = run.data.clients[name].train[:1]
    task = method.configure(state, 2, {name: Work(epochs=1)})[name]
    update = method.execute(task, Client(name, ClientData(name, [example])))
    after = method.aggregate(state, [Answer(name, task, update)]).state
    run.knowledge.enter(task)
    gradient = run.knowledge.gradient(example, list(update.tensors))
    moved = {n: after.tensors[n] - state.tensors[n] for n in update.tensors}
    assert likeness(moved, run.knowledge.in_state(gradient, task)) > 0.999
    assert likeness(moved, gradient) < 0.9


def test_candidates_of_noise_are_guesses(tiny: dict[str, str]) -> None:
    run = target(tiny["bert"], "lora")
    view = replace(with_noise(seen(run, 2, list(run.data.clients)[:10])), number=1)
    found = by_measure(Candidates().attack(run, view, LATER))
    for of in ("client's update", "state difference"):
        area = found[f"{of}: AUC"]
        assert area.low is not None
        assert area.high is not None
        assert area.low <= 0.5 <= area.high
        assert "does not tell" in area.meaning
    assert found["state difference: AUC"].epsilon == pytest.approx(0.0, abs=0.5)


def test_pairs_have_one_label_and_are_of_nobody_else(tiny: dict[str, str]) -> None:
    run, names = target(tiny["bert"], "lora"), [f"c{n:02}" for n in range(5)]
    pairs = matched_pairs(run, names[:3], names)
    inside = {e.text for name in names for e in run.data.clients[name].train}
    assert {pair.client for pair in pairs} == set(names[:3])
    for pair in pairs:
        assert pair.member in run.data.clients[pair.client].train
        assert pair.other.label == pair.member.label
        assert pair.other.text not in inside
    assert len({pair.other.text for pair in pairs}) == len(pairs)
    assert matched_pairs(run, names[:3], names) == pairs
    assert not matched_pairs(run, names, list(run.data.clients))


def test_likeness_is_the_mean_cosine() -> None:
    change = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[2.0]])}
    assert likeness(change, {"a": torch.tensor([-3.0, 0.0]), "b": torch.tensor([[5.0]])}) == pytest.approx(
        0.0
    )
    assert likeness(change, {"a": torch.tensor([-1.0, 1.0])}) == pytest.approx(2**-0.5)
    assert likeness(change, {"a": torch.zeros(2), "b": torch.tensor([[-1.0]])}) == pytest.approx(0.5)
    assert likeness({}, {}) == 0


def test_a_gradient_is_that_of_autograd(tiny: dict[str, str]) -> None:
    """And the model's tensors keep what they require of autograd."""
    run = target(tiny["bert"], "lora")
    parameters = run.knowledge.parts.trainable.parameters
    before = {name: p.requires_grad for name, p in parameters.items()}
    example, model = run.texts[0], run.knowledge.parts.trainable.model
    found = run.knowledge.gradient(example, list(parameters))
    objective = run.knowledge.parts.objective
    model.zero_grad()
    model.eval()
    objective.loss(model, objective.collate(objective.tokens([example]))).backward()
    for name, parameter in parameters.items():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(found[name], wanted, atol=1e-7)
    model.zero_grad()
    assert {name: p.requires_grad for name, p in parameters.items()} == before


def test_the_sum_is_attacked_where_it_says_something_else(tiny: dict[str, str]) -> None:
    """The mean of the cohort's changes by its examples; not where the state moved along just that."""
    run = target(tiny["bert"], "lora", training={"optimizer": "sgd", "learning_rate": 0.1})
    view = seen(run, 2, list(run.data.clients)[:5])
    assert summed_change(run, view) == {}
    assert {f.view for f in Candidates().attack(run, view, LATER) if isinstance(f, Finding)} == {
        "client's update", "state difference",
    }  # fmt: skip
    turned = {n: t + torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in
              view.after.tensors.items()}  # fmt: skip
    other = replace(view, after=replace(view.after, tensors=turned))
    total = summed_change(run, other)
    for name, tensor in total.items():
        expected = sum(m.update.weight * m.update.tensors[name] for m in view.received)
        expected = expected / sum(m.update.weight for m in view.received)
        assert torch.allclose(tensor, expected, atol=1e-7)  # type: ignore[arg-type]
        moved = view.after.tensors[name] - view.before.tensors[name]
        assert torch.allclose(tensor, moved, atol=1e-6)  # plain FedAvg
    found = by_measure(Candidates().attack(run, other, LATER))
    assert "which secure sums would leave the server" in found["sum of clients: AUC"].meaning
    plain = by_measure(Candidates().attack(run, view, LATER))
    assert found["sum of clients: AUC"].success == pytest.approx(
        plain["state difference: AUC"].success, abs=0.01
    )
    assert summed_change(run, replace(other, unseen=1)) == {}
    assert summed_change(run, replace(other, received=[])) == {}


# --- tokens ---


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_tokens_are_read_exactly(tiny: dict[str, str], decay: float) -> None:
    run = target(tiny["bert"], "full", training={"weight_decay": decay})
    assert Tokens().inapplicable(run) is None
    view = seen(run, 2, list(run.data.clients)[:6])
    found = by_measure(Tokens().attack(run, view, LATER))
    exact = found["client's update: exact set of tokens"]
    assert (exact.success, exact.trials) == (1.0, 6)
    overlap = found["client's update: overlap of sets (Jaccard)"]
    assert overlap.success == 1.0
    assert overlap.chance is not None
    assert 0 < overlap.chance < 0.9


def test_tokens_of_noise_are_none_or_all(tiny: dict[str, str]) -> None:
    run = target(tiny["bert"], "full")
    found = by_measure(Tokens().attack(run, with_noise(seen(run, 2, ["c00", "c01"])), LATER))
    assert found["client's update: exact set of tokens"].success == 0


def test_tokens_need_a_table_of_their_own(tiny: dict[str, str]) -> None:
    assert (
        Tokens().inapplicable(target(tiny["bert"], "lora")) == "the table of input embeddings is not trained"
    )
    tied = Target(
        load_recipe({"data": {"source": "x"}}),
        target(tiny["bert"], "lora").data,
        make(tiny["llama"], "full", "generation"),
    )
    assert "output layer too" in (Tokens().inapplicable(tied) or "")


def test_rows_that_shrink_alike_have_not_changed() -> None:
    table = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    change = -0.01 * table
    assert changed_rows(change, table) == frozenset()
    change[[3, 7]] += 0.001
    assert changed_rows(change, table) == {3, 7}
    assert changed_rows(torch.zeros(50, 8), table) == frozenset()


# --- sums ---


def fitted(folder: str, **training: Any) -> Target:
    return target(folder, "lora", training={"fit_head_rounds": [1], "fit_head_least_texts": 1, **training})


def test_sums_name_every_text(tiny: dict[str, str]) -> None:
    run = fitted(tiny["bert"], fit_head_steps=4)
    assert Sums().inapplicable(run) is None
    view = seen(run, 1, list(run.data.clients))
    found = by_measure(Sums().attack(run, view, LATER))
    single = found["client's update: label sums of one or two texts"]
    labels = [[e.label for e in run.data.clients[name].train] for name in run.data.clients]
    sent = [n for each in labels for n in np.bincount(each) if n >= 1]
    assert single.trials == len(sent)
    assert single.success == pytest.approx(sum(n <= 2 for n in sent) / len(sent))
    for measure in ("sums of two texts named", "texts named by the span of the scatter"):
        each = found[f"client's update: {measure}"]
        assert each.success == 1.0, measure
        assert each.chance is not None
        assert each.chance < 0.1
    assert found["client's update: texts named by the span of the gradients"].success > 0.5


def test_sums_of_noise_name_no_text(tiny: dict[str, str]) -> None:
    run = fitted(tiny["bert"], fit_head_steps=2)
    view = seen(run, 1, list(run.data.clients))
    found = by_measure(
        Sums().attack(run, with_noise(view, lambda name: name in ("counts", "counted")), LATER)
    )
    assert found["client's update: sums of two texts named"].success < 0.2
    for part in ("scatter", "gradients"):
        each = found[f"client's update: texts named by the span of the {part}"]
        assert each.chance is not None
        assert each.success < each.chance + 0.2


def test_sums_of_one_text(tiny: dict[str, str]) -> None:
    """As earlier versions sent them: the least number of examples is read off what was sent."""
    run = fitted(tiny["bert"])
    view = seen(run, 1, ["c00", "c01", "c02"])
    run.knowledge.enter(view.received[0].task)
    received = []
    for message in view.received:
        if "counts" not in message.update.tensors:
            continue
        train = run.data.clients[message.client].train
        vectors = run.knowledge.vectors(train)
        labels = torch.tensor([e.label for e in train])
        totals = torch.stack([vectors[labels == label].sum(dim=0) for label in labels.unique()])
        tensors = {**message.update.tensors, "counted": message.update.tensors["counts"], "totals": totals}
        received.append(replace(message, update=replace(message.update, tensors=tensors)))
    found = by_measure(Sums().attack(run, replace(view, received=received), LATER))
    assert found["client's update: sums of one text named"].success == 1.0
    assert found["client's update: sums of two texts named"].success == 1.0


def test_what_is_withheld_is_said(tiny: dict[str, str]) -> None:
    """Zeros are no gradient whose span could be looked at."""
    run = fitted(tiny["bert"], fit_head_steps=2)
    view = seen(run, 1, list(run.data.clients)[:6])
    received = [
        replace(
            m,
            update=replace(m.update, tensors={n: t * (n != "gradient") for n, t in m.update.tensors.items()}),
        )
        for m in view.received
    ]
    found = by_measure(Sums().attack(run, replace(view, received=received), LATER))
    assert found["client's update: clients that send gradients of the head"].success == 0
    assert "client's update: texts named by the span of the gradients" not in found


def test_a_released_head_of_few_texts_tells(tiny: dict[str, str]) -> None:
    run = fitted(tiny["bert"])
    view = replace(seen(run, 1, list(run.data.clients)[:10]), received=[])
    found = by_measure(Sums().attack(run, view, LATER))
    named = found["state difference: texts named by the released head"]
    assert named.trials == 10 * PER_CLIENT
    assert named.success <= len(LABELS) / named.trials  # a guess a label
    area = found["state difference: AUC"]
    noise = {n: torch.randn(t.shape) for n, t in view.after.tensors.items()}
    other = by_measure(Sums().attack(run, replace(view, after=replace(view.after, tensors=noise)), LATER))
    assert other["state difference: AUC"].success < area.success + 0.15


def test_no_sums_where_no_head_is_fitted(tiny: dict[str, str]) -> None:
    run = target(tiny["bert"], "lora")
    assert "training.fit_head = false" in (Sums().inapplicable(run) or "")


# --- all of them ---


@pytest.mark.parametrize(
    ("attack", "method", "number"), [(Sums(), "lora", 1), (Candidates(), "lora", 2), (Tokens(), "full", 2)]
)
def test_an_attack_stops_in_time(tiny: dict[str, str], attack: Any, method: str, number: int) -> None:
    run = target(tiny["bert"], method, training={"fit_head_rounds": [1]})
    view = seen(run, number, ["c00", "c01"])
    with pytest.raises(OutOfTime):
        attack.attack(run, view, Deadline(0.0))


def test_tokens_need_messages(tiny: dict[str, str]) -> None:
    """The other attacks go on with what the states tell."""
    run = target(tiny["bert"], "full", training={"fit_head_rounds": [1]})
    with pytest.raises(CannotAttack):
        Tokens().attack(run, replace(seen(run, 2, ["c00", "c01"]), received=[]), LATER)


def test_a_keeper_keeps_whole_clients() -> None:
    keeper = Keeper(room=100)
    small, large = Update({"a": torch.zeros(10)}), Update({"a": torch.zeros(20)})
    task: Any = None
    keeper.take(Received("a", task, small))
    keeper.take(Received("b", task, small))
    keeper.take(Received("b", task, large))  # which does not fit beside the first
    keeper.take(Received("c", task, small))
    keeper.take(Received("b", task, small))  # nor does a part of its messages tell
    assert [m.client for m in keeper.messages] == ["a", "c"]
    assert list(keeper.answered) == ["a", "b", "c"]
    assert list(keeper.unseen) == ["b"]
    assert keeper.room == 20


def test_sums_over_clients(tiny: dict[str, str]) -> None:
    """Under secure sums no label's sum is of one or two texts; and three clients with fewer texts than
    vectors have numbers have them named by the second moments of all, as one client would.
    """
    training = {"fit_head_rounds": [1], "fit_head_steps": 3}
    recipe = {"secure_sum": {"on": True}}
    for asked, named in ((20, None), (3, 1.0)):
        run = target(tiny["bert"], "probe", training=training, recipe=recipe, sum_terms=SumTerms())
        names = [f"c{number:02}" for number in range(asked)]
        view = summed_view(run, names)
        assert [each.task.kind for each in view.sums[:3]] == ["count labels", "sum vectors", "sum losses"]
        found = by_measure(Sums().attack(run, view, LATER))
        single = found["sum of clients: label sums of one or two texts"]
        assert (single.success, single.trials > 0) == (0.0, True)
        span = found["sum of clients: texts named by the span of the scatter"]
        assert span.success == (span.chance if named is None else named)
        assert any(key.startswith("state difference") for key in found)
        assert not any(key.startswith("client's update") for key in found)


def summed_view(run: Target, names: list[str]) -> RoundView:
    """A round of which the server is shown sums alone."""
    method = run.method
    assert isinstance(method, WeightTuning)
    method.head_fit.clients = len(names)
    before = state = method.initialise()
    clients = {name: Client(name, run.data.clients[name]) for name in names}
    sums = []
    while True:
        tasks = method.configure(state, 1, {name: Work(epochs=1) for name in names})
        updates = [method.execute(task, clients[name]) for name, task in tasks.items()]
        total = {key: sum(each.tensors[key] for each in updates) for key in updates[0].tensors}
        update = replace(updates[0], tensors=total, weight=sum(each.weight for each in updates))
        task = tasks[names[0]]
        sums.append(Summed(tuple(names), task, update))
        state = method.aggregate(state, [Answer("(sum)", task, update, summed=tuple(names))]).state
        if UNFINISHED not in state.values:
            return RoundView(1, "fitting the head", before, state, [], names, summed=sums[-1], sums=sums)
