"""``fedcustom.federate``: federated rounds in which a user's own Trainer trains each client."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core import environment
from ..core.errors import RunError
from ..core.files import read_json, write_folder, write_json
from ..data.examples import ClientData, FederatedData, LearningTask
from ..federated.callbacks import Callback, Callbacks
from ..federated.history_frames import client_frame, round_frame
from ..federated.loop import FedAvg
from ..federated.run_directory import LOCK, History, RunDirectory
from ..federated.simulation import Federation
from ..federated.summary import summarise
from ..methods.protocol import State
from ..models.load import Base
from ..recipe.recipe import Recipe
from ..transport.channel import Channel
from ..transport.client_store import ClientStore
from ..transport.in_process import InProcessTransport
from .evaluation import TrainerEvaluation
from .local_trainer import LocalTrainer
from .method import TrainerMethod
from .settings import loop_settings

if TYPE_CHECKING:
    import pandas as pd

FEDERATION = "federation.json"
"""The file that says what a run is of; a run that is resumed must be of the same."""

ARGUMENTS = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "weight_decay", "warmup_steps", "max_grad_norm", "data_seed",
)  # fmt: skip
"""Arguments of a Trainer that a run which is resumed must share, beside optimiser and scheduler."""


@dataclass(frozen=True)
class FederatedTrainer:
    """A finished federation of a Trainer.

    Attributes:
        directory: The run directory (docs/run_directory.md), with the model in ``model/``.
        summary: The content of ``summary.json``; ``metrics`` are scores on the Trainer's ``eval_dataset``.
    """

    directory: Path
    summary: dict[str, Any]

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return History.read(self.directory / "metrics.jsonl").rows

    @property
    def history(self) -> pd.DataFrame:
        """One row a round (:attr:`fedcustom.Run.history`)."""
        return round_frame(self._rows)

    @property
    def client_history(self) -> pd.DataFrame:
        """One row for each client that was asked in a round (:attr:`fedcustom.Run.client_history`)."""
        return client_frame(self._rows)


def federate(
    trainer: Any,
    *,
    clients: Mapping[str, Any],
    rounds: int = 10,
    clients_per_round: int | None = None,
    weighting: Literal["examples", "uniform"] = "examples",
    aggregation: str | Mapping[str, Any] = "mean",
    select: Literal["best", "last"] = "best",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> FederatedTrainer:
    """Train a ``transformers.Trainer``'s model in federated rounds, each client with its own dataset.

    In each round the Trainer trains every client of the cohort from the server's state, with a fresh
    optimiser and learning-rate schedule, for ``max_steps`` or ``num_train_epochs`` of its arguments, and with
    its own collator, loss and callbacks. What travels are the parameters that require gradients: the adapter
    of a PEFT model, all weights of a plain one. The score of a round is the Trainer's ``evaluate()`` on its
    ``eval_dataset``. Afterwards the Trainer's model holds the state of the best round.

    All clients live in this process. Each sends the change of the trained parameters, its number of rows, its
    mean training loss and its numbers of steps and examples.

    Examples:
        >>> trainer = transformers.Trainer(model, arguments, data_collator=collate, eval_dataset=held_out)
        >>> result = fedcustom.federate(trainer, clients={"a": data_a, "b": data_b}, rounds=5, out="runs/own")
        >>> result.summary["metrics"]["loss"], result.history

    Args:
        trainer: The Trainer, or a function that makes one for a client's dataset. TRL's trainers need the
            function: they turn rows into tokens when they are made. It must use one model for all.
        clients: The dataset of each client by its name, as the Trainer takes it for training.
        rounds: How many rounds.
        clients_per_round: Clients drawn for each round; None: all of them, but 50 where there are more.
        weighting: A client's weight in the mean: its number of rows, or one.
        aggregation: The name of a rule (``mean``, ``fednova``, ``median``, ``trimmed_mean``, ``krum``,
            ``multi_krum``, ``geometric_median``, ``norm_bounding``, ``centred_clipping``, or that of a
            plug-in), or a dict of settings of the recipe's section ``[aggregation]``.
        select: Which round's state is kept: the one with the least ``eval_loss``, or the last.
        seed: Seed of cohorts, and of random numbers in local training; global generators are seeded anew
            before each client.
        out: The run directory; None: ``runs/trainer-seed-<seed>``. One that holds this run, finished, is
            left as it is.
        resume: Go on with a run in ``out`` that was stopped, from its last round.
        callbacks: Told of every event of the run (:class:`fedcustom.Callback`).

    Raises:
        RecipeError: a setting is impossible; the message names it.
        RunError: the Trainer has something that does not go with rounds, ``out`` holds something else, or no
            client answered in a round.
    """
    local = LocalTrainer(trainer, clients)
    arguments = local.trainer.args
    recipe = loop_settings(
        arguments,
        local.name,
        rounds=rounds,
        clients=len(local.clients),
        clients_per_round=clients_per_round,
        weighting=weighting,
        seed=seed,
        aggregation=aggregation,
        select=select,
    )
    directory = RunDirectory(Path(out) if out is not None else Path("runs") / f"trainer-seed-{seed}")
    told = Callbacks(callbacks)
    described = _described(recipe, local)
    with _locked(directory, described, resume=resume) as finished:
        if finished is not None:
            told.on_note(f"{directory.path} holds this run already; nothing to do")
            local.write(directory.checkpoints.load(finished["best_round"]).state.tensors)
        else:
            finished = _run(recipe, local, directory, told)
    told.on_phase("")
    told.raise_failure()
    return FederatedTrainer(directory.path, finished)


def _run(
    recipe: Recipe, local: LocalTrainer, directory: RunDirectory, callbacks: Callbacks
) -> dict[str, Any]:
    """From the last checkpoint, or from the beginning, to the summary."""
    started = time.perf_counter()
    environment.restart_peak_memory()
    federation = _federation(recipe, local, directory, callbacks)
    loop = FedAvg(recipe, federation, directory, callbacks)
    loop.run()
    finishing = time.perf_counter()
    callbacks.on_phase("evaluating the best round")
    best = directory.best_round(recipe)
    checkpoint = directory.checkpoints.load(best)
    result = federation.evaluation.final(checkpoint.state)
    callbacks.on_phase("writing the model")
    write_folder(directory.path / "model", lambda folder: federation.method.export(checkpoint.state, folder))
    summary = summarise(
        recipe,
        federation.data,
        result,
        directory.history.rows,
        best=best,
        sizes=federation.method.sizes(checkpoint.state),
        untuned=checkpoint.untuned,
        elapsed=finishing - started,
        finishing=time.perf_counter() - finishing,
        temperature=None,
        truncation={},
    )
    summary |= {"task": "trainer", "scored_on": "eval_dataset"}
    write_json(directory.path / "summary.json", summary)
    callbacks.on_run_end(summary)
    return summary


def _federation(
    recipe: Recipe, local: LocalTrainer, directory: RunDirectory, callbacks: Callbacks
) -> Federation:
    """The run's parties, all of them in this process. The datasets stay with the Trainer."""
    trainer, task = local.trainer, LearningTask("generation")
    base = Base(
        model=trainer.model,
        tokenizer=trainer.processing_class,
        architecture="decoder",
        task=task,
        name=local.name,
        path=local.name,
        head=(),
        precision="float32",
        device=trainer.args.device,
    )
    method = TrainerMethod(local, recipe.aggregation, recipe.seed)
    owners = {name: ClientData(name, []) for name in local.clients}
    store = ClientStore(owners, directory.checkpoints.clients)
    origin = method.initialise()
    transport = InProcessTransport(
        method, store, Channel(recipe.compression, origin.tensors), (), callbacks.on_note
    )
    data = FederatedData(task, owners, [], [], test_is_pooled=False)
    return Federation(base, data, method, State(origin.tensors), TrainerEvaluation(local), transport, store)


