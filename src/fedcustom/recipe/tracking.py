"""The recipe's section on trackers, which follow a run and change nothing of it."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from ..core.settings import Settings

TrackerName = Literal["tensorboard", "mlflow", "wandb"]

SCHEMES = ("http", "https", "file")
"""Addresses that ``tracking.uri`` takes beside folders."""


class TrackingSettings(Settings):
    """Trackers that follow a run. They change no result, so a run may go on with others."""

    to: list[TrackerName] = Field(
        default_factory=list,
        description="Empty: none. tensorboard: event files in the run's directory; mlflow: a local folder "
        "or a server; wandb: Weights & Biases. Each is an extra of the same name",
    )
    name: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Name of the tracked run; unset: that of the run's directory. Comparisons and "
        "experiments name their runs themselves",
    )
    group: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="Name under which trackers group runs; comparisons and experiments set their own",
    )
    project: str | None = Field(
        None,
        min_length=1,
        max_length=200,
        description="MLflow's experiment and Weights & Biases' project; unset: fedcustom",
    )
    uri: str | None = Field(
        None,
        min_length=1,
        description="Where MLflow stores: a folder, or the address of a server. Unset: what "
        "MLFLOW_TRACKING_URI says, else the folder mlruns in the current one",
    )
    parent: str | None = Field(
        None,
        min_length=1,
        description="Id of the MLflow run under which this one stands; comparisons and experiments set it",
    )
    offline: bool | None = Field(
        None,
        description="Whether Weights & Biases writes files alone, for wandb sync. Unset: what WANDB_MODE "
        "says, else true unless there is an API key",
    )
    model: bool | None = Field(
        None,
        description="Whether MLflow and Weights & Biases get the exported model as well; unset: they do not",
    )
    timeout: float | None = Field(
        None,
        gt=0,
        le=3600,
        description="Seconds that one request to a server may take, and that a run waits for its trackers at "
        "the end; unset: 20",
    )

    @field_validator("to")
    @classmethod
    def _once_each(cls, value: list[TrackerName]) -> list[TrackerName]:
        if len(set(value)) < len(value):
            raise ValueError("names a tracker twice")
        return value

    @field_validator("uri")
    @classmethod
    def _without_secrets(cls, value: str | None) -> str | None:
        if value is None or "://" not in value:
            return value
        try:
            parts = urlsplit(value)
        except ValueError:
            raise ValueError("is no address") from None
        if parts.scheme not in SCHEMES:
            raise ValueError(f"must begin with {', '.join(f'{s}://' for s in SCHEMES)}, or be a folder")
        if parts.username is not None or parts.password is not None or parts.query:
            raise ValueError(
                "must hold no credentials: recipes are kept with their runs; set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        return value

    @property
    def seconds(self) -> float:
        """``timeout`` with its default."""
        return 20.0 if self.timeout is None else self.timeout
