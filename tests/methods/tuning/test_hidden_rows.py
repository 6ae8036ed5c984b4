"""Gradients of single rows, and the noised steps that are made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from fedcustom.core.errors import RecipeError, UpdateError
from fedcustom.data.conversations import Message
from fedcustom.data.examples import ClientData, Example
from fedcustom.data.tokens import TokenizedExample
from fedcustom.methods import Client, WeightTuning, Work
from fedcustom.methods.tuning.batching import bounded_rows, trainer
from fedcustom.methods.tuning.batching.bounded_rows import BoundedRows
from fedcustom.methods.tuning.batching.trainer import Work as Steps
from fedcustom.methods.tuning.batching.trainer import train_together
from fedcustom.methods.tuning.hidden_rows import STEPS, steps_of
from fedcustom.methods.tuning.messages import TrainUpdate
from fedcustom.privacy.example_mechanism import ExampleMechanism, ExamplePrivacy, Releases, RowPrivacy
from fedcustom.privacy.noise import NoiseKey
from fedcustom.privacy.settings import PrivacySettings
from fedcustom.training.settings import TrainingSettings
from fedcustom.transport.messages import read_update, values_of
from helpers.conversations import chat_llama, conversations
from helpers.methods import ALONE, MODELS, SETTINGS, SINGLE, examples_for, make
from helpers.rounds import SIZES, distance, rounds

NAMES = {f"c{number}": Releases(999) for number in range(len(SIZES))}


def privacy(batch_size: int = 3, **more: Any) -> ExamplePrivacy:
    values = {"unit": "example", "noise_multiplier": 0.5, "delta": 1e-3, "randomness": "seeded", **more}
    return ExamplePrivacy(PrivacySettings(**values), batch_size, 0, NAMES)


def options(name: str, **more: Any) -> dict[str, Any]:
    training = {
        "batch_size": more.get("batch_size", 3),
        "clip_norm": 0,
        "optimizer": "sgd",
        "learning_rate": 0.1,
    }
    return {**SETTINGS[name], "training": training, "row_privacy": privacy(**more)}


class Noted:
    """The rows of each pass, with the tensors that they were given, and their gradients before bounds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[TokenizedExample, dict[str, Tensor], dict[str, Tensor]]] = []
        self.most = 0
        waiting: list[tuple[TokenizedExample, dict[str, Tensor]]] = []
        whole, sums = trainer._Trainer._whole, BoundedRows.sums

        def noting(itself: Any, parameters: Any, rows: Any) -> Any:
            given = {**parameters, **itself.fixed}
            waiting[:] = [
                (row.example, {name: stack[row.client].detach().clone() for name, stack in given.items()})
                for row in rows
            ]
            return whole(itself, parameters, rows)

        def summing(itself: Any, gradients: Mapping[str, Tensor], owners: Tensor, clients: int) -> Any:
            self.most = max(self.most, len(waiting))
            for place, (example, given) in enumerate(waiting):
                self.found.append((example, given, {n: g[place].clone() for n, g in gradients.items()}))
            return sums(itself, gradients, owners, clients)

        monkeypatch.setattr(trainer._Trainer, "_whole", noting)
        monkeypatch.setattr(BoundedRows, "sums", summing)

    def check(self, method: WeightTuning) -> None:
        """Against the backward pass of each row by itself through the model as it is, in float32."""
        parameters, model, objective = method.trainable.parameters, method.trainable.model, method.objective
        model.eval()
        for example, given, gradients in self.found:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(given[name])
            loss = objective.loss(model, objective.collate([example]))
            alone = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            wanted = {name: g for name, g in zip(parameters, alone, strict=True) if g is not None}
            zeros = {name: torch.zeros(()) for name in parameters}
            gaps = [(zeros | wanted)[name] - (zeros | gradients)[name] for name in gradients]
            size = math.hypot(*(float(g.norm()) for name, g in wanted.items() if name in gradients))
            assert size > 0
            assert math.hypot(*(float(gap.norm()) for gap in gaps)) <= 4e-6 * size


