"""Local training on the resident model, one client at a time or many in one batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ...core.environment import free_memory
from ...core.errors import RecipeError
from ...core.tensors import Tensors, count, part
from ...data.tokens import Batch, TokenizedExample, of_one_length
from ...models.checkpointing import Carry, checkpointed_layers, checkpointing, kept_share
from ...models.first_token import carry_classifying
from ...models.forward import LABEL_OFFSET
from ...models.frozen_layers import LowerLayers, lower_layers
from ...models.load import Base
from ...privacy.example_mechanism import RowPrivacy
from ...training.local import LocalResult, train_locally
from ...training.settings import TrainingSettings
from ..messages import Update
from ..messages import Work as Amount
from ..protocol import Client
from .aggregation_hooks import AggregationHooks
from .batching.agreement import disagreement
from .batching.client_modules import ClientModules, stand_ins
from .batching.trainer import PassBudget, Work, train_together
from .drift_corrections import Correction
from .lower_check import passes_by
from .messages import TrainTask
from .objective import Objective
from .technique import TrainableModel

MOST_CLIENTS = 64
"""Clients that are trained in one batch at most; beyond that nothing is gained."""

SCALE = "scale"
"""The name under which a batch's clients have what their products are multiplied by."""


@dataclass(frozen=True)
class Job:
    """One client's training, ready to begin."""

    task: TrainTask
    client: Client
    correction: Correction
    hooks: AggregationHooks
    before: Tensors
    batches: list[list[TokenizedExample]]
    shift: Tensors
    seed: list[int]
    stop: int
    label_offset: Tensor | None = None
    """What is added to the logits while the client trains, (labels,)."""
    resting: frozenset[str] = frozenset()
    """The tensors that are not trained in this round, whatever the method's rules say."""
    privacy: RowPrivacy | None = None
    """By what each of the client's rows is hidden."""

    @property
    def number(self) -> int:
        """The round that the task belongs to."""
        return self.task.round_number

    def trains(self, name: str) -> bool:
        """Whether a tensor is trained."""
        return self.hooks.trains(name, self.number) and name not in self.resting

    @property
    def factor(self) -> float:
        """What the learning rates are multiplied by."""
        return self.task.learning_rate_factor


