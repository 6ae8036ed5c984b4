"""Run a recipe and open the result, or open a run that is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..federated.callbacks import Callback
from ..federated.run import run_recipe
from ..recipe.recipe import Recipe, load_recipe
from ..updates.transform import UpdateTransform
from .finished_run import Run

Source = str | Path | Mapping[str, Any] | Recipe


def run(
    recipe: Source,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    data_changed: Literal["refuse", "accept"] = "refuse",
    check_export: bool = True,
    transforms: Sequence[UpdateTransform] = (),
) -> Run:
    """Run a recipe (a TOML file, a dict, or a :class:`~fedcustom.recipe.recipe.Recipe`) and open the result.

    ``overrides`` change single settings: ``{"rounds.count": 5}`` or ``["rounds.count=5"]``. ``out`` is the
    run's directory (default: a name in ``runs/`` made from recipe, method and seed). ``callbacks`` are
    told of every event of the run (:class:`~fedcustom.federated.callbacks.Callback`). A run in ``out`` whose
    rows have changed since is refused, unless ``data_changed`` is ``"accept"``. The model that the run writes
    is compared with the trained one in a fresh process, unless ``check_export`` is False. ``transforms`` act
    on clients' updates and on the aggregate (:mod:`fedcustom.updates.transform`); a run that is resumed needs
    those that it began with.

    Raises:
        FedcustomError: the recipe or what it names is not in order; the message says what to mend.
    """
    checked = load_recipe(recipe, overrides)
    directory = Path(out) if out is not None else default_directory(recipe, checked)
    run_recipe(
        checked,
        directory,
        resume=resume,
        callbacks=callbacks,
        data_changed=data_changed,
        check_export=check_export,
        transforms=transforms,
    )
    return Run(directory)


def load(directory: str | Path) -> Run:
    """Open a finished run.

    Raises:
        RunError: the directory holds no finished run.
    """
    return Run(directory)


def default_directory(source: Source, recipe: Recipe) -> Path:
    """``runs/<recipe>-<baseline>-<method>-seed-<seed>``."""
    name = Path(source).stem if isinstance(source, str | Path) else "run"
    parts = [name, *([] if recipe.baseline == "federated" else [recipe.baseline]), recipe.method.name]
    return Path("runs") / f"{'-'.join(parts)}-seed-{recipe.seed}"
