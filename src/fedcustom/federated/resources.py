"""Resources that a run needs: parameters, bytes, memory, and seconds by measured steps."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..core import environment
from ..core.errors import RecipeError, RunError
from ..data.examples import Example
from ..methods import WeightTuning, Work, client_labels
from ..methods.tuning.head_fit import as_if_fitted
from ..methods.tuning.local_training import batch_ranges
from ..models.load import Base
from ..models.quantised_layers import count_weights, stored_bytes
from ..recipe import Recipe
from ..recipe.paths import absolute
from .callbacks import Callback, Outline
from .cost_estimate import outline
from .resolve import resolved
from .schedule import Plan, plan_rounds
from .simulation import Federation, gathered, simulate

STEPS = 2
"""Steps of each client that are measured, after one that is not; fewer where rows are hidden by noise for
fewer."""

FLOAT = 4
"""Bytes of a trained number, which is float32."""

SMALL = 50_000_000
"""Parameters of models that train wherever they load."""

MOMENTS = 3 * FLOAT
"""Bytes of its gradient and its two moments while its client trains."""


@dataclass(frozen=True)
class Resources:
    """What a run needs.

    ``parameters`` are all of the model's with the method attached, which take ``model_bytes``; ``trained``
    those that the method trains, and ``head`` those of the head. ``client_bytes`` is the memory of a process
    in which one client trains, on the device that trains: what this process holds once the model is loaded,
    gradients and moments, and the activations of a batch. ``server_bytes`` is that of a server across sites:
    the same, with the state, a sum and one update in place of training. ``process_bytes`` is the most main
    memory that this process held while the cohort of a round trained for the measured steps, and
    ``available_bytes`` what the device has left, with what this process holds. ``round_seconds`` are those of
    the training of a round's cohort in this process, ``run_seconds`` those of all rounds, without
    evaluations; None where no round trains.
    """

    outline: Outline
    parameters: int
    model_bytes: int
    trained: int
    head: int
    client_bytes: int
    server_bytes: int
    process_bytes: int
    available_bytes: int
    round_seconds: float | None
    run_seconds: float | None

    @property
    def exceeds(self) -> str | None:
        """What this machine has too little of, in a sentence."""
        return exceeds(self.client_bytes, self.available_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, by name."""
        return asdict(self)


def exceeds(needed: int, available: int) -> str | None:
    """That a client needs more bytes of memory than a device has, in a sentence; None where it does not."""
    if needed <= available:
        return None
    return (
        f"a client needs about {needed / 1e9:.1f} GB of memory; this machine has "
        f"{available / 1e9:.1f} GB left (docs/memory.md: what takes less)"
    )


def memory_warning(recipe: Recipe, federation: Federation) -> str | None:
    """That this machine has too little memory to train one client, before any is trained: a forward pass of
    one batch is measured. Models of fewer than :data:`SMALL` parameters are not looked at.
    """
    method, base = federation.method, federation.base
    if not isinstance(method, WeightTuning) or count_weights(base.model) < SMALL:
        return None
    held, available = _memory(base)
    trained = MOMENTS * sum(method.sizes(federation.origin))
    with torch.random.fork_rng(devices=[]):  # the run's own draws stay as they are
        return exceeds(held + trained + _activations(recipe, federation, method), available)


def _memory(base: Base) -> tuple[int, int]:
    """Bytes that this process holds on the devices of the model, and those with what is free there."""
    held = sum(map(environment.held_memory, base.devices))
    return held, held + sum(map(environment.free_memory, base.devices))


def measure_resources(recipe: Recipe, callbacks: Callback | None = None) -> Resources:
    """Load what a recipe names, and train the cohort of its first round that trains for a few steps; nothing
    is kept.

    Raises:
        RecipeError: the method trains no tensors.
        FedcustomError: as a run of the recipe would.
    """
    told = callbacks or Callback()
    recipe = absolute(resolved(recipe))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        environment.restart_peak_memory()
        with gathered(simulate, recipe, place, place / "clients", told) as federation:
            return resources_of(recipe, federation, told)


def untrained(recipe: Recipe) -> str:
    """Why there are no steps to measure, in a sentence, where a method trains no tensors."""
    return (
        f"method.name = {recipe.method.name!r}: trains no tensors, so that there are no steps to "
        "measure; fedcustom run says before its first round what it sends"
    )


