"""Simulation: all parties of a run in this process; the protocols a run's parties follow."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..core.errors import RecipeError
from ..data.examples import FederatedData
from ..data.many_clients import names_of
from ..data.perturb import perturbed
from ..data.truncation import CutCount
from ..evaluation.metrics import Metrics
from ..methods import Method, State
from ..methods.protocol import HasRemarks
from ..models.load import Base
from ..recipe.recipe import Recipe
from ..simulation.poison import backdoor_probes
from ..transport.channel import Channel
from ..transport.client_store import ClientStore
from ..transport.in_process import InProcessTransport
from ..transport.protocol import Transport, check_visible
from ..transport.summing import SummingTransport
from ..transport.workers.cluster import check_installed
from ..transport.workers.pool import WorkerPool
from ..transport.workers.transport import WorkersTransport
from ..updates.attack import hostile_clients, simulated_attack
from ..updates.pipeline import update_transforms
from ..updates.transform import UpdateTransform
from .base_model import load_for
from .build import check_transforms, make_method, noised_sums, summation
from .callbacks import Callback
from .client_side import damaged, owners, read_data
from .evaluator import Evaluator, Probes, Result
from .example_run import ExampleRun, example_run
from .fingerprint import Fingerprint, of_data
from .private_run import PrivateRun, private_run
from .truncation import fitted_data
from .worker import worker_setup


class Evaluation(Protocol):
    """How good a state is."""

    def development(self, state: State) -> Metrics:
        """Quality on the development split."""

    def scale(self, state: State) -> float:
        """What a classifier's logits are best multiplied by, on the development split."""

    def test(self, state: State) -> Metrics:
        """Quality of one global state on the test split."""

    def final(self, state: State, trained: State | None = None) -> Result:
        """Quality on the test split and on every client's own test part; clients' versions are fine-tuned
        from the state as it was ``trained``, where that is another.
        """