def _described(recipe: Recipe, local: LocalTrainer) -> dict[str, Any]:
    """What makes a run the same run."""
    arguments = local.trainer.args
    return {
        "trainer": type(local.trainer).__name__,
        "model": local.name,
        "trained": {name: list(parameter.shape) for name, parameter in local.trained.items()},
        "arguments": {
            **{name: getattr(arguments, name, None) for name in ARGUMENTS},
            "optim": str(getattr(arguments.optim, "value", arguments.optim)),
            "lr_scheduler_type": str(
                getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
            ),
        },
        "clients": dict(local.sizes),
        "seed": recipe.seed,
        "rounds": recipe.rounds.model_dump(exclude_none=True),
        "aggregation": recipe.aggregation.model_dump(exclude_none=True),
        "select": recipe.evaluation.select,
    }


@contextlib.contextmanager
def _locked(
    directory: RunDirectory, described: Mapping[str, Any], *, resume: bool
) -> Iterator[dict[str, Any] | None]:
    """Hold the directory, described on first use; gives the summary of a finished run that it holds.

    Raises:
        RunError: it holds another run, an unfinished one without ``resume``, or other files.
    """
    path, file = directory.path, directory.path / FEDERATION
    if path.exists() and not path.is_dir():
        raise RunError(f"{path}: is a file; name a folder")
    if not file.exists() and path.exists() and any(found.name != LOCK for found in path.iterdir()):
        raise RunError(f"{path}: is not empty and holds no run of a Trainer; name another folder (out)")
    with directory.locked():
        finished = None
        if file.exists():
            begun = read_json(file)
            if different := [key for key in described if begun.get(key) != described[key]]:
                raise RunError(f"{path}: holds another run ({', '.join(different)} differ); name another out")
            if (path / "summary.json").exists():
                finished = read_json(path / "summary.json")
            elif not resume:
                raise RunError(
                    f"{path}: holds an unfinished run; go on with resume=True, or name another out"
                )
        else:
            found = {**environment.describe(), "started": datetime.now(UTC).isoformat(timespec="seconds")}
            write_json(path / "environment.json", found)
            write_json(file, dict(described))
        yield finished
