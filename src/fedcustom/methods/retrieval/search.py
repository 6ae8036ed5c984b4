"""Federated search: which clients the server asks, and how their results are merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import RunError
from ...core.files import read_tensors, write_tensors
from ...core.tensors import Tensors
from ..messages import Task, typed
from ..protocol import Asked
from .client import unpacked
from .merging import Hit, as_list, by_rank, by_score
from .messages import (
    CalibrateTask,
    FetchTask,
    FetchUpdate,
    IndexTask,
    IndexUpdate,
    RetrieveTask,
    RouteTask,
    RouteUpdate,
)
from .privacy import Vectors, perturbed
from .router import Sums, choose, fit_router, threshold
from .settings import RetrievalSettings

NOT_FOUND = 0
ROUTER = "router.safetensors"


@dataclass
class Searched:
    """What a search found: the documents of each query, whom it asked, the queries' vectors as they were
    sent, the bytes that travelled, and who was asked and gave no answer.
    """

    hits: list[list[Hit]]
    asked: Tensor
    vectors: Vectors
    bytes_up: int = 0
    bytes_down: int = 0
    silent: tuple[str, ...] = ()

    def ranks(self, wanted: Sequence[str]) -> list[int]:
        """The place of each query's document, from 1; 0 where it was not found."""
        result = []
        for hits, document in zip(self.hits, wanted, strict=True):
            names = [hit.document for hit in hits]
            result.append(names.index(document) + 1 if document in names else NOT_FOUND)
        return result


@dataclass
class Ready:
    """For which encoder the clients have an index, who they are, and the router."""

    encoder: str = ""
    clients: list[str] = field(default_factory=list)
    router: tuple[Tensor, Tensor] | None = None
    mass: float = 1.0


