"""The trackers that a recipe names, told of a run for as long as it lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from ...core.errors import RecipeError
from ...recipe import Recipe
from ...recipe.tracking import TrackerName, TrackingSettings
from ..callbacks import Callbacks
from ..run_directory import RunDirectory
from .delivery import Delivery
from .event_files import EventFiles
from .mlflow_run import MlflowRun
from .tracker import Tracker
from .wandb_run import WandbRun


@contextlib.contextmanager
def followed(
    recipe: Recipe, place: RunDirectory, told: Callbacks, finished: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Have a run followed by the recipe's trackers while this is open. One that is ``finished``, with this
    summary, is delivered as far as a tracker lacks it.

    Raises:
        RecipeError: a tracker's package is missing.
    """
    settings = recipe.tracking
    if settings is None or not settings.to:
        yield
        return

    def warn(text: str) -> None:
        told.on_note(text)
        place.warn(text)

    delivery = Delivery(
        trackers(settings), settings.seconds, warn, told.on_information, settings.name, settings.group
    )
    with told.joined(delivery):
        try:
            if finished is not None:
                delivery.deliver_finished(recipe, place.path, finished)
            yield
        except BaseException as error:
            delivery.close("failed" if isinstance(error, Exception) else "killed")
            raise
        delivery.close("finished")


def trackers(settings: TrackingSettings) -> list[Tracker]:
    """The trackers that the settings name.

    Raises:
        RecipeError: a tracker's package is missing.
    """
    for name in settings.to:
        if find_spec(name) is None:
            raise RecipeError(f"tracking.to: {name} needs its package: pip install 'fedcustom[{name}]'")
    return [_made(name, settings) for name in settings.to]


def _made(name: TrackerName, settings: TrackingSettings) -> Tracker:
    if name == "tensorboard":
        return EventFiles()
    return MlflowRun(settings) if name == "mlflow" else WandbRun(settings)