def resources_of(recipe: Recipe, federation: Federation, callbacks: Callback) -> Resources:
    """The same of parties that are there, whose memories are of no further use.

    Args:
        recipe: the complete recipe of the federation.

    Raises:
        RecipeError: the method trains no tensors.
    """
    method = federation.method
    if not isinstance(method, WeightTuning):
        raise RecipeError(untrained(recipe))
    state = federation.origin
    model_bytes = stored_bytes(federation.base.model)
    held, available = _memory(federation.base)
    settled = recipe.settled(len(federation.data.clients))
    turns = federation.private.turns() if federation.private else None
    plan = plan_rounds(settled, federation.data, client_labels(state), turns)
    cost = outline(settled, federation.data, method, state, plan)
    callbacks.on_phase("measuring steps")
    seconds = _seconds(settled, federation, plan)
    activations = _activations(settled, federation, method)
    callbacks.on_phase("")
    trained, head = method.sizes(state)
    one, whole = (None, None) if seconds is None else seconds
    return Resources(
        outline=cost,
        parameters=count_weights(federation.base.model),
        model_bytes=model_bytes,
        trained=trained,
        head=head,
        client_bytes=held + MOMENTS * (trained + head) + activations,
        server_bytes=held + 3 * FLOAT * (trained + head),
        process_bytes=environment.peak_memory(),
        available_bytes=available,
        round_seconds=one,
        run_seconds=whole,
    )


def _seconds(recipe: Recipe, federation: Federation, plan: Plan) -> tuple[float, float] | None:
    """Seconds of the first round that trains and of all of them, by the examples that the measured steps saw;
    None where there is no such round.
    """
    method, data = federation.method, federation.data
    fits = recipe.training.rounds_of_head_fits(recipe.rounds.count)
    numbers = [number for number in range(1, len(plan) + 1) if number not in fits]
    if not numbers:
        return None
    first, size = numbers[0], recipe.training.batch_size
    owned = [example.label for client in data.clients.values() for example in client.train]
    state = federation.origin
    if fits and recipe.data.task == "classification":
        counts = [max(1, owned.count(label)) for label in range(len(data.task.labels))]
        state = as_if_fitted(state, counts)

    def examples(name: str, amount: Work) -> int:
        rows = len(data.clients[name].train) if name in data.clients else len(owned)
        return sum(end - start for start, end in batch_ranges(rows, 0, size, amount)) if rows else 0

    def trained(steps: int) -> tuple[float, int]:
        amounts = {name: Work(steps=steps) for name in plan[first - 1]}
        tasks, seen, begun = method.configure(state, first, amounts), 0, time.perf_counter()
        for reply in federation.transport.exchange(tasks, first):
            if reply.update is None and not reply.summed:
                raise RunError(f"{reply.client}: {reply.reason}: {reply.detail}")
            if reply.client in amounts:  # and not a sum
                seen += examples(reply.client, amounts[reply.client])
        return time.perf_counter() - begun, seen

    steps = STEPS
    if federation.hidden is not None:  # no more than are planned, which is what their noise is for
        planned = [one.planned.steps for one in federation.hidden.mechanisms.values()]
        steps = min(STEPS, *planned)
        if min(planned) > STEPS:
            trained(1)
    else:
        trained(1)
    seconds, seen = trained(steps)
    each = [sum(examples(name, a.amount) for name, a in plan[n - 1].items() if not a.absent) for n in numbers]
    return seconds / seen * each[0], seconds / seen * sum(each)


def _activations(recipe: Recipe, federation: Federation, method: WeightTuning) -> int:
    """Bytes that a client's batch keeps for its backward pass, of the longest texts among a hundred rows.
    No others are tokenised: of preference pairs, that takes a pass of the reference model.
    """
    some = [example for client in federation.data.clients.values() for example in client.train[:10]][:100]
    longest = sorted(some, key=lambda example: -_characters(example))[: recipe.training.batch_size]
    batch = method.objective.collate(method.tokens(longest))
    budget, tokens = method.local.pass_budget(), batch["input_ids"].numel()
    budget.tokens(tokens, lambda: method.local.loss(batch), federation.base.device)
    return int((budget.bytes_per_token or 0) * tokens)


def _characters(example: Example) -> int:
    """How long what the model is given and learns to write is."""
    given = [message.content for message in example.messages] or [example.text]
    return sum(map(len, given)) + max(len(example.target), len(example.rejected))