def unsettled(method: WeightTuning) -> None:
    """Leave the first state, in which some tensors have no gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in method.trainable.parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def one_step(method: WeightTuning, examples: list[Example]) -> None:
    """Every row once, in one step of two clients from the same state."""
    halves = {"c0": examples[:3], "c1": examples[3:]}
    clients = {name: Client(name, ClientData(name, rows)) for name, rows in halves.items()}
    tasks = method.configure(method.initialise(), 1, {name: Work(steps=1) for name in clients})
    answers = method.execute_together([(tasks[name], client) for name, client in clients.items()])
    assert all(isinstance(answer, TrainUpdate) for answer in answers), answers


ENCODER = (
    "lora", "lora ffa", "lora fedsa", "lora private", "lora hetlora", "prefix", "prefix memory",
    "prefix frozen", "prefix shifts", "soft_prompt", "adapter", "ia3", "bitfit", "ln_tuning",
)  # fmt: skip

CASES = [
    *((name, "bert") for name in ENCODER),
    *(
        (name, "llama")
        for name in (
            "lora",
            "prefix",
            "prefix memory",
            "prefix shifts",
            "soft_prompt",
            "adapter",
            "ia3",
            "bitfit",
        )
    ),
    *((name, "gpt2") for name in ("lora", "prefix", "bitfit")),
    *((name, "bart") for name in ("lora", "adapter")),
]


def unequal(kind: str) -> list[Example]:
    """Examples of different lengths."""
    return [
        replace(example, text=f"{'old ' * (place % 3)}{example.text}")
        for place, example in enumerate(examples_for(kind))
    ]


@pytest.mark.parametrize(("name", "model"), CASES)
def test_gradients_of_rows_are_those_of_each_row_alone(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, name: str, model: str
) -> None:
    kind = MODELS[model]
    method = make(tiny[model], name.split()[0], kind, **options(name, batch_size=99))
    unsettled(method)
    noted = Noted(monkeypatch)
    examples = unequal(kind)
    one_step(method, examples)
    assert len(noted.found) == len(examples)
    assert len({example.length for example, *_ in noted.found}) > 1
    assert noted.most > 1  # padded to the longest
    noted.check(method)


@pytest.mark.parametrize("name", ["lora", "prefix", "prefix memory", "bitfit"])
def test_gradients_of_pairs_and_of_conversations(
    tiny: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A row of a conversation has several answers; of preference two."""
    talks = []
    for row in conversations():
        *before, last = [Message(m["role"], m["content"]) for m in row["messages"]]
        talks.append(Example(before[-1].content, target=last.content, messages=tuple(before)))
    for kind, folder, examples in (
        ("preference", tiny["llama"], examples_for("preference")),
        ("chat", chat_llama(tmp_path / "llama"), talks),
    ):
        method = make(folder, name.split()[0], kind, max_length=200, **options(name, batch_size=99))
        unsettled(method)
        with monkeypatch.context() as patch:
            noted = Noted(patch)
            one_step(method, examples)
            assert len(noted.found) == len(examples)
            assert noted.most > 1
            noted.check(method)


