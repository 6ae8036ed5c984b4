"""Opening of runs at a site: a recipe is checked, rows are read and divided, and the method is built."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ...core.errors import DataError, WireError
from ...core.files import read_json, write_json
from ...data.party_data import OwnData
from ...data.truncation import in_words
from ...federated.resolve import resolved
from ...recipe.recipe import Recipe, load_recipe
from ..replies import MAX_LABELS, LabelList
from .audit import AuditLog
from .data import read_site, told_labels
from .ledger import Ledger
from .participant import Division, Participant
from .policy import check_opening, check_opening_limits, check_recipe
from .rows import DataChanged, RowRecords, rows_of
from .settings import SiteSettings

MAX_STORED_RUNS = 3
"""Runs whose memory stays on a site's disk."""


class Openings:
    """The run that a site takes part in. A server first describes it, to which the site replies with its
    labels, and then opens it. What it was opened with is on disk (:meth:`record`), from which the run is
    built again after a restart.

    ``base`` is the folder that paths of the data are relative to, ``folder`` the one for this site's files.

    Attributes:
        participant: This site in the run that was opened last; None before any, and after :meth:`close`.
        load_count: How often a base model was loaded.
    """

    def __init__(
        self,
        name: str,
        settings: SiteSettings,
        base: Path,
        folder: Path,
        audit: AuditLog,
        ledger: Ledger,
        data_changed: DataChanged,
    ) -> None:
        self.name, self.settings, self.base, self.folder = name, settings, base, folder
        self.audit, self.ledger = audit, ledger
        self.row_records = RowRecords(audit, data_changed)
        self.participant: Participant | None = None
        self.load_count = 0
        self._described: tuple[str, Recipe, OwnData] | None = None
        self._open_run = ""

    def describe(self, run: str, content: Any) -> dict[str, Any]:
        """Check a run's recipe against the policy, and reply with the labels that this site declares.

        Raises:
            PolicyError: the policy, or a limit of it, forbids the run.
            WireError, FedcustomError: the recipe or this site's rows are not in order.
        """
        self._described = None
        recipe = self._checked_recipe(content)
        if self.ledger.is_new(run):
            check_opening_limits(self.settings.policy, self.ledger)
            self.ledger.note_run(run)
        data = self._rows_for(run, recipe)
        labels = told_labels(self.settings.data, data)
        self._described = (run, recipe, data)
        return LabelList(labels, len(data.train)).to_values()

    def open(self, run: str, values: dict[str, Any]) -> dict[str, Any]:
        """Build the method of the run that was described, save what is needed to do so again, and reply with
        the numbers of examples.

        Raises:
            WireError: the run was not described, or the names of its clients lack this site's.
            PolicyError, FedcustomError: see :meth:`describe`.
        """
        if self._described is None or run != self._described[0]:
            raise WireError("a run is opened before it was described")
        _, recipe, data = self._described
        names, labels = check_opening(values.get("names"), values.get("labels"), MAX_LABELS)
        if self.name not in names:
            raise WireError(f"the run's clients are {', '.join(names[:5])}; this site is {self.name}")
        division = self._division(run, recipe, names)
        participant = self._build(run, recipe, data, names, labels, division, opens=True)
        state = {"recipe": recipe.model_dump(mode="json"), "names": names, "labels": labels}
        write_json(self.record(run), {**state, "division": division.to_values()})
        self._remove_old_runs()
        sizes = participant.sizes()
        for part, count in (("development", sizes.development), ("test", sizes.test)):
            if held := len(getattr(participant.data, part)) - count:
                self.audit.write("withheld", run=run, kind=f"the {part} part", examples=held)
        return sizes.to_values()

    def participant_of(self, run: str) -> Participant:
        """The participant of a run; after a restart it is built again from what is on disk.

        Raises:
            WireError: the run was never opened here.
            FedcustomError: it cannot be built again.
        """
        if self.participant is not None and run == self._open_run:
            return self.participant
        if not self.record(run).exists():
            raise WireError("the run is not open here")
        saved = read_json(self.record(run))
        recipe = self._checked_recipe(saved["recipe"])
        data = read_site(self.settings.data, self.base, recipe.data, recipe.public)
        names, labels = saved["names"], saved["labels"]
        division = self._division(run, recipe, names)
        return self._build(run, recipe, data, names, labels, division, opens=False)

    def close(self) -> None:
        """Forget the participant, in whatever state it is."""
        self.participant, self._open_run = None, ""

    def record(self, run: str) -> Path:
        """The file that says what a run was opened with: recipe, names of clients, and labels."""
        return self._run_folder(run) / "run.json"

    def log_cuts(self, run: str, texts: list[str]) -> None:
        """Say in the audit log what was cut off."""
        for text in texts:
            self.audit.write("truncated", run=run, text=text)

    def _rows_for(self, run: str, recipe: Recipe) -> OwnData:
        """This site's rows for a recipe. Where the run was opened here before, they are compared with those
        that it began with, before anything is told of them.
        """
        folder = self._run_folder(run)
        data = read_site(self.settings.data, self.base, recipe.data, recipe.public)
        self.row_records.check_kept(folder, used=self._used(run))
        if self.record(run).exists():
            saved = read_json(self.record(run))
            try:
                labels = saved["labels"]
                own = self._division(run, recipe, saved["names"]).examples(self.name, labels, data)
            except DataError as error:  # a label, say, that the run does not have
                self.row_records.check_unreadable(folder, error)
            else:
                self.row_records.check(folder, rows_of(own, data.public, labels), opens=True)
        return data

    def _division(self, run: str, recipe: Recipe, names: list[str]) -> Division:
        """How this site's rows are divided: as when the run began here, even where other members have left
        since, so that no row that was held out is trained on.
        """
        saved = read_json(self.record(run)) if self.record(run).exists() else {}
        if "division" in saved:
            return Division.from_values(saved["division"])
        number = saved.get("names", names).index(self.name)
        return Division(number, recipe.seed, recipe.clients)

    def _used(self, run: str) -> bool:
        """Whether this site has worked in the run, by its ledger."""
        known = self.ledger.run(run)
        return any(known[key] for key in ("rounds", "evaluations", "tasks", "queries"))

    def _checked_recipe(self, content: Any) -> Recipe:
        """A recipe that the policy allows. It is checked before it is completed, which may look up its model,
        and again afterwards.
        """
        if not isinstance(content, dict):  # a text would be taken for the path of a file
            raise WireError("a message's recipe must be an object")
        recipe = load_recipe(content)
        check_recipe(self.settings.policy, recipe)
        recipe = resolved(recipe)
        check_recipe(self.settings.policy, recipe)
        return recipe

    def _build(
        self,
        run: str,
        recipe: Recipe,
        own: OwnData,
        names: list[str],
        labels: list[str],
        division: Division,
        *,
        opens: bool,
    ) -> Participant:
        self.close()  # only one base model at a time
        folder, policy = self._run_folder(run), self.settings.policy
        try:
            data = division.examples(self.name, labels, own)
        except DataError as error:
            self.row_records.check_unreadable(folder, error)
            raise
        rows = rows_of(data, own.public, labels)
        self.row_records.check_kept(folder, used=self._used(run))
        self.row_records.check(folder, rows, opens=opens)

        def loaded() -> None:
            self.load_count += 1
            self.audit.write("base model loaded", run=run, times=self.load_count, process=os.getpid())

        participant = Participant(recipe, names, labels, data, own, folder, policy, loaded)
        self.row_records.record(folder, rows)
        self.participant, self._open_run = participant, run
        self.log_cuts(run, in_words(participant.truncation))
        return participant

    def _run_folder(self, run: str) -> Path:
        return self.folder / "runs" / run

    def _remove_old_runs(self) -> None:
        """Delete the memory of old runs; what they sent stays in the ledger."""
        runs = sorted((self.folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
        for folder in runs[:-MAX_STORED_RUNS]:
            shutil.rmtree(folder, ignore_errors=True)
