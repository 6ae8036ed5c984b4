"""An experiment from its file to its results: searches, cells, and what is done already."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.errors import RunError
from ..core.files import held, holder, read_json, write_json
from ..evaluation.degenerate import in_words
from ..federated.composed_privacy import composed
from ..federated.private_run import count_clients
from ..federated.tracking.group import Group
from ..report import formatting as words
from .baselines import added_cells
from .estimate import Rates, total
from .grid import Cell, experiment_cells, group_of
from .results import (
    Result,
    collect,
    has_result,
    read_result,
    result_paths,
    results_by_digest,
    write_result,
)
from .runner import Job, drop_weights, run_jobs, tracked
from .search import Trial, choose, chosen_tables, trials
from .settings import ExperimentSettings, Match, check_metric, load_experiment, nested

Say = Callable[[str], None]


@dataclass
class Experiment:
    """One experiment's file, and where its runs and results are.

    ``runs`` gets a directory a cell; ``results`` a small JSON file a cell, ``search.json``, and ``search/``
    with a file a trial. A cell whose result is there, of the same recipe, is not run again; nor is one of
    which there is a result under another name, or in the results of an experiment that the file reuses.
    """

    file: Path
    runs: Path
    results: Path
    only: Match = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.settings: ExperimentSettings
        self.settings, self.base = load_experiment(self.file)
        # A file that is not in order is refused before anything runs.
        self.added()
        cells = self.cells()
        self._trials = self._made_trials()
        check_metric(self.settings.report, [cell.recipe.data.task for cell in cells], str(self.file))

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem

    def cells(self, chosen: Mapping[tuple[str, ...], Mapping[str, Any]] | None = None) -> list[Cell]:
        """The grid's cells, with the learning rates of a search; none where added baselines alone are asked
        for.
        """
        if self.settings.is_added(self.only):
            return []
        return experiment_cells(self.settings, self.base, str(self.file), only=self.only, chosen=chosen)

    def added(self) -> tuple[list[Cell], list[str]]:
        """The baselines that the file adds to the grid, and why some are not possible."""
        if not self.settings.baselines:
            return [], []
        return added_cells(self.settings, self.base, str(self.file), only=self.only)

    def trials(self) -> list[Trial]:
        """The search's trials for those cells; where they are made does not depend on ``only``."""
        groups = {group_of(self.settings, cell.points) for cell in self.cells()}
        return [trial for trial in self._trials if trial.group in groups]

    def _made_trials(self) -> list[Trial]:
        if self.settings.search is None:
            return []
        where = str(self.file)
        return trials(self.settings, self.base, experiment_cells(self.settings, self.base, where), where)

    def result_path(self, name: str) -> Path:
        """Where a cell's result is kept."""
        return self.results / f"{name}.json"

    def trial_path(self, name: str) -> Path:
        """Where a trial's result is kept."""
        return self.results / "search" / f"{name}.json"

    def listing(self) -> Iterator[str]:
        """A line a trial and cell, with its time as far as it is known, and what all of it takes."""
        measured = [read_result(path) for path in self._result_paths()]
        rates, results = Rates(self.settings, measured), self._known()
        added, reasons = self.added()
        yield from self._not_reused()
        made, cells = self.trials(), [*added, *self.cells(self._chosen())]
        yield from reasons
        yield from self._composed_privacy(cells)
        for kind, named in (
            ("trial", [(t.name, t.cell, self.trial_path(t.name)) for t in made]),
            ("cell", [(c.name, c, self.result_path(c.name)) for c in cells]),
        ):
            todo = []
            for name, cell, path in named:
                is_done = cell.digest in results or has_result(path, cell.digest)
                todo += [] if is_done else [cell]
                seconds = rates.seconds(cell)
                known = "time unknown" if seconds is None else f"about {words.duration(seconds)}"
                yield f"{kind} {name}  {'done' if is_done else known}"
            seconds, unknown = total(rates, todo)
            lacking = f", and {unknown} of unknown time" if unknown else ""
            yield (
                f"{words.plural(len(named), kind)}, {len(named) - len(todo)} done; "
                f"left: about {seconds / 3600:.1f} hours of one core{lacking}"
            )

    def _composed_privacy(self, cells: Sequence[Cell]) -> Iterator[str]:
        """What the private runs and trials on the same clients promise together."""
        recipes = [cell.recipe for cell in [*(trial.cell for trial in self.trials()), *cells]]
        yield from composed(recipes, count_clients)

    def _chosen(self) -> dict[tuple[str, ...], dict[str, Any]]:
        """The learning rates that are known: of groups all of whose trials have results, here or in an
        experiment that is reused, and of those that ``search.json`` has, with failed trials.
        """
        if self.settings.search is None:
            return {}
        known, made, path = self._known(), self.trials(), self.results / "search.json"
        open_groups = {trial.group for trial in made if trial.cell.digest not in known}
        finished = [trial for trial in made if trial.group not in open_groups]
        found = {trial.name: known[trial.cell.digest] for trial in finished}
        groups = choose(self.settings, finished, found, {})["groups"]
        if path.exists():
            digests = {trial.cell.digest for trial in made}
            content = read_json(path)
            groups |= {
                name: entry
                for name, entry in content["groups"].items()
                if all(run["digest"] in digests for rate in entry["trials"] for run in rate["runs"])
            }
        return chosen_tables({"setting": self.settings.search.setting, "groups": groups})

    def run(self, jobs: int, say: Say) -> dict[str, str]:
        """Search, then run all cells that have no result yet; what failed, by name, with the reason.

        Raises:
            RecipeError: a rate that the search may choose is not possible in some cell.
            RunError: another process searches this experiment's rates, or the results that are there cannot
                be read.
        """
        for path in result_paths(self.results):
            read_result(path)  # what cannot be shown with the others at the end is said now
        added, reasons = self.added()
        for reason in [*reasons, *self._not_reused()]:
            say(reason)
        for line in self._composed_privacy(self.cells(self._chosen())):
            say(line)
        cells = [*added, *self.cells(self._search(jobs, say))]
        # A rate that fails in a trial is a rate that was not chosen, and no failure of the experiment.
        return self._all([(c.name, c, self.result_path(c.name)) for c in cells], "cells", jobs, say)

    def _search(self, jobs: int, say: Say) -> dict[tuple[str, ...], dict[str, Any]]:
        """The rates of the best trials, after running those that have no result yet."""
        made = self.trials()
        if not made:
            return {}
        if not all(has_result(self.trial_path(trial.name), trial.cell.digest) for trial in made):
            self._check_rates(made)
        lock = self.runs / "search.pid"
        with held(lock) as alone:  # a trial that another process is at would pass for one that failed
            if not alone:
                raise RunError(f"{self.runs}: process {holder(lock)} searches learning rates; wait for it")
            failed = self._all([(t.name, t.cell, self.trial_path(t.name)) for t in made], "search", jobs, say)
            paths = {trial.name: self.trial_path(trial.name) for trial in made if trial.name not in failed}
            found = {name: read_result(path) for name, path in paths.items()}
            content = choose(self.settings, made, found, failed)
            self._note_search(content)
        return chosen_tables(content)

    def _check_rates(self, made: Sequence[Trial]) -> None:
        """See that each rate that a search may choose is possible in every cell, before any is tried."""
        assert self.settings.search is not None
        rates: dict[tuple[str, ...], list[float]] = {}
        for trial in made:
            rates.setdefault(trial.group, []).append(trial.rate)
        once = self.only | {"seed": str(self.cells()[0].seed)}
        for tried in zip(*(dict.fromkeys(each) for each in rates.values()), strict=True):
            chosen = {
                group: nested(self.settings.search.setting, rate)
                for group, rate in zip(rates, tried, strict=True)
            }
            experiment_cells(self.settings, self.base, str(self.file), only=once, chosen=chosen)

    def _all(
        self, wanted: Sequence[tuple[str, Cell, Path]], kind: str, jobs: int, say: Say
    ) -> dict[str, str]:
        """Run what has no result yet and write its result; the names of what failed, with the reason."""
        todo = {name: (cell, path) for name, cell, path in wanted if not has_result(path, cell.digest)}
        known = self._known() if todo else {}
        taken = [name for name, (cell, _) in todo.items() if cell.digest in known]
        for name in taken:
            cell, path = todo.pop(name)
            write_result(path, replace(known[cell.digest], experiment=self.name, points=dict(cell.points)))
        if wanted:
            over = f", {len(taken)} of them taken over from results of the same recipe" if taken else ""
            say(f"{kind}: {len(wanted)}, of which {len(wanted) - len(todo)} are done{over}")
        failed: dict[str, str] = {}
        ended = 0

        def done(job: Job, reason: str | None) -> None:
            nonlocal ended
            ended += 1
            cell, path = todo[job.name]
            if reason is not None:
                failed[job.name] = reason
                say(f"{ended}/{len(todo)} {job.name}: failed: {reason}")
                return
            result = collect(
                job.directory,
                experiment=self.name,
                points=cell.points,
                digest=cell.digest,
                command=self._command(cell),
            )
            write_result(path, result)
            if not self.settings.keep_models:
                drop_weights(job.directory)
            say(f"{ended}/{len(todo)} {job.name}: {_said(result, kind)}")

        folder = self.runs if kind == "cells" else self.runs / "search"
        group = Group(folder, self.name if kind == "cells" else f"{self.name} search", say)
        each = [
            Job(name, tracked(cell.recipe, group, name), folder / f"{name}-{cell.digest[:6]}")
            for name, (cell, _) in todo.items()
        ]
        run_jobs(each, jobs, done)
        return failed

    def _command(self, cell: Cell) -> str:
        points = {**cell.points, "seed": cell.seed}
        only = [f"--only={axis}={point}" for axis, point in points.items()]
        return shlex.join(["fedcustom", "experiment", str(self.file), *only])

    def _result_paths(self) -> list[Path]:
        """The files of results that are there, those of trials behind those of cells."""
        return [*result_paths(self.results), *result_paths(self.results / "search")]

    def _known(self) -> dict[str, Result]:
        """Results by their recipe's digest: this experiment's, and those of experiments that it reuses."""
        return results_by_digest([*self._others(), self.results])

    def _others(self) -> list[Path]:
        """The results' folders of experiments that are reused."""
        return [self.results.parent / name for name in self.settings.reuse]

    def _not_reused(self) -> list[str]:
        """Which of these folders have no result, a line each."""
        return [f"reuse: {folder} has no results" for folder in self._others() if not result_paths(folder)]

    def _note_search(self, content: dict[str, Any]) -> None:
        """Write ``search.json``; groups that ``only`` leaves out stay in it as they were."""
        path = self.results / "search.json"
        if path.exists():
            content["groups"] = read_json(path)["groups"] | content["groups"]
        write_json(path, content)


def open_experiment(
    file: Path, runs: Path | None = None, results: Path | None = None, only: Match | None = None
) -> Experiment:
    """An experiment with its usual folders: ``runs/<name>`` and ``results/<name>``.

    Raises:
        RecipeError: the file is not in order.
    """
    name = file.stem
    return Experiment(file, runs or Path("runs") / name, results or Path("results") / name, only or {})


def _said(result: Result, kind: str) -> str:
    if kind == "search":
        text = f"development {result.metric} {result.score:.4f}"
    else:
        first = next(iter(result.metrics))
        text = f"test {first} {result.metrics[first]:.4f}"
        if warning := in_words(result.more.get("degenerate", {})):
            text += f", {warning}"
    return f"{text}  ({result.seconds['total']:.0f} s)"
