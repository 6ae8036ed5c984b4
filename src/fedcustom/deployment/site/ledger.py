"""Ledger of a site: what it has done and sent, over all runs, kept across runs and restarts."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import DeploymentError, RunError
from ...core.files import read_json, write_json

Count = Literal["runs", "rounds", "tasks", "bytes", "evaluations", "queries"]

COUNTS: tuple[Count, ...] = get_args(Count)

HOUR_FORMAT, DAY_FORMAT = "%Y-%m-%dT%H", "%Y-%m-%d"

DAY = timedelta(hours=24)

Number = Annotated[int, Field(ge=0)]


class Release(BaseModel):
    """Noised optimiser steps, or noised sums for a head, in which every row is: how much noise they had over
    the bound, with which probability each row was in one, the delta at which the recipe promises its epsilon,
    and how many they were. Of ``unit = "client"`` they are noised changes that hide the site as a whole;
    ``integers`` with Skellam noise.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    noise_multiplier: float = Field(gt=0)
    sampling: float = Field(gt=0, le=1)
    delta: float = Field(gt=0, lt=1)
    steps: int = Field(ge=1)
    unit: Literal["example", "client"] = "example"
    integers: bool = False


class _Run(BaseModel):
    """What the file says of a run."""

    model_config = ConfigDict(strict=True)

    rounds: list[str] = Field(default_factory=list)
    evaluations: dict[str, list[str]] = Field(default_factory=dict)
    tasks: Number = 0
    bytes: Number = 0
    queries: Number = 0
    releases: list[Release] = Field(default_factory=list)


class _Content(BaseModel):
    """The form of the file."""

    model_config = ConfigDict(strict=True, extra="forbid")

    totals: dict[str, Number]
    hours: dict[str, dict[str, Number]]
    days: dict[str, dict[str, Number]]
    runs: dict[str, _Run]
    unfinished: dict[str, Number]