class Memories(Protocol):
    """What clients keep to themselves, wherever that is."""

    def snapshot(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """What a checkpoint holds of it: private numbers, and names of files with private tensors."""

    def restore(self, round_number: int, memories: dict[str, dict[str, Any]], files: dict[str, str]) -> None:
        """Go back to what clients remembered after a round."""

    def saved(self, rounds: Container[int]) -> None:
        """Checkpoints of these rounds are on disk: nothing else may be gone back to."""


@dataclass(frozen=True)
class Federation:
    """A run's parties. ``data`` has what the server knows of the clients' data: in a simulation everything,
    across sites their names alone. ``fingerprint`` is that of the rows as they were read; across sites, of
    the server's own, and None where it has none. ``truncation`` counts what is cut of the data that the
    server knows. ``private`` is there where clients are hidden by noise, ``hidden`` where
    their training rows are. ``close`` ends the processes that were started for it.
    """

    base: Base
    data: FederatedData
    method: Method
    origin: State
    evaluation: Evaluation
    transport: Transport
    memories: Memories
    fingerprint: Fingerprint | None = None
    truncation: dict[str, CutCount] = field(default_factory=dict)
    private: PrivateRun | None = None
    hidden: ExampleRun | None = None
    close: Callable[[], None] = lambda: None


Gather = Callable[[Recipe, Path, Path, Callback, Sequence[UpdateTransform]], Federation]
"""From a recipe, the run's directory, its folder for clients' private tensors, something that is told how
this goes, and the caller's transforms of updates, to the run's parties."""


@contextmanager
def gathered(
    gather: Gather,
    recipe: Recipe,
    directory: Path,
    memories: Path,
    callbacks: Callback,
    transforms: Sequence[UpdateTransform] = (),
) -> Iterator[Federation]:
    """A run's parties; the processes that were started for them end with this context.

    Nothing here refers to the parties in the meantime: who is done with them frees their memory.
    """
    parties = [gather(recipe, directory, memories, callbacks, transforms)]
    close = parties[0].close
    try:
        yield parties.pop()
    finally:
        close()


def simulate(
    recipe: Recipe,
    directory: Path,
    memories: Path,
    callbacks: Callback,
    transforms: Sequence[UpdateTransform] = (),
) -> Federation:
    """All parties in this process, on one resident base model. ``transforms`` act on updates after the
    simulated attack and before compression (:mod:`fedcustom.updates.transform`).

    Raises:
        RecipeError, DataError, ModelError: what the recipe names does not exist or does not fit together, or
            something would pass by a transform that may not be skipped.
    """
    if transforms and recipe.baseline != "federated":
        raise RecipeError(f"baseline = {recipe.baseline!r}: transforms of updates need 'federated'")
    callbacks.on_phase("reading the data")
    workers = recipe.workers if recipe.workers is not None and recipe.workers.count is not None else None
    if workers is not None:
        check_installed()
    read = read_data(recipe)
    settings, data = read.settings, read.data
    private = private_run(recipe.settled(len(data.clients)), len(data.clients), directory)
    rows = of_data(recipe, data)
    callbacks.on_phase(f"loading {recipe.model.base}")
    base = load_for(recipe, data.task, directory)
    data, truncation = fitted_data(recipe, settings, base, data)
    hidden = example_run(recipe, data)
    hostile = hostile_clients(names_of(data.clients), recipe.attack, recipe.seed)
    attack = simulated_attack(hostile, recipe.attack, recipe.seed)
    applied = update_transforms(recipe.compression, attack, transforms)
    noise = (private.release, private.own_noise) if private is not None else (None, None)
    method = make_method(recipe, base, data, applied, *noise)
    check_transforms(transforms, recipe, method)
    probes = _probes(recipe, data)
    data = damaged(recipe, data)
    store = ClientStore(owners(recipe, data), memories, directory / "clients")
    evaluator = Evaluator(
        method,
        base,
        data,
        store,
        recipe.evaluation,
        own=not has_one_model(recipe),
        whole=recipe.method.is_whole,
        finetune_epochs=recipe.personalisation.finetune_epochs if recipe.baseline == "federated" else 0,
        probes=probes,
    )
    for remark in method.remarks() if isinstance(method, HasRemarks) else []:
        callbacks.on_note(remark)
    origin = method.initialise()
    channel = Channel(recipe.compression, origin.tensors)
    ending = ExitStack()
    transport: Transport
    if workers is not None and len(store.data) > 1:  # one client is one process's work
        setup = worker_setup(recipe, base, origin, rows, private, directory)
        pool = WorkerPool(workers, len(store.data), setup, callbacks.on_note, callbacks.on_phase)
        ending.callback(pool.close)
        transport = WorkersTransport(method, store, channel, pool, applied, callbacks.on_note)
    else:
        transport = InProcessTransport(method, store, channel, applied, callbacks.on_note)
    mechanism, keys = (private.mechanism, private.client_key) if private is not None else (None, None)
    summed = summation(recipe, method, len(data.clients), lambda: noised_sums(method, mechanism, keys))
    if summed is not None:
        transport = SummingTransport(transport, summed)
    check_visible(transport, applied, recipe.aggregation)
    return Federation(
        base,
        data,
        method,
        origin,
        evaluator,
        transport,
        store,
        rows,
        truncation,
        private,
        hidden,
        ending.close,
    )


def _probes(recipe: Recipe, data: FederatedData) -> Probes:
    """The further test sets that the recipe asks for."""
    settings = recipe.evaluation
    return {
        "perturbed": {
            kind: perturbed(data.test, kind, settings.perturb_rate, [recipe.seed, 15])
            for kind in settings.perturb
        },
        "backdoor": backdoor_probes(data.test, recipe.attack, data.task.labels),
    }


def has_one_model(recipe: Recipe) -> bool:
    """Whether the run ends with one model, and not with one for each client alone."""
    return recipe.baseline != "local" and recipe.method.has_server_model
