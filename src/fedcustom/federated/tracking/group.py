"""Runs that belong together: named by their cell, and in MLflow nested under one parent run."""

from __future__ import annotations

import threading
from pathlib import Path

from ...core.files import read_json, write_json
from ...recipe.tracking import TrackingSettings
from .delivery import FILE, Say
from .mlflow_run import MlflowRun, connect, create_run, variables_of
from .variables import held


class Group:
    """Names the runs of a comparison or an experiment for their trackers.

    Args:
        folder: Where the runs are. The parent runs in MLflow are remembered there, in ``tracking.json``.
        name: The group's name.
        warn: Told once where MLflow does not answer; the runs then have no parent.
    """

    def __init__(self, folder: Path, name: str, warn: Say) -> None:
        self.folder, self.name, self.warn = folder, name, warn
        self._parents: dict[str, str | None] = {}

    def named(self, settings: TrackingSettings | None, name: str) -> TrackingSettings | None:
        """The settings of the run of that name; what the recipe says itself stays."""
        if settings is None:
            return None
        parent = settings.parent or (self._parent(settings) if "mlflow" in settings.to else None)
        changed = {
            "name": name if settings.name is None else f"{settings.name}: {name}",
            "group": settings.group or self.name,
            "parent": parent,
        }
        return settings.model_copy(update=changed)

    def _parent(self, settings: TrackingSettings) -> str | None:
        """The group's run in the settings' MLflow experiment; None where it could not be made."""
        place = MlflowRun(settings).place
        if place not in self._parents:
            self._parents[place] = self._made(settings, place)
        return self._parents[place]

    def _made(self, settings: TrackingSettings, place: str) -> str | None:
        path, found = self.folder / FILE, list[str]()
        known = read_json(path) if path.exists() else {}
        if place in known:
            return str(known[place])
        failure = f"no answer within {settings.seconds:g} s"

        def make() -> None:
            nonlocal failure
            try:
                tags = {"fedcustom.group": settings.group or self.name}
                with held(variables_of(settings)):
                    found.append(create_run(connect(settings), settings, settings.group or self.name, tags))
            except (Exception, SystemExit) as error:
                failure = (str(error).splitlines() or [type(error).__name__])[0]

        thread = threading.Thread(target=make, daemon=True)
        thread.start()
        thread.join(settings.seconds)
        if not found:
            self.warn(f"tracking: mlflow: {failure}; the runs of {self.name} have no parent there")
            return None
        write_json(path, {**known, place: found[0]})
        return found[0]
