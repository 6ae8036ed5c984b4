"""Token exchange: the likeliest next tokens at each position of public texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from torch import Tensor

from ...core.seeds import name_seed
from ...core.tensors import Tensors, named, part, without
from ...data.tokens import Batch
from ...training.local import schedule_factor
from ..messages import typed
from ..protocol import Aggregate, Answer, Client, State
from ..tuning.technique import Context
from . import packing
from .language_models import Speaker
from .losses import Student, teaching, text_batches, top_k_divergence
from .messages import DistilTask
from .packing import Floats, Integers, TopK, pack_positions
from .sampling import ASKED, asked_in, drawn
from .settings import DistillationSettings
from .student import Models, StudentModel, own_tensors
from .token_translation import Lesson, Translator, lesson_batch

TAUGHT = "taught"


class TokenExchange:
    """Top-k next-token probabilities of public texts go up and, with direction both, those of the server's
    model down; each text's best teacher is learnt from where it is better than the student.

    That is FedMKT's DualMinCE (Fan et al. 2024): among the teachers of a text, aligned to the student's
    tokens, the one with the least cross-entropy of the text is chosen, if it is less than the student's own.
    The cross-entropy is computed by the student from what was sent, not believed.
    """

    def __init__(self, settings: DistillationSettings, context: Context, models: Models) -> None:
        self.settings, self.context, self.models = settings, context, models
        self.count = len(context.public)
        self._speakers: dict[int, Speaker] = {}
        self._translators: dict[tuple[int, int], Translator] = {}
        for learner in models.each():
            self.speaker(learner)

    # --- server ---

    def initialise(self) -> Tensors:
        """Nothing beside its model."""
        return {}

    def configure(self, state: State, round_number: int, clients: Iterable[str]) -> dict[str, Tensors]:
        """The round's texts and, with direction both, what the server's model says of them."""
        texts = drawn(self.settings.samples_per_round, self.count, self.context.seed, round_number)
        asked = {ASKED: pack_positions(texts, self.count)}
        if self.settings.direction == "both":
            server = self.speaker(self.models.server)
            said = packing.pack(server.top_k(state.tensors, texts), server.format)
            asked |= named(said, f"{TAUGHT}/")
        return dict.fromkeys(clients, asked)

    def check(self, task: DistilTask, tensors: Tensors) -> None:
        """Refuse what is not a packed row for each place of each text asked about."""
        self._read(self._speaker_of(task), tensors, asked_in(task, self.count))

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The server's model after learning from the best client of each text."""
        number = int(state.values.get("round", 0)) + 1
        server = self.speaker(self.models.server)
        own: dict[int, Floats] = {}
        best: dict[int, Lesson] = {}
        for answer in answers:
            task = typed(answer.task, DistilTask)
            texts = asked_in(task, self.count)
            own |= server.losses(state.tensors, np.array([t for t in texts if int(t) not in own], np.int64))
            teacher = self._speaker_of(task)
            rows = self._read(teacher, answer.update.tensors, texts)
            for text, lesson in self._lessons(teacher, server, texts, rows, own):
                if text not in best or lesson.loss < best[text].loss:
                    best[text] = lesson
        chosen = {text: lesson for text, lesson in best.items() if lesson.loss < lesson.own_loss}
        tensors, loss = self._teach(
            server,
            state.tensors,
            chosen,
            [self.context.seed, 13, number],
            "server",
            schedule_factor(self.context.training, number, self.context.rounds),
        )
        report = {"asked": len(own), "taught": len(chosen), **({} if loss is None else {"server_loss": loss})}
        return Aggregate(State(tensors, dict(state.server), {**state.values, "round": number}), report)

    # --- client ---

    def learn(self, learner: StudentModel, task: DistilTask, client: Client) -> None:
        """Let the client's model learn from the server's where that is better."""
        packed = part(task.tensors, f"{TAUGHT}/")
        if not packed:
            return
        texts = asked_in(task, self.count)
        server, own = self.speaker(self.models.server), self.speaker(learner)
        rows = self._read(server, packed, texts)
        losses = own.losses(own_tensors(client), texts)
        lessons = self._lessons(server, own, texts, rows, losses)
        chosen = {text: lesson for text, lesson in lessons if lesson.loss < lesson.own_loss}
        tensors, _ = self._teach(
            own,
            own_tensors(client),
            chosen,
            [self.context.seed, 13, task.round_number, name_seed(client.name)],
            "client",
            task.learning_rate_factor,
        )
        client.memory.tensors = without(client.memory.tensors, "state/") | named(tensors, "state/")

    def say(self, learner: StudentModel, task: DistilTask, client: Client) -> Tensors:
        """The client's likeliest next tokens at each place of the texts that it is asked about, packed."""
        texts = asked_in(task, self.count)
        if not len(texts):
            return {}
        speaker = self.speaker(learner)
        return packing.pack(speaker.top_k(own_tensors(client), texts), speaker.format)

    # --- parts ---

    def speaker(self, learner: StudentModel) -> Speaker:
        """A resident model with its tokens of the public texts."""
        if id(learner) not in self._speakers:
            self._speakers[id(learner)] = Speaker(learner, self.context, self.settings)
        return self._speakers[id(learner)]

    def _speaker_of(self, task: DistilTask) -> Speaker:
        return self.speaker(self.models.of(task.model))

    def _read(self, speaker: Speaker, tensors: Tensors, texts: Integers) -> TopK:
        return packing.unpack(tensors, int(speaker.rows(texts)[-1]), speaker.format)

    def _lessons(
        self, teacher: Speaker, student: Speaker, texts: Integers, rows: TopK, own: dict[int, Floats]
    ) -> Iterator[tuple[int, Lesson]]:
        """What the teacher's rows say to the student, text by text."""
        key = id(teacher), id(student)
        translator = self._translators.setdefault(key, Translator(teacher, student))
        bounds = teacher.rows(texts)
        for text, start, stop in zip(texts.tolist(), bounds[:-1], bounds[1:], strict=True):
            if start < stop and student.places(text):
                yield text, translator.lesson(text, rows[start:stop], own[text])

    def _teach(
        self,
        student: Speaker,
        tensors: Tensors,
        lessons: dict[int, Lesson],
        seed: list[int],
        role: Student,
        factor: float,
    ) -> tuple[Tensors, float | None]:
        """A model's tensors after its lessons, and its mean loss; unchanged where there are none."""
        if not lessons:
            return tensors, None
        settings, texts = self.settings, np.array(sorted(lessons))
        epochs = settings.server_epochs if role == "server" else settings.client_epochs

        def batches() -> Iterator[Batch]:
            for chosen in text_batches(texts, epochs, settings.distil_batch_size, seed):
                yield lesson_batch(student, [(int(t), lessons[int(t)]) for t in texts[chosen]])

        def loss(batch: Batch) -> Tensor:
            valid = batch["valid"]
            logits = student.logits(batch)[:, :-1][valid]
            return top_k_divergence(logits, batch["tokens"][valid], batch["probabilities"][valid]).mean()

        training = teaching(settings, self.context.training, role, self.context.base)
        return student.learner.imitate(tensors, batches(), loss, training, factor, seed)
