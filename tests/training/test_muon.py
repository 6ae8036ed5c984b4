"""Muon, for matrices of several clients and several that lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedcustom.core.errors import RecipeError
from fedcustom.data.examples import ClientData
from fedcustom.data.tokens import TokenizedExample
from fedcustom.methods import Client
from fedcustom.methods import Work as Amount
from fedcustom.methods.tuning.batching.trainer import Work, train_together
from fedcustom.recipe.recipe import load_recipe
from fedcustom.training.local import make_optimizer, train_locally
from fedcustom.training.muon import Muon, orthogonalised, side_by_side
from fedcustom.training.settings import TrainingSettings
from helpers.methods import examples_for, make

RATE = 0.01


def expected(matrix: np.ndarray) -> np.ndarray:
    """The iteration on singular values alone: s becomes a s + b s^3 + c s^5, five times."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    norm = np.linalg.norm(matrix)
    values = values / norm
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return np.asarray((left * values * min(1, norm / 1e-7)) @ right)


def step(
    weights: torch.Tensor, gradients: list[torch.Tensor], parts: int = 1, decay: float = 0.0
) -> torch.Tensor:
    """The weights after a step for each gradient."""
    parameter = nn.Parameter(weights.clone())
    optimizer = Muon([{"params": [parameter], "lr": RATE, "parts": parts}], [], decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_singular_values_become_alike(rows: int, columns: int, seed: int, scale: float) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)) * scale
    found = orthogonalised(torch.from_numpy(matrix)).numpy()
    np.testing.assert_allclose(found, expected(matrix), atol=1e-7)
    values = np.linalg.svd(matrix, compute_uv=False)
    if values[-1] > 0.01 * values[0] and np.linalg.norm(matrix) > 1e-7:
        after = np.linalg.svd(found, compute_uv=False)
        assert 0.65 < after.min() <= after.max() < 1.25


def test_no_gradient_is_no_step() -> None:
    """And one that is rounding next to none."""
    assert step(torch.ones(3, 4), [torch.zeros(3, 4)]).equal(torch.ones(3, 4))
    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    gradient *= 1e-9 / gradient.norm()
    assert 0 < float(orthogonalised(gradient).norm()) < 0.03


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_steps_are_those_of_pytorch(shape: tuple[int, int]) -> None:
    """To the rounding of bfloat16, in which PyTorch computes; five times its step."""
    generator = torch.Generator().manual_seed(0)
    weights, *gradients = (torch.randn(shape, generator=generator) for _ in range(4))
    reference = nn.Parameter(weights.clone())
    theirs = torch.optim.Muon(
        [reference], lr=5 * RATE, weight_decay=0.1 / 5, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for gradient in gradients:
        reference.grad = gradient.clone()
        theirs.step()
    ours, change = step(weights, gradients, decay=0.1), reference.detach() - weights
    assert (ours - reference).norm() < 0.02 * change.norm()
    assert change.square().mean().sqrt() == pytest.approx(3 * RATE, rel=0.3)


def test_clients_and_neighbours_do_not_know_each_other() -> None:
    """(clients, rows, parts x columns): each matrix moves as it would alone."""
    weights = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(1))
    gradients = [torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(s)) for s in (2, 3)]
    found = side_by_side(step(weights, gradients, parts=2, decay=0.1), 2)
    for client in range(3):
        for part, columns in enumerate((slice(0, 5), slice(5, 10))):
            own = [gradient[client, :, columns] for gradient in gradients]
            alone = step(weights[client, :, columns].contiguous(), own, decay=0.1)
            torch.testing.assert_close(found[client, part], alone)


def test_everything_else_is_adamws() -> None:
    """Vectors and the head, with the head's own rate; one state for all."""
    torch.manual_seed(0)
    shapes = {"w": (3, 5), "bias": (5,), "head": (2, 3)}
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    training = TrainingSettings(
        optimizer="muon", learning_rate=RATE, head_learning_rate=0.1, weight_decay=0.5
    )
    optimizer = make_optimizer(parameters, training, 0.5, frozenset({"head"}), {"w": 1})
    references = {name: nn.Parameter(before[name].clone()) for name in ("bias", "head")}
    adamw = torch.optim.AdamW(
        [{"params": [references["bias"]], "lr": 0.5 * RATE}, {"params": [references["head"]], "lr": 0.05}],
        weight_decay=0.5,
    )
    for name, parameter in parameters.items():
        parameter.grad = torch.randn_like(parameter)
        if name in references:
            references[name].grad = parameter.grad.clone()
    gradient = parameters["w"].grad
    optimizer.step()
    adamw.step()
    for name, reference in references.items():
        torch.testing.assert_close(parameters[name], reference)
    assert gradient is not None
    direction = torch.from_numpy(expected(gradient.double().numpy())).float()
    torch.testing.assert_close(
        parameters["w"].detach(), (1 - 0.25 * RATE) * before["w"] - 0.5 * RATE * 5**0.5 * direction
    )
    assert {frozenset(optimizer.state[p]) for p in parameters.values()} == {
        frozenset({"momentum"}), frozenset({"step", "exp_avg", "exp_avg_sq"}),
    }  # fmt: skip
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in parameters.values())