class Searcher:
    """The server's side of searches. ``embed`` makes vectors of questions."""

    def __init__(self, settings: RetrievalSettings, embed: Callable[[Sequence[str]], Vectors]) -> None:
        self.settings, self.embed = settings, embed
        self.ready = Ready()
        self.bytes_up = self.bytes_down = 0
        self._ask: Callable[[Mapping[str, Task]], dict[str, Asked]] | None = None
        self.names: list[str] = []

    def connect(self, ask: Callable[[Mapping[str, Task]], dict[str, Asked]], clients: Sequence[str]) -> None:
        """Give the server a way to its clients."""
        self._ask, self.names = ask, list(clients)

    def index(self, encoder: str, tensors: Tensors) -> dict[str, int]:
        """Let the clients index their documents with an encoder, and learn the router.

        Returns the number of documents of each client that has some.

        Raises:
            RunError: no client has documents.
        """
        task = IndexTask(dict(tensors), encoder=encoder)
        replies = self.asked(dict.fromkeys(self.names, task))
        found = {name: typed(reply.update, IndexUpdate).documents for name, reply in replies.items()}
        if not found:
            raise RunError("no client has documents to search")
        self.ready = Ready(encoder, sorted(found))
        if self.settings.routing == "learned":
            self._learn_routes()
        return found

    def take_index(self, encoder: str) -> None:
        """Take it that the clients have indexed their documents with an encoder."""
        self.ready = Ready(encoder, sorted(self.names))

    def search(
        self,
        questions: Sequence[str],
        *,
        routed: bool = True,
        private: bool = True,
        noise: np.random.Generator | None = None,
    ) -> Searched:
        """The documents of all clients that answer each question best.

        ``noise`` draws what perturbs the queries; unset: seeded by the system, as clients know the recipe's
        seed and could subtract what comes of it.

        Raises:
            RunError: no client answered.
        """
        settings, vectors = self.settings, self.embed(questions)
        if settings.privacy_epsilon is not None and private:
            vectors = perturbed(vectors, settings.privacy_epsilon, noise or np.random.default_rng())
        asked = torch.ones(len(questions), len(self.ready.clients), dtype=torch.bool)
        raised = torch.zeros(asked.shape, dtype=torch.float64)
        if self.ready.router is not None and routed:
            weight, bias = self.ready.router
            logits = torch.from_numpy(vectors).double() @ weight.T + bias
            asked = choose(logits, self.ready.mass)
            raised = settings.router_weight * torch.log_softmax(logits, dim=1)
        tasks, rows = {}, {}
        for column, name in enumerate(self.ready.clients):
            chosen = asked[:, column].nonzero().flatten().tolist()
            if chosen:
                rows[name] = chosen
                tasks[name] = self._query(vectors[chosen], [questions[i] for i in chosen])
        replies = self.asked(tasks)
        if not replies:
            raise RunError("no client answered the search")
        lists: dict[str, list[dict[str, Any]]] = {"vector": [], "text": []}
        for way in lists:
            lists[way] = [{} for _ in questions]
        for name, reply in replies.items():
            for way, by_query in lists.items():
                if f"{way}/counts" in reply.update.tensors:
                    found = unpacked(way, reply.update.tensors)
                    more = raised[rows[name], self.ready.clients.index(name)].tolist()
                    for i, each, constant in zip(rows[name], found, more, strict=True):
                        by_query[i][name] = each.plus(constant) if constant and way == "vector" else each
        return Searched(
            [self._merged(lists["vector"][i], lists["text"][i]) for i in range(len(questions))],
            asked,
            vectors,
            sum(reply.bytes_up for reply in replies.values()),
            sum(reply.bytes_down for reply in replies.values()),
            tuple(name for name in tasks if name not in replies),
        )

    def passages(self, hits: Sequence[Hit], vector: Vectors) -> dict[str, str]:
        """What the clients whose policy allows it show of the documents, by document: the passage nearest to
        the query's vector, which is to be the one that was searched with.
        """
        wanted: dict[str, list[str]] = {}
        for hit in hits:
            if self.settings.policy_of(hit.client) == "passages":
                wanted.setdefault(hit.client, []).append(hit.document)
        query = {"query": torch.from_numpy(vector)}
        tasks = {
            name: FetchTask(query, encoder=self.ready.encoder, documents=documents)
            for name, documents in wanted.items()
        }
        shown: dict[str, str] = {}
        for reply in self.asked(tasks).values():
            shown |= typed(reply.update, FetchUpdate).passages
        return shown

    def save_router(self, folder: Path) -> None:
        """Write the router, if there is one, and nothing in its place if there is none."""
        if self.ready.router is None:
            (folder / ROUTER).unlink(missing_ok=True)
            return
        weight, bias = self.ready.router
        mass = torch.tensor(self.ready.mass, dtype=torch.float64)
        write_tensors(folder / ROUTER, {"weight": weight.contiguous(), "bias": bias, "mass": mass})

    def load_router(self, folder: Path) -> None:
        """Take the router that :meth:`save_router` wrote."""
        if (folder / ROUTER).exists():
            router = read_tensors(folder / ROUTER)
            self.ready.router = router["weight"], router["bias"]
            self.ready.mass = float(router["mass"])

    def asked(self, tasks: Mapping[str, Task]) -> dict[str, Asked]:
        """The clients' answers to tasks, whose bytes are counted."""
        if self._ask is None:
            raise RunError("method retrieval: a search needs the clients, who are not connected here")
        replies = self._ask(tasks)
        for reply in replies.values():
            self.bytes_up, self.bytes_down = (
                self.bytes_up + reply.bytes_up,
                self.bytes_down + reply.bytes_down,
            )
        return replies

    def _query(self, vectors: Vectors, questions: list[str]) -> Task:
        settings = self.settings
        tensors: Tensors = {}
        if settings.search != "text":
            tensors["queries"] = torch.from_numpy(np.ascontiguousarray(vectors))
        texts = questions if settings.search != "vector" else None
        return RetrieveTask(tensors, encoder=self.ready.encoder, top=settings.top, texts=texts)

    def _merged(self, vector: dict[str, Any], text: dict[str, Any]) -> list[Hit]:
        top = self.settings.top
        ways = [way for way in (vector, text) if way]
        if self.settings.merge == "ranks":
            return by_rank(ways, top)
        merged = [by_score(way, top) for way in ways]
        if len(merged) == 1:
            return merged[0]
        # Scores of the two ways are not of one scale: their merged lists are fused by rank.
        owner = {hit.document: hit.client for hits in merged for hit in reversed(hits)}
        fused = by_rank([{"all": as_list(hits)} for hits in merged], top)
        return [replace(hit, client=owner[hit.document]) for hit in fused]

    def _learn_routes(self) -> None:
        task = RouteTask()
        replies = self.asked(dict.fromkeys(self.ready.clients, task))
        sums = {
            name: Sums(
                typed(r.update, RouteUpdate).questions, r.update.tensors["total"], r.update.tensors["scatter"]
            )
            for name, r in sorted(replies.items())
        }
        if set(sums) != set(self.ready.clients) or len(sums) < 2:
            return  # one that cannot be told apart would never be asked
        weight, bias = fit_router(sums)
        tasks = {
            name: CalibrateTask({"weight": weight, "bias": bias}, own=number)
            for number, name in enumerate(self.ready.clients)
        }
        masses = [reply.update.tensors["masses"] for reply in self.asked(tasks).values()]
        together = torch.cat(masses) if masses else torch.zeros(0)
        if len(together):
            self.ready.router = weight, bias
            self.ready.mass = threshold(together, self.settings.route_recall)
