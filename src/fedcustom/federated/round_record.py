"""The record of one round: who answered, what travelled, and the round's row of ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..aggregation.norm_limit import ChangeSize
from ..core.text import printable
from ..methods.messages import LossUpdate
from ..methods.tuning.messages import TrainUpdate
from ..recipe import Recipe
from ..training.local import schedule_factor
from ..transport.protocol import Reply
from .norm_gate import NORMS, STEPS
from .run_directory import Row
from .schedule import Assignment

MOST_CHARACTERS = 1000
"""Of the reason why a client is left out, which may be the client's own words."""


@dataclass
class RoundRecord:
    """Counts, bytes and losses of a round, noted reply by reply.

    ``seconds`` is the clients' time; ``elapsed`` the server's, from the first task to the aggregated state.
    A round that fits the head takes several ``exchanges``. ``sizes`` are those of the changes that were
    merged, ``refused`` why the state stayed as it was.
    """

    number: int
    cohort: Mapping[str, Assignment]
    answered: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    losses: list[tuple[float | None, int]] = field(default_factory=list)
    sizes: dict[str, ChangeSize] = field(default_factory=dict)
    refused: str = ""
    seconds: float = 0.0
    elapsed: float = 0.0
    exchanges: int = 1

    def note(self, reply: Reply) -> None:
        """Note a reply's bytes and time, and whether it is an answer."""
        self.seconds += reply.seconds
        if not reply.clients:  # a sum has no messages of its own
            self.bytes_down[reply.client] = self.bytes_down.get(reply.client, 0) + reply.bytes_down
        if reply.bytes_up:
            self.bytes_up[reply.client] = self.bytes_up.get(reply.client, 0) + reply.bytes_up
        if reply.summed:
            return
        if reply.update is None:
            self.left_out[reply.client] = printable(reply.reason, lines=False, longest=MOST_CHARACTERS)
            return
        self.answered.extend(reply.clients or (reply.client,))
        if isinstance(reply.update, LossUpdate | TrainUpdate):
            loss = reply.update.loss
            self.losses.append((None if loss is None else float(loss), reply.update.examples))

    def staleness(self, client: str) -> int:
        """How many rounds a client's starting state is behind the newest one."""
        return self.number - 1 - self.cohort[client].since

    def row(self, recipe: Recipe, learning_rate: float, previous: Row) -> Row:
        """The round's row, with running totals that go on from the ``previous`` one's (empty: none)."""
        sent = recipe.baseline == "federated"  # a centralised or local run has nobody to send to
        up, down = (self.bytes_up, self.bytes_down) if sent else ({}, {})
        examples = sum(count for _, count in self.losses)
        factor = schedule_factor(recipe.training, self.number, recipe.rounds.count)
        training = min(self.seconds, self.elapsed)  # sites train at the same time
        told = [(loss, count) for loss, count in self.losses if loss is not None]
        mean = sum(count * loss for loss, count in told) / max(1, sum(count for _, count in told))
        row: Row = {
            "round": self.number,
            "cohort": list(self.cohort),
            "answered": self.answered,
            "left_out": self.left_out,
            "late": {name: late for name in self.cohort if (late := self.staleness(name)) > 0},
            "learning_rate": learning_rate * factor,
            "train_loss": mean if told else None,
            "examples": examples,
            "bytes_up": up,
            "bytes_down": down,
            "bytes_up_total": previous.get("bytes_up_total", 0) + sum(up.values()),
            "bytes_down_total": previous.get("bytes_down_total", 0) + sum(down.values()),
            "seconds": {
                "train": round(training, 4),
                "evaluate": 0.0,
                "aggregate": round(self.elapsed - training, 4),
            },
        }
        if self.sizes:
            row[NORMS] = {client: size.norm for client, size in self.sizes.items()}
            row[STEPS] = {client: size.steps for client, size in self.sizes.items()}
        if self.refused:
            row["refused"] = self.refused
        return row