def test_a_client_goes_on_where_its_moments_are_kept() -> None:
    """Two rounds that keep the state are one of as many steps."""
    torch.manual_seed(0)
    start = {"w": torch.randn(4, 6), "bias": torch.randn(4)}
    targets = [torch.randn(4) for _ in range(4)]
    inputs = torch.randn(4, 6)
    training = TrainingSettings(optimizer="muon", learning_rate=RATE)

    def train(parameters: dict[str, nn.Parameter], chosen: list[torch.Tensor], moments: Any = None) -> Any:
        batches = ([({"labels": target}, 1.0)] for target in chosen)
        return train_locally(
            parameters,
            batches,
            lambda batch: (
                ((parameters["w"] * inputs).sum(1) + parameters["bias"] - batch["labels"]).square().sum()
            ),
            training,
            1.0,
            matrices={"w": 2},
            moments=moments,
        )

    whole = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    train(whole, targets)
    halves = {name: nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    kept = train(halves, targets[:2]).moments
    assert {key.split("/")[0] for key in kept} == {"momentum", "step", "exp_avg", "exp_avg_sq"}
    train(halves, targets[2:], kept)
    for name, parameter in whole.items():
        torch.testing.assert_close(halves[name], parameter)


def test_a_cohort_is_its_clients_one_by_one() -> None:
    """With matrices of full rank, clients that are done at different times, and two matrices side by side."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    values = {n: torch.randn(4, 6, generator=generator, dtype=torch.float64) for n in range(20)}
    training = TrainingSettings(optimizer="muon", learning_rate=RATE, weight_decay=0.1)
    examples = [TokenizedExample.of([n], []) for n in values]
    batches = [[examples[:3], examples[3:5]], [examples[5:9]], [[e] for e in examples[9:14]]]

    def loss(weights: torch.Tensor, rows: Sequence[TokenizedExample]) -> torch.Tensor:
        wanted = torch.stack([values[n] for n in rows_of(rows)])
        return (weights - wanted).square().sum((1, 2)) + (weights.sin() * wanted).sum((1, 2))

    stacks = {"w": start.repeat(3, 1, 1)}
    train_together(
        stacks,
        [Work(own) for own in batches],
        lambda tensors, rows, owners: loss(tensors["w"][owners], rows),
        training,
        0.5,
        units_of=lambda example: 1,
        matrices={"w": 2},
    )
    for client, own in enumerate(batches):
        alone = nn.Parameter(start.clone())
        pieces = ([({"labels": torch.tensor(rows_of(rows))}, 1.0)] for rows in own)
        train_locally(
            {"w": alone},
            pieces,
            lambda batch, w=alone: loss(w[None], [examples[n] for n in batch["labels"].tolist()]).mean(),
            training,
            0.5,
            matrices={"w": 2},
        )
        torch.testing.assert_close(stacks["w"][client], alone.detach())


def rows_of(rows: Sequence[TokenizedExample]) -> list[int]:
    return [int(row.source[0]) for row in rows]


def test_which_tensors_are_matrices(tiny: dict[str, str]) -> None:
    layers = 2
    assert make(tiny["bert"], "prefix", kind="kv", length=4).trainable.matrices == {"prefix": 2 * layers}
    assert make(tiny["bert"], "soft_prompt", length=4).trainable.matrices == {"soft_prompt": 1}
    for name in ("lora", "adapter"):
        tuned = make(tiny["bert"], name).trainable
        weights = {n for n, p in tuned.parameters.items() if p.dim() == 2 and n not in tuned.head}
        assert weights
        assert set(tuned.matrices) == weights
    full = make(tiny["bert"], "full").trainable
    assert not [name for name in full.matrices if "embeddings" in name or name in full.head]
    assert "bert.encoder.layer.0.attention.self.query.weight" in full.matrices


@pytest.mark.parametrize("name", ["bitfit", "ia3", "prefix reparametrised"])
def test_methods_without_matrices_refuse_it(tiny: dict[str, str], name: str) -> None:
    options: dict[str, Any] = {"reparametrise": True} if " " in name else {}
    with pytest.raises(RecipeError, match="trains no matrices"):
        make(tiny["bert"], name.split()[0], training={"optimizer": "muon"}, **options)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_momentum_is_for_plain_gradient_steps(optimizer: str) -> None:
    with pytest.raises(RecipeError, match=r"momentum = 0.9: is for optimizer = 'sgd'"):
        load_recipe({"training": {"optimizer": optimizer, "momentum": 0.9}})


def test_a_clients_first_step_moves_all_keys_and_values_alike(tiny: dict[str, str]) -> None:
    """Each layer's keys, and its values, by the rate: AdamW moves numbers alike, Muon directions."""
    training = {"optimizer": "muon", "learning_rate": RATE, "batch_size": 8}
    method = make(tiny["bert"], "prefix", kind="kv", length=4, training=training)
    state, client = method.initialise(), Client("a", ClientData("a", examples_for("classification")[:8]))
    update = method.execute(method.configure(state, 1, {"a": Amount(steps=1)})["a"], client)
    for layer in update.tensors["prefix"]:
        for change in layer:  # (heads, length, size)
            matrix = change.movedim(0, 1).flatten(1)
            values = torch.linalg.svdvals(matrix / (RATE * max(matrix.shape) ** 0.5))
            assert float(values.max()) < 1.25
    assert update.tensors["prefix"][:, 1].square().mean().sqrt() == pytest.approx(RATE, rel=0.35)
