"""MLflow: parameters, figures by round, files and the model of a run, in a folder or on a server."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...recipe.tracking import TrackingSettings
from .tracker import Known, Outcome, Scalars, Start

PROJECT = "fedcustom"
FILES = ("summary.json", "metrics.jsonl")
MOST_AT_ONCE = 500
"""Figures or parameters of one request; MLflow takes 1000 and 100."""
MOST_PARAMETERS = 100
LONGEST_PARAMETER = 6000
STATES = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class MlflowRun:
    """A run in an MLflow experiment. A run that goes on is the same MLflow run; what MLflow has
    already is not sent again.
    """

    name = "mlflow"

    def __init__(self, settings: TrackingSettings) -> None:
        self.settings = settings
        self._client: Any = None
        self._run = ""
        self._steps: dict[str, set[int]] = {}
        self._directory = Path()
        self._recipe = ""

    @property
    def place(self) -> str:
        """The address of the store, and the experiment."""
        return f"{address(self.settings)} {self.settings.project or PROJECT}"

    @property
    def variables(self) -> Mapping[str, str]:
        """Requests that end, and no reports of use (:func:`variables_of`)."""
        return variables_of(self.settings)

    def open(self, start: Start, known: Known) -> Known:
        """Create the run, or go on with it: then read which figures it has."""
        self._client = connect(self.settings)
        self._directory, self._recipe = start.directory, start.recipe
        if run := known.get("run_id"):
            self._client.update_run(run, status="RUNNING")
            data = self._client.get_run(run).data
            self._steps = {
                name: {metric.step for metric in self._client.get_metric_history(run, name)}
                for name in data.metrics
            }
            has = set(data.params)
        else:
            tags = {"fedcustom.group": start.group} if start.group is not None else {}
            if self.settings.parent is not None:
                tags["mlflow.parentRunId"] = self.settings.parent
            run = create_run(self._client, self.settings, start.name, tags)
            has = set()
        self._run = run
        self._log_parameters(start, has)
        return {"run_id": run}

    def log(self, step: int, scalars: Scalars) -> None:
        """Send the figures of a step that are not there yet."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {name: value for name, value in scalars.items() if step not in self._steps.get(name, ())}
        metrics = [Metric(name, float(value), now, step) for name, value in new.items()]
        for first in range(0, len(metrics), MOST_AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[first : first + MOST_AT_ONCE])
        for name in new:
            self._steps.setdefault(name, set()).add(step)

    def finish(self, step: int, scalars: Scalars) -> None:
        """Send the final figures, ``recipe.toml`` without its trackers, ``summary.json``, ``metrics.jsonl``
        and, where the recipe asks for it, the model.
        """
        self.log(step, scalars)
        self._client.log_text(self._run, self._recipe, "recipe.toml")
        for name in FILES:
            self._client.log_artifact(self._run, str(self._directory / name))
        model = self._directory / "model"
        if self.settings.model and model.is_dir():
            self._client.log_artifacts(self._run, str(model), "model")

    def close(self, outcome: Outcome) -> None:
        """Say how the run ended."""
        if self._run:
            self._client.set_terminated(self._run, status=STATES[outcome])

    def _log_parameters(self, start: Start, has: set[str]) -> None:
        from mlflow.entities import Param

        texts = {name: value for name, value in start.parameters.items() if name not in has}
        params = [Param(name, value[:LONGEST_PARAMETER]) for name, value in texts.items()]
        for first in range(0, len(params), MOST_PARAMETERS):
            self._client.log_batch(self._run, params=params[first : first + MOST_PARAMETERS])


def address(settings: TrackingSettings) -> str:
    """The store's address: the recipe's, the environment's, or the folder ``mlruns``."""
    given = settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns"
    return given if "://" in given else Path(given).absolute().as_uri()


def variables_of(settings: TrackingSettings) -> dict[str, str]:
    """Variables with which requests of MLflow end in bounded time, nothing is sent to MLflow's makers, and
    folders are allowed where the store is one.
    """
    found = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(settings.seconds))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what is not delivered is sent with the next round
        "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": str(max(1, round(settings.seconds))),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    if address(settings).startswith("file:"):
        found["MLFLOW_ALLOW_FILE_STORE"] = "true"  # folders are refused without
    return found


def connect(settings: TrackingSettings) -> Any:
    """A client of the store, for use while :func:`variables_of` are set."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=address(settings))


def create_run(client: Any, settings: TrackingSettings, name: str, tags: dict[str, str]) -> str:
    """A run in the settings' experiment, which is made where it is missing; its id."""
    from mlflow.exceptions import MlflowException

    project = settings.project or PROJECT
    experiment = client.get_experiment_by_name(project)
    if experiment is None:
        try:
            identity = client.create_experiment(project)
        except MlflowException:  # another run was faster
            experiment = client.get_experiment_by_name(project)
            if experiment is None:
                raise
    if experiment is not None:
        identity = experiment.experiment_id
    return str(client.create_run(identity, run_name=name, tags=tags).info.run_id)
