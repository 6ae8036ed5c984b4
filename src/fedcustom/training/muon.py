"""Muon (Jordan et al. 2024): steps that move a matrix equally far in all directions that its gradient has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
"""A matrix with a smaller norm is taken for rounding, and makes a step that is smaller in proportion."""


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for everything else.

    With gradient g and momentum b (0.95), for each matrix::

        m = b m + (1 - b) g;   u = b m + (1 - b) g;   w <- w - rate (decay w + sqrt(max(rows, columns)) O(u))

    O(u) has the singular vectors of u, and singular values of about one (:func:`orthogonalised`). So the
    numbers of a matrix whose gradient has full rank move by the rate in root mean square, as in Adam's first
    step, whatever the gradient's length: rates for AdamW are of the right order. PyTorch's own Muon takes a
    fifth of that (``match_rms_adamw``), in bfloat16, and one matrix at a time.

    ``matrices`` are groups of parameters with ``parts``: how many matrices lie side by side in each. The last
    two dimensions are a matrix's (or those of its neighbours with it), those before them are clients. The
    state has one dict for both kinds, as that of any optimiser.
    """

    def __init__(
        self, matrices: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], weight_decay: float
    ) -> None:
        super().__init__(matrices, {"weight_decay": weight_decay})
        self.others = torch.optim.AdamW(others, weight_decay=weight_decay, fused=True) if others else None
        if self.others is not None:
            self.others.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                update = side_by_side(parameter.grad.lerp(momentum, MOMENTUM), group["parts"])
                longest = max(update.shape[-2:])
                change = orthogonalised(update).mul_(longest**0.5)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(change.movedim(-3, -2).reshape(parameter.shape), alpha=group["lr"])
        if self.others is not None:
            self.others.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        super().zero_grad(set_to_none)
        if self.others is not None:
            self.others.zero_grad(set_to_none)


def side_by_side(tensor: Tensor, parts: int) -> Tensor:
    """Matrices that lie side by side, (..., rows, parts columns), one by one: (..., parts, rows, columns)."""
    return tensor.view(*tensor.shape[:-1], parts, -1).movedim(-2, -3)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices, (..., rows, columns), with singular values between 0.7 and 1.2 or so in place of their own.

    Five steps of the Newton-Schulz iteration with the coefficients of Jordan et al. (2024), which makes
    singular values from about a thousandth of the largest on nearly one; it needs matrix products alone.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / norm.clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x * (norm / EPSILON).clamp(max=1)
    return x.mT if tall else x
