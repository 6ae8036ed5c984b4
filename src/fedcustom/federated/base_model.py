"""The base model that a recipe names, loaded as a run uses it."""

from __future__ import annotations

from pathlib import Path

from ..core.files import read_json
from ..data.examples import LearningTask
from ..models.load import Base, load_base
from ..models.precision import BOTH, Precision
from ..recipe.recipe import Recipe

ENVIRONMENT = "environment.json"
"""The file of a run's directory that says in which precision it was begun."""


def load_for(recipe: Recipe, task: LearningTask, directory: Path | None = None) -> Base:
    """The recipe's base model; with ``model.dtype = "auto"`` in the precision in which the run in
    ``directory`` was begun, on whatever machine, or else in the faster for the recipe's batches here.

    Raises:
        ModelError: the model cannot be loaded or does not fit the task.
    """
    data, training = recipe.data, recipe.training
    rows = training.batch_size * (recipe.rounds.clients_per_round or 1)
    tokens = data.max_length + (data.max_target_length if data.writes else 0)
    return load_base(
        recipe.model,
        task,
        recipe.seed,
        head=recipe.method.with_head,
        precision=None if directory is None else begun_in(directory),
        batch=(rows, tokens),
    )


def begun_in(directory: Path) -> Precision | None:
    """The precision in which the run in a directory was begun; None where none was."""
    file = directory / ENVIRONMENT
    found = read_json(file).get("precision") if file.exists() else None
    return next((precision for precision in BOTH if precision == found), None)
