"""Shared negatives: passage vectors of other clients for contrastive training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ...core.errors import UpdateError
from ...core.seeds import name_seed
from ...core.tensors import Tensors, is_finite, named, part, without
from ..messages import Task, Update
from ..protocol import Client, State
from .settings import RetrievalSettings
from .store import Vectors

Message = TypeVar("Message", Task, Update)

PREFIX = "negatives/"

BORROWED = f"{PREFIX}borrowed"
"""The tensor of a task: vectors of other clients' passages, (vectors, width), float16."""

LENT = f"{PREFIX}lent"
"""The tensor of an update: vectors of the client's own passages; the server keeps them by client."""


class Negatives:
    """A question is otherwise told apart from its own client's passages alone, while a search ranks the
    passages of all. So each client sends, with its update, vectors of some of its passages by the encoder
    that it was sent, and gets in the next round what the others' answers of the last merged round brought.

    Discloses: to the server and all other clients the vectors of ``shared_negatives`` passages, other ones in
    each round, of clients whose policy lets passages out. A text like the passage can be guessed from a
    vector (Morris et al. 2023). No robust rule guards what is lent: vectors of any direction are taken.
    """

    def __init__(
        self,
        settings: RetrievalSettings,
        seed: int,
        rounds: int,
        embed: Callable[[Sequence[str]], Vectors],
    ) -> None:
        self.settings, self.seed, self.rounds, self.embed = settings, seed, rounds, embed

    # --- server ---

    def offered(self, state: State, tasks: Mapping[str, Task]) -> dict[str, Task]:
        """The tasks, each with what the other clients lent in the round before, in order of name."""
        lent = dict(sorted(part(state.server, f"{LENT}/").items()))
        given = {}
        for name, task in tasks.items():
            others = [vectors for owner, vectors in lent.items() if owner != name]
            more = {BORROWED: torch.cat(others)} if others else {}
            given[name] = replace(task, tensors={**task.tensors, **more})
        return given

    def check(self, update: Update, width: int) -> None:
        """Refuse vectors of another number, width or length than were asked for.

        Raises:
            UpdateError: says what is wrong.
        """
        given = {name: tensor for name, tensor in update.tensors.items() if name.startswith(PREFIX)}
        lent = given.pop(LENT, None)
        if given:
            raise UpdateError(f"wrong tensor names: {', '.join(sorted(given))}")
        if lent is None:
            return
        most, shape = self.settings.shared_negatives, tuple(lent.shape)
        if lent.dim() != 2 or shape[0] > most or shape[1] != width or lent.dtype != torch.float16:
            raise UpdateError(
                f"{LENT} is {shape}, {lent.dtype}, not at most {most} float16 vectors of {width} numbers"
            )
        if not is_finite({LENT: lent}) or ((lent.float().norm(dim=1) - 1).abs() > 0.01).any():
            raise UpdateError(f"{LENT}: must be vectors of length 1")

    def kept(self, state: State, lent: Mapping[str, Tensor]) -> State:
        """The state with what this round's clients lent, in place of what was lent before."""
        return replace(state, server={**without(state.server, PREFIX), **named(lent, f"{LENT}/")})

    # --- client ---

    def lend(self, client: Client, round_number: int) -> Tensors:
        """Vectors of passages drawn anew in each round but the last, after which nobody borrows; none where
        the policy keeps passages in the house.
        """
        passages = list(dict.fromkeys(example.target for example in client.data.train))
        kept = self.settings.policy_of(client.name) != "passages" or round_number >= self.rounds
        if kept or not passages:
            return {}
        generator = np.random.default_rng([self.seed, 23, name_seed(client.name), round_number])
        count = min(self.settings.shared_negatives, len(passages))
        chosen = generator.choice(len(passages), count, replace=False).tolist()
        return {LENT: torch.from_numpy(self.embed([passages[i] for i in chosen])).half()}


def plain(message: Message) -> Message:
    """A task or an update of training alone."""
    return replace(message, tensors=without(message.tensors, PREFIX))
