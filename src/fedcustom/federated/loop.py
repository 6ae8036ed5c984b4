"""One run: builds what the recipe names, drives the rounds, writes checkpoints, resumes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from ..core import environment
from ..core.errors import RunError
from ..core.files import held, holder, read_json, write_folder, write_json, write_text
from ..evaluation.degenerate import in_words
from ..evaluation.metrics import Metrics, is_better
from ..methods import UNFINISHED, Answer, AsksClients, ScalesLogits, State, Task, client_labels, streamed
from ..methods.tuning.method import RATE_FACTOR
from ..models.load import Base
from ..recipe.recipe import Recipe, load_recipe, to_toml
from ..training.local import schedule_factor
from ..transport.protocol import Reply
from .callbacks import Progress, Silent
from .outline import outline
from .rate_search import search_rate
from .run_directory import Checkpoint, Checkpoints, History, Row
from .schedule import Assignment, Plan, last_uses, plan_rounds
from .simulation import Federation, Gather, Memories, has_one_model, simulate
from .summary import summarise

RUNNING = "run.pid"
"""The file that the process at a run holds."""


def run_recipe(
    recipe: Recipe,
    directory: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    gather: Gather = simulate,
) -> dict[str, Any]:
    """Run a recipe into a directory and return its summary.

    A directory that holds the finished run of the same recipe is left as it is. One that holds an unfinished
    run is continued if ``resume`` is set.

    Raises:
        RunError: the directory holds something else, or too few clients answered in a round.
        RecipeError, DataError, ModelError: what the recipe names does not exist or does not fit together.
    """
    recipe = recipe.complete()
    progress = progress or Silent()
    finished = _prepare_directory(recipe, directory, resume)
    if finished is not None:
        progress.note(f"{directory} holds this run already; nothing to do")
        return finished
    lock = directory / RUNNING
    with held(lock) as alone:
        if not alone:
            raise RunError(f"{directory}: process {holder(lock)} is at this run; wait for it, or stop it")
        finished = _prepare_directory(recipe, directory, resume)  # another may have been at it until now
        if finished is not None:
            return finished
        try:
            return _Driver(recipe, directory, progress, gather).drive()
        except BaseException:
            if [path.name for path in directory.iterdir()] == [RUNNING]:  # nothing was begun
                shutil.rmtree(directory)
            raise
        finally:
            progress.phase("")


def _prepare_directory(recipe: Recipe, directory: Path, resume: bool) -> dict[str, Any] | None:
    """Make the directory ready; the summary if it holds this run, finished."""
    written = directory / "recipe.toml"
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory}: is a file; name a folder")
    if written.exists():
        old = load_recipe(written)
        if old != recipe:
            raise RunError(
                f"{directory}: holds another recipe's run ({_difference(old, recipe)}); name another --out"
            )
        if (directory / "summary.json").exists():
            summary: dict[str, Any] = read_json(directory / "summary.json")
            return summary
        if not resume:
            raise RunError(
                f"{directory}: holds an unfinished run; go on with --resume, or name another --out"
            )
    elif directory.exists() and any(path.name != RUNNING for path in directory.iterdir()):
        raise RunError(f"{directory}: is not empty and holds no run; name another --out")
    return None


def _difference(old: Recipe, new: Recipe) -> str:
    """The first setting in which two recipes differ."""

    def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, sub in value.items():
                yield from flat(sub, f"{path}.{key}" if path else key)
        else:
            yield path, value

    before, after = dict(flat(old.model_dump())), dict(flat(new.model_dump()))
    key = next(key for key in [*before, *after] if before.get(key) != after.get(key))
    return f"{key} = {before.get(key)!r} there, {after.get(key)!r} here"


@dataclass
class _Round:
    """What is noted of a round while its replies come in."""

    answered: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    losses: list[tuple[float, int]] = field(default_factory=list)
    seconds: float = 0.0
    exchanges: int = 1


class _Driver:
    """Drives the rounds of one run."""

    def __init__(self, recipe: Recipe, directory: Path, progress: Progress, gather: Gather) -> None:
        self.recipe, self.gather = recipe, gather
        self.directory = directory
        self.progress = progress
        self.checkpoints = Checkpoints(directory / "checkpoints")
        self.history = History(directory / "metrics.jsonl")

    def drive(self) -> dict[str, Any]:
        """From the last checkpoint, or from the beginning, to the summary."""
        started = time.perf_counter()
        environment.restart_peak_memory()
        parties = self.gather(self.recipe, self.directory, self.checkpoints.clients, self.progress)
        self.evaluation, memories = parties.evaluation, parties.memories
        state, done = self._resume(parties.origin, memories)
        self._describe(parties.base)
        recipe = self.recipe = self.recipe.settled(len(parties.data.clients))
        if parties.base.measured:
            steps = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parties.base.measured.items())
            self.progress.note(f"model.dtype = auto: {parties.base.precision} (a step: {steps})")
        self.progress.started(recipe, done, self.directory)
        self.progress.phase("planning the rounds")
        plan = plan_rounds(recipe, parties.data, client_labels(state))
        self.progress.outlined(outline(recipe, parties.data, parties.method, parties.origin, plan))
        fits = recipe.training.rounds_of_head_fits(recipe.rounds.count)
        uses = last_uses(plan)
        states = self._earlier(state, done, uses, parties.origin)
        parties = replace(parties, origin=State({}))  # held no longer than it is needed
        if done == 0:
            self._note_untuned(state)
        for number in range(done + 1, recipe.rounds.count + 1):
            if recipe.training.search_rates and RATE_FACTOR not in state.values and number not in fits:
                states[number - 1] = state = self._with_found_rate(state, number, plan, parties)
            state = self._round(number, plan[number - 1], states, parties)
            if number in fits and number < recipe.rounds.count:  # clients told of their labels
                self.progress.phase("planning the rounds")
                plan = plan_rounds(recipe, parties.data, client_labels(state))
            states[number] = state
            needed = [since for since in states if uses.get(since, 0) > number]
            states = {since: states[since] for since in {*needed, number}}
            last = number == recipe.rounds.count
            due = number % recipe.rounds.checkpoint_every == 0 or any(since < number for since in needed)
            if last or due or self._best() == number:
                self._phase(number, "writing its checkpoint")
                checkpoint = Checkpoint(number, state, *memories.snapshot())
                self.checkpoints.save(checkpoint, keep=[self._best(), *needed])
                states[number] = state = self.checkpoints.mapped(checkpoint)
                del checkpoint
                memories.saved(self.checkpoints.rounds())
        states.clear()  # what follows is read from the checkpoint of the best round
        del state
        summary = self._finish(parties, time.perf_counter() - started)
        self.progress.finished(summary)
        if said := in_words(summary.get("degenerate", {})):
            self._warn(said)
        return summary

    # --- rounds ---

    def _with_found_rate(self, state: State, number: int, plan: Plan, parties: Federation) -> State:
        """The state with the learning rate that a search finds, which is written to ``search.json``."""
        found = search_rate(self.recipe, state, plan, number, parties, lambda text: self._phase(number, text))
        write_json(self.directory / "search.json", found.described())
        trials = ", ".join(
            f"{t.learning_rate:g}: {'failed' if t.score is None else f'{t.score:.4f}'} after {t.rounds}"
            for t in found.trials
        )
        self.progress.note(
            f"learning rate {found.learning_rate:g} of {trials} rounds ({self.recipe.metric} on the "
            f"development split; {found.bytes_up + found.bytes_down:,} bytes, {found.seconds:.0f} s)"
        )
        usual = self.recipe.training.learning_rate
        assert isinstance(usual, float)
        return replace(state, values={**state.values, RATE_FACTOR: found.learning_rate / usual})

    def _earlier(self, state: State, done: int, uses: Mapping[int, int], origin: State) -> dict[int, State]:
        """The states, by round, that clients of later rounds start from."""
        states = {done: state}
        for since, until in uses.items():
            if since < done < until:
                states[since] = self.checkpoints.load(since).state if since else origin
        return states

    def _round(
        self,
        number: int,
        cohort: Mapping[str, Assignment],
        states: Mapping[int, State],
        parties: Federation,
    ) -> State:
        noted, state, method = _Round(), states[number - 1], parties.method
        tasks: dict[str, Task] = {}
        for since in sorted({assignment.since for assignment in cohort.values()}):
            amounts = {name: a.amount for name, a in cohort.items() if a.since == since}
            tasks |= method.configure(states[since], since + 1, amounts)
        tasks = {name: tasks[name] for name in cohort}
        self._phase(number, self._kind(number), of=len(tasks))
        begun = time.perf_counter()
        absent = {name for name, assignment in cohort.items() if assignment.absent}
        replies = parties.transport.exchange(tasks, f"{number:06d}", absent)
        accepted = self._accept(replies, noted, number, cohort)
        first = list(islice(accepted, 1))
        needed = min(self.recipe.rounds.min_clients, len(tasks))
        following = method.aggregate(state, streamed(first, accepted)) if first else state
        if len(noted.answered) < max(1, needed):
            raise RunError(
                f"round {number}: {len(noted.answered)} of {len(tasks)} clients answered, "
                f"rounds.min_clients = {needed}; the last reason: {list(noted.left_out.values())[-1]}"
            )
        candidates = [following]
        while UNFINISHED in following.values:
            following = self._next_exchange(number, cohort, following, parties, noted)
            if following.tensors is not candidates[-1].tensors:
                candidates = [candidates[-1], following]
            candidates[-1] = following
        merged = time.perf_counter() - begun
        row = self._row(number, cohort, noted, merged)
        evaluation = self.recipe.evaluation
        due = number % evaluation.every == 0 or number == self.recipe.rounds.count
        fits = number in self.recipe.training.rounds_of_head_fits(self.recipe.rounds.count)
        if due or fits:
            self._phase(number, "evaluating")
            begun = time.perf_counter()
            if fits and number > 1 and state is not candidates[0]:
                candidates.insert(0, state)
            following, row["development"] = self._better(candidates)
            row["seconds"]["evaluate"] = round(time.perf_counter() - begun, 4)
        if report := following.values.get("method"):
            row["method"] = report
        row["peak_memory_bytes"] = environment.peak_memory()
        self.history.append(row)
        self.progress.round(row)
        return following

    def _next_exchange(
        self, number: int, cohort: Mapping[str, Assignment], state: State, parties: Federation, noted: _Round
    ) -> State:
        """A further exchange of an unfinished round, with those who answered so far, or of them those who
        have more to say.
        """
        amounts = {name: cohort[name].amount for name in noted.answered}
        tasks = parties.method.configure(state, number, amounts)
        noted.answered = [name for name in noted.answered if name not in tasks]
        noted.exchanges += 1
        accepted = self._accept(parties.transport.exchange(tasks, f"{number:06d}"), noted, number, cohort)
        return parties.method.aggregate(state, accepted)

    def _better(self, candidates: Sequence[State]) -> tuple[State, Metrics]:
        """The best on the development split of states that a round may end with, the later where two are
        alike; the last one where the recipe keeps the last round's. What the first exchange left unfinished
        is finished.
        """
        metric = self.recipe.metric
        if self.recipe.evaluation.select == "last":
            candidates = candidates[-1:]
        scored = [(state, self.evaluation.development(state)) for state in candidates]
        best = len(scored) - 1
        for place in reversed(range(best)):
            if is_better(scored[place][1][metric], scored[best][1][metric], metric):
                best = place
        state, development = scored[best]
        latest = candidates[-1].values
        if best < len(scored) - 1:
            kept = "the discriminant" if UNFINISHED in state.values else "as it was"
            told = ", ".join(f"{found[metric]:.4f}" for _, found in scored)
            values = {key: value for key, value in latest.items() if key != "method"}
            said = latest.get("method", {}).get("head", "fitted")
            values["method"] = {"head": f"{said}; kept {kept} (development {metric} of candidates: {told})"}
            state = State(state.tensors, {**candidates[-1].server}, values)
        return state, development

    def _accept(
        self,
        replies: Iterator[Reply],
        noted: _Round,
        number: int,
        cohort: Mapping[str, Assignment],
    ) -> Iterator[Answer]:
        """The sound answers, one by one; the others are noted with a warning that names the client."""
        exponent, kind = self.recipe.participation.staleness_exponent, self._kind(number)
        kind += f", exchange {noted.exchanges}" if noted.exchanges > 1 else ""
        done = 0
        for reply in replies:  # enumerate would hold on to each until the next one is there
            done += 1
            self._phase(number, kind, done, len(cohort))
            noted.seconds += reply.seconds
            noted.bytes_down[reply.client] = noted.bytes_down.get(reply.client, 0) + reply.bytes_down
            if reply.bytes_up:
                noted.bytes_up[reply.client] = noted.bytes_up.get(reply.client, 0) + reply.bytes_up
            if reply.update is None:
                noted.left_out[reply.client] = reply.reason
                if reply.detail:  # a simulated drop-out is no surprise
                    text = f"round {number}: client {reply.client} left out: {reply.reason}"
                    self._warn(text, reply.detail)
                continue
            noted.answered.append(reply.client)
            said = reply.update.values
            if "loss" in said:
                noted.losses.append((float(said["loss"]), int(said.get("examples", 1))))
            late = number - 1 - cohort[reply.client].since
            discount = (1 + late) ** -exponent if late else 1.0
            yield Answer(reply.client, reply.task, reply.update, discount)
            del reply  # before the next one comes

    def _row(self, number: int, cohort: Mapping[str, Assignment], noted: _Round, seconds: float) -> Row:
        recipe = self.recipe
        sent = recipe.baseline == "federated"  # a centralised or local run has nobody to send to
        up, down = (noted.bytes_up, noted.bytes_down) if sent else ({}, {})
        before = self.history.rows[-1] if self.history.rows else {}
        examples = sum(count for _, count in noted.losses)
        factor = schedule_factor(recipe.training, number, recipe.rounds.count)
        training = min(noted.seconds, seconds)  # sites train at the same time
        return {
            "round": number,
            "cohort": list(cohort),
            "answered": noted.answered,
            "left_out": noted.left_out,
            "late": {name: number - 1 - a.since for name, a in cohort.items() if a.since < number - 1},
            "learning_rate": self._rate() * factor,
            "train_loss": sum(n * loss for loss, n in noted.losses) / max(1, examples)
            if noted.losses
            else None,
            "examples": examples,
            "bytes_up": up,
            "bytes_down": down,
            "bytes_up_total": before.get("bytes_up_total", 0) + sum(up.values()),
            "bytes_down_total": before.get("bytes_down_total", 0) + sum(down.values()),
            "seconds": {
                "train": round(training, 4),
                "evaluate": 0.0,
                "aggregate": round(seconds - training, 4),
            },
        }

    def _rate(self) -> float:
        """The client's learning rate before the schedule; 0 where nothing is trained by steps."""
        file = self.directory / "search.json"
        if self.recipe.training.search_rates and file.exists():
            return float(read_json(file)["learning_rate"])
        rate = self.recipe.training.learning_rate
        return rate if isinstance(rate, float) else 0.0

    def _kind(self, number: int) -> str:
        """What clients do in a round, in a word or two."""
        fits = self.recipe.training.rounds_of_head_fits(self.recipe.rounds.count)
        return "fitting the head" if number in fits else "training"

    def _phase(self, number: int, text: str, done: int = 0, of: int = 0) -> None:
        """Tell what is being done in a round."""
        self.progress.phase(f"round {number} of {self.recipe.rounds.count}, {text}", done, of)

    def _note_untuned(self, state: State) -> None:
        """Round 0: the quality of the untuned model, which the state carries along to the summary."""
        if not self.recipe.evaluation.untuned:
            return
        self.progress.phase("evaluating the untuned model")
        begun = time.perf_counter()
        state.values["untuned"] = self.evaluation.test(state)
        row: Row = {"round": 0, "development": self.evaluation.development(state)}
        row["seconds"] = {"train": 0.0, "evaluate": round(time.perf_counter() - begun, 4), "aggregate": 0.0}
        row["peak_memory_bytes"] = environment.peak_memory()
        self.history.append(row)
        self.progress.round(row)

    def _warn(self, text: str, detail: str = "") -> None:
        self.progress.note(text)
        with (self.directory / "warnings.log").open("a", encoding="utf-8") as file:
            file.write(f"{_now()} {text}\n{detail}")

    # --- beginning and end ---

    def _describe(self, base: Base) -> None:
        """Write what is run, and on what."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / "recipe.toml").exists():
            write_text(self.directory / "recipe.toml", to_toml(self.recipe))
        if not (self.directory / "environment.json").exists():
            found = {**environment.describe(), "precision": base.precision, "device": str(base.device)}
            if base.measured:
                found["precision_seconds"] = {name: round(s, 4) for name, s in base.measured.items()}
            write_json(self.directory / "environment.json", {**found, "started": _now()})

    def _resume(self, origin: State, memories: Memories) -> tuple[State, int]:
        """The state to go on from and the rounds that are done."""
        rounds = self.checkpoints.rounds()
        if not rounds:
            if self.history.path.exists():
                self.history.path.unlink()
            return origin, 0
        checkpoint = self.checkpoints.load(rounds[-1])
        self.history = History.read(self.history.path)
        self.history.keep_until(checkpoint.round_number)
        memories.restore(checkpoint.round_number, checkpoint.memories, checkpoint.files)
        return checkpoint.state, checkpoint.round_number

    def _best(self) -> int:
        """The best round so far on the development split (or the last, if the recipe says so); 0 if there
        is none.
        """
        metric, best, value = self.recipe.metric, 0, None
        for row in self.history.rows:
            if "development" not in row or row["round"] == 0:
                continue
            new = row["development"][metric]
            if value is None or self.recipe.evaluation.select == "last" or is_better(new, value, metric):
                best, value = row["round"], new
        return best

    def _calibrated(self, state: State, parties: Federation) -> tuple[State, float | None]:
        """The state with the temperature that the development split gives it, and what its logits were
        multiplied by; None where they were not.
        """
        recipe, method = self.recipe, parties.method
        wanted = recipe.evaluation.calibrate and recipe.data.task == "classification"
        if (
            not (wanted and has_one_model(recipe) and isinstance(method, ScalesLogits))
            or method.keeps_parts()
        ):
            return state, None
        if method.scaled(state, 1.0) is None:
            return state, None
        scale = self.evaluation.scale(state)
        return method.scaled(state, scale) or state, scale

    def _finish(self, parties: Federation, elapsed: float) -> dict[str, Any]:
        recipe, data, method, begun = self.recipe, parties.data, parties.method, time.perf_counter()
        self.progress.phase("evaluating the best round")
        best = self._best()
        checkpoint = self.checkpoints.load(best)
        parties.memories.restore(best, checkpoint.memories, checkpoint.files)
        state, scale = self._calibrated(checkpoint.state, parties)
        result = self.evaluation.final(state, checkpoint.state)
        if result.predictions is not None:
            lines = "".join(result.prediction_lines(data))
            write_text(self.directory / "predictions.jsonl", lines)
        self.progress.phase("writing the model")
        for name, text in method.notes(state).items():
            write_text(self.directory / name, text)
        if has_one_model(recipe):
            write_folder(self.directory / "model", lambda folder: method.export(state, folder))
        finishing = time.perf_counter() - begun
        summary = summarise(
            recipe,
            data,
            result,
            self.history.rows,
            best=best,
            sizes=method.sizes(state),
            untuned=state.values.get("untuned", {}),
            elapsed=elapsed,
            finishing=finishing,
            temperature=None if scale is None else 1 / scale,
            search=read_json(file) if (file := self.directory / "search.json").exists() else None,
            a_query=method.bytes_a_query() if isinstance(method, AsksClients) else None,
        )
        write_json(self.directory / "summary.json", summary)
        return summary


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
