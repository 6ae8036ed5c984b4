"""The recorder of rounds of a private run: what others see of them, kept while the run goes.

The key of a private run's noise is deleted at its end, so that no round can be repeated. What is kept is what
the run's promise covers, and nothing else: the states that were sent and, unless the server adds the noise,
the messages of clients or their sums, which are noised before the server sees them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import RunError
from ..core.files import write_bytes
from ..core.tensors import named, part
from ..methods import State
from ..recipe import Recipe
from ..transport.messages import read_task, read_update, values_of
from ..transport.protocol import Reply
from ..transport.wire import decode, encode
from ..updates.transform import UpdateTransform
from .callbacks import Callback
from .replay import ReplayedRound, Seen, Watched, copy_of_run, finished_recipe
from .run_directory import Checkpoint, Checkpoints, History, RunDirectory
from .simulation import Federation, simulate

FOLDER = "recorded_rounds"
"""The folder in a run's directory of what was kept."""

MOST_BYTES = 2**30
"""Of one round's messages; those beyond are left out, and counted."""

MORE = "left-out"
"""Before the number of a message that was left out, in its file's name."""


def has_secret_noise(recipe: Recipe) -> bool:
    """Whether rounds of a recipe cannot be repeated, since nobody keeps the key of their noise."""
    return recipe.privacy is not None and recipe.privacy.unit != "none" and recipe.privacy.is_valid


class RoundRecorder(Callback):
    """Keeps the states before and after some ``rounds`` of a run in ``directory``; as its ``gather``, it also
    keeps the messages of these rounds where clients hide their rows themselves.
    """

    def __init__(self, directory: Path, rounds: Collection[int]) -> None:
        self.directory, self.rounds = directory, frozenset(rounds)
        self._room: dict[int, int] = {}
        self._count: dict[int, int] = {}

    def on_checkpoint(self, number: int) -> None:
        """Keep the state, without what clients remember."""
        if not self.rounds & {number, number + 1}:
            return
        state = RunDirectory(self.directory).checkpoints.load(number).state
        kept = Checkpoints(self.directory / FOLDER)
        kept.save(Checkpoint(number, state, {}, {}), keep=kept.rounds())

    def gather(
        self,
        recipe: Recipe,
        directory: Path,
        memories: Path,
        callbacks: Callback,
        transforms: Sequence[UpdateTransform] = (),
    ) -> Federation:
        """The parties of the run (:func:`~.simulation.simulate`), whose messages are kept."""
        federation = simulate(recipe, directory, memories, callbacks, transforms)
        if recipe.privacy is None or recipe.privacy.place == "server":
            return federation
        return replace(federation, transport=Watched(federation.transport, self._seen))

    def _seen(self, number: int, reply: Reply) -> None:
        if number not in self.rounds or reply.update is None:
            return
        tensors = named(reply.task.tensors, "task/") | named(reply.update.tensors, "update/")
        values = {
            "client": reply.client,
            "clients": list(reply.clients),
            "kind": reply.task.kind,
            "task": values_of(reply.task),
            "update": values_of(reply.update),
        }
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        place = self._count[number] = self._count.get(number, 0) + 1
        room = self._room.get(number, MOST_BYTES) - size
        if room >= 0:
            self._room[number] = room
        content = encode(tensors if room >= 0 else {}, values)
        name = f"{'message' if room >= 0 else MORE}-{place:06d}"
        write_bytes(self.directory / FOLDER / f"messages-{number:06d}" / name, content)


class RecordedRounds:
    """The rounds of a finished private run that a :class:`RoundRecorder` kept, in place of their replay.

    Args:
        directory: The run's.
        seen: Told of each message that was kept, with its round.
        callbacks: Told what is being done.
        transforms: Those that the caller gave the run.

    Raises:
        RunError: the run is not finished, or its clients' data have changed.
    """

    def __init__(
        self,
        directory: Path,
        seen: Seen,
        callbacks: Callback | None = None,
        transforms: Sequence[UpdateTransform] = (),
    ) -> None:
        self.directory, self.seen = directory, seen
        self.recipe = finished_recipe(directory)
        self.rows = {row["round"]: row for row in History.read(directory / "metrics.jsonl").rows}
        self._states = Checkpoints(directory / FOLDER)
        self._scratch = tempfile.TemporaryDirectory(prefix="fedcustom-recorded-")
        try:
            self.federation = copy_of_run(
                directory, self.recipe, Path(self._scratch.name), callbacks or Callback(), transforms
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RecordedRounds:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary directory."""
        self._scratch.cleanup()

    def seconds(self, number: int) -> float:
        """No time: nothing is repeated."""
        return 0.0

    def missing(self, number: int) -> str | None:
        """Why a round cannot be looked at; None where it was kept."""
        wanted = {number} | ({number - 1} if number > 1 else set())
        if wanted <= set(self._states.rounds()):
            return None
        return (
            "the key of a private run's noise is deleted, so that rounds cannot be repeated, and this one "
            "was not kept while the run went; audit its recipe, with another --out"
        )

    def round(self, number: int) -> ReplayedRound:
        """A round that was kept.

        Raises:
            RunError: it was not.
        """
        if (reason := self.missing(number)) is not None:
            raise RunError(f"{self.directory}, round {number}: {reason}")
        for file in sorted((self.directory / FOLDER / f"messages-{number:06d}").glob("message-*")):
            self.seen(number, self._reply(file))
        before = self._state(number - 1) if number > 1 else self.federation.origin
        return ReplayedRound(number, before, self._state(number), checkpoint=True)

    def left_out(self, number: int) -> int:
        """How many messages of a round were too large to keep."""
        return len(list((self.directory / FOLDER / f"messages-{number:06d}").glob(f"{MORE}-*")))

    def _state(self, number: int) -> State:
        return self._states.load(number).state

    def _reply(self, file: Path) -> Reply:
        messages = self.federation.method.messages
        tensors, values = decode(file.read_bytes())
        task = read_task(messages, values["kind"], values["task"], part(tensors, "task/"))
        update = read_update(messages, task, values["update"], part(tensors, "update/"))
        clients = tuple(values.get("clients", ()))
        return Reply(values["client"], task, update, "", "", 0, 0, 0.0, clients=clients)