class LocalTraining:
    """Trains what a technique attached to the base model; ``rows``, of unlike lengths, are for trials."""

    def __init__(
        self,
        trainable: TrainableModel,
        objective: Objective,
        training: TrainingSettings,
        base: Base,
        loss: Callable[[Batch], Tensor],
        rows: Sequence[TokenizedExample],
    ) -> None:
        self.trainable, self.objective, self.training = trainable, objective, training
        self.rows = rows
        self.unshared: str | None = None
        self.device, self.compiled, self.loss = base.device, base.compile, loss
        self.spans = base.spans
        self.padding, self.coarse = base.padding, base.precision != "float32"
        if training.optimizer == "muon" and not trainable.matrices:
            raise RecipeError("training.optimizer = 'muon': this method trains no matrices; use 'adamw'")

    def widest(self) -> int:
        """How many clients to train in one batch: as many as the recipe says, or as fit into a quarter of
        the free memory; 1 where that is not possible.
        """
        training, trainable = self.training, self.trainable
        plain = not (training.dropout or trainable.active_dropout or self.compiled)
        possible = self.objective.separable and plain
        if training.cohort_width == 1 or not possible or self._stand_ins is None:
            return 1
        if training.cohort_width is not None:
            return training.cohort_width
        # Of each client: state, gradient, two moments, and the tensors before and after.
        each = 6 * 4 * count(trainable.parameters.values())
        return max(1, min(MOST_CLIENTS, int(0.25 * free_memory(self.device)) // each))

    def check_row_gradients(self) -> None:
        """Refuse what has no gradient of its own for each row of a batch.

        Raises:
            RecipeError: names the setting, or says what of the model's code does not keep rows apart.
        """
        where = "privacy.unit = 'example': each row needs a gradient of its own"
        if not self.objective.separable:
            raise RecipeError(f"{where}, and the loss of a row depends on its batch")
        if self.compiled:
            raise RecipeError(f"{where}; set model.compile = false")
        if self.training.dropout or self.trainable.active_dropout:
            raise RecipeError(f"{where}, of a model without dropout; set training.dropout = false")
        if self._stand_ins is None:
            reason = f"the model's code gives {self.unshared}" if self.unshared else "it trains whole layers"
            raise RecipeError(f"{where}, which this method has not on this model ({reason})")

    def alone(self, job: Job) -> LocalResult:
        """One client's training; the model has its tensors already, and its trained ones afterwards.

        Raises:
            UpdateError: the training loss is not finite.
        """
        trainable = self.trainable
        trained = {n: p for n, p in trainable.parameters.items() if job.trains(n)}
        with torch.random.fork_rng(devices=[]), only_these_train(trainable.parameters, trained):
            torch.manual_seed(int.from_bytes(hashlib.sha256(repr(job.seed).encode()).digest()[:7], "big"))
            trainable.model.train(self.training.dropout)
            for module in trainable.active_dropout:
                module.train()
            with self._passing_by(), self._checkpointing(carry_classifying):
                return train_locally(
                    trained,
                    (self._pieces(batch, job.label_offset) for batch in job.batches),
                    self.loss,
                    job.correction.training(self.training),
                    job.factor,
                    head=trainable.head,
                    matrices=self.trainable.matrices,
                    moments=part(job.client.memory.tensors, "moments/"),
                    shift=job.shift,
                )

    def together(
        self, jobs: Sequence[Job], close: Callable[[Job, LocalResult], Update]
    ) -> list[Update | Exception]:
        """The clients' updates, or the errors that they met. ``close`` makes an update of a result while the
        model holds the client's trained tensors.
        """
        buckets: dict[Hashable, list[int]] = {}
        for position, job in enumerate(jobs):
            alike = job.number, job.factor, bool(job.shift), job.label_offset is None, job.privacy is None
            buckets.setdefault(alike, []).append(position)
        answers: dict[int, Update | Exception] = {}
        for positions in buckets.values():
            bucket = [jobs[i] for i in positions]
            shared = self._stand_ins is not None and (len(bucket) > 1 or bucket[0].privacy is not None)
            found = self._in_one_batch(bucket, close) if shared else self._in_turn(bucket, close)
            answers |= zip(positions, found, strict=True)
        return [answers[position] for position in range(len(jobs))]

    def _pieces(
        self, rows: Sequence[TokenizedExample], offset: Tensor | None
    ) -> Iterator[tuple[Batch, float]]:
        """A batch, and its weight in the loss; one that is larger than the recipe says, in parts."""
        size = self.training.batch_size if self.objective.separable else len(rows)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        if self.padding == "none":
            parts = [[some[i] for i in alike] for some in parts for alike in of_one_length(some)]
        units = [max(1, sum(map(self.objective.units, part))) for part in parts]
        for some, share in zip(parts, units, strict=True):
            yield self._collated(some, offset), share / sum(units)

    def _collated(self, rows: Sequence[TokenizedExample], offset: Tensor | None) -> Batch:
        """One batch, with what is added to its logits: the same for all rows, (labels,), or a row of its own
        for each.
        """
        batch = self.objective.collate(rows)
        if offset is not None:
            batch[LABEL_OFFSET] = offset.to(self.device)
        if self._lower is not None:
            self._lower.expect(rows, batch["attention_mask"])
        return batch

    @cached_property
    def _lower(self) -> LowerLayers | None:
        """The layers that give the same for an example every time; an eighth of the free memory keeps it, and
        of main memory another, where the model is on an accelerator. None where layers lie on several
        devices: accelerate replaces their forward passes too.
        """
        trainable = self.trainable
        plain = not (self.training.dropout or trainable.active_dropout or self.compiled or self.spans)
        if not plain or not (self.objective.separable and self.objective.one_pass):
            return None
        found = lower_layers(trainable.model, trainable.parameters, trainable.head, self._kept_bytes)
        if found is None:
            return None
        equal = self.padding == "none"
        if passes_by(found, trainable, self.objective, self.rows, coarse=self.coarse, equal=equal):
            return found
        found.remove()
        return None

    def _kept_bytes(self) -> tuple[int, int]:
        """How much of what enters the first trained layer may be kept where the model is, and in main memory
        beside that.
        """
        room = free_memory(self.device) // 8
        return room, 0 if self.device.type == "cpu" else free_memory(torch.device("cpu")) // 8

    def kept_states(self) -> str | None:
        """How much is kept of what lower layers give, in one line; None where nothing is."""
        if (lower := self._lower) is None:
            return None
        room, each = lower.room + lower.spare + lower.held, max(1, lower.bytes_per_token)
        return (
            f"layers below {len(lower.below)} are computed once for each example: {each:,} bytes a token are "
            f"kept, of {room // each:,} tokens at most ({room / 2**30:.1f} GB, an eighth of the free memory)"
        )

    @contextmanager
    def _passing_by(self) -> Iterator[None]:
        """Afterwards the model computes all of its layers, however training ended."""
        try:
            yield
        finally:
            if self._lower is not None:
                self._lower.forget()

    def _lanes(self) -> int:
        """How many passes of a cohort's step may run at a time: one on an accelerator, and where the lower
        layers are told which batch comes next.
        """
        return torch.get_num_threads() if self.device.type == "cpu" and self._lower is None else 1

    def _checkpointing(self, *carried: Carry) -> AbstractContextManager[None]:
        """Meanwhile, passes keep what the recipe says: everything, or the inputs of layers."""
        if not self.training.gradient_checkpointing:
            return nullcontext()
        dropout = self.training.dropout or bool(self.trainable.active_dropout)
        return checkpointing(self.trainable.model, carried, dropout=dropout)

    @cached_property
    def _room(self) -> PassBudget:
        return self.pass_budget()

    def pass_budget(self) -> PassBudget:
        """How many tokens a pass may have, yet to be measured."""
        model, share = self.trainable.model, 1.0
        if self.training.gradient_checkpointing:
            share = kept_share(len(checkpointed_layers(model)))
        return PassBudget(model.parameters(), share)

    @cached_property
    def _stand_ins(self) -> ClientModules | None:
        """What lets several clients share a batch; None where they cannot, of which ``unshared`` may say
        why.
        """
        found = stand_ins(self.trainable.model, self.trainable.parameters)
        if found is None or not self.objective.separable:
            return found
        self.unshared = disagreement(
            found, self.trainable, self.objective, self.rows, coarse=self.coarse, equal=self.padding == "none"
        )
        return None if self.unshared else found

    def _in_turn(
        self, jobs: Sequence[Job], close: Callable[[Job, LocalResult], Update]
    ) -> Iterator[Update | Exception]:
        for job in jobs:
            self.trainable.write(job.before)
            try:
                yield close(job, self.alone(job))
            except Exception as error:  # whatever one client does wrong, the others go on
                yield error

    def _in_one_batch(
        self, jobs: Sequence[Job], close: Callable[[Job, LocalResult], Update]
    ) -> Iterator[Update | Exception]:
        modules, parameters, first = self._stand_ins, self.trainable.parameters, jobs[0]
        assert modules is not None
        stacks = {n: p.new_empty(len(jobs), *p.shape) for n, p in parameters.items()}
        with torch.no_grad():
            for position, job in enumerate(jobs):
                values = self.trainable.inwards(job.before)
                for name, stack in stacks.items():
                    stack[position] = values[name]
        trained = [n for n in parameters if first.trains(n)]  # in an order that is the same everywhere

        def losses(tensors: Mapping[str, Tensor], rows: Sequence[TokenizedExample], owners: Tensor) -> Tensor:
            own = {name: tensors[name] for name in parameters}
            modules.give(own, owners, tensors.get(SCALE), self.trainable.scaled)
            offset = tensors[LABEL_OFFSET][owners.to(self.device)] if LABEL_OFFSET in tensors else None
            return self.objective.row_losses(self.trainable.model, self._collated(rows, offset))

        fixed = {name: stack for name, stack in stacks.items() if name not in trained}
        offsets = [job.label_offset for job in jobs if job.label_offset is not None]
        if offsets:
            fixed[LABEL_OFFSET] = torch.stack(offsets).to(self.device)
        scales = [self.trainable.scale(job.before) for job in jobs]
        if len(set(scales)) > 1:  # the model has the last client's
            fixed[SCALE] = torch.tensor([scale / scales[-1] for scale in scales], device=self.device)
        self.trainable.model.eval()
        recomputing = self._checkpointing(carry_classifying, modules.carry)
        with modules.in_place(), self._passing_by(), recomputing:
            results = train_together(
                {name: stacks[name] for name in trained},
                [Work(job.batches, job.shift, job.privacy) for job in jobs],
                losses,
                first.correction.training(self.training),
                first.factor,
                units_of=self.objective.units,
                head=self.trainable.head,
                matrices=self.trainable.matrices,
                fixed=fixed,
                room=self._room,
                lanes=self._lanes(),
                equal=self.padding == "none",
            )
        for position, (job, result) in enumerate(zip(jobs, results, strict=True)):
            try:
                if isinstance(result, Exception):
                    raise result
                self.trainable.write(job.before)
                with torch.no_grad():
                    for name, parameter in parameters.items():
                        parameter.copy_(stacks[name][position])
                yield close(job, result)
            except Exception as error:
                yield error


def batch_ranges(count: int, start: int, batch_size: int, amount: Amount) -> list[tuple[int, int]]:
    """Where each batch begins and ends in the client's endless stream of examples.

    A batch never crosses the end of a pass over the
    client's ``count`` examples, so that one epoch is every example once in ceil(count / batch_size) steps;
    or, where ``amount`` has ``batches`` too, in min(count, batches) steps, whose sizes differ by one at most.
    A part of an epoch is the nearest whole number of examples, and one at least.
    """
    steps: float = math.inf
    if amount.steps is not None:
        steps, stop = amount.steps, start + amount.steps * batch_size
    elif amount.examples is not None:
        stop = start + amount.examples
    else:
        stop = start + max(1, round((amount.epochs or 0) * count))
    ranges: list[tuple[int, int]] = []
    batches = min(count, amount.batches) if amount.batches is not None else None
    while start < stop and len(ranges) < steps:
        whole, seen = start // count * count, start % count
        if batches is None:
            end = min(start + batch_size, stop, whole + count)
        else:  # the first of the points i * count / batches, rounded down, that lies beyond
            i = math.ceil((seen + 1) * batches / count)
            end = min(whole + i * count // batches, stop)
        ranges.append((start, end))
        start = end
    return ranges


@contextmanager
def only_these_train(
    parameters: Mapping[str, nn.Parameter], trained: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """Meanwhile, no gradient is computed for the other parameters."""
    resting = [parameter for name, parameter in parameters.items() if name not in trained]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)