class Ledger:
    """Ledger ``ledger.json``: totals, the last hours, every day, and every run; written atomically.

    A server names runs as it likes, so that limits hold for the totals and for the last 24 hours by this
    machine's clock. Nothing is ever deleted but the hours before yesterday, whose sums are in the days. Hours
    that lie ahead count as if they were now: a clock that was set back frees nothing.
    """

    def __init__(self, path: Path, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Read the ledger, or begin one.

        Raises:
            DeploymentError: it is damaged; the site does not start without what it counted.
        """
        self.path, self.now = path, now
        self.content: dict[str, Any] = {"totals": {}, "hours": {}, "days": {}, "runs": {}, "unfinished": {}}
        if path.exists():
            try:
                read = read_json(path)
            except RunError as error:
                raise DeploymentError(str(error)) from None
            try:
                _Content.model_validate(read)
            except ValidationError as error:
                where = ".".join(map(str, error.errors()[0]["loc"])) or "its content"
                raise DeploymentError(f"{path}: is no ledger ({where}); restore it from a copy") from None
            self.content = read
        else:
            self._take_old(path.parent / "runs")

    def total(self, count: Count) -> int:
        """What was counted since the ledger began."""
        return int(self.content["totals"].get(count, 0))

    def last_day(self, count: Count) -> int:
        """What was counted in the last 24 hours, to the hour."""
        since = (self.now() - DAY).strftime(HOUR_FORMAT)
        return sum(
            int(counts.get(count, 0)) for hour, counts in self.content["hours"].items() if hour >= since
        )

    def run(self, run: str) -> dict[str, Any]:
        """What was counted in a run: ``rounds`` and ``evaluations`` are digests of the requests, ``releases``
        noised ones.
        """
        known: dict[str, Any] = self.content["runs"].get(run, {})
        return {"rounds": [], "evaluations": {}, "tasks": 0, "bytes": 0, "queries": 0, "releases": []} | known

    def releases(self, run: str | None = None) -> list[Release]:
        """What was released with noise in a run; in all runs, where none is named."""
        runs = self.content["runs"] if run is None else {run: self.run(run)}
        return [Release.model_validate(each) for one in runs.values() for each in one.get("releases", [])]

    def note_release(self, run: str, release: Release) -> None:
        """Count noised releases, before they are made, and write the ledger: what was begun may have left."""
        known = self.releases(run)
        same = release.model_dump(exclude={"steps"})
        before = sum(each.steps for each in known if each.model_dump(exclude={"steps"}) == same)
        others = [each for each in known if each.model_dump(exclude={"steps"}) != same]
        merged = release.model_copy(update={"steps": before + release.steps})
        self._change_run(run, releases=[each.model_dump() for each in (*others, merged)])
        self._write()

    def is_new(self, run: str) -> bool:
        """Whether nothing of this run has been counted."""
        return run not in self.content["runs"]

    def note_run(self, run: str) -> None:
        """Count a run that begins here."""
        self._change_run(run)
        self._count({"runs": 1})

    def begin(self, run: str, request: str) -> None:
        """Note a request by its digest before it is executed, in case that ends the process."""
        unfinished = self.content["unfinished"]
        unfinished[request] = unfinished.get(request, 0) + 1
        self.add(run)

    def attempts(self, request: str) -> int:
        """How often a request was begun and ended this site's process."""
        return int(self.content["unfinished"].get(request, 0))

    def finish(self, run: str, request: str, sent: int) -> None:
        """Count a request's reply of so many bytes; 0 where it was refused or failed."""
        self.content["unfinished"].pop(request, None)
        self.add(run, bytes=sent)

    def note_round(self, run: str, request: str) -> None:
        """Count a request as one round; the same request again is the same round."""
        if request not in self.run(run)["rounds"]:
            self._change_run(run, rounds=[*self.run(run)["rounds"], request])
            self._count({"rounds": 1})

    def note_evaluation(self, run: str, part: str, request: str) -> None:
        """Count a request as one evaluation on a part; the same request again is the same evaluation."""
        known = self.run(run)["evaluations"]
        if request not in known.get(part, []):
            self._change_run(run, evaluations={**known, part: [*known.get(part, []), request]})
            self._count({"evaluations": 1})

    def add(self, run: str, **counts: int) -> None:
        """Add to the counts of the site and, where it has begun here, of a run, and write the ledger."""
        known = self.run(run)
        if not self.is_new(run):
            self._change_run(
                run, **{key: known[key] + value for key, value in counts.items() if key in known}
            )
        self._count(counts)
        self._write()

    def _change_run(self, run: str, **changes: Any) -> None:
        began = {"began": self.now().isoformat(timespec="seconds")}
        self.content["runs"][run] = began | self.run(run) | changes

    def _count(self, counts: dict[str, int]) -> None:
        now, content = self.now(), self.content
        hours = content["hours"].setdefault(now.strftime(HOUR_FORMAT), {})
        days = content["days"].setdefault(now.strftime(DAY_FORMAT), {})
        for key, value in counts.items():
            for place in (content["totals"], hours, days):
                place[key] = int(place.get(key, 0)) + value

    def _write(self) -> None:
        oldest = (self.now() - 2 * DAY).strftime(HOUR_FORMAT)
        hours = self.content["hours"]
        self.content["hours"] = {hour: counts for hour, counts in hours.items() if hour >= oldest}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)

    def _take_old(self, runs: Path) -> None:
        """Take over what earlier versions counted run by run (``sent.json``)."""
        for file in sorted(runs.glob("*/sent.json")):
            try:
                old = read_json(file)
                rounds = [f"round {number}" for number in old["rounds"]]
                counts = {"bytes": int(old["bytes"]), "tasks": int(old.get("work", 0))}
            except (RunError, KeyError, TypeError, ValueError):
                continue
            self._change_run(file.parent.name, rounds=rounds, **counts)
            self._count({"rounds": len(rounds), **counts})
