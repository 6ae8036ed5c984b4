"""The client's side of retrieval: indexing, searching and showing its documents."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ...core.errors import DataError, UpdateError
from ...data.examples import Example
from ...training.settings import LEAST_TEXTS
from ..messages import Task, Update
from ..protocol import Client
from ..tuning.head_disclosure import counted_rows, sends_scatter
from .generation import Generator
from .messages import (
    AnswerTask,
    AnswerUpdate,
    CalibrateTask,
    CalibrateUpdate,
    CountTask,
    CountUpdate,
    FetchTask,
    FetchUpdate,
    IndexTask,
    IndexUpdate,
    RetrieveTask,
    RetrieveUpdate,
    RouteTask,
    RouteUpdate,
)
from .router import Sums, mass_before
from .settings import RetrievalSettings
from .store import DocumentStore, Found, Vectors

Embed = Callable[[Sequence[str]], Vectors]
BYTES = 16


class RetrievalClient:
    """A client's side of every task but training.

    Discloses, task by task: ``index`` the numbers of documents and chunks; ``route`` sums over its own
    questions' vectors (n, sum x, sum x x^T), unless these are so few or so alike that single ones could be
    read from them (:mod:`~fedcustom.methods.tuning.head_disclosure`);
    ``calibrate`` one number for each of its development questions; ``retrieve`` names (hashes) and scores of
    documents; ``fetch`` the passages themselves, where its policy allows it; ``answer`` a text that a
    language model wrote from them.
    """

    def __init__(
        self,
        settings: RetrievalSettings,
        tokenizer: Any,
        embed: Embed,
        embed_questions: Callable[[Sequence[Example]], Vectors],
        generator: Generator | None,
    ) -> None:
        """``embed`` makes vectors of chunks, ``embed_questions`` of questions, which may be cut."""
        self.settings, self.tokenizer, self.generator = settings, tokenizer, generator
        self.embed, self.embed_questions = embed, embed_questions

    def store(self, client: Client, encoder: str) -> DocumentStore:
        """The client's documents on its own disk.

        Raises:
            DataError: the client has no disk, or the encoder is named by something else than its digest.
        """
        if not re.fullmatch("[0-9a-f]{12,128}", str(encoder)):  # it becomes a part of a path
            raise DataError(f"client {client.name!r} was asked with an encoder that is no digest")
        if client.folder is None:
            raise DataError(f"client {client.name!r} has no folder to keep documents in")
        settings = self.settings
        chunking = (settings.chunk_length, settings.chunk_overlap, settings.most_chunks)
        return DocumentStore(client.folder / f"store-{encoder[:12]}", encoder, self.tokenizer, chunking)

    def execute(self, task: Task, client: Client) -> Update:
        """The task's answer.

        Raises:
            DataError: the client has no documents, or its policy refuses the task.
            UpdateError: there is no such task.
        """
        match task:
            case CountTask():
                return CountUpdate(documents=len(documents_of(client)))
            case IndexTask():
                return self._index(task, client)
            case RouteTask():
                return self._route(client)
            case CalibrateTask():
                return self._calibrate(task, client)
            case RetrieveTask():
                return self._retrieve(task, client)
            case FetchTask():
                return self._fetch(task, client)
            case AnswerTask():
                return self._answer(task, client)
        raise UpdateError(f"retrieval has no task {task.kind!r}")

    def _index(self, task: IndexTask, client: Client) -> Update:
        documents = documents_of(client)
        if not documents:
            raise DataError(f"client {client.name!r} has no documents")
        store = self.store(client, task.encoder)
        updated = store.update(documents, self.embed)
        for other in store.folder.parent.glob("store-*"):
            if other != store.folder:  # of an encoder that nobody asks with any more
                shutil.rmtree(other, ignore_errors=True)
        return IndexUpdate(documents=updated.documents, chunks=updated.chunks)

    def _route(self, client: Client) -> Update:
        questions = client.data.train
        if not questions:
            raise DataError(f"client {client.name!r} has no questions to learn routing from")
        numbers: dict[str, int] = {}
        texts = torch.tensor([numbers.setdefault(one.text, len(numbers)) for one in questions])
        together = torch.zeros_like(texts)  # one label
        if not (
            counted_rows(together, texts, 1, LEAST_TEXTS).all()
            and sends_scatter(together, texts, LEAST_TEXTS)
        ):
            raise DataError(
                f"client {client.name!r} withholds the sums of its {len(questions)} questions "
                f"({len(numbers)} different ones), which could be read from them"
            )
        sums = Sums.of(torch.from_numpy(self.embed_questions(questions)))
        return RouteUpdate({"total": sums.total, "scatter": sums.scatter}, questions=sums.count)

    def _calibrate(self, task: CalibrateTask, client: Client) -> Update:
        questions = client.data.development
        masses = torch.zeros(0, dtype=torch.float64)
        if questions:
            vectors = torch.from_numpy(self.embed_questions(questions)).double()
            logits = vectors @ task.tensors["weight"].T + task.tensors["bias"]
            masses = mass_before(logits, torch.full((len(questions),), task.own))
        return CalibrateUpdate({"masses": masses})

    def _retrieve(self, task: RetrieveTask, client: Client) -> Update:
        store = self.store(client, task.encoder)
        top = task.top
        tensors: dict[str, torch.Tensor] = {}
        if "queries" in task.tensors:
            tensors |= packed("vector", store.search(task.tensors["queries"].numpy(), top), top)
        if task.texts is not None:
            tensors |= packed("text", store.search_words(task.texts, top), top)
        return RetrieveUpdate(tensors)

    def _fetch(self, task: FetchTask, client: Client) -> Update:
        if self.settings.policy_of(client.name) != "passages":
            raise DataError(f"client {client.name!r} does not share passages")
        return FetchUpdate(passages=self._passages(task, client))

    def _answer(self, task: AnswerTask, client: Client) -> Update:
        if self.settings.policy_of(client.name) != "answer":
            raise DataError(f"client {client.name!r} does not write answers")
        if self.generator is None:
            raise DataError(f"client {client.name!r} has no generator to write answers with")
        passages = list(self._passages(task, client).values())
        (text,) = self.generator.write([Example(task.question)], [passages])
        return AnswerUpdate(answer=text)

    def _passages(self, task: FetchTask | AnswerTask, client: Client) -> dict[str, str]:
        query = task.tensors.get("query")
        vector = None if query is None else query.numpy()
        return self.store(client, task.encoder).passages(task.documents, vector)


def documents_of(client: Client) -> list[str]:
    """All that a client can be asked about: the targets of its examples, each once, in their order."""
    data = client.data
    return list(dict.fromkeys(e.target for e in [*data.train, *data.development, *data.test]))


def packed(way: str, found: Sequence[Found], top: int) -> dict[str, torch.Tensor]:
    """Lists of documents as tensors: scores (queries, top), names (queries, top, 16) and how many there
    are.
    """
    scores = np.zeros((len(found), top), dtype=np.float32)
    names = np.zeros((len(found), top, BYTES), dtype=np.uint8)
    for row, each in enumerate(found):
        scores[row, : len(each.scores)] = each.scores
        for column, name in enumerate(each.documents):
            names[row, column] = np.frombuffer(bytes.fromhex(name), dtype=np.uint8)
    counts = np.array([len(each.documents) for each in found], dtype=np.int64)
    return {
        f"{way}/scores": torch.from_numpy(scores),
        f"{way}/documents": torch.from_numpy(names),
        f"{way}/counts": torch.from_numpy(counts),
    }


def unpacked(way: str, tensors: dict[str, torch.Tensor]) -> list[Found]:
    """The inverse of :func:`packed`."""
    scores, names = tensors[f"{way}/scores"].tolist(), tensors[f"{way}/documents"].numpy()
    return [
        Found([names[row, column].tobytes().hex() for column in range(count)], scores[row][:count])
        for row, count in enumerate(tensors[f"{way}/counts"].tolist())
    ]
