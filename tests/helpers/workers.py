"""Runs with workers: in a stand-in of Ray that does everything in this process, or in Ray itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import fedcustom
from helpers.runs import tensors_of

with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'fedcustom[ray]'"
)


class Died(Exception):
    """Ray's error of an actor that is gone."""


class TaskError(Exception):
    """Ray's error of an actor whose method raised; ``cause`` is what it raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"in a task: {cause}")
        self.cause = cause


@dataclass
class Reference:
    """The result of a call, or the error."""

    value: Any = None
    error: Exception | None = None


@dataclass
class StandIn:
    """What :mod:`fedcustom.transport.workers` uses of Ray, in this process. Calls are done when they are
    made.

    Args:
        dies: Of each actor, by its place from 0, before which of its calls to work it dies (from 1).
        cpus: Of the cluster.
    """

    dies: dict[int, int] = field(default_factory=dict)
    cpus: int = 64
    made: list[Any] = field(default_factory=list)
    calls: list[tuple[int, str]] = field(default_factory=list)
    puts: int = 0
    exceptions: ClassVar[Any] = SimpleNamespace(
        RayTaskError=TaskError, RayActorError=Died, ObjectLostError=Died, NodeDiedError=Died
    )

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def remote(self, actor: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *a: self._made(actor(*a))))

    def _made(self, inner: Any) -> _Actor:
        self.made.append(inner)
        return _Actor(self, inner, len(self.made) - 1)

    def put(self, value: Any) -> Reference:
        self.puts += 1
        return Reference(value)

    def get(self, reference: Reference) -> Any:
        if reference.error is not None:
            raise reference.error
        return reference.value

    def wait(self, references: Sequence[Any], **_: Any) -> tuple[Sequence[Any], list[Any]]:
        return references, []

    def kill(self, actor: Any) -> None:
        actor.dead = True


@dataclass
class _Actor:
    ray: StandIn
    inner: Any
    place: int
    dead: bool = False
    worked: int = 0

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self._called(name, arguments))

    def _called(self, name: str, arguments: Sequence[Any]) -> Reference:
        if name == "work":
            self.worked += 1
            self.dead = self.dead or self.worked == self.ray.dies.get(self.place)
        if self.dead:
            return Reference(error=Died("The actor is dead.\nworker exited with signal 9"))
        self.ray.calls.append((self.place, name))
        given = [one.value if isinstance(one, Reference) else one for one in arguments]
        try:
            return Reference(getattr(self.inner, name)(*given))
        except Exception as error:
            return Reference(error=TaskError(error))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """In place of Ray, a stand-in that is there already."""
    ray = StandIn()
    monkeypatch.setattr("fedcustom.transport.workers.cluster.library", lambda: ray)
    monkeypatch.setattr("fedcustom.federated.simulation.check_installed", lambda: None)
    return ray


def with_workers(recipe: Mapping[str, Any], count: int = 2, **settings: Any) -> dict[str, Any]:
    """The recipe with so many workers of one core and thread each."""
    return {**recipe, "workers": {"count": count, "cpus": 1, "threads": 1, **settings}}


def run_both(
    recipe: Mapping[str, Any], folder: Path, arguments: Callable[[], dict[str, Any]] = dict
) -> tuple[Path, Path]:
    """The directories of a recipe's run in one process and of that with two workers, with the same further
    ``arguments``, made anew for each.
    """
    fedcustom.run(dict(recipe), out=folder / "alone", **arguments())
    fedcustom.run(with_workers(recipe), out=folder / "workers", **arguments())
    return folder / "alone", folder / "workers"


def gap(one: Path, other: Path) -> float:
    """The largest difference between the tensors of two exported models."""
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    return max(float((first[n].double() - second[n].double()).abs().max()) for n in first)


def are_equal(one: Path, other: Path) -> bool:
    """Whether two exported models are the same, bit by bit."""
    first, second = tensors_of(one), tensors_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
