"""Evaluation of a global state on development and test data, and client by client."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.errors import DataError
from ..data.conversations import as_rows
from ..data.examples import Example, FederatedData, LearningTask
from ..data.many_clients import ManyClients
from ..evaluation.calibration import best_scale, softmax, tempered_losses
from ..evaluation.degenerate import degenerate_shares
from ..evaluation.metrics import Metrics, client_mean, text_metrics, worst_client
from ..evaluation.settings import CHOICE_METRIC, EvaluationSettings
from ..methods import Client, Method, State
from ..models.choices import with_choices
from ..models.inference import Predictions, measure
from ..models.load import Base
from ..transport.client_store import ClientStore

Probes = Mapping[str, Mapping[str, list[Example]]]
"""Further test sets, by kind and name."""


@dataclass(frozen=True)
class Result:
    """The final evaluation of a run.

    ``personalised`` is that of the clients' own versions on their own test parts, where they have such;
    ``probes`` that on further test sets, by kind and name. Of a generator, ``copy`` is the quality of the
    prompts as outputs, and ``degenerate`` has the shares of outputs that are degenerate, by kind
    (:mod:`.evaluation.degenerate`).
    """

    metrics: Metrics
    clients: dict[str, dict[str, Any]]
    client_mean: Metrics
    worst_client: Metrics
    predictions: Predictions | None
    personalised: dict[str, Metrics] = field(default_factory=dict)
    probes: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    copy: Metrics = field(default_factory=dict)
    degenerate: dict[str, float] = field(default_factory=dict)

    def prediction_lines(self, data: FederatedData) -> Iterator[str]:
        """The lines of ``predictions.jsonl``; of a generator those with a text or a chosen option."""
        assert self.predictions is not None
        if data.task.preference:
            yield from map(_pair_line, data.test, self.predictions.scores.tolist())
            return
        if data.task.kind == "generation":
            said = {id(example): text for example, text in self.predictions.with_texts(data.test)}
            options = {id(example): option for example, option in self.predictions.with_choices(data.test)}
            for example in data.test:
                text, option = said.get(id(example)), options.get(id(example))
                if text is None and option is None:
                    continue
                line: dict[str, Any] = {"messages": as_rows(example.messages)} if example.messages else {}
                line |= {"source": example.text, "references": list(example.references)}
                line |= {"prediction": option if text is None else text}
                line |= {} if option is None else {"chosen": option}
                yield json.dumps(line, ensure_ascii=False) + "\n"
            return
        for number, example in enumerate(data.test):
            if data.task.kind == "classification":
                logits = self.predictions.scores[number]
                chosen = int(logits.argmax())
                row = {
                    "text": example.text,
                    "label": data.task.labels[example.label],
                    "prediction": data.task.labels[chosen],
                    "probability": round(float(softmax(logits)[chosen]), 6),
                }
            else:
                rank = int(self.predictions.scores[number, 0])
                row = {
                    "source": example.text,
                    "references": [example.target],
                    "prediction": f"found at rank {rank}" if rank else "not found",
                    "rank": rank or None,
                }
            yield json.dumps(row, ensure_ascii=False) + "\n"


def _pair_line(example: Example, scores: Sequence[float]) -> str:
    """The line of a preference pair: which answer has the larger implicit reward, and by how much."""
    _, margin, likelier = scores
    row: dict[str, Any] = {
        "messages": as_rows(example.messages),
        "source": example.text,
        "references": [example.target],
        "rejected": example.rejected,
        "prediction": "chosen" if margin > 0 else "rejected" if margin < 0 else "neither",
        "reward_margin": margin,
        "likelihood_margin": likelier,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def with_references(
    result: Result, task: LearningTask, examples: Sequence[Example], settings: EvaluationSettings
) -> Result:
    """The result with what a generator's outputs are held against: the quality of copies of the prompts, and
    how many outputs are degenerate. ``examples`` are the test split. Where texts were written for a part of
    it, both are of that part.
    """
    if task.kind != "generation" or not task.texts_are_scored or not examples or not settings.writes:
        return result
    written = result.predictions.with_texts(examples) if result.predictions is not None else []
    sources = [example for example, _ in written] or examples
    wanted = [example.references for example in sources]
    return replace(
        result,
        copy=text_metrics([example.text.strip() for example in sources], wanted),
        degenerate=degenerate_shares([text for _, text in written], wanted) if written else {},
    )


def predicted(
    method: Method, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
) -> Predictions:
    """What a state, or a client's own version of it, says of test examples, with the options that it chooses
    where examples have some.
    """

    def scored(some: list[Example]) -> Predictions:
        return method.predict(state, some, client, texts=False)

    return with_choices(method.predict(state, examples, client, texts=texts), examples, scored)


def development_predictions(
    method: Method,
    state: State,
    examples: list[Example],
    settings: EvaluationSettings,
    client: Client | None = None,
) -> Predictions:
    """What a state says of development examples. Texts are not generated, and options are scored only where
    the best round is chosen by them: as many passes as there are options.

    Raises:
        DataError: the best round is to be chosen by options, and no example has any.
    """
    if settings.metric != CHOICE_METRIC:
        return method.predict(state, examples, client, texts=False)
    if not any(example.options for example in examples):
        raise DataError(
            f"evaluation.metric = {CHOICE_METRIC!r}: no development example has options (data.options)"
        )
    return predicted(method, state, examples, client, texts=False)


def final_predictions(
    method: Method, state: State, examples: list[Example], task: LearningTask, settings: EvaluationSettings
) -> Predictions:
    """What a state says of the test split after the last round, with the texts that the recipe asks for:
    those of ``generate_limit`` examples at even distances, where it limits them.
    """
    limit = settings.generate_limit
    if limit is None or limit >= len(examples):
        return predicted(method, state, examples, texts=task.texts_are_scored and settings.writes)
    places = tuple(number * len(examples) // limit for number in range(limit))
    texts = method.predict(state, [examples[i] for i in places], texts=True).texts
    return replace(predicted(method, state, examples, texts=False), texts=texts, written=places)


class Evaluator:
    """Evaluates states of one run.

    With ``own`` (the local baseline) every client has a model of its own, and each figure is the mean over
    clients. Where clients keep parts of the model, or train on for ``finetune_epochs`` after the last round,
    the final evaluation reports their own versions beside the global model. ``whole`` is whether the global
    model is then of use alone, and rounds are compared by it. ``probes`` are further test sets for the final
    evaluation.
    """

    def __init__(
        self,
        method: Method,
        base: Base,
        data: FederatedData,
        store: ClientStore,
        settings: EvaluationSettings,
        *,
        own: bool,
        whole: bool = False,
        finetune_epochs: int = 0,
        probes: Probes | None = None,
    ) -> None:
        self.probes = probes or {}
        self.method, self.base, self.data, self.store, self.own = method, base, data, store, own
        self.settings = settings
        self.whole, self.finetune_epochs = whole, finetune_epochs

    def development(self, state: State) -> Metrics:
        """Quality on the development split; texts are not generated, so that it costs a forward pass only."""
        if not self.own and (self.whole or not self.method.keeps_parts()):
            return self._development(state, self.data.development)
        parts = {name: client.development for name, client in self.data.clients.items() if client.development}
        if not parts:  # the recipe names a development split that is nobody's
            parts = dict.fromkeys(self.data.clients, self.data.development)
        return client_mean(
            {
                name: self._development(state, examples, self.store.open(name))
                for name, examples in parts.items()
            }
        )

    def _development(self, state: State, examples: list[Example], client: Client | None = None) -> Metrics:
        said = development_predictions(self.method, state, examples, self.settings, client)
        return self._measure(said, examples)

    def scale(self, state: State) -> float:
        """What a classifier's logits are best multiplied by, on the development split."""
        examples = self.data.development
        said = self.method.predict(state, examples, texts=False)
        return best_scale(tempered_losses(said.scores, [example.label for example in examples]))

    def test(self, state: State) -> Metrics:
        """Quality of one global state on the test split."""
        return self._measure(
            predicted(self.method, state, self.data.test, texts=self._writes), self.data.test
        )

    def final(self, state: State, trained: State | None = None) -> Result:
        """Quality on the test split, on every client's own test part and on further test sets; clients'
        versions are fine-tuned from the state as it was ``trained``, where that is another.
        """
        probes = {
            kind: {name: self._probe(state, examples) for name, examples in sets.items()}
            for kind, sets in self.probes.items()
        }
        result = replace(self._final(state, trained or state), probes=probes)
        return with_references(result, self.data.task, self.data.test, self.settings)

    def _probe(self, state: State, examples: list[Example]) -> Metrics:
        """Quality on a further test set; where clients have their own models, the mean over them."""
        if self.own:
            return client_mean({name: self._own(state, name, examples) for name in self.data.clients})
        return self._measure(predicted(self.method, state, examples, texts=self._writes), examples)

    def _final(self, state: State, trained: State) -> Result:
        if self.own:
            names = list(self.data.clients)
            whole = client_mean({name: self._own(state, name, self.data.test) for name in names})
            parts = {name: client.test for name, client in self.data.clients.items() if client.test}
            texts = self._writes_own(sum(map(len, parts.values())))
            clients = {name: self._own(state, name, part, texts=texts) for name, part in parts.items()}
            return self._result(whole, clients, None)
        predictions = final_predictions(self.method, state, self.data.test, self.data.task, self.settings)
        result = self._result(
            self._measure(predictions, self.data.test), self._by_client(state, predictions), predictions
        )
        return replace(result, personalised=self._personalised(trained))

    def _personalised(self, state: State) -> dict[str, Metrics]:
        """Quality of each client's own version on its own test part."""
        if not self.finetune_epochs and not self.method.keeps_parts():
            return {}
        metrics = {}
        for name, data in self.data.clients.items():
            if not data.test:
                continue
            own, client = state, self.store.open(name)
            if self.finetune_epochs:
                own = self.method.adapt(state, client, self.finetune_epochs)
                client.memory.tensors = {}  # what it kept is in its new state
            predictions = predicted(self.method, own, data.test, client, texts=False)
            metrics[name] = self._measure(predictions, data.test)
        return metrics

    @property
    def _writes(self) -> bool:
        return self.data.task.texts_are_scored and self.settings.writes_all

    def _measure(self, predictions: Predictions, examples: list[Example]) -> Metrics:
        return measure(predictions, examples, self.base)

    def _writes_own(self, examples: int) -> bool:
        """Whether clients' own models write texts for their own test parts, together so many examples."""
        limit = self.settings.generate_limit
        writes = self.data.task.texts_are_scored and self.settings.writes
        return writes and (limit is None or limit >= examples)

    def _own(self, state: State, name: str, examples: list[Example], *, texts: bool = False) -> Metrics:
        client = self.store.open(name)
        return self._measure(predicted(self.method, state, examples, client, texts=texts), examples)

    def _by_client(self, state: State, whole: Predictions) -> dict[str, Metrics]:
        """One pass over all clients' test parts (none where they are the test set), then each one's share."""
        if isinstance(self.data.clients, ManyClients):  # who have none
            return {}
        parts = {name: client.test for name, client in self.data.clients.items() if client.test}
        together = [example for examples in parts.values() for example in examples]
        if not together:
            return {}
        places = {id(example): number for number, example in enumerate(self.data.test)}
        if all(id(example) in places for example in together):  # their test parts make up the test set
            predictions = whole.select([places[id(example)] for example in together])
        else:
            predictions = predicted(self.method, state, together, texts=False)
        metrics, start = {}, 0
        for name, examples in parts.items():
            positions = range(start, start + len(examples))
            metrics[name] = self._measure(predictions.select(positions), examples)
            start += len(examples)
        return metrics

    def _result(self, whole: Metrics, clients: dict[str, Metrics], predictions: Predictions | None) -> Result:
        described = {
            name: {
                "examples": len(self.data.clients[name].train),
                "test_examples": len(self.data.clients[name].test),
                **metrics,
            }
            for name, metrics in clients.items()
        }
        return Result(whole, described, client_mean(clients), worst_client(clients), predictions)
