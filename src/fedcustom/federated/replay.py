"""Replay: rounds of a finished run once more, from its checkpoints, checked against what the run recorded."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core.errors import RunError
from ..core.files import read_json
from ..core.tensors import Tensors
from ..methods import State, Task
from ..recipe import Recipe, recorded_recipe
from ..recipe.paths import absolute
from ..transport.protocol import Reply, Transport
from ..updates.identity import identity_of, in_words
from ..updates.transform import UpdateTransform
from . import fingerprint
from .base_model import ENVIRONMENT
from .callbacks import Callback, Callbacks
from .loop import FedAvg
from .private_run import RECORD
from .run_directory import TRANSFORMS, Checkpoints, History, Row, RunDirectory
from .simulation import Federation, simulate

UNREPEATED = ("seconds", "peak_memory_bytes")
"""What a round's row has that no second run of it repeats."""

Seen = Callable[[int, Reply], None]
"""Told of each reply as the server gets it, with its round."""


@dataclass(frozen=True)
class ReplayedRound:
    """A round once more: the states before and after it, and how it was checked.

    ``checkpoint`` is whether the state after it equals the run's own checkpoint of that round bit by bit;
    where there is none of that round, its figures alone (cohort, losses, norms, bytes, scores) were compared.
    """

    number: int
    before: State
    after: State
    checkpoint: bool


class Watched:
    """A transport that shows each reply on its way to the server; it changes none."""

    def __init__(self, transport: Transport, seen: Seen) -> None:
        self.transport, self.seen = transport, seen

    def exchange(
        self, tasks: Mapping[str, Task], round_number: int, absent: Container[str] = ()
    ) -> Iterator[Reply]:
        """The replies of the transport, in its order."""
        for reply in self.transport.exchange(tasks, round_number, absent):
            self.seen(round_number, reply)
            yield reply
            del reply  # before the next one comes


class Replay:
    """A finished run, repeated in this process from its directory, which stays as it is.

    Rounds go through the loop of the run itself (:class:`~.loop.FedAvg`), in a temporary directory that holds
    a copy of the checkpoint from which they go on. Each is compared with what the run recorded. ``origin`` is
    the first state. Once an error has ``stopped`` a round, no other one can be repeated.

    Args:
        directory: A finished run's directory.
        seen: Told of each reply as the server gets it, after compression and all transforms.
        callbacks: Told what is being done.
        transforms: Those that the caller gave the run.

    Raises:
        RunError: the run cannot be repeated here: it is not finished, its clients' data lie elsewhere or have
            changed, or it had other transforms.
    """

    def __init__(
        self,
        directory: Path,
        seen: Seen,
        callbacks: Callback | None = None,
        transforms: Sequence[UpdateTransform] = (),
    ) -> None:
        self.source = RunDirectory(directory)
        self.recipe = finished_recipe(directory)
        _check_transforms(directory, transforms)
        self.rows = {row["round"]: row for row in History.read(directory / "metrics.jsonl").rows}
        self.seen, self.transforms = seen, transforms
        self._pace, self.stopped = 1.0, False
        self.callbacks = Callbacks([callbacks] if callbacks is not None else [])
        self._scratch = tempfile.TemporaryDirectory(prefix="fedcustom-replay-")
        self._ending = ExitStack()
        try:
            self._loop, self.done = self._begin(0)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary directory, in which are clients' private tensors, and end what was started."""
        self._ending.close()
        self._scratch.cleanup()

    @property
    def federation(self) -> Federation:
        """The run's parties."""
        return self._loop.federation

    def seconds(self, number: int) -> float:
        """How long the rounds up to this one took when the run was made, from where the replay goes on; times
        as much as those that were repeated so far took longer than then.
        """
        return self._pace * self._recorded(range(self._start_for(number) + 1, number + 1))

    def _recorded(self, numbers: range) -> float:
        return sum(sum(self.rows.get(n, {}).get("seconds", {}).values()) for n in numbers)

    def round(self, number: int) -> ReplayedRound:
        """Go on to a round, from the newest checkpoint before it where that saves rounds, and repeat it. The
        rounds on the way are repeated and checked too.

        Raises:
            RunError: a round gives other figures or tensors than the run recorded.
            ValueError: the round lies behind.
        """
        if not self.done < number <= self.recipe.rounds.count:
            raise ValueError(f"round {number}: {self.done} are done, {self.recipe.rounds.count} there are")
        start = self._start_for(number)
        if start > self.done:
            self._loop, self.done = self._begin(start)
        began, first = time.perf_counter(), self.done + 1
        self.stopped = True  # as long as it is not known to be whole
        with _threads(self.source.path):
            while self.done < number:
                result = self._next()
        self.stopped = False
        self._pace = (time.perf_counter() - began) / max(self._recorded(range(first, number + 1)), 1e-3)
        return result

    def _start_for(self, number: int) -> int:
        """After which round to go on to repeat this one."""
        known = [n for n in self.source.checkpoints.rounds() if n < number]
        return max([self.done, *known])

    def _next(self) -> ReplayedRound:
        """The next round, checked."""
        loop, number = self._loop, self.done + 1
        loop.search_learning_rate(number)
        before = loop.states[number - 1]
        row = loop.round(number)
        loop.end_round(number, row)
        self.callbacks.raise_failure()
        after, self.done = loop.states[number], number
        self._compare(number, row)
        exact = number in self.source.checkpoints.rounds()
        if exact and (found := difference(self.source.checkpoints.load(number).state, after)):
            raise RunError(
                f"{self.source.path}: cannot be replayed: after round {number} {found}; the code, the "
                "libraries or the machine are others than the run's (environment.json); audit its recipe anew"
            )
        return ReplayedRound(number, before, after, exact)

    def _begin(self, start: int) -> tuple[FedAvg, int]:
        """The loop after a round of which there is a checkpoint, or at the beginning."""
        place = RunDirectory(Path(self._scratch.name) / f"from-{start}")
        place.path.mkdir()
        if start:
            shutil.copytree(self.source.checkpoints.folder, place.checkpoints.folder)
            for later in [n for n in place.checkpoints.rounds() if n > start]:
                shutil.rmtree(place.checkpoints.folder / f"round-{later:06d}")
            shutil.copy(self.source.history.path, place.history.path)
        with _threads(self.source.path):
            federation = copy_of_run(
                self.source.path, self.recipe, place.path, self.callbacks, self.transforms
            )
            self._ending.close()
            self._ending.callback(federation.close)
            watched = replace(federation, transport=Watched(federation.transport, self.seen))
            # The untuned model's scores decide nothing in a round.
            quick = self.recipe.evaluation.model_copy(update={"untuned": False})
            recipe = self.recipe.model_copy(update={"evaluation": quick})
            self.origin = federation.origin
            loop = FedAvg(recipe, watched, place, self.callbacks)
            return loop, loop.resume()

    def _compare(self, number: int, row: Row) -> None:
        """Refuse a round whose figures are not those that were recorded."""
        recorded = {k: v for k, v in self.rows.get(number, {}).items() if k not in UNREPEATED}
        found = {k: v for k, v in json.loads(json.dumps(row)).items() if k not in UNREPEATED}
        if recorded == found:
            return
        key = next(k for k in [*recorded, *found] if recorded.get(k) != found.get(k))
        said = f"{_short(recorded.get(key))} there, {_short(found.get(key))} here"
        raise RunError(
            f"{self.source.path}: cannot be replayed: round {number} has another {key} ({said}); the code, "
            "the libraries or the machine are others than the run's (environment.json); audit its recipe anew"
        )


