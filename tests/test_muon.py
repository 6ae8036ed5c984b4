"""Muon, for matrices of several clients and several that lie side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedcustom.data.examples import ClientData
from fedcustom.methods import Client
from fedcustom.training.local import make_optimizer
from fedcustom.training.muon import Muon, orthogonalised, side_by_side
from fedcustom.training.settings import TrainingSettings
from test_methods import examples_for, make

RATE = 0.01


def expected(matrix: np.ndarray) -> np.ndarray:
    """The iteration on singular values alone: s becomes a s + b s^3 + c s^5, five times."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / max(np.linalg.norm(matrix), 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return np.asarray((left * values) @ right)


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
    if values[-1] > 0.01 * values[0]:
        after = np.linalg.svd(found, compute_uv=False)
        assert 0.65 < after.min() <= after.max() < 1.25


def test_no_gradient_is_no_step() -> None:
    assert step(torch.ones(3, 4), [torch.zeros(3, 4)]).equal(torch.ones(3, 4))


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


def test_which_tensors_are_matrices(tiny: dict[str, str]) -> None:
    layers = 2
    prefix = make(tiny["bert"], "prefix", length=4).tuned
    assert prefix.matrices() == {"prefix": 2 * layers}
    lora = make(tiny["bert"], "lora", rank=2).tuned
    assert set(lora.matrices()) == set(lora.parameters) - lora.head
    assert make(tiny["bert"], "bitfit").tuned.matrices() == {}
    full = make(tiny["bert"], "full").tuned
    assert not [name for name in full.matrices() if "embeddings" in name or name in full.head]
    assert "bert.encoder.layer.0.attention.self.query.weight" in full.matrices()


def test_a_clients_first_step_moves_all_keys_and_values_alike(tiny: dict[str, str]) -> None:
    """Each layer's keys, and its values, by the rate: AdamW moves numbers alike, Muon directions."""
    training = {"optimizer": "muon", "learning_rate": RATE, "batch_size": 8}
    method = make(tiny["bert"], "prefix", length=4, training=training)
    state, client = method.start(), Client("a", ClientData("a", examples_for("classification")[:8]))
    update = method.work(method.ask(state, 1, {"a": {"steps": 1}})["a"], client)
    for layer in update.tensors["prefix"]:
        for change in layer:  # (heads, length, size)
            matrix = change.movedim(0, 1).flatten(1)
            values = torch.linalg.svdvals(matrix / (RATE * max(matrix.shape) ** 0.5))
            assert float(values.max()) < 1.25
    assert update.tensors["prefix"][:, 1].square().mean().sqrt() == pytest.approx(RATE, rel=0.35)
