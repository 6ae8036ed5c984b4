"""A client's side of methods that train tensors: its training, and its part in fitting the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...core.errors import DataError, UpdateError
from ...core.seeds import name_seed
from ...core.tensors import named, part, without, zeros_like
from ...data.tokens import example_order
from ...training.label_prior import label_offset
from ...training.local import LocalResult, learning_rate
from ..messages import Task, Update, typed
from ..protocol import Client
from .aggregation_hooks import AggregationHooks
from .drift_corrections import CONTROL, Correction
from .further_exchange import FurtherExchange
from .head_client import HeadClient
from .hidden_rows import STEPS, hidden_rows
from .local_training import Job, LocalTraining, batch_ranges
from .messages import SUMMED_KINDS, FitHeadTask, HeadSumsUpdate, HeadTask, TrainTask, TrainUpdate
from .parts import TokenCache, TuningParts
from .release import clipped_by_client
from .update_checks import check_state


class TuningClient:
    """What clients of one process do of a method that trains tensors, on one resident model."""

    def __init__(
        self, parts: TuningParts, local: LocalTraining, head: HeadClient, tokens: TokenCache
    ) -> None:
        self.parts, self.local, self.head, self.tokens = parts, local, head, tokens

    def execute(self, task: Task, client: Client) -> Update:
        """Train on the client's own examples and return the change of the tensors that travel; or, in a round
        that fits the head, the sums from which that is done; or what a further exchange of a round asks for.

        Raises:
            DataError: the client has nothing to train on.
            UpdateError: the training loss is not finite, or the task is none.
        """
        if (further := self._further(task)) is not None:
            return further.execute(task, client)
        asked = self._asked(task)
        if isinstance(asked, HeadTask):
            return self._head_sums(asked, client)
        return self.alone(self.prepare(asked, client, self.parts.correction, self.parts.hooks))

    def execute_together(self, pairs: Sequence[tuple[Task, Client]]) -> list[Update | Exception]:
        """The tasks of several clients, trained in one batch where the method, the recipe and their states
        allow it. An answer is what :meth:`execute` gives, to rounding, or the error that it raises.
        """
        jobs: list[Job | Update | Exception] = []
        self.tokens.add([client.data.train for _, client in pairs])
        self._read_together([(task, client) for task, client in pairs if isinstance(task, FitHeadTask)])
        for task, client in pairs:
            try:
                if (further := self._further(task)) is not None:
                    jobs.append(further.execute(task, client))
                    continue
                asked = self._asked(task)
                if isinstance(asked, HeadTask):
                    jobs.append(self._head_sums(asked, client))
                else:
                    jobs.append(self.prepare(asked, client, self.parts.correction, self.parts.hooks))
            except Exception as error:  # whatever one client does wrong, the others go on
                jobs.append(error)
        ready = [job for job in jobs if isinstance(job, Job)]
        answers = iter(self.local.together(ready, self.close))
        return [next(answers) if isinstance(job, Job) else job for job in jobs]

    def widest_cohort(self) -> int:
        """How many clients to train in one batch."""
        return self.local.widest() if self.parts.context.keeps == "nothing" else 1

    # --- training ---

    def prepare(
        self,
        task: TrainTask,
        client: Client,
        correction: Correction,
        hooks: AggregationHooks,
        *,
        own: bool = False,
    ) -> Job:
        """Everything that a client's training starts from.

        What is trained for the client's ``own`` use keeps the client's label prior, and all of it is trained,
        without noise.
        """
        parts = self.parts
        self.head.forget()
        examples = self.tokens.of(client.data.train)
        if not examples:
            raise DataError(f"client {client.name!r} has no examples to train on")
        before = parts.ownership.complete(without(task.tensors, CONTROL), client.memory)
        check_state(parts.trainable.inwards(before), parts.trainable.parameters)
        start = int(client.memory.values.get("examples_seen", 0))
        parted = task.work.batches
        if parted is not None and (type(parted) is not int or parted < 1):
            raise UpdateError(f"batches {parted!r}: must be a whole number from 1")
        seed = [parts.context.seed, 5, name_seed(client.name)]
        hidden = None
        if parts.context.row_privacy is not None and not own:
            privacy, number = parts.context.row_privacy, task.round_number
            hidden = hidden_rows(privacy, client.name, examples, client.memory, task.work, number)
            batches, stop = hidden.batches, start
        else:
            ranges = batch_ranges(len(examples), start, parts.context.training.batch_size, task.work)
            order, stop = example_order(len(examples), start, ranges[-1][1], seed), ranges[-1][1]
            batches = [[examples[i] for i in order[a - start : b - start]] for a, b in ranges]
        shift = correction.shift(task.tensors, client.memory)
        if shift:
            shift = parts.trainable.inwards({**zeros_like(before), **shift})
        return Job(
            task,
            client,
            correction,
            hooks,
            before,
            batches=batches,
            shift=shift,
            seed=[*seed, start],
            stop=stop,
            label_offset=None if own else self.label_offset(task, client),
            resting=frozenset() if own else parts.ownership.resting(task),
            privacy=hidden.privacy if hidden is not None else None,
        )

    def alone(self, job: Job) -> TrainUpdate:
        """One client's training.

        Raises:
            UpdateError: the training loss is not finite.
        """
        if job.privacy is not None:  # row by row, as in a cohort
            (answer,) = self.local.together([job], self.close)
            if isinstance(answer, Exception):
                raise answer
            return typed(answer, TrainUpdate)
        self.parts.trainable.write(job.before)
        return self.close(job, self.local.alone(job))

    def close(self, job: Job, result: LocalResult) -> TrainUpdate:
        """What a client remembers and sends; the model has its trained tensors."""
        parts, context, memory = self.parts, self.parts.context, job.client.memory
        memory.values["examples_seen"] = job.stop
        if job.privacy is not None:
            memory.values[STEPS] = int(memory.values.get(STEPS, 0)) + result.steps
        after = parts.trainable.read()
        parts.ownership.remember(memory, after, result.moments)
        weight = float(len(job.client.data.train))
        update = TrainUpdate({}, weight, loss=result.loss, examples=result.examples, steps=result.steps)
        if context.keeps == "everything":
            return update
        change = {
            name: after[name] - tensor
            for name, tensor in job.before.items()
            if parts.ownership.comes_up(name, job.task)
        }
        if context.privacy is not None:
            change = clipped_by_client(change, parts.trainable.head, context.privacy, job.factor)
        if context.own_noise is not None:
            change = context.own_noise.noised(
                change,
                head=parts.trainable.head,
                groups=parts.bounded_groups,
                round_number=job.task.round_number,
                factor=job.factor,
                client=job.client.name,
            )
            update = replace(update, loss=None)
        update = job.hooks.pack(replace(update, tensors=change), job.task, memory)

        def rate(name: str) -> float:
            return job.factor * learning_rate(context.training, head=name in parts.trainable.head)

        more = job.correction.remember(job.task.tensors, memory, change, rate, result.steps)
        return replace(update, tensors=update.tensors | more)

    def label_offset(self, task: TrainTask, client: Client) -> Tensor | None:
        """What the recipe has a client add to its logits in training; once the head was fitted, relative to
        the labels that it was fitted to.
        """
        parts, training, overall = self.parts, self.parts.context.training, None
        if parts.head_rounds:
            if parts.context.keeps == "everything":
                return None  # its head is fitted to its own labels
            overall = self.head.label_counts(task)
        if not training.logit_adjustment:
            return None
        return label_offset(
            [example.label for example in client.data.train],
            len(parts.base.task.labels),
            strength=training.logit_adjustment,
            prior_count=training.prior_count,
            overall=overall,
        )

    def _further(self, task: Task) -> FurtherExchange | None:
        """The exchange of the method's own rule that the task belongs to, if it is one of that."""
        further = self.parts.further
        return further if further is not None and task.kind in further.messages else None

    def _asked(self, task: Task) -> TrainTask | HeadTask:
        """The task as one of training, or of fitting the head.

        Raises:
            UpdateError: it asks for other than the recipe does in that round.
        """
        asked = task if isinstance(task, HeadTask) else typed(task, TrainTask)
        if isinstance(asked, HeadTask) and (asked.kind in SUMMED_KINDS) != self.parts.context.sums_only:
            raise UpdateError(
                f"the task {task.kind!r} does not go with secure_sum.on = "
                f"{str(self.parts.context.sums_only).lower()} in the recipe"
            )
        if isinstance(asked, HeadTask) != (asked.round_number in self.parts.head_rounds):
            raise UpdateError(f"the recipe has no task {task.kind!r} in round {asked.round_number}")
        return asked

    # --- fitting the head ---

    def _read_together(self, pairs: Sequence[tuple[FitHeadTask, Client]]) -> None:
        """Compute what the head is fitted to for several clients that have the same model, with passes over
        all of their examples, since many clients have few.
        """
        parts = self.parts
        same = {tuple(map(id, task.tensors.values())) for task, _ in pairs}
        if len(pairs) < 2 or len(same) > 1 or parts.ownership.personal or parts.context.keeps != "nothing":
            return
        task = pairs[0][0]
        if task.round_number not in parts.head_rounds:
            return
        parts.trainable.write(parts.ownership.complete(without(task.tensors, CONTROL)))
        tokens = [self.tokens.of(client.data.train) for _, client in pairs]
        vectors = self.head.inputs([row for rows in tokens for row in rows])
        split = torch.split(vectors, [len(rows) for rows in tokens])
        self.head.read = {client.name: own for (_, client), own in zip(pairs, split, strict=True)}

    def _head_sums(self, task: HeadTask, client: Client) -> Update:
        """What a client sends for the head to be fitted; where it keeps everything, it fits its own."""
        parts, examples, memory = self.parts, client.data.train, client.memory
        if not examples:
            raise DataError(f"client {client.name!r} has no examples to fit the head to")
        if not isinstance(task, FitHeadTask):
            return self.head.execute(task, client.name, examples, [], memory)
        if client.name not in self.head.read:
            parts.trainable.write(parts.ownership.complete(without(task.tensors, CONTROL), memory))
        update = self.head.execute(task, client.name, examples, self.tokens.of(examples), memory)
        moments = part(memory.tensors, "moments/")
        moments = {
            name: m for name, m in moments.items() if name.partition("/")[2] not in self.head.layer.names
        }
        if parts.context.keeps == "everything":
            head = self.head.alone(client.name)
            parts.ownership.remember(memory, {**parts.trainable.read(), **head}, moments)
            return HeadSumsUpdate({}, update.weight)
        memory.tensors = without(memory.tensors, "moments/") | named(moments, "moments/")
        return update
