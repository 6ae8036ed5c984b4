"""Muon and AdamW."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


def orthogonalised(matrices: Tensor, precision: torch.dtype) -> Tensor:
    """Nearly the closest orthogonal matrix to each of ``(count, rows, columns)``, rows <= columns.

    Five steps of the quintic Newton-Schulz iteration with the coefficients of Jordan et al. 2024 (Muon), in
    ``precision``.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(precision)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024), scaled to the size of AdamW's updates (Liu et al. 2025).

    For hidden matrices. Matrices of one shape are orthogonalised in one batch, in ``precision``:
    ``torch.optim.Muon`` always goes through bfloat16, which is slow on most CPUs.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        momentum: float,
        weight_decay: float,
        precision: torch.dtype,
    ) -> None:
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update: w = (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) orthogonalised(momentum)."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
            for shape, members in shapes.items():
                wanted = []
                for p in members:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    velocity.lerp_(p.grad, 1 - group["momentum"])
                    ahead = p.grad.lerp(velocity, group["momentum"])
                    wanted.append(ahead if p.shape[0] <= p.shape[1] else ahead.T)
                directions = orthogonalised(torch.stack(wanted), self.precision)
                rate = group["lr"] * 0.2 * math.sqrt(shape[1])
                for p, direction in zip(members, directions, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(direction if p.shape[0] <= p.shape[1] else direction.T, alpha=-rate)


class Optimizers:
    """Muon for the hidden matrices, AdamW for embeddings and norms, as one."""

    def __init__(self, model: LlamaForCausalLM, precision: str) -> None:
        self.named = dict(model.named_parameters())
        hidden = [p for name, p in self.named.items() if p.dim() == 2 and "embed" not in name]
        embeddings = [p for name, p in self.named.items() if "embed" in name]
        vectors = [p for p in self.named.values() if p.dim() == 1]
        self.muon = Muon(hidden, momentum=0.95, weight_decay=0.1, precision=getattr(torch, precision))
        groups = [{"params": embeddings, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)

    def step(self, rate: float) -> None:
        """One step of both at a learning rate; gradients are set to zero afterwards."""
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    def state(self) -> dict[str, Tensor]:
        """Moments as named tensors."""
        found = {**self.muon.state, **self.adamw.state}
        return {
            f"{kind}/{name}": value.contiguous()
            for name, p in self.named.items()
            for kind, value in found[p].items()
        }

    def restore(self, moments: dict[str, Tensor]) -> None:
        """Put back what :meth:`state` gave."""
        for key, value in moments.items():
            kind, name = key.split("/", maxsplit=1)
            parameter = self.named[name]
            owner = self.muon if kind == "velocity" else self.adamw
            owner.state[parameter][kind] = value.to(parameter.device)  # the step too, which is fused
