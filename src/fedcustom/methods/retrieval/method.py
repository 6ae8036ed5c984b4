"""Retrieval-augmented generation over clients that keep their documents."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import ModelError
from ...core.tensors import Tensors
from ...data.examples import Example
from ...models.configuration import context_length
from ...models.inference import Predictions
from ...models.quantised_layers import exact_weights
from ..full.method import SHARD, Full
from ..full.settings import FullSettings
from ..lora.method import Lora
from ..lora.settings import LoraSettings
from ..messages import Messages, Task, Update, Work, typed
from ..protocol import Aggregate, Answer, Asked, Client, State
from ..sequential_clients import SequentialClients
from ..tuning.export_check import Reference
from ..tuning.loading_page import loading_page
from ..tuning.messages import TrainTask
from ..tuning.method import WeightTuning
from ..tuning.objective import Contrastive
from ..tuning.technique import Context, Technique
from ..tuning.update_checks import check_state
from .checks import check_answer, check_search
from .chunking import digest
from .client import RetrievalClient
from .embedder import Embedder
from .export import weights_digest, write_modules
from .generation import Generator, generator_of
from .measures import answer_losses, search_figures
from .merging import Hit
from .messages import MESSAGES, AnswerTask, AnswerUpdate, CountTask, CountUpdate, IndexTask
from .negatives import BORROWED, LENT, Negatives, plain
from .search import Searched, Searcher
from .settings import RetrievalSettings
from .store import library


class Retrieval(SequentialClients):
    """Federated retrieval-augmented generation.

    Rounds train the sentence encoder, if the recipe asks for that, by the verbs of every method that trains
    tensors. For a search, the clients index their documents with the encoder (each on its own disk), the
    server sends the query's vector to all clients or to those that a router names, merges their lists, and
    asks for the passages of what was found first.

    Discloses: what training sends (:class:`~fedcustom.methods.tuning.method.WeightTuning`, and with
    ``shared_negatives`` :class:`~.negatives.Negatives`) and what a client answers to each task
    (:class:`~.client.RetrievalClient`). Clients see each query's vector, from which a text like the
    query can be guessed; ``privacy_epsilon`` perturbs it.
    """

    def __init__(self, settings: RetrievalSettings, context: Context) -> None:
        """Build encoder, training and generator.

        Raises:
            ModelError: the encoder's window is shorter than a chunk, or a model cannot be loaded.
        """
        library()  # before anything is loaded or trained
        self.settings, self.context, self.base = settings, context, context.base
        window = context_length(context.base.model.config)
        longest = max(settings.chunk_length + 2, context.data.max_length, context.data.max_target_length)
        if window is not None and longest > window:
            raise ModelError(
                f"{context.base.name} sees {window} tokens at once, not {longest}: lower method.chunk_length "
                "(two tokens less than the window), data.max_length or data.max_target_length"
            )
        self._base_weights = weights_digest(context.base.model)
        self.contrastive = Contrastive(context.base, context.data, settings.temperature)
        self.tuning = self._training()
        model = self.tuning.trainable.model if self.tuning else self.base.model
        evaluation = context.evaluation
        self.embedder = Embedder(
            replace(self.base, model=model), context.data, settings.chunk_length, evaluation.batch_size
        )
        self.generator = generator_of(
            settings.generator,
            context.model,
            evaluation,
            settings.answer_tokens,
            context.data.truncation,
            self.base.precision,
        )
        self.retrieval_client = RetrievalClient(
            settings, self.base.tokenizer, self.embedder.chunks, self.embedder.questions, self.generator
        )
        self.searcher = Searcher(settings, self.embedder.typed_questions)
        shares = settings.shared_negatives and context.keeps == "nothing"
        self.negatives = (
            Negatives(settings, context.seed, context.rounds, self.embedder.passages) if shares else None
        )
        self.report: dict[str, Any] = {}

    @property
    def messages(self) -> Messages:
        """Searches and, where the encoder is trained, those of training."""
        return {**(self.tuning.messages if self.tuning else {}), **MESSAGES}

    # --- rounds ---

    def initialise(self) -> State:
        """The encoder as it is."""
        return self.tuning.initialise() if self.tuning else State({})

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """Train the encoder, or say how many documents there are."""
        if self.tuning:
            tasks = self.tuning.configure(state, round_number, work)
            return self.negatives.offered(state, tasks) if self.negatives else tasks
        return {name: CountTask(round_number=round_number) for name in work}

    def execute(self, task: Task, client: Client) -> Update:
        """The task done on the client's questions or documents."""
        if isinstance(task, TrainTask) and self.tuning:
            return self._trained(self.tuning, task, client)
        if isinstance(task, IndexTask) and self.tuning:
            self.tuning.trainable.write(self.tuning.ownership.complete(task.tensors))
        return self.retrieval_client.execute(task, client)

    def check_task(self, task: Task) -> None:
        """Refuse a search that asks for more than the recipe's."""
        check_search(self.settings, task)

    def check_state(self, state: State) -> None:
        """An encoder's tensors have their forms: there is nothing to refuse."""

    def check(self, task: Task, update: Update) -> None:
        """Refuse what is not a sound answer."""
        if isinstance(task, TrainTask) and self.tuning:
            if self.negatives:
                self.negatives.check(update, self.base.model.config.hidden_size)
                task, update = plain(task), plain(update)
            self.tuning.check(task, update)
        else:
            check_answer(task, update, self.base.model.config.hidden_size)

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The next encoder, or the number of documents."""
        if self.tuning and self.negatives:
            lent: Tensors = {}

            def trained() -> Iterator[Answer]:
                for answer in answers:
                    if LENT in answer.update.tensors:
                        lent[answer.client] = answer.update.tensors[LENT]
                    yield replace(answer, task=plain(answer.task), update=plain(answer.update))

            merged = self.tuning.aggregate(state, trained())
            return replace(merged, state=self.negatives.kept(merged.state, lent))
        if self.tuning:
            return self.tuning.aggregate(state, answers)
        counts = {answer.client: typed(answer.update, CountUpdate).documents for answer in answers}
        return Aggregate(State({}, {}, dict(state.values)), {"documents": sum(counts.values())})

    # --- searches ---

    def connect(self, ask: Callable[[Mapping[str, Task]], dict[str, Asked]], clients: Sequence[str]) -> None:
        """Give the server a way to its clients outside rounds."""
        self.searcher.connect(ask, clients)

    def prepare(self, state: State, *, index: bool = True) -> dict[str, int]:
        """Let the clients index their documents with the encoder of this state, and learn the router.

        Returns the number of documents of each client that has some. Without ``index`` the clients are taken
        to have done so.

        Raises:
            RunError: no client has documents.
        """
        encoder = self._fingerprint(state)
        self._use(state)
        if self.searcher.ready.encoder == encoder:
            return {}
        if index:
            return self.searcher.index(encoder, state.tensors)
        self.searcher.take_index(encoder)
        return {}

    def search(
        self, state: State, questions: Sequence[str], noise: np.random.Generator | None = None
    ) -> Searched:
        """The documents of all clients that answer each question best (:meth:`.search.Searcher.search`)."""
        self.prepare(state)
        return self.searcher.search(questions, noise=noise)

    def reranked(self, question: str, hits: Sequence[Hit], shown: Mapping[str, str]) -> list[Hit]:
        """The hits that are shown, by how likely the generator finds the question after them (if the recipe
        asks for that), before the others.
        """
        if not self.settings.rerank or self.generator is None:
            return list(hits)
        known = [hit for hit in hits if hit.document in shown]
        scores = self.generator.likelihood(
            self.embedder.question(question), [shown[hit.document] for hit in known]
        )
        order = sorted(range(len(known)), key=lambda i: (-scores[i], i))
        best = [replace(known[i], score=scores[i]) for i in order]
        return [*best, *(hit for hit in hits if hit.document not in shown)]

    def answer(self, question: str, hits: Sequence[Hit], shown: Mapping[str, str]) -> tuple[str, list[int]]:
        """An answer and the places of the hits that it stands on. Where no passage may be shown, a client
        that writes answers itself is asked.
        """
        places = [i for i, hit in enumerate(hits) if hit.document in shown][: self.settings.passages_given]
        if places and self.generator is not None:
            (text,) = self.generator.write(
                [self.embedder.question(question)], [[shown[hits[i].document] for i in places]]
            )
            return text, places
        for hit in hits:
            if self.settings.policy_of(hit.client) == "answer":
                own = [i for i, other in enumerate(hits) if other.client == hit.client]
                documents = [hits[i].document for i in own][: self.settings.passages_given]
                encoder = self.searcher.ready.encoder
                task = AnswerTask(encoder=encoder, question=question, documents=documents)
                reply = self.searcher.asked({hit.client: task}).get(hit.client)
                if reply is not None:
                    return typed(reply.update, AnswerUpdate).answer, own[: len(documents)]
        return "", []

    def bytes_a_query(self) -> tuple[float, float]:
        """Bytes down and up of one query of the last evaluation, mean over its queries."""
        figures = self.report.get("searches", {}).get("as set", {})
        down, up = (figures.get(f"bytes_{way}_per_query", math.nan) for way in ("down", "up"))
        return down, up

    def cut_of(self, question: str) -> int:
        """How many tokens of a question are cut before it is embedded."""
        return self.embedder.cut_of(question)

    def take_cuts(self) -> list[str]:
        """What of passages, questions and answers the generator had no room for, and what of chunks the
        encoder had none for, since the last call.
        """
        found = self.embedder.take_cuts()
        return found + (self.generator.take_cuts() if self.generator is not None else [])

    # --- evaluation and export ---

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """Each question's rank of its own document, and the share of clients asked, (questions, 2).

        With ``texts`` all clients' documents are searched; without, an estimate: those of the examples alone.
        Documents of clients that do not answer count as not found, and ``retrieval.json`` names the clients.
        """
        questions = [example.text for example in examples]
        self.embedder.know(examples)
        if not texts:
            self._use(state)
            return Predictions(np.stack([self.embedder.ranks(examples), np.ones(len(examples))], axis=1))
        wanted = [digest(example.target) for example in examples]
        searched = self.search(state, questions, noise=self._repeatable())
        scores = np.zeros((len(examples), 2))
        scores[:, 0] = searched.ranks(wanted)
        scores[:, 1] = searched.asked.double().mean(dim=1).numpy()
        self.report = {"searches": search_figures(self._variants(questions, searched), wanted)}
        if searched.silent:  # what they have counts as not found
            self.report["silent"] = list(searched.silent)
        if count := self.settings.measured_answers:
            assert isinstance(self.generator, Generator)
            losses = answer_losses(self.generator, self.searcher, examples[:count], searched)
            self.report["answer_loss"] = losses
        return Predictions(scores)

    def export(self, state: State, folder: Path) -> None:
        """Write the sentence encoder, as ``sentence-transformers`` reads it too, and the router."""
        if self.tuning:
            self.tuning.export(state, folder)
        else:
            with exact_weights(self.base.model, self.base.quantised):
                self.base.model.save_pretrained(folder, max_shard_size=SHARD)
            self.base.tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(loading_page(self.base, adapter=False), encoding="utf-8")
        write_modules(folder, self.base.model.config.hidden_size)
        self.searcher.save_router(folder)

    def reference(self, state: State, examples: Sequence[Example]) -> Reference | None:
        """The outputs of the tuned encoder, for the check of its export; None where it is the base model."""
        return self.tuning.reference(state, examples) if self.tuning else None

    def open(self, folder: Path) -> State:
        """The encoder that :meth:`export` wrote, and the router."""
        state = self.tuning.open(folder) if self.tuning else State({})
        self.searcher.take_index(self._fingerprint(state))
        self.searcher.load_router(folder)
        return state

    def keeps_parts(self) -> bool:
        """No: all clients have the same encoder."""
        return False

    def adapt(self, state: State, client: Client, epochs: int) -> State:
        """Not defined."""
        raise NotImplementedError

    def notes(self, state: State) -> dict[str, str]:
        """``retrieval.json``: who has documents, and how searches compare."""
        content = {"clients": self.searcher.ready.clients, **self.report}
        return {"retrieval.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n"}

    def sizes(self, state: State) -> tuple[int, int]:
        """How many numbers are trained."""
        return self.tuning.sizes(state) if self.tuning else (0, 0)

    # --- parts ---

    def _training(self) -> WeightTuning | None:
        settings, context = self.settings, self.context
        if settings.train == "none":
            return None
        technique: Technique = Full(FullSettings())
        if settings.train == "lora":
            technique = Lora(LoraSettings(rank=settings.rank))
        return WeightTuning(technique, context, self.contrastive, name="retrieval")

    def _trained(self, tuning: WeightTuning, task: TrainTask, client: Client) -> Update:
        """The client's training, with what others lent as further negatives, and what it lends itself."""
        if self.negatives is None:
            return tuning.execute(task, client)
        own = plain(task)
        tensors = tuning.ownership.complete(own.tensors)
        check_state(tuning.trainable.inwards(tensors), tuning.trainable.parameters)
        tuning.trainable.write(tensors)
        lent = self.negatives.lend(client, task.round_number)
        self.contrastive.negatives = task.tensors.get(BORROWED)
        try:
            update = tuning.execute(own, client)
        finally:
            self.contrastive.negatives = None
        return replace(update, tensors={**update.tensors, **lent})

    def _repeatable(self) -> np.random.Generator:
        """Noise for an evaluation, the same whenever a run is repeated."""
        return np.random.default_rng([self.context.seed, 12])

    def _use(self, state: State) -> None:
        """Put the state's encoder into the resident model."""
        if self.tuning:
            self.tuning.trainable.write(self.tuning.ownership.complete(state.tensors))

    def _fingerprint(self, state: State) -> str:
        """A name of the encoder: its content, of the base and of the trained tensors."""
        parts = [self._base_weights, self.base.precision, str(self.context.data.max_length)]
        content = hashlib.sha256(" ".join(parts).encode())
        for name in sorted(state.tensors):
            content.update(name.encode() + state.tensors[name].contiguous().numpy().tobytes())
        return content.hexdigest()

    def _variants(self, questions: list[str], searched: Searched) -> dict[str, Searched]:
        """The recipe's search beside those without its routing and without its privacy."""
        searcher, variants = self.searcher, {"as set": searched}
        if searcher.ready.router is not None:
            noise = self._repeatable()
            variants["all clients asked"] = searcher.search(questions, routed=False, noise=noise)
        if self.settings.privacy_epsilon is not None:
            variants["exact queries"] = searcher.search(questions, private=False)
        return variants
