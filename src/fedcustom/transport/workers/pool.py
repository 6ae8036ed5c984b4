"""The resident workers of a run: their start, their calls in order, and the replacement of one that dies."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...core.errors import FedcustomError, RunError
from ...core.tensors import Tensors
from .cluster import Cluster
from .messages import ClientAnswer, encode_tensors
from .settings import WorkerSettings

MOST_REPLACED = 3
"""Workers that are replaced in one run; more deaths are no accident."""

PLACED_WITHIN = 600
"""Seconds within which a cluster has to give every worker its place, imports included."""


@dataclass(frozen=True)
class Setup:
    """What workers are made of.

    Args:
        worker: Their class. It takes a number of threads; its ``load`` takes the ``settings`` with the
            device's kind, and returns what it found as JSON; its ``work`` takes a request, clients' memories
            and messages of tensors (:mod:`.messages`) and returns answers; its ``cuts`` says what was cut.
        settings: What each loads, as JSON.
        check: Refuses what a worker found where it is not what the run's process has.
        accelerated: Whether the model lies on an accelerator.
        store: Bytes that Ray's object store should have.
    """

    worker: type
    settings: Mapping[str, Any]
    check: Callable[[Mapping[str, Any]], None]
    accelerated: bool
    store: int


@dataclass(frozen=True)
class Call:
    """A request to one worker: its text, clients' memories, and references of their tasks' tensors. What has
    a ``key`` left something in the worker's process that a later call may need, until a call of the same key.
    """

    clients: tuple[str, ...]
    head: bytes
    memories: list[bytes]
    tensors: list[Any]
    key: Hashable = None


@dataclass
class _Worker:
    actor: Any
    waiting: deque[tuple[Call, Any]] = field(default_factory=deque)
    done: dict[Hashable, Call] = field(default_factory=dict)


class WorkerPool:
    """Workers that do their calls one after another, each the clients' that it is given.

    They start with the first call. One that dies is replaced: the new one repeats what the old one's process
    had to remember, and does the calls that were under way again. ``note`` is told of that,
    ``phase`` of their start. There are no more of them than ``clients``.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        clients: int,
        setup: Setup,
        note: Callable[[str], None],
        phase: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings, self.setup, self.note, self.phase = settings, setup, note, phase
        self.count = min(settings.count or 1, clients)
        self.replaced = 0
        self._cluster: Cluster | None = None
        self._workers: list[_Worker] = []
        self._session: Hashable = None

    # --- calls ---

    def begin(self, session: Hashable) -> None:
        """What follows belongs to this round, or is outside rounds: what workers had to remember of another
        one is of no use any more.
        """
        if session != self._session:
            self._session = session
            for worker in self._workers:
                worker.done.clear()

    def put(self, tensors: Tensors) -> Any:
        """Give tensors to all workers, once; a reference for calls."""
        return self._ray.put(encode_tensors(tensors))

    def submit(self, number: int, call: Call) -> None:
        """Have a worker do a call after those that it has."""
        self._start()
        worker = self._workers[number]
        worker.waiting.append((call, self._called(worker, call)))

    def fetch(self, number: int) -> list[ClientAnswer]:
        """What a worker answered to the first of its calls that has not been fetched; waits for it.

        Raises:
            RunError: workers die again and again.
        """
        worker = self._workers[number]
        while True:
            call, reference = worker.waiting[0]
            try:
                answers = self._got(reference)
            except _Died as death:
                self._replace(number, str(death))
                continue
            worker.waiting.popleft()
            if call.key is not None:
                worker.done.pop(call.key, None)
                worker.done[call.key] = call
            return [ClientAnswer(*answer) for answer in answers]

    def forget(self) -> None:
        """Drop all calls that have not been fetched."""
        for worker in self._workers:
            worker.waiting.clear()

    def cuts(self) -> list[str]:
        """A sentence of each worker on what it cut or left out, if it did."""
        found: list[str] = []
        for worker in self._workers:
            try:
                found += self._got(worker.actor.cuts.remote())
            except _Died:
                continue
        return found

    # --- workers ---

    def close(self) -> None:
        """End all workers, and a cluster that was started for them."""
        cluster, workers = self._cluster, self._workers
        self._cluster, self._workers = None, []
        if cluster is not None:
            for worker in workers:
                _end(cluster.ray, worker.actor)
            cluster.close()

    @property
    def _ray(self) -> Any:
        self._start()
        assert self._cluster is not None
        return self._cluster.ray

    def _start(self) -> None:
        if self._cluster is not None:
            return
        setup = self.setup
        self.phase(f"starting {self.count} workers")
        cluster = Cluster(self.settings, self.count, accelerated=setup.accelerated, store=setup.store)
        self._cluster = cluster
        try:
            for _ in range(self.count):
                self._workers.append(_Worker(self._made(cluster)))
            actors = [worker.actor for worker in self._workers]
            self._wait_for_places(cluster, actors)
            loading = [self._loading(cluster, actor) for actor in actors]
            for found in loading:
                try:
                    setup.check(json.loads(self._got(found)))
                except _Died as death:
                    raise RunError(f"workers: one died while it loaded the model: {death}") from None
        except BaseException:
            self.close()
            raise

    def _made(self, cluster: Cluster) -> Any:
        share = cluster.share
        remote = cluster.ray.remote(self.setup.worker)
        options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_restarts": 0}
        return remote.options(**options).remote(share.threads)

    def _wait_for_places(self, cluster: Cluster, actors: Sequence[Any]) -> None:
        ready = [actor.ready.remote() for actor in actors]
        done, late = cluster.ray.wait(ready, num_returns=len(ready), timeout=PLACED_WITHIN)
        if late:
            raise RunError(
                f"workers.count = {self.count}: {len(late)} of them got no place within {PLACED_WITHIN} "
                "seconds, others use the cluster; ask for fewer, or for less a worker"
            )
        for reference in done:
            try:
                self._got(reference)
            except _Died as death:
                raise RunError(f"workers: one died at its start: {death}") from None

    def _loading(self, cluster: Cluster, actor: Any) -> Any:
        device = "cuda" if cluster.share.gpus else "cpu"
        return actor.load.remote(json.dumps({**self.setup.settings, "device": device}))

    def _replace(self, number: int, reason: str) -> None:
        worker, cluster = self._workers[number], self._cluster
        assert cluster is not None
        again = [name for call, _ in worker.waiting for name in call.clients]
        self.replaced += 1
        if self.replaced > MOST_REPLACED:
            raise RunError(
                f"workers: {self.replaced} died in this run, the last one: {reason}; the rounds are kept: go "
                "on with --resume"
            )
        shown = ", ".join(again[:5]) + (f" and {len(again) - 5} more" if len(again) > 5 else "")
        self.note(
            f"worker {number + 1} of {self.count} died ({reason}); another takes its place and does these "
            f"clients again: {shown}"
        )
        _end(cluster.ray, worker.actor)
        worker.actor = self._made(cluster)
        try:
            self._wait_for_places(cluster, [worker.actor])
            self.setup.check(json.loads(self._got(self._loading(cluster, worker.actor))))
        except _Died as death:
            self._replace(number, str(death))
            return
        for call in worker.done.values():  # what its process is to remember; the answers are there
            self._called(worker, call)
        worker.waiting = deque((call, self._called(worker, call)) for call, _ in worker.waiting)

    def _called(self, worker: _Worker, call: Call) -> Any:
        return worker.actor.work.remote(call.head, call.memories, *call.tensors)

    def _got(self, reference: Any) -> Any:
        """A call's result.

        Raises:
            _Died: its worker, or the node with its result, is gone.
        """
        assert self._cluster is not None
        errors = self._cluster.ray.exceptions
        try:
            return self._cluster.ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, FedcustomError):  # a user can mend it: one line
                raise type(error.cause)(f"at a worker: {error.cause}") from None
            raise
        except (errors.RayActorError, errors.ObjectLostError, errors.NodeDiedError) as error:
            raise _Died(_why(error)) from None


class _Died(Exception):
    """A worker is gone; says why."""


def _why(error: Exception) -> str:
    """Why Ray says that an actor died, in a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "exit" in line.lower() or "killed" in line.lower()]
    return (told or lines or [type(error).__name__])[-1 if told else 0][:200]


def _end(ray: Any, actor: Any) -> None:
    try:
        ray.kill(actor)
    except Exception:  # it is gone, or Ray is
        return
