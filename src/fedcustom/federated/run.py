"""One run, from a recipe to a run directory: its parties, the federated loop, the final evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..core import environment
from ..core.errors import ExportError
from ..core.files import read_json, write_folder, write_json, write_text
from ..data.truncation import in_words
from ..evaluation import degenerate
from ..methods import AsksClients, CountsCuts, ScalesLogits, State
from ..methods.tuning.export_check import ComparesExport, check_export, some, wanted
from ..privacy.accounting import Guarantee
from ..recipe import Recipe
from ..recipe.paths import absolute
from ..updates.identity import Identity, identity_of
from ..updates.transform import UpdateTransform
from . import fingerprint
from .callbacks import Callback, Callbacks
from .loop import FedAvg
from .private_run import forget_key
from .resolve import resolved
from .resources import memory_warning
from .run_directory import RunDirectory
from .simulation import Federation, Gather, gathered, has_one_model, simulate
from .summary import summarise
from .tracking.follow import followed


def run_recipe(
    recipe: Recipe,
    directory: Path,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] | Callbacks = (),
    gather: Gather = simulate,
    data_changed: Literal["refuse", "accept"] = "refuse",
    check_export: bool = True,
    transforms: Sequence[UpdateTransform] = (),
) -> dict[str, Any]:
    """Run a recipe into a directory and return its summary.

    A directory that holds the finished run of the same recipe is left as it is. One that holds an unfinished
    run is continued if ``resume`` is set.

    Args:
        callbacks: Told of every event of the run.
        gather: Puts the run's parties together; by default all of them in this process.
        data_changed: Whether the run goes on where its rows are not those that it began with; across sites,
            the server's own rows.
        check_export: Load the model that the run writes in a fresh process, without this package, and compare
            its outputs with the trained model's.
        transforms: What the caller has done to updates on their way, beside what the recipe names
            (:mod:`fedcustom.updates.transform`). They are a part of the run's identity; callbacks are not, as
            they change nothing of a run.

    Raises:
        RunError: the directory holds something else, or a run with other transforms; the rows have changed,
            too few clients answered in a round, or the written model gives other outputs than the trained
            one.
        RecipeError, DataError, ModelError: what the recipe names does not exist or does not fit together.
    """
    recipe, place = absolute(resolved(recipe)), RunDirectory(directory)
    told = callbacks if isinstance(callbacks, Callbacks) else Callbacks(callbacks)
    accept = data_changed == "accept"
    identities = [identity_of(transform) for transform in transforms]
    finished = place.finished(recipe, identities, resume=resume)
    if finished is not None:
        if text := fingerprint.check_finished(directory, recipe, accept=accept):
            told.on_note(f"{directory}: {text}")
        told.on_note(f"{directory} holds this run already; nothing to do")
        if recipe.tracking is not None:
            with place.locked(), followed(recipe, place, told, finished):
                pass
        told.raise_failure()
        return finished
    with place.locked():
        finished = place.finished(recipe, identities, resume=resume)  # another may have been at it until now
        if finished is not None:
            return finished
        try:
            with followed(recipe, place, told):
                summary = _run(
                    recipe, place, told, gather, transforms, identities, accept=accept, check=check_export
                )
        except BaseException as error:
            told.on_phase("")
            if told.failure is not None:
                error.add_note(f"before that a callback raised {told.failure!r}")
            raise
        told.on_phase("")
        told.raise_failure()
        return summary


def _run(
    recipe: Recipe,
    directory: RunDirectory,
    callbacks: Callbacks,
    gather: Gather,
    transforms: Sequence[UpdateTransform],
    identities: Sequence[Identity],
    *,
    accept: bool,
    check: bool,
) -> dict[str, Any]:
    """From the last checkpoint, or from the beginning, to the summary. ``accept``: with other rows too;
    ``check``: compare the model that is written with the trained one.
    """
    started = time.perf_counter()
    environment.restart_peak_memory()
    path, memories = directory.path, directory.checkpoints.clients
    with gathered(gather, recipe, path, memories, callbacks, transforms) as parties:
        rows = parties.fingerprint
        difference = fingerprint.check(path, rows, accept=accept) if rows else None
        too_large = memory_warning(recipe, parties) if gather is simulate else None
        loop = FedAvg(recipe, parties, directory, callbacks)
        callbacks.raise_failure()
        del parties  # with the first state, which is held no longer than the loop needs it
        directory.describe(recipe, loop.federation.base, identities)
        if loop.federation.private is not None:
            loop.federation.private.write(path)
        _record_hidden(loop)
        if rows:
            fingerprint.record(path, rows)
        _tell(recipe, loop, difference, too_large)
        loop.run()
        forget_key(path)
        _record_hidden(loop)
        summary = _finish(loop, time.perf_counter() - started, check=check)
        callbacks.on_run_end(summary)
        if text := degenerate.in_words(summary.get("degenerate", {})):
            loop.warn(text)
        return summary


def _record_hidden(loop: FedAvg) -> None:
    """Write down what hides the clients' rows, and how often each client's have been used."""
    if loop.federation.hidden is not None:
        loop.federation.hidden.write(loop.directory.path, loop.federation.memories.snapshot()[0])


def _tell(recipe: Recipe, loop: FedAvg, difference: str | None, too_large: str | None) -> None:
    """Say before the first round what users should know: that rows have changed, how the model was loaded,
    that memory is short, and what is cut.
    """
    base, callbacks = loop.federation.base, loop.callbacks
    if difference is not None:
        loop.warn(f"{loop.directory.path}: {difference}")
    if report := base.loading.in_words():
        tell = callbacks.on_note if base.loading.concerns_body else callbacks.on_information
        tell(f"loading {base.name}: {report}")
    if too_large is not None:
        loop.warn(too_large)
    for sentence in in_words(loop.federation.truncation):
        loop.warn(sentence)
    if recipe.model.device_map is not None and not base.spans:
        callbacks.on_note(
            f"model.device_map = {recipe.model.device_map!r}: all of {base.name} lies on {base.device}"
        )
    if base.quantised:
        callbacks.on_note(f"{base.name}: {base.quantised.in_words()}")
    if base.measured:
        steps = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in base.measured.items())
        callbacks.on_note(f"model.dtype = auto: {base.precision} (a step: {steps})")


def _finish(loop: FedAvg, elapsed: float, *, check: bool) -> dict[str, Any]:
    """Calibrate, evaluate and export the state of the best round, and write the summary."""
    begun = time.perf_counter()
    recipe, directory, federation, callbacks = loop.recipe, loop.directory, loop.federation, loop.callbacks
    method, path = federation.method, directory.path
    callbacks.on_phase("evaluating the best round")
    best = directory.best_round(recipe)
    checkpoint = directory.checkpoints.load(best)
    federation.memories.restore(best, checkpoint.memories, checkpoint.files)
    state, scale = _calibrated(recipe, checkpoint.state, federation)
    result = federation.evaluation.final(state, checkpoint.state)
    if result.predictions is not None:
        write_text(path / "predictions.jsonl", "".join(result.prediction_lines(federation.data)))
    callbacks.on_phase("writing the model")
    counting = [each for each in (method, federation.transport) if isinstance(each, CountsCuts)]
    cuts = [text for each in counting for text in each.take_cuts()]
    for text in cuts:
        loop.warn(text)
    for name, text in method.notes(state).items():
        write_text(path / name, text)
    if has_one_model(recipe):
        _export(loop, state, path / "model", check=check)
    summary = summarise(
        recipe,
        federation.data,
        result,
        directory.history.rows,
        best=best,
        sizes=method.sizes(state),
        untuned=checkpoint.untuned,
        elapsed=elapsed,
        finishing=time.perf_counter() - begun,
        temperature=None if scale is None else 1 / scale,
        search=read_json(file) if (file := path / "search.json").exists() else None,
        truncation=federation.truncation,
        cuts=cuts,
        a_query=method.bytes_a_query() if isinstance(method, AsksClients) else None,
        guarantee=_guarantee(federation),
    )
    write_json(path / "summary.json", summary)
    return summary


def _guarantee(federation: Federation) -> Guarantee | None:
    """What the run promises of privacy; None where it promises nothing, or its sites alone know what."""
    if federation.private is not None:
        return federation.private.mechanism.guarantee()
    return federation.hidden.guarantee() if federation.hidden is not None else None


def _export(loop: FedAvg, state: State, target: Path, *, check: bool) -> None:
    """Write the model of a state, and compare it with the one in memory before it takes its place."""
    method, data, callbacks = loop.federation.method, loop.federation.data, loop.callbacks

    def fill(folder: Path) -> None:
        method.export(state, folder)
        if not isinstance(method, ComparesExport):
            return
        if not wanted(check):
            callbacks.on_information("the exported model is not compared with the trained one: switched off")
            return
        callbacks.on_phase("comparing the written model with the trained one")
        expected = method.reference(state, some(data.test or data.development))
        if expected is not None and (text := check_export(folder, expected)):
            loop.warn(text)

    try:
        write_folder(target, fill)
    except ExportError as error:
        raise ExportError(f"{target.parent}: {error}; the rounds are kept: go on with --resume") from None


def _calibrated(recipe: Recipe, state: State, federation: Federation) -> tuple[State, float | None]:
    """Temperature scaling (Guo et al. 2017): the state with its logits multiplied by the factor that the
    development split gives, and that factor; None where they are not calibrated.
    """
    method = federation.method
    wanted = recipe.evaluation.calibrate and recipe.data.task == "classification"
    if not (wanted and has_one_model(recipe) and isinstance(method, ScalesLogits)) or method.keeps_parts():
        return state, None
    if method.scaled(state, 1.0) is None:
        return state, None
    scale = federation.evaluation.scale(state)
    return method.scaled(state, scale) or state, scale
