"""Evaluation of a state by a Trainer's own ``evaluate()``."""

from __future__ import annotations

from ..core.errors import RunError
from ..evaluation.metrics import Metrics
from ..federated.evaluator import Result
from ..methods.protocol import State
from .local_trainer import LocalTrainer


class TrainerEvaluation:
    """The loop's evaluation: every score is that of the Trainer's ``eval_dataset``."""

    def __init__(self, local: LocalTrainer) -> None:
        self.local = local
        self._latest: tuple[State, Metrics] | None = None

    def development(self, state: State) -> Metrics:
        """The scores of a state; of the state that was asked for last they are known."""
        if self._latest is None or self._latest[0] is not state:
            self._latest = (state, self.local.evaluate(state.tensors))
        return dict(self._latest[1])

    def test(self, state: State) -> Metrics:
        """The same: there is no second dataset."""
        return self.development(state)

    def scale(self, state: State) -> float:
        """Not there.

        Raises:
            RunError: always.
        """
        raise RunError("federate: a Trainer's model is not calibrated")

    def final(self, state: State, trained: State | None = None) -> Result:
        """The scores of the best round's state; clients are not evaluated one by one."""
        return Result(self.development(state), {}, {}, {}, None)
