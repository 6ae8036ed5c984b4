"""Label exchange: classifiers' soft labels of public texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from ...core.errors import DataError, UpdateError
from ...core.seeds import name_seed
from ...core.tensors import Tensors, named, part, without
from ...data.tokens import Batch, collate
from ...models.forward import classification_logits
from ...models.inference import predict, to_device
from ...training.local import schedule_factor
from ..messages import typed
from ..protocol import Aggregate, Answer, Client, State, Values
from ..tuning.technique import Context
from . import packing
from .ensemble import combine
from .losses import Student, divergence, teaching, text_batches
from .messages import DistilTask
from .packing import Floats, Format, Integers, pack_positions, unpack_positions
from .sampling import ASKED, asked_in, drawn
from .settings import DistillationSettings
from .student import Models, StudentModel, own_tensors

SOFT, REFRESHED, CURRENT, HELD = "labels", "refreshed", "current", "held/"
FRESH, CACHE, CACHED = "fresh", "cache", "cached"
TEACHER = "teacher"


class LabelExchange:
    """Soft labels of public texts go up; the ensemble's go down, where clients learn from them.

    The server keeps the ensemble's soft labels (texts, labels), the round in which each was made (0: never),
    which texts the last round was about, and for each client the round up to which it holds a soft label. So
    only texts without a young label are asked about, and only labels that a client lacks are sent to it
    (SCARLET, Azuma et al. 2025).
    """

    def __init__(self, settings: DistillationSettings, context: Context, models: Models) -> None:
        self.settings, self.context, self.models = settings, context, models
        self.count, self.labels = len(context.public), len(context.base.task.labels)
        self.format = Format(self.labels, settings.top_k, settings.bits)
        self.teaches = settings.direction in ("down", "both")

    # --- server ---

    def initialise(self) -> Tensors:
        """What the server keeps: no soft label yet."""
        return {
            SOFT: torch.zeros(self.count, self.labels),
            REFRESHED: torch.zeros(self.count, dtype=torch.int32),
            CURRENT: torch.zeros(self.count, dtype=torch.uint8),
        }

    def configure(self, state: State, round_number: int, clients: Iterable[str]) -> dict[str, Tensors]:
        """The texts of the round that have no young soft label; the ensemble's labels that a client lacks."""
        refreshed = state.server[REFRESHED].numpy()
        texts = drawn(self.settings.samples_per_round, self.count, self.context.seed, round_number)
        young = (refreshed > 0) & (round_number - refreshed <= self.settings.cache_duration)
        asked = {ASKED: pack_positions(texts[~young[texts]], self.count)}
        current = np.flatnonzero(state.server[CURRENT].numpy())
        if not self.teaches or not len(current):
            return dict.fromkeys(clients, asked)
        asked[CURRENT] = pack_positions(current, self.count)
        return {name: asked | self._lacking(state, current, name) for name in clients}

    def _lacking(self, state: State, current: Integers, client: str) -> Tensors:
        refreshed = state.server[REFRESHED].numpy()
        held = state.server.get(HELD + client, torch.zeros(self.count, dtype=torch.int32)).numpy()
        fresh = current[held[current] < refreshed[current]]
        soft = state.server[SOFT].double().numpy()[fresh]
        packed = packing.pack(packing.largest(soft, self.format), self.format)
        return {FRESH: pack_positions(fresh, self.count), **named(packed, f"{SOFT}/")}

    def check(self, task: DistilTask, tensors: Tensors) -> None:
        """Refuse what is not one packed row for each text asked about."""
        self._read(task, tensors)

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The ensemble's soft labels, and the server's model after learning from them."""
        settings, number = self.settings, int(state.values.get("round", 0)) + 1
        uniform = self.context.aggregation.weighting == "uniform"
        server = dict(state.server)
        current = np.zeros(self.count, dtype=bool)
        said: list[Tensor] = []
        weights: list[Tensor] = []
        for answer in answers:
            task = typed(answer.task, DistilTask)
            texts, soft = self._read(task, answer.update.tensors)
            weight = torch.zeros(self.count)
            weight[texts] = answer.discount * (1.0 if uniform else answer.update.weight)
            row = torch.zeros(self.count, self.labels)
            row[texts] = soft
            said.append(row)
            weights.append(weight)
            since = task.round_number
            current[drawn(settings.samples_per_round, self.count, self.context.seed, since)] = True
            self._note_held(server, answer, since - 1)
        known = torch.stack(weights).sum(0) > 0
        asked = int(known.sum())
        if asked:
            soft = state.server[SOFT].clone()
            soft[known] = combine(
                torch.stack(said)[:, known],
                torch.stack(weights)[:, known],
                settings.ensemble,
                temperature=settings.sharpening_temperature,
                exponent=settings.sharpening_exponent,
                smallest=0.5 / (2**settings.bits - 1),
            )
            refreshed = state.server[REFRESHED].clone()
            refreshed[known] = number
            server |= {SOFT: soft, REFRESHED: refreshed}
        texts = np.flatnonzero(current & (server[REFRESHED].numpy() > 0)).astype(np.int64)
        server[CURRENT] = torch.zeros(self.count, dtype=torch.uint8)
        server[CURRENT][texts] = 1
        tensors = dict(state.tensors)
        report: Values = {"asked": asked, "cached": len(texts) - asked}
        if settings.has_server_model:
            tensors, loss = self._teach(
                self.models.server,
                tensors,
                texts,
                server[SOFT][texts],
                [self.context.seed, 13, number],
                "server",
                schedule_factor(self.context.training, number, self.context.rounds),
            )
            report["server_loss"] = loss
        return Aggregate(State(tensors, server, {**state.values, "round": number}), report)

    def _note_held(self, server: Tensors, answer: Answer, until: int) -> None:
        """That the client now holds what it was sent, as the ensemble said it up to a round."""
        if FRESH not in answer.task.tensors:
            return
        fresh = unpack_positions(answer.task.tensors[FRESH], self.count)
        held = server.get(HELD + answer.client, torch.zeros(self.count, dtype=torch.int32)).clone()
        held[fresh] = until
        server[HELD + answer.client] = held

    def _read(self, task: DistilTask, tensors: Tensors) -> tuple[Integers, Tensor]:
        """The texts that were asked about and a client's soft labels of them."""
        texts = asked_in(task, self.count)
        if not len(texts):
            if tensors:
                raise UpdateError(
                    f"wrong tensor names: {', '.join(sorted(tensors)[:3])}; nothing was asked for"
                )
            return texts, torch.zeros(0, self.labels)
        return texts, packing.dense(packing.unpack(tensors, len(texts), self.format), self.format)

    # --- client ---

    def learn(self, learner: StudentModel, task: DistilTask, client: Client) -> None:
        """Let the client's model learn from the ensemble's soft labels of the last round's texts.

        Raises:
            DataError: the client lacks a label that the server takes for known to it.
        """
        if CURRENT not in task.tensors:
            return
        current = unpack_positions(task.tensors[CURRENT], self.count)
        soft = self._update_cache(task, client, current)
        number = task.round_number
        tensors, _ = self._teach(
            learner,
            own_tensors(client),
            current,
            soft,
            [self.context.seed, 13, number, name_seed(client.name)],
            "client",
            task.learning_rate_factor,
        )
        kept = without(client.memory.tensors, "state/")
        client.memory.tensors = kept | named(tensors, "state/")

    def _update_cache(self, task: DistilTask, client: Client, current: Integers) -> Tensor:
        """Put the labels that came into the client's cache; those of the current texts."""
        fresh = unpack_positions(task.tensors[FRESH], self.count)
        memory = client.memory.tensors
        cache = memory.get(CACHE, torch.zeros(self.count, self.labels)).clone()
        cached = memory.get(CACHED, torch.zeros(self.count, dtype=torch.uint8)).clone()
        packed = part(task.tensors, f"{SOFT}/")
        cache[fresh] = packing.dense(packing.unpack(packed, len(fresh), self.format), self.format)
        cached[fresh] = 1
        if not bool(cached[current].all()):
            raise DataError(f"client {client.name!r} lacks soft labels that the server takes for known to it")
        client.memory.tensors = memory | {CACHE: cache, CACHED: cached}
        return cache[current]

    def say(self, learner: StudentModel, task: DistilTask, client: Client) -> Tensors:
        """The client's soft labels of the texts that it is asked about, packed."""
        texts = asked_in(task, self.count)
        if not len(texts):
            return {}
        soft = self.soft_labels(learner, own_tensors(client), texts)
        return packing.pack(packing.largest(soft, self.format), self.format)

    # --- models ---

    def soft_labels(self, learner: StudentModel, tensors: Tensors, texts: Integers) -> Floats:
        """``softmax(z / T)`` of the model's logits z: (texts, labels)."""
        learner.put(tensors)
        tokens = learner.tokens(self.context.public)
        chosen = [tokens[i] for i in texts]
        scores = predict(learner.trainable.model, learner.base, chosen, self.context.evaluation).scores
        scaled = torch.from_numpy(scores) / self.settings.temperature
        result: Floats = torch.softmax(scaled, dim=1).numpy()
        return result

    def _teach(
        self,
        learner: StudentModel,
        tensors: Tensors,
        texts: Integers,
        soft: Tensor,
        seed: list[int],
        student: Student,
        factor: float,
    ) -> tuple[Tensors, float]:
        """A model's tensors after learning the soft labels of some texts, and its mean loss."""
        settings = self.settings
        epochs = settings.server_epochs if student == "server" else settings.client_epochs
        tokens = learner.tokens(self.context.public)

        def batches() -> Iterator[Batch]:
            for chosen in text_batches(texts, epochs, settings.distil_batch_size, seed):
                batch = collate(
                    [tokens[i] for i in texts[chosen]],
                    learner.base.tokenizer.pad_token_id,
                    learner.base.task,
                    sequence_to_sequence=False,
                )
                yield to_device({**batch, TEACHER: soft[chosen]}, learner.base.device)

        def loss(batch: Batch) -> Tensor:
            with learner.base.autocast():
                logits = classification_logits(learner.trainable.model, batch)
            return divergence(logits, batch[TEACHER], settings.temperature)

        training = teaching(settings, self.context.training, student, self.context.base)
        return learner.imitate(tensors, batches(), loss, training, factor, seed)