def test_passes_are_cut_to_the_memory_of_row_gradients(
    tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same result."""
    updates = []
    for most in (bounded_rows.MOST_BYTES, 1, 40_000):
        monkeypatch.setattr(bounded_rows, "MOST_BYTES", most)
        method = make(tiny["bert"], "lora", **options("lora", batch_size=99))
        numbers = sum(p.numel() for p in method.trainable.parameters.values())
        with monkeypatch.context() as patch:
            noted = Noted(patch)
            updates.append(rounds(method, "classification", together=True, double=True)[-1])
        assert noted.most <= max(1, most // (8 * numbers))
    for update in updates[1:]:
        assert all(distance(update[client], updates[0][client]) < 1e-9 for client in update)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *(
            (name, "bert")
            for name in (
                "lora",
                "lora hetlora",
                "lora fedsa",
                "lora fedsb",
                "lora fedsvd",
                "prefix memory stacked",
            )
        ),
        *((name, "llama") for name in ("prefix", "prefix memory", "soft_prompt", "adapter", "ia3", "bitfit")),
    ],
)
def test_the_same_as_one_by_one(tiny: dict[str, str], name: str, model: str) -> None:
    """Batches, bounds and noise are each client's own."""
    kind, technique, double = MODELS[model], name.split()[0], name not in SINGLE
    alone = rounds(make(tiny[model], technique, kind, **options(name)), kind, together=False, double=double)
    together = rounds(make(tiny[model], technique, kind, **options(name)), kind, together=True, double=double)
    for before, after in zip(alone, together, strict=True):
        for client, update in before.items():
            assert distance(update, after[client]) < (1e-7 if double else 1e-5), client
            assert values_of(update) == values_of(after[client])
            assert update.loss is None
            assert "loss" not in values_of(update)


NUMBERS = 20_000


def steps(privacies: Sequence[RowPrivacy], features: Sequence[Tensor], **training: Any) -> dict[str, Tensor]:
    """The tensors after three steps of clients whose rows' losses are inner products with their features; a
    quarter of each row's is the head's.
    """
    stacks = {"w": torch.zeros(len(privacies), NUMBERS), "h": torch.zeros(len(privacies), NUMBERS // 4)}
    rows = [[TokenizedExample.of([place], []) for place in range(len(own))] for own in features]
    known = {
        id(row): feature
        for own, some in zip(features, rows, strict=True)
        for row, feature in zip(some, own, strict=True)
    }
    kept = list(rows)

    def losses(tensors: Mapping[str, Tensor], examples: Sequence[Any], owners: Tensor) -> Tensor:
        x = torch.stack([known[id(example)] for example in examples])
        cut = NUMBERS // 4
        return (tensors["w"][owners] * x).sum(1) + (tensors["h"][owners] * x[:, :cut]).sum(1)

    work = [
        Steps([[some[i] for i in privacy.batch(step)] for step in range(3)], {}, privacy)
        for privacy, some in zip(privacies, kept, strict=True)
    ]
    settings = TrainingSettings(**{"learning_rate": 1.0, "optimizer": "sgd", "clip_norm": 0.0, **training})
    train_together(stacks, work, losses, settings, 1.0, units_of=lambda _: 1, head=frozenset({"h"}))
    return stacks


def rows_of(rows: int, batch_size: int, seed: int = 0, z: float = 1.0, **more: Any) -> RowPrivacy:
    section = PrivacySettings(unit="example", noise_multiplier=z, delta=1e-3, **more)
    return RowPrivacy(ExampleMechanism(section, rows, batch_size, Releases(3), z), NoiseKey.seeded(seed))


def test_noise_of_empty_batches_is_that_of_the_mechanism() -> None:
    """N(0, z^2 G C^2) for each of three steps, divided by the rows of a batch on average, and no more."""
    privacies = [rows_of(5, 1, seed, z=1.5, clip=0.5, clip_head=3.0) for seed in (0, 1)]
    assert not all(privacies[0].batch(step) for step in range(3))
    found = steps(privacies, [torch.zeros(5, NUMBERS)] * 2)
    for name, bound in (("w", 0.5), ("h", 3.0)):
        values = found[name].double() / (1.5 * math.sqrt(2) * bound * math.sqrt(3))
        for own in values:
            assert stats.kstest(own.numpy(), "norm").pvalue > 1e-3
        correlation = float(torch.corrcoef(values)[0, 1])
        assert abs(correlation) < 4 / math.sqrt(values.shape[1])


@pytest.mark.parametrize("value", [1e6, -1e6, 1e30, math.inf, math.nan])
@pytest.mark.parametrize("clip", ["unit", 0.25])
def test_one_row_moves_a_step_by_two_bounds_at_most(value: float, clip: Any) -> None:
    """Of each group, whatever becomes of the row; of another client's tensors it moves nothing."""
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(6, NUMBERS, generator=generator) for _ in range(2)]
    privacies = [rows_of(6, 99, seed, clip=clip, clip_head=2.0) for seed in (0, 1)]
    before = steps(privacies, features)
    changed = [features[0].clone(), features[1]]
    changed[0][2] *= value
    after = steps(privacies, changed)
    bounds = {"w": 1.0 if clip == "unit" else clip, "h": 2.0}
    for name, bound in bounds.items():
        moved = (after[name] - before[name]).norm(dim=1) * 6 / 3  # of three steps, rows on average
        assert moved[1] == 0
        assert moved[0] <= 2 * bound * (1 + 1e-5)
        assert moved[0] > 0 or value == 1e6  # which a bound makes no other


def test_a_step_is_the_sum_over_the_rows_on_average() -> None:
    """Without noise to speak of, against a loop; the weight of FedProx comes after it."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(30, NUMBERS, generator=generator)
    privacy = rows_of(30, 7, z=1e-7, clip=0.5, clip_head=0.5)
    cut, w, h = NUMBERS // 4, torch.zeros(NUMBERS), torch.zeros(NUMBERS // 4)
    sizes = [len(privacy.batch(step)) for step in range(3)]
    assert len(set(sizes)) > 1
    for step in range(3):
        rows = features[privacy.batch(step)]
        w = w - (0.5 * (rows / rows.norm(dim=1, keepdim=True)).sum(0) / 7 + 0.1 * w)
        rows = rows[:, :cut]
        h = h - (0.5 * (rows / rows.norm(dim=1, keepdim=True)).sum(0) / 7 + 0.1 * h)
    found = steps([privacy], [features], proximal=0.1)
    assert torch.allclose(found["w"][0], w, atol=1e-6)
    assert torch.allclose(found["h"][0], h, atol=1e-6)


def test_a_client_that_asks_for_more_than_is_planned(tiny: dict[str, str]) -> None:
    given = replace(privacy(), planned={"c0": Releases(3)})
    method = make(tiny["bert"], "lora", **{**options("lora"), "row_privacy": given})
    client = Client("c0", ClientData("c0", examples_for("classification")))
    state = method.initialise()
    for number in (1, 2):
        update = method.execute(method.configure(state, number, {"c0": Work(steps=1)})["c0"], client)
        assert client.memory.values[STEPS] == number
        assert update.steps == 1  # type: ignore[attr-defined]
    task = method.configure(state, 2, {"c0": Work(steps=2)})["c0"]
    with pytest.raises(UpdateError, match="2 of 3 planned steps are done, 2 more would exceed"):
        method.execute(task, client)
    with pytest.raises(RecipeError, match="client 'c1' trains in no planned round"):
        method.execute(task, Client("c1", client.data))


def test_a_losing_answer_is_refused_both_ways(tiny: dict[str, str]) -> None:
    """One with a loss where rows are hidden, and one without where they are not."""
    hidden, plain = make(tiny["bert"], "lora", **options("lora")), make(tiny["bert"], "lora")
    client = Client("c0", ClientData("c0", examples_for("classification")))
    answers = []
    for method in (hidden, plain):
        task = method.configure(method.initialise(), 1, {"c0": Work(epochs=1)})["c0"]
        update = method.execute(task, client)
        assert isinstance(update, TrainUpdate)
        method.check(task, update)
        answers.append((task, read_update(method.messages, task, values_of(update), update.tensors)))
    (task, update), (other, told) = answers
    assert isinstance(update, TrainUpdate)
    assert isinstance(told, TrainUpdate)
    assert update.loss is None
    with pytest.raises(UpdateError, match="a training loss came with an update whose rows are hidden"):
        hidden.check(task, replace(update, loss=0.5))
    with pytest.raises(UpdateError, match="training loss None is not a finite number"):
        plain.check(other, replace(told, loss=None))


def test_secret_noise_is_drawn_anew(tiny: dict[str, str]) -> None:
    """A task that is done twice has two answers, or their noise could be told."""
    method = make(tiny["bert"], "lora", **options("lora", randomness="secret"))
    task = method.configure(method.initialise(), 1, {"c0": Work(epochs=1)})["c0"]
    client = Client("c0", ClientData("c0", examples_for("classification")))
    one, other = method.execute(task, client), method.execute(task, client)
    assert distance(one, other) > 0.1


@pytest.mark.parametrize("name", ALONE)
def test_methods_without_slices_are_refused(tiny: dict[str, str], name: str) -> None:
    with pytest.raises(RecipeError, match=r"privacy\.unit = 'example': each row needs a gradient of its own"):
        make(tiny["bert"], name.split()[0], **options(name))


@pytest.mark.parametrize(
    ("more", "named"),
    [({"training": {"dropout": True}}, "training.dropout"), ({"dropout": 0.1}, "dropout")],
)
def test_dropout_is_refused(tiny: dict[str, str], more: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        make(tiny["bert"], "lora", **{**options("lora"), **more})


def test_steps_of_work() -> None:
    """The fewest that an update's check allows, wherever the passes before ended."""
    assert steps_of(Work(steps=7), 5, 99) == 7
    assert steps_of(Work(epochs=1), 10, 3) == 4
    assert steps_of(Work(epochs=0.25), 10, 3) == 1
    assert steps_of(Work(epochs=2), 10, 4) == 5
    assert steps_of(Work(examples=9), 10, 4) == 3
