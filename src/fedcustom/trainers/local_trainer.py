"""Local training by a ``transformers.Trainer``, from the tensors of the server and back to tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.errors import RunError, UpdateError
from ..core.files import write_tensors
from ..core.seeds import name_seed
from ..core.tensors import Tensors
from ..evaluation.metrics import Metrics

FOR_A_ROUND: Mapping[str, Any] = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
}
"""Arguments while a client trains: the loop evaluates and writes checkpoints, once for all clients."""

NO_SCORES = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
"""What ``evaluate()`` gives beside scores."""


@dataclass(frozen=True)
class Trained:
    """A client's tensors after training, the mean loss over its steps, the number of optimiser steps, and how
    many examples they saw.
    """

    tensors: Tensors
    loss: float
    steps: int
    examples: int


class LocalTrainer:
    """The Trainer of a federation: one model in which every client trains in turn.

    Args:
        trainer: A ``transformers.Trainer``, or a function that makes one for a client's dataset, always with
            the same model.
        clients: The dataset of each client.

    Raises:
        RunError: the Trainer has something that does not go with rounds; the message names it.
    """

    def __init__(self, trainer: Any, clients: Mapping[str, Any]) -> None:
        _check_clients(clients)
        self.clients = dict(clients)
        self.sizes = {name: len(dataset) for name, dataset in clients.items()}
        if not hasattr(trainer, "train"):
            self._trainers = _made(trainer, clients)
            trainer = next(iter(self._trainers.values()))
        else:
            self._trainers = {}  # one for all
            if hasattr(trainer, "_prepare_dataset"):
                _check_prepared(trainer, clients)
        _check_trainer(trainer)
        self.trainer = trainer
        self.trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise RunError("federate: trainer: no parameter of its model is trained (requires_grad)")

    @property
    def name(self) -> str:
        """The model's name or folder; else its class."""
        configured = getattr(getattr(self.trainer.model, "config", None), "_name_or_path", "")
        return str(configured or type(self.trainer.model).__name__)

    def read(self) -> Tensors:
        """A copy of the trained tensors, in main memory."""
        return {
            name: parameter.detach().to("cpu", copy=True).contiguous()
            for name, parameter in self.trained.items()
        }

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put trained tensors into the model."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[name])

    def train(
        self, client: str, tensors: Mapping[str, torch.Tensor], seed: int, round_number: int
    ) -> Trained:
        """Train from ``tensors`` on a client's data, with a fresh optimiser and schedule, for as long as the
        Trainer's arguments say. Random numbers are a function of seed, round and client.

        Raises:
            UpdateError: it made no step.
        """
        from transformers import set_seed

        trainer = self._of(client)
        self.write(tensors)
        drawn = np.random.SeedSequence([seed, 21, round_number, name_seed(client)]).generate_state(1)
        set_seed(int(drawn[0]))
        try:
            with _arguments(trainer.args, FOR_A_ROUND):
                output = trainer.train()
        finally:
            trainer.optimizer = trainer.lr_scheduler = None
        if output.global_step < 1:
            raise UpdateError(f"the Trainer made no step on {self.sizes[client]} rows")
        epochs = float(output.metrics.get("epoch", 1.0))
        examples = max(1, round(epochs * len(trainer.train_dataset)))
        return Trained(self.read(), float(output.training_loss), int(output.global_step), examples)

    def evaluate(self, tensors: Mapping[str, torch.Tensor]) -> Metrics:
        """The scores of ``evaluate()`` with these tensors, without the prefix ``eval_``.

        Raises:
            RunError: there is no finite ``eval_loss``.
        """
        self.write(tensors)
        found = {key.removeprefix("eval_"): value for key, value in self.trainer.evaluate().items()}
        scores = {
            key: float(value)
            for key, value in found.items()
            if key not in NO_SCORES and isinstance(value, int | float) and math.isfinite(value)
        }
        if "loss" not in scores:
            said = ", ".join(f"{key} = {value}" for key, value in found.items() if key not in NO_SCORES)
            raise RunError(
                f"federate: trainer.evaluate() gave no finite eval_loss, by which rounds are compared "
                f"({said}); it needs one eval_dataset with labels"
            )
        return scores

    def save(self, folder: Path) -> None:
        """Write the model as it is: an adapter, a whole model, or the trained tensors alone where the model
        cannot write itself; with its tokenizer. (``Trainer.save_model`` would add a pickled file.)
        """
        model = self.trainer.model
        if not hasattr(model, "save_pretrained"):
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / "trained.safetensors", self.read())
            return
        model.save_pretrained(folder)
        if hasattr(self.trainer.processing_class, "save_pretrained"):
            self.trainer.processing_class.save_pretrained(folder)

    def _of(self, client: str) -> Any:
        """The Trainer with a client's dataset."""
        if client in self._trainers:
            return self._trainers[client]
        self.trainer.train_dataset = self.clients[client]
        return self.trainer


