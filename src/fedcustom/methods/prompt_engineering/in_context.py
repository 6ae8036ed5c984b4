"""Federated in-context learning (Fed-ICL, Wang et al. 2025): clients refine the answers to public queries
with their nearest private examples in context.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...core.errors import DataError, ModelError, RecipeError, UpdateError
from ...data.examples import Example
from ...models.configuration import context_length
from ...models.inference import Predictions, generate
from ...models.likelihood import prompt_ids
from ..messages import Task, Update, Work, typed
from ..protocol import Aggregate, Answer, Client, Prompts, State, Values
from ..tuning.technique import Context
from .answers import medoid, pooled_log_probabilities, similarity_weights
from .messages import IN_CONTEXT, AnswerQueriesTask, AnswerQueriesUpdate
from .prompt_method import PromptMethod
from .retriever import Retriever, nearest_texts
from .scorer import Matrix, Scorer, log_softmax
from .settings import PromptEngineeringSettings
from .templates import CONTENT_FREE, INPUT, LABELS, PLAIN, Candidate, continuation, label_sets

MAX_ANSWER = 20_000
"""Longest answer in characters that a server takes."""


class InContext(PromptMethod):
    """The verbs of federated in-context learning.

    The queries are the public texts. What the federation makes of them, public texts with answers, is in the
    end a set of demonstrations: a new input is answered with its nearest answered queries in context. Before
    the first round that is the zero-shot model.

    Discloses: for each public query a client sends the labels' log-probabilities (float16), and the mean
    similarity of the query to its nearest private examples (float16): so a server that chooses its queries
    well learns whether a client holds something like a given text, and of which label. For generation a
    client sends the text that the model wrote with private examples in context; such a text can repeat parts
    of them word for word.
    """

    strategy = "in_context"
    messages = IN_CONTEXT

    def __init__(self, settings: PromptEngineeringSettings, context: Context) -> None:
        self.settings, self.context, self.base = settings, context, context.base
        self.scorer = Scorer(settings, context)
        if self.scorer.encoder:
            raise ModelError(
                f"method.strategy = 'in_context': needs a language model; {self.base.name} is an encoder"
            )
        if self.scorer.generates and settings.verbalisers:
            raise RecipeError("method.verbalisers: a generation task has no labels")
        template = settings.instructions[0] if settings.instructions else PLAIN[self.base.task.kind]
        (labels,) = label_sets(self.base.task.labels, settings.verbalisers)
        self.candidate = Candidate(template, labels)
        whole = Candidate(f"{settings.preamble}\n\n{template}", labels)
        self.scorer.check(whole, "method.preamble" if settings.preamble else "method.instructions")
        self.retriever = Retriever(settings.retriever, context)
        self._shown, self._left_out = 0, 0

    # --- server ---

    def initialise(self) -> State:
        """The queries as they are shown, cut by ``data.truncate``, without answers.

        Raises:
            RecipeError: there is no public set.
        """
        queries = self.scorer.inputs(self.context.public)
        if not queries:
            raise RecipeError(
                "method.strategy = 'in_context': the queries are public texts; set public.source or "
                "public.fraction"
            )
        return State({}, {}, {"round": 0, "queries": queries, "answers": []})

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """The current answers; the queries themselves are public."""
        tensors = {name: tensor.half() for name, tensor in state.tensors.items()}
        task = AnswerQueriesTask(
            tensors,
            round_number=round_number,
            queries=len(state.values["queries"]),
            answers=state.values["answers"],
        )
        return dict.fromkeys(work, task)

    def check(self, task: Task, update: Update) -> None:
        """Refuse answers of another number or shape, and log-probabilities that are none."""
        count, labels = typed(task, AnswerQueriesTask).queries, len(self.base.task.labels)
        similarity = update.tensors.get("similarities")
        wanted = {"similarities"} if self.scorer.generates else {"similarities", "answers"}
        if update.tensors.keys() != wanted or similarity is None:
            raise UpdateError(f"wrong tensor names: {', '.join(sorted(update.tensors)) or 'none'}")
        _check_tensor("similarities", similarity, (count,), -1.001, 1.001)
        if not self.scorer.generates:
            answers = update.tensors["answers"]
            _check_tensor("answers", answers, (count, labels), -65504.0, 0.001)
            if not torch.allclose(answers.double().exp().sum(dim=1), torch.ones(count).double(), atol=0.02):
                raise UpdateError("answers: are not log-probabilities; a query's do not sum to 1")
            return
        texts = typed(update, AnswerQueriesUpdate).answers
        if not isinstance(texts, list) or len(texts) != count:
            raise UpdateError(f"answers: must be {count} texts")
        for text in texts:
            if not isinstance(text, str) or len(text) > MAX_ANSWER:
                raise UpdateError(f"answers: each must be a text of at most {MAX_ANSWER} characters")

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The clients' answers, weighted by how near their examples are, as the new answers."""
        received = list(answers)
        similarities = np.stack([_array(answer.update.tensors["similarities"]) for answer in received])
        weights = similarity_weights(similarities, self.settings.similarity_temperature)
        values = {**state.values, "round": state.values["round"] + 1}
        report: Values = {
            "queries": len(state.values["queries"]),
            "mean_similarity": round(float(similarities.mean()), 6),
        }
        if self.scorer.generates:
            said = [typed(answer.update, AnswerQueriesUpdate).answers or [] for answer in received]
            values["answers"] = self._chosen(state, said, weights)
            if state.values["answers"]:
                pairs = zip(values["answers"], state.values["answers"], strict=True)
                report["changed"] = sum(new != old for new, old in pairs)
            return Aggregate(State({}, {}, values), report)
        pooled = pooled_log_probabilities(
            [log_softmax(_array(answer.update.tensors["answers"])) for answer in received], weights
        )
        report["confidence"] = round(float(np.exp(pooled.max(axis=1)).mean()), 6)
        if "answers" in state.tensors:
            before = _array(state.tensors["answers"]).argmax(axis=1)
            report["changed"] = int((before != pooled.argmax(axis=1)).sum())
        tensors = {"answers": torch.from_numpy(pooled).float()}
        return Aggregate(State(tensors, {}, values), report)

    # --- client ---

    def execute(self, task: Task, client: Client) -> Update:
        """Answer every query with the nearest private examples, and from round 2 on with the current
        answers.

        Raises:
            DataError: the client has no examples.
        """
        asked = typed(task, AnswerQueriesTask)
        if not client.data.train:
            raise DataError(f"client {client.name!r} has no examples to put into the context")
        own, queries = client.data.train, self.context.public
        vectors = self.retriever.vectors
        chosen, near = nearest_texts(vectors(queries), vectors(own), self.settings.demonstrations)
        texts = self.scorer.inputs(own)
        shown = [[(texts[i], self._answer_of(own[i])) for i in row] for row in chosen]
        known = {"answers": asked.answers, "queries": self.scorer.inputs(queries)}
        state = State(task.tensors, {}, known)
        shared = self._shared(state, queries, exclude_self=True)
        prompts = self._prompts([[*a, *b] for a, b in zip(shared, shown, strict=True)], queries)
        tensors = {"similarities": torch.from_numpy(near).half()}
        if self.scorer.generates:
            sources = [np.asarray(ids, dtype=np.int32) for ids in prompt_ids(self.base, prompts)]
            texts = generate(self.base.model, self.base, sources, self.context.evaluation)
            answers = [_first(text) for text in texts]
            return AnswerQueriesUpdate(tensors, float(len(own)), examples=len(own), answers=answers)
        said = log_softmax(self._logits(prompts))
        if "answers" in task.tensors:
            prior = self.settings.prior
            said = log_softmax((1 - prior) * said + prior * _array(task.tensors["answers"]))
        # Nothing below float16's range: exp(-100) is nothing either.
        tensors["answers"] = torch.from_numpy(np.maximum(said, -100.0)).half()
        return AnswerQueriesUpdate(tensors, float(len(own)), examples=len(own))

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """Answers with the nearest answered queries in context; without answers zero-shot."""
        prompts = self._asked(state, examples)
        if self.scorer.generates:
            return self.scorer.predict_texts(prompts, examples, texts=texts)
        return Predictions(self._logits(prompts))

    def prompts(self, state: State, examples: Sequence[Example]) -> Prompts:
        """The examples with the nearest answered queries in context, for the base model."""
        sources = self.scorer.sources(self._asked(state, list(examples)))
        return Prompts(self.base.model, self.base, sources)

    # --- parts ---

    def _asked(self, state: State, examples: list[Example]) -> list[str]:
        """The examples with the nearest answered queries in context."""
        shown = self._shared(state, examples, count=self.settings.demonstrations)
        return self._prompts(shown, examples)

    def prompt(self, state: State) -> dict[str, Any]:
        """The answered queries as demonstrations; those in the message are the surest of each label."""
        queries, answers = state.values["queries"], self._answers(state)
        rows: list[dict[str, Any]] = [
            {"input": text, "answer": answer} for text, answer in zip(queries, answers, strict=False)
        ]
        chosen = list(range(min(len(rows), self.settings.demonstrations)))
        if "answers" in state.tensors:
            odds = _array(state.tensors["answers"])
            for row, said in zip(rows, odds, strict=True):
                row["probability"] = round(float(np.exp(said.max())), 6)
                row["log_probabilities"] = [round(float(value), 6) for value in said]
            chosen = _surest(odds, self.settings.demonstrations)
        shown = [(rows[i]["input"], rows[i]["answer"]) for i in chosen]
        labels = dict(zip(self.base.task.labels, self.candidate.labels, strict=True))
        content = self._joined([self._demonstrated(*pair) for pair in shown], self.candidate.fill(INPUT))
        form = {
            "messages": [{"role": "user", "content": content}],
            "placeholder": INPUT,
            "template": self.candidate.template,
            "labels": labels,
            "calibrated": self.scorer.calibrate and not self.scorer.generates,
            "content_free": CONTENT_FREE,
            "demonstrations": rows,
            "queries": queries,
            "use": f"the {self.settings.demonstrations} nearest of the demonstrations, the nearest last",
        }
        return self.described(form, {"rounds": state.values["round"], "retriever": self.settings.retriever})

    def restore(self, content: dict[str, Any]) -> State:
        """The answered queries of the file."""
        rows = content["demonstrations"]
        queries = self.scorer.inputs([Example(text) for text in content["queries"]])
        values = {"round": content["provenance"]["rounds"], "queries": queries, "answers": []}
        if rows and "log_probabilities" in rows[0]:
            return State({"answers": torch.tensor([row["log_probabilities"] for row in rows])}, {}, values)
        return State({}, {}, {**values, "answers": [row["answer"] for row in rows]})

    def _logits(self, prompts: Sequence[str]) -> Matrix:
        """Calibrated by the content-free input without demonstrations: with them, calibration would subtract
        what the demonstrations say of the query, since they were chosen for it.
        """
        scores = self.scorer.label_scores(prompts, self.candidate.labels)
        if not self.scorer.calibrate:
            return scores
        free = self._joined([], self.candidate.fill(CONTENT_FREE))
        return scores - self.scorer.label_scores([free], self.candidate.labels)

    def _answers(self, state: State) -> list[str]:
        """The current answers as texts."""
        if "answers" in state.tensors:
            return [self.candidate.labels[i] for i in state.tensors["answers"].argmax(dim=1).tolist()]
        return list(state.values["answers"])

    def _answer_of(self, example: Example) -> str:
        return example.target if self.scorer.generates else self.candidate.labels[example.label]

    def _shared(
        self, state: State, examples: list[Example], *, count: int | None = None, exclude_self: bool = False
    ) -> list[list[tuple[str, str]]]:
        """For each example the nearest answered queries; none where nothing is answered yet."""
        answers, texts = self._answers(state), state.values["queries"]
        count = self.settings.shared_demonstrations if count is None else count
        if not answers or not count:
            return [[] for _ in examples]
        known = self.retriever.vectors_now([Example(text) for text in texts])
        queries = self.retriever.vectors(examples)
        chosen, _ = nearest_texts(queries, known, count, exclude_self=exclude_self)
        return [[(texts[i], answers[i]) for i in row] for row in chosen]

    def _prompts(self, demonstrations: list[list[tuple[str, str]]], examples: list[Example]) -> list[str]:
        """One prompt an example; the farthest demonstrations are left out where the context is too short."""
        limit = context_length(self.base.model.config) or 2**20
        room = limit - self._answer_room()
        blocks = [[self._demonstrated(*pair) for pair in row] for row in demonstrations]
        asked = [self.candidate.fill(text) for text in self.scorer.inputs(examples)]
        prompts = [self._joined(row, own) for row, own in zip(blocks, asked, strict=True)]
        for place, ids in enumerate(prompt_ids(self.base, prompts)):
            row = blocks[place]
            self._shown += len(row)
            while row and len(ids) > room:
                row = row[1:]
                self._left_out += 1
                prompts[place] = self._joined(row, asked[place])
                (ids,) = prompt_ids(self.base, [prompts[place]])
        return prompts

    def _answer_room(self) -> int:
        data, evaluation = self.context.data, self.context.evaluation
        if self.scorer.generates:
            return max(data.max_target_length, evaluation.max_new_tokens)
        texts = [f" {label}" for label in self.candidate.labels]
        return max(len(ids) for ids in self.base.tokenizer(texts, add_special_tokens=False)["input_ids"])

    def _demonstrated(self, text: str, answer: str) -> str:
        prompt = self.candidate.fill(text)
        return prompt + (answer if answer[:1].isspace() else continuation(prompt, answer))

    def _joined(self, demonstrations: Sequence[str], asked: str) -> str:
        preamble = self.settings.preamble.replace(LABELS, ", ".join(self.candidate.labels))
        return "\n\n".join(part for part in [preamble, *demonstrations, asked] if part)

    def _chosen(self, state: State, said: list[list[str]], weights: Matrix) -> list[str]:
        """For each query the answer most like the others; the current one is among them, with the mean
        weight.
        """
        chosen = []
        for query in range(len(state.values["queries"])):
            texts, mass = [row[query] for row in said], weights[:, query]
            if state.values["answers"]:
                texts = [*texts, state.values["answers"][query]]
                mass = np.append(mass, mass.mean())
            vectors = self.retriever.vectors_now([Example(text or " ") for text in texts])
            chosen.append(texts[medoid(vectors, mass)])
        return chosen

    def take_cuts(self) -> list[str]:
        """How many texts were cut for the retriever, and how many demonstrations a prompt had no room for,
        since the last call.
        """
        found = self.retriever.take_cuts()
        shown, left_out = self._shown, self._left_out
        self._shown, self._left_out = 0, 0
        if left_out:
            limit = context_length(self.base.model.config)
            found.append(
                f"{left_out} of {shown} demonstrations were left out, the farthest of their prompts: "
                f"{self.base.name} has {limit} positions"
            )
        return found


def _surest(odds: Matrix, count: int) -> list[int]:
    """Positions of the surest answers, the labels taken in turn, surest last."""
    best, labels = odds.max(axis=1), odds.argmax(axis=1)
    order = np.argsort(-best, kind="stable").tolist()
    queues = {label: [i for i in order if labels[i] == label] for label in sorted(set(labels.tolist()))}
    chosen: list[int] = []
    while len(chosen) < min(count, len(order)):
        for queue in queues.values():
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    return chosen[::-1]


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], low: float, high: float) -> None:
    if tensor.shape != shape:
        raise UpdateError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    if tensor.dtype != torch.float16:
        raise UpdateError(f"{name} has dtype {tensor.dtype}, not torch.float16")
    if not bool(((tensor >= low) & (tensor <= high)).all()):  # what is not a number is in no range
        raise UpdateError(f"{name} holds values outside {low:g} to {high:g}")


def _array(tensor: torch.Tensor) -> Matrix:
    return tensor.double().numpy()


def _first(text: str) -> str:
    """What a model wrote before it went on with a demonstration of its own."""
    return text.split("\n\n")[0].strip()[:MAX_ANSWER]
