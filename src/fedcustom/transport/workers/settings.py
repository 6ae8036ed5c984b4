"""The recipe's section on the workers of a simulation."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from ...core.settings import Settings

ADDRESS = re.compile(r"auto|(ray://)?(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")


class WorkerSettings(Settings):
    """Resident processes on Ray that train the clients of a simulation (docs/workers.md). They change results
    by rounding alone, so a run may go on with others.
    """

    count: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Resident processes among which each round's clients are shared, at most as many as "
        "there are clients; unset: clients train in this process. Needs the extra ray",
    )
    cpus: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Cores that Ray keeps for each; unset: an equal share of this process's threads, or with "
        "an address 1",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="Threads of each; unset: as many as its cores"
    )
    gpus: float | None = Field(
        None,
        ge=0,
        le=64,
        description="GPUs of each, a part of one (0.5) or a whole number; unset: one, or an equal share "
        "where there are fewer, and none where model.device is none",
    )
    address: str | None = Field(
        None,
        description="A Ray cluster that runs already: host:port, ray://host:port, or auto (one that was "
        "started on this machine). Unset: one is started on this machine for the run alone",
    )

    @field_validator("gpus")
    @classmethod
    def _part_or_whole(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and value != int(value):
            raise ValueError("must be a part of one GPU, or a whole number of them")
        return value

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and not ADDRESS.fullmatch(value):
            raise ValueError("must be host:port, ray://host:port, or auto")
        return value

    @model_validator(mode="after")
    def _has_workers(self) -> Self:
        if self.count is None:
            for key in ("cpus", "threads", "gpus", "address"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key}: has no effect without workers.count")
        return self