@contextlib.contextmanager
def _arguments(arguments: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Arguments of a Trainer, changed for a while."""
    before = {name: getattr(arguments, name) for name in values}
    try:
        for name, value in values.items():
            setattr(arguments, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(arguments, name, value)


def _check_clients(clients: Mapping[str, Any]) -> None:
    if not isinstance(clients, Mapping) or not clients:
        raise RunError("federate: clients: give a dict from the name of each client to its dataset")
    for name, dataset in clients.items():
        if not isinstance(name, str) or not name:
            raise RunError(f"federate: clients: {name!r} is no name; names are texts")
        if not hasattr(dataset, "__len__"):
            raise RunError(f"federate: clients: {name}: a dataset without a length has no weight in a mean")
        if len(dataset) == 0:
            raise RunError(f"federate: clients: {name}: has no rows")


def _made(make: Any, clients: Mapping[str, Any]) -> dict[str, Any]:
    """The Trainer of each client, all of them with one model."""
    if not callable(make):
        raise RunError(
            f"federate: trainer is {type(make).__name__}; give a transformers.Trainer, or a function that "
            "makes one for a dataset"
        )
    found: dict[str, Any] = {}
    for name, dataset in clients.items():
        made = make(dataset)
        if not hasattr(made, "train"):
            raise RunError(f"federate: trainer: the function gave {type(made).__name__}, not a Trainer")
        if found and made.model is not next(iter(found.values())).model:
            raise RunError(
                "federate: trainer: the function makes another model for each client; make model and adapter "
                "once, outside of the function"
            )
        found[name] = made
    return found


def _check_prepared(trainer: Any, clients: Mapping[str, Any]) -> None:
    """TRL's trainers turn rows into tokens when they are made, and so only the dataset given then."""
    for name, dataset in clients.items():
        columns = getattr(dataset, "column_names", None)
        if columns is not None and "input_ids" not in columns:
            raise RunError(
                f"federate: clients: {name}: has no column input_ids, and {type(trainer).__name__} prepares "
                "its dataset only when it is made; give a function from a dataset to a trainer in its place"
            )


def _check_trainer(trainer: Any) -> None:
    """Refuse what does not go with rounds."""
    if trainer.optimizer is not None or trainer.lr_scheduler is not None:
        raise RunError(
            "federate: trainer: has an optimizer or a scheduler already, and each client needs a fresh one "
            "in each round; make a new Trainer, with optimizer_cls_and_kwargs or arguments (optim) in place "
            "of optimizers"
        )
    if trainer.model_init is not None:
        raise RunError("federate: trainer: model_init makes the model anew in each round; give it a model")
    if trainer.eval_dataset is None:
        raise RunError("federate: trainer: has no eval_dataset; a round's score is its evaluate()")
    if trainer.args.world_size > 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise RunError("federate: trainer: runs in several processes; one process is needed")
