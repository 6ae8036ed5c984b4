"""Client drift corrections: SCAFFOLD and FedDyn."""

from __future__ import annotations

from collections.abc import Callable

from ...aggregation.server_optimizers import server_step
from ...aggregation.settings import AggregationSettings
from ...core.tensors import Tensors, combine, named, part, without, zeros_like
from ...training.settings import TrainingSettings
from ..protocol import Memory

CONTROL, DUAL = "control/", "dual/"


class Correction:
    """No correction: the server optimiser follows the cohort's change."""

    def __init__(self, settings: AggregationSettings, clients: int) -> None:
        self.settings, self.clients = settings, clients

    def initialise(self, tensors: Tensors) -> Tensors:
        """What the server keeps beside the state, and sends with it."""
        return {}

    def training(self, settings: TrainingSettings) -> TrainingSettings:
        """The client's training."""
        return settings

    def shift(self, sent: Tensors, memory: Memory) -> Tensors:
        """What is added to every gradient at a client."""
        return {}

    def remember(
        self, sent: Tensors, memory: Memory, change: Tensors, rate: Callable[[str], float], steps: int
    ) -> Tensors:
        """Bring the client's memory up to date after ``steps`` steps; what it sends of that."""
        return {}

    def step(
        self, current: Tensors, change: Tensors, server: Tensors, answered: int
    ) -> tuple[Tensors, Tensors]:
        """The next global tensors, and what of the server's own tensors is new."""
        return server_step(current, change, server, self.settings)


class Scaffold(Correction):
    """SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II), for plain gradient steps.

    Every gradient is shifted by ``c - c_i``. After K steps at rate eta::

        c_i <- c_i - c - change / (K eta);   c <- c + |S| / N mean(c_i_new - c_i)

    Discloses the change of each client's control variate, an estimate of its mean gradient; doubles the
    traffic.
    """

    def initialise(self, tensors: Tensors) -> Tensors:
        """c = 0."""
        return named(zeros_like(tensors), CONTROL)

    def shift(self, sent: Tensors, memory: Memory) -> Tensors:
        """``c - c_i``."""
        own = part(memory.tensors, CONTROL)
        return {name: c - own.get(name, 0) for name, c in part(sent, CONTROL).items()}

    def remember(
        self, sent: Tensors, memory: Memory, change: Tensors, rate: Callable[[str], float], steps: int
    ) -> Tensors:
        """The next c_i; sends by how much it changed."""
        server = part(sent, CONTROL)
        own = zeros_like(server) | part(memory.tensors, CONTROL)
        following = {
            name: own[name] - server[name] - delta / (steps * rate(name)) for name, delta in change.items()
        }
        memory.tensors = memory.tensors | named(following, CONTROL)
        return named({name: following[name] - own[name] for name in following}, CONTROL)

    def step(
        self, current: Tensors, change: Tensors, server: Tensors, answered: int
    ) -> tuple[Tensors, Tensors]:
        """The server optimiser's step, and the next c."""
        share = answered / self.clients
        control = combine(lambda c, d: c + share * d, part(server, CONTROL), part(change, CONTROL))
        change = without(change, CONTROL)
        tensors, moments = server_step(
            {name: current[name] for name in change}, change, server, self.settings
        )
        return tensors, moments | named(control, CONTROL)


class FedDyn(Correction):
    """FedDyn (Acar et al. 2021, algorithm 1). Nothing more is sent than without it.

    A client's gradient is shifted by ``-h_k + alpha (w - w_global)``. After training::

        h_k <- h_k - alpha change
        h <- h - alpha |S| / N mean(change);   x <- x + mean(change) - h / alpha
    """

    def training(self, settings: TrainingSettings) -> TrainingSettings:
        """With the proximal term alpha."""
        return settings.model_copy(update={"proximal": self.settings.feddyn_alpha})

    def shift(self, sent: Tensors, memory: Memory) -> Tensors:
        """``-h_k``."""
        return {name: -dual for name, dual in part(memory.tensors, DUAL).items()}

    def remember(
        self, sent: Tensors, memory: Memory, change: Tensors, rate: Callable[[str], float], steps: int
    ) -> Tensors:
        """The next h_k; sends nothing."""
        dual, alpha = part(memory.tensors, DUAL), self.settings.feddyn_alpha
        following = {name: dual.get(name, 0) - alpha * delta for name, delta in change.items()}
        memory.tensors = memory.tensors | named(following, DUAL)
        return {}

    def step(
        self, current: Tensors, change: Tensors, server: Tensors, answered: int
    ) -> tuple[Tensors, Tensors]:
        """x and h."""
        alpha, share = self.settings.feddyn_alpha, answered / self.clients
        dual = part(server, DUAL) or zeros_like(change)
        dual = combine(lambda h, d: h - alpha * share * d, dual, change)
        tensors = combine(lambda x, d, h: x + d - h / alpha, current, change, dual)
        return tensors, named(dual, DUAL)


CORRECTIONS: dict[str, type[Correction]] = {"none": Correction, "scaffold": Scaffold, "feddyn": FedDyn}


def make_correction(settings: AggregationSettings, clients: int) -> Correction:
    """The correction that the settings name, in a federation of ``clients``."""
    return CORRECTIONS[settings.correction](settings, clients)
