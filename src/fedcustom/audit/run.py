"""The audit of a run: rounds are replayed from its directory, and each attack is made on what it sees."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..core import environment
from ..core.errors import RunError, UpdateError
from ..federated.callbacks import Callback
from ..federated.replay import Replay, finished_recipe
from ..federated.resolve import resolved
from ..federated.round_recorder import RecordedRounds, RoundRecorder, has_secret_noise
from ..federated.run import run_recipe
from ..federated.run_directory import History, RunDirectory
from ..methods import State
from ..recipe import Recipe
from ..transport.protocol import Reply
from ..updates.transform import UpdateTransform
from .attack import (
    LATE,
    Attack,
    CannotAttack,
    Deadline,
    Keeper,
    OutOfTime,
    Received,
    RoundKind,
    RoundView,
    Summed,
    Target,
)
from .promise import promised_delta, promised_epsilon
from .registry import chosen
from .results import Audit, CheckedRound, Finding, NotRun, write_audit

MINUTES = 5.0
"""How long an audit may take, unless told otherwise."""

KEPT_SHARE = 0.25
"""Of the free memory: what the messages of a round may take."""


class _Activity(Callback):
    """Passes on what is being done and what is to be noted, and no event of a run."""

    def __init__(self, told: Callback) -> None:
        self.told = told

    def on_phase(self, text: str, done: int = 0, of: int = 0) -> None:
        """Pass it on."""
        self.told.on_phase(f"replaying: {text}" if text else "", done, of)

    def on_note(self, text: str) -> None:
        """Pass it on."""
        self.told.on_note(text)


@dataclass
class _Progress:
    """What an audit has found so far."""

    findings: list[Finding] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    rounds: list[CheckedRound] = field(default_factory=list)


def audit_run(
    directory: Path,
    *,
    attacks: Sequence[str] = (),
    minutes: float = MINUTES,
    callbacks: Callback | None = None,
    transforms: Sequence[UpdateTransform] = (),
) -> Audit:
    """Attack a finished run and write ``audit.json`` into its directory.

    Rounds are repeated in this process (:class:`~fedcustom.federated.replay.Replay`): of those that train and
    of those that fit the head the first, the middle and the last. What an attack is judged by are the
    clients' own examples, which only an audit in one process has. Nothing is sent.

    Args:
        attacks: Their names; all, by default.
        minutes: When they are over, what is left is listed, not made.
        callbacks: Told what is being done.
        transforms: Those of updates that the caller gave the run.

    Raises:
        RunError: the run cannot be replayed; the message says why.
    """
    began = time.monotonic()
    if not 0 < minutes < 1e6:
        raise RunError(f"--minutes = {minutes:g}: must be a positive number")
    wanted, told = chosen(attacks), callbacks or Callback()
    recipe = finished_recipe(directory)
    epsilon, delta = promised_epsilon(directory), promised_delta(directory)
    deadline, keepers = Deadline(began + 60 * minutes), dict[int, Keeper]()

    def seen(number: int, reply: Reply) -> None:
        deadline.check()
        if (keeper := keepers.get(number)) is None or reply.update is None:
            return
        if reply.clients:
            keeper.take_sum(Summed(reply.clients, reply.task, reply.update))
        else:
            keeper.take(Received(reply.client, reply.task, reply.update))

    found = _Progress()
    activity = _Activity(told)
    source: Replay | RecordedRounds
    if has_secret_noise(recipe):
        source = RecordedRounds(directory, seen, activity, transforms)
    else:
        source = Replay(directory, seen, activity, transforms)
    with source:
        target = _target(source, delta)
        able = []
        for attack in wanted:
            reason = attack.inapplicable(target)
            able.append(attack) if reason is None else found.not_run.append(NotRun(attack.name, reason))
        origin = source.federation.origin if isinstance(source, RecordedRounds) else source.origin
        for number, kind in rounds_to_attack(recipe):
            ready = [attack for attack in able if kind in attack.kinds]
            if not ready:
                continue
            if (missing := _missing(source, number, deadline)) is not None:
                found.not_run += [NotRun(attack.name, missing, number) for attack in ready]
                continue
            keeper = Keeper(int(KEPT_SHARE * environment.free_memory(torch.device("cpu"))))
            keepers[number] = keeper
            try:
                round_ = source.round(number)
            except OutOfTime:
                found.not_run += [NotRun(attack.name, LATE, number) for attack in ready]
                continue
            recorded = isinstance(source, RecordedRounds)
            found.rounds.append(CheckedRound(number, round_.checkpoint and not recorded, recorded))
            unseen = len(keeper.unseen)
            if isinstance(source, RecordedRounds):
                unseen += source.left_out(number)
            view = RoundView(
                number, kind, round_.before, round_.after, keepers.pop(number).messages,
                list(keeper.answered) or target.cohorts.get(number, []), unseen, keeper.summed, keeper.sums,
            )  # fmt: skip
            for attack in ready:
                told.on_phase(f"round {number}: attack {attack.name}")
                _make(attack, target, view, deadline, found)
        if final := [attack for attack in able if "finished" in attack.kinds]:
            took_part = list(dict.fromkeys(name for names in target.cohorts.values() for name in names))
            view = RoundView(0, "finished", origin, released(directory, recipe), [], took_part)
            for attack in final:
                told.on_phase(f"attack {attack.name}")
                _make(attack, target, view, deadline, found)
    told.on_phase("")
    audit = Audit(
        findings=found.findings,
        not_run=found.not_run,
        rounds=found.rounds,
        promised_epsilon=epsilon,
        delta=delta,
        seconds=round(time.monotonic() - began, 1),
    )
    write_audit(directory, audit)
    return audit


def run_to_audit(recipe: Recipe, directory: Path, callbacks: Sequence[Callback] = ()) -> None:
    """Run a recipe into a directory, or go on with its run, and keep what an audit of a private run needs.

    Raises:
        FedcustomError: the recipe or what it names is not in order.
    """
    complete = resolved(recipe)
    if not has_secret_noise(complete):
        run_recipe(recipe, directory, resume=True, callbacks=callbacks)
        return
    recorder = RoundRecorder(directory, {number for number, _ in rounds_to_attack(complete)})
    run_recipe(recipe, directory, resume=True, callbacks=[*callbacks, recorder], gather=recorder.gather)


def _target(source: Replay | RecordedRounds, delta: float) -> Target:
    """What is attacked."""
    federation, cohorts = source.federation, dict[int, list[str]]()
    for number, row in source.rows.items():
        if number:
            cohorts[number] = [name for name in row["cohort"] if name not in row["left_out"]]
    return Target(source.recipe, federation.data, federation.method, delta, federation.private, cohorts)


def released(directory: Path, recipe: Recipe) -> State:
    """The state that a finished run released, before its temperature was fitted."""
    place = RunDirectory(directory)
    place.history.rows = History.read(place.history.path).rows
    return place.checkpoints.load(place.best_round(recipe)).state


def _missing(source: Replay | RecordedRounds, number: int, deadline: Deadline) -> str | None:
    """Why a round cannot be looked at; None where it can."""
    if isinstance(source, RecordedRounds) and (reason := source.missing(number)) is not None:
        return reason
    if isinstance(source, Replay) and source.stopped:
        return LATE
    if (needed := source.seconds(number)) <= deadline.left:
        return None
    return (
        f"no time{f': the rounds up to it take {needed:.0f} s' if deadline.left > 0 else ''}; raise --minutes"
    )


def _make(attack: Attack, target: Target, view: RoundView, deadline: Deadline, found: _Progress) -> None:
    """Make one attack on one round, or note why it was not."""
    try:
        deadline.check()
        for each in attack.attack(target, view, deadline):
            found.findings.append(each) if isinstance(each, Finding) else found.not_run.append(each)
    except OutOfTime:
        found.not_run.append(NotRun(attack.name, LATE, view.number or None))
    except (CannotAttack, UpdateError) as error:
        found.not_run.append(NotRun(attack.name, str(error), view.number or None))


def rounds_to_attack(recipe: Recipe) -> list[tuple[int, RoundKind]]:
    """The first, the middle and the last round of each kind, in order."""
    fits = recipe.training.rounds_of_head_fits(recipe.rounds.count)
    trains = [n for n in range(1, recipe.rounds.count + 1) if n not in fits]
    kinds: dict[RoundKind, list[int]] = {"training": trains, "fitting the head": sorted(fits)}
    return sorted(
        (number, kind)
        for kind, numbers in kinds.items() if numbers
        for number in {numbers[0], numbers[len(numbers) // 2], numbers[-1]}
    )  # fmt: skip