def copy_of_run(
    directory: Path,
    recipe: Recipe,
    place: Path,
    callbacks: Callback,
    transforms: Sequence[UpdateTransform] = (),
) -> Federation:
    """The parties of a run of ``directory`` once more, with a folder ``place`` of their own. Where the run is
    private, they have its mechanism as it was recorded, and another key, unless that is the seed's.

    Raises:
        RunError: the clients' data have changed.
    """
    for name in ("search.json", RECORD, ENVIRONMENT):
        if (directory / name).exists():
            shutil.copy(directory / name, place)
    federation = simulate(recipe, place, Checkpoints(place / "checkpoints").clients, callbacks, transforms)
    if federation.fingerprint:
        _check_rows(directory, federation.fingerprint)
    return federation


def finished_recipe(directory: Path) -> Recipe:
    """The complete recipe of a finished run, made in one process, whose clients send updates.

    Raises:
        RunError: the directory holds none.
    """
    if not directory.is_dir():
        raise RunError(f"{directory}: no such folder; name a run's directory")
    if not (directory / "recipe.toml").exists():
        raise RunError(f"{directory}: holds no run (no recipe.toml)")
    if not (directory / "summary.json").exists():
        raise RunError(f"{directory}: the run is not finished; go on with fedcustom run --resume")
    recipe = absolute(recorded_recipe(directory / "recipe.toml"))
    if recipe.baseline != "federated":
        raise RunError(f"{directory}: a {recipe.baseline} baseline: its clients send nothing")
    file = directory / fingerprint.FILE
    if not file.exists() or not read_json(file).get("clients"):
        raise RunError(
            f"{directory}: has no record of its clients' rows (a deployed run, whose rows lie with the "
            "sites, or one of an earlier version); run its recipe in one process to replay it"
        )
    return recipe


def difference(recorded: State, found: State) -> str | None:
    """The first difference of two states in words; None where all tensors are equal, bit by bit."""
    for old, new in ((recorded.tensors, found.tensors), (recorded.server, found.server)):
        if text := _tensor_difference(old, new):
            return text
    return None


def _tensor_difference(old: Tensors, new: Tensors) -> str | None:
    if old.keys() != new.keys():
        return f"the tensor {min(old.keys() ^ new.keys())} is in one of both states only"
    for name, tensor in old.items():
        other = new[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return f"{name} has another form"
        if not torch.equal(tensor.cpu(), other.cpu()):
            most = float((tensor.double() - other.double()).abs().max())
            return f"{name} differs by up to {most:.3g}"
    return None


def _check_rows(directory: Path, rows: fingerprint.Fingerprint) -> None:
    """Refuse data that are not those of the run."""
    try:
        fingerprint.check(directory, rows, accept=False)
    except RunError as error:
        reason = str(error).partition("not those of this run: ")[2].partition(";")[0]
        raise RunError(f"{directory}: cannot be replayed: the data have changed: {reason}") from None


def _check_transforms(directory: Path, transforms: Sequence[UpdateTransform]) -> None:
    """Refuse other transforms than the run had."""
    file = directory / TRANSFORMS
    recorded = read_json(file) if file.exists() else []
    given = [identity_of(transform) for transform in transforms]
    if recorded != given:
        raise RunError(
            f"{directory}: cannot be replayed: it had transforms of updates ({in_words(recorded)} there, "
            f"{in_words(given)} here), which its directory does not hold; replay it from Python with them"
        )


@contextmanager
def _threads(directory: Path) -> Iterator[None]:
    """Meanwhile, as many threads as the run had, since the order of sums depends on them."""
    file, before = directory / "environment.json", torch.get_num_threads()
    recorded = read_json(file).get("threads") if file.exists() else None
    if isinstance(recorded, int) and 1 <= recorded <= 1024:
        torch.set_num_threads(recorded)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"
