"""Corrections of client drift: each client remembers how its own data pull, and trains against that.

SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II) sends a control variate beside every tensor, so it
doubles the traffic. FedDyn (Acar et al. 2021, algorithm 1) sends nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..tensors import Tensors, combine, zeros_like

CONTROL, DUAL = "control/", "dual/"


def part(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def named(tensors: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The tensors with ``prefix`` before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without(tensors: Mapping[str, Tensor], *prefixes: str) -> Tensors:
    """The tensors whose names begin with none of ``prefixes``."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def scaffold_client(
    change: Mapping[str, Tensor],
    server_control: Mapping[str, Tensor],
    own_control: Mapping[str, Tensor],
    rates: Mapping[str, float],
    steps: int,
) -> Tensors:
    """A client's next control variate: ``c_i - c - change / (steps rate)``, with the rate of each tensor."""
    return {
        name: own_control[name] - server_control[name] - delta / (steps * rates[name])
        for name, delta in change.items()
    }


def scaffold_server(control: Tensors, mean: Mapping[str, Tensor], answered: int, clients: int) -> Tensors:
    """The server's next control variate: ``c + |S| / N mean(c_i_new - c_i)``."""
    return combine(lambda c, d: c + answered / clients * d, control, mean)


def feddyn_server(
    current: Tensors, change: Tensors, dual: Tensors, alpha: float, answered: int, clients: int
) -> tuple[Tensors, Tensors]:
    """The next global state and the server's next h, from the cohort's mean change::

    h <- h - alpha |S| / N change;   x <- x + change - h / alpha
    """
    dual = dual or zeros_like(current)
    dual = combine(lambda h, d: h - alpha * answered / clients * d, dual, change)
    return combine(lambda x, d, h: x + d - h / alpha, current, change, dual), dual
