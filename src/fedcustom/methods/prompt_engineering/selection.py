"""Prompt selection: a bandit over candidate prompts, of which clients tell how well each did, and no more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ...core.errors import DataError, PolicyError, RecipeError, UpdateError
from ...core.seeds import name_seed
from ...data.examples import Example
from ...data.tokens import example_order
from ...models.inference import Predictions
from ..messages import Task, Update, Work, typed
from ..protocol import Aggregate, Answer, Client, Prompts, State, Values
from ..tuning.technique import Context
from . import bandit
from .bandit import Tally
from .edits import PARAPHRASES, offspring
from .limits import MAX_CANDIDATES, check_bred
from .messages import SELECTION, BredCandidate, ScoreTask, ScoreUpdate, TallyRow
from .prompt_method import PromptMethod
from .scorer import Scorer, log_softmax
from .settings import PromptEngineeringSettings
from .templates import CONTENT_FREE, INPUT, LABELS, PLAIN, Candidate, label_sets, read_templates

LARGEST_LOSS = 1e6
"""Of one example, in nats: what a client's sum may hold, so that sums of all rounds can still travel."""


class Selection(PromptMethod):
    """The verbs of prompt selection.

    Server and clients make the same first pool of candidates from the recipe, so that only numbers of
    candidates travel; the texts of candidates that are bred later are sent down to those who score them.

    Discloses: for each candidate that it was asked about, a client sends on how many private examples it was
    scored, the sum of rewards (how many were right, for classification) and the sum of log-likelihoods.
    No text, label or single example leaves. With few examples a sum can come close to a single answer.
    """

    strategy = "selection"
    messages = SELECTION

    def __init__(self, settings: PromptEngineeringSettings, context: Context) -> None:
        self.settings, self.context, self.base = settings, context, context.base
        self.scorer = Scorer(settings, context)
        self.synonyms = settings.synonyms or PARAPHRASES
        self._pool: list[Candidate] = []

    # --- server ---

    def initialise(self) -> State:
        """The pool of the recipe, of which nothing is known."""
        return self.state({"round": 0, "alive": list(range(len(self.pool))), "tallies": {}, "bred": {}})

    @property
    def pool(self) -> list[Candidate]:
        """The candidates that the recipe gives, with their edits.

        Raises:
            RecipeError: there is none, or one does not fit the model.
        """
        if not self._pool:
            self._pool = self._make_pool()
        return self._pool

    def configure(self, state: State, round_number: int, work: Mapping[str, Work]) -> dict[str, Task]:
        """The same candidates for everybody: numbers, and texts of those that were bred."""
        chosen = self._choose(state, round_number)
        bred = {str(i): state.values["bred"][str(i)] for i in chosen if str(i) in state.values["bred"]}
        return {
            name: ScoreTask(round_number=round_number, candidates=chosen, bred=bred, work=amount)
            for name, amount in work.items()
        }

    def check_task(self, task: Task) -> None:
        """Refuse more prompts than the recipe scores, and prompts so long that they would fill the memory."""
        asked, settings = typed(task, ScoreTask), self.settings
        most = MAX_CANDIDATES if settings.bandit == "successive_halving" else settings.candidates_per_round
        if len(asked.candidates) > most:
            raise PolicyError(f"candidates: the recipe scores at most {most} in a round")
        if len(set(asked.candidates)) < len(asked.candidates):
            raise PolicyError("candidates: one is named twice")
        check_bred(asked.bred, most)

    def check_state(self, state: State) -> None:
        """Refuse prompts so long or so many that they would fill the memory."""
        check_bred(state.values.get("bred", {}))

    def check(self, task: Task, update: Update) -> None:
        """Refuse candidates that were not asked for, and counts and sums that no examples can have."""
        asked, answered = typed(task, ScoreTask), typed(update, ScoreUpdate)
        said, wanted = answered.tallies, sorted(str(i) for i in asked.candidates)
        if update.tensors or not isinstance(said, dict) or sorted(map(str, said)) != wanted:
            raise UpdateError("tallies: must hold exactly the candidates that were asked for")
        counts = set()
        for name, row in said.items():
            if (
                not isinstance(row, list | tuple)
                or len(row) != 3
                or not all(_is_number(value) for value in row)
            ):
                raise UpdateError(f"candidate {name}: {row!r} is not a count and two finite sums")
            count, reward, score = row
            counts.add(count)
            if type(count) is not int or not 1 <= count <= self._most(asked):
                raise UpdateError(
                    f"candidate {name}: scored on {count!r} examples, not 1 to {self._most(asked)}"
                )
            whole = self.scorer.generates or float(reward).is_integer()
            if not 0 <= reward <= count or not whole:
                raise UpdateError(f"candidate {name}: reward {reward!r} of {count} examples")
            if score > 0:
                raise UpdateError(f"candidate {name}: log-likelihood {score!r} is above 0")
            if score < -LARGEST_LOSS * count:
                raise UpdateError(
                    f"candidate {name}: log-likelihood {score!r} is below {-LARGEST_LOSS:g} an example"
                )
        if len(counts) > 1 or answered.examples not in counts:
            raise UpdateError("candidates were scored on different numbers of examples")

    def aggregate(self, state: State, answers: Iterable[Answer]) -> Aggregate:
        """Add the counts up; halve the field and breed where it is time."""
        tallies = self._tallies(state)
        scored: set[int] = set()
        for answer in answers:
            for name, (count, reward, score) in typed(answer.update, ScoreUpdate).tallies.items():
                scored.add(int(name))
                tallies[int(name)] += Tally(count, float(reward), float(score))
        number, alive = state.values["round"] + 1, list(state.values["alive"])
        halving = self.settings.bandit == "successive_halving"
        if halving and bandit.is_stage_end(number, self.context.rounds, len(self.pool)):
            alive = bandit.halve(tallies, alive)
        bred = dict(state.values["bred"])
        for child in self._breed(state, number, tallies, alive):
            alive.append(len(self.pool) + len(bred))
            bred[str(alive[-1])] = asdict(child)
        following = self.state(
            {
                **state.values,
                "round": number,
                "alive": alive,
                "bred": bred,
                "tallies": {str(i): [t.count, t.reward, t.score] for i, t in tallies.items() if t.count},
            }
        )
        chosen = self.best(following)
        report: Values = {
            "best": chosen,
            "template": self.candidate(following, chosen).template,
            "reward": round(tallies.get(chosen, Tally()).mean, 6),
            "scored_on": tallies.get(chosen, Tally()).count,
            "candidates": len(self.pool) + len(bred),
            "remaining": len(alive),
            "scored": len(scored),
        }
        return Aggregate(following, report)

    # --- client ---

    def execute(self, task: Task, client: Client) -> Update:
        """Score the candidates on the round's private examples: other ones in each round, until all were
        used.

        Raises:
            DataError: the client has no examples.
        """
        asked = typed(task, ScoreTask)
        if not client.data.train:
            raise DataError(f"client {client.name!r} has no examples to score prompts on")
        positions = self._examples(asked, client)
        examples = [client.data.train[i] for i in positions]
        vectors = self.scorer.vectors(examples) if self.scorer.encoder else None
        said: dict[str, TallyRow] = {}
        for number in asked.candidates:
            candidate = _candidate(asked.bred, number) or self.pool[number]
            rewards, scores = self._rewards(candidate, examples, vectors)
            said[str(number)] = (len(examples), _plain(rewards.sum()), float(scores.sum()))
        return ScoreUpdate({}, float(len(examples)), tallies=said, examples=len(examples))

    def _rewards(
        self, candidate: Candidate, examples: list[Example], vectors: Any
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Each example's reward and log-likelihood. For a generated text the reward is the inverse
        perplexity, exp(mean log-likelihood of the target's tokens).
        """
        if self.scorer.generates:
            prompts = [candidate.fill(text) for text in self.scorer.inputs(examples)]
            losses, tokens = self.scorer.losses(prompts, examples).T
            likelihoods = np.minimum(-losses / np.maximum(tokens, 1), 0.0)
            return np.exp(likelihoods), likelihoods
        if vectors is not None:
            logits = self.scorer.from_vectors(candidate, vectors)
        else:
            logits = self.scorer.logits(candidate, examples)
        labels = np.array([example.label for example in examples])
        odds = log_softmax(logits)[np.arange(len(labels)), labels]
        return (logits.argmax(axis=1) == labels).astype(np.float64), np.minimum(odds, 0.0)

    def predict(
        self, state: State, examples: list[Example], client: Client | None = None, *, texts: bool
    ) -> Predictions:
        """What the model says under the best candidate."""
        return self.scorer.predict(self.candidate(state, self.best(state)), examples, texts=texts)

    def prompts(self, state: State, examples: Sequence[Example]) -> Prompts:
        """The examples in the best candidate, for the base model."""
        candidate = self.candidate(state, self.best(state))
        texts = [candidate.fill(text) for text in self.scorer.inputs(list(examples))]
        return Prompts(self.base.model, self.base, self.scorer.sources(texts))

    # --- parts ---

    def best(self, state: State) -> int:
        """The number of the candidate to use: among those still in the race."""
        tallies = self._tallies(state)
        return bandit.best({i: tallies[i] for i in state.values["alive"]})

    def candidate(self, state: State, number: int) -> Candidate:
        """A candidate of the pool, or one that was bred."""
        return _candidate(state.values["bred"], number) or self.pool[number]

    def prompt(self, state: State) -> dict[str, Any]:
        """The best candidate and how it came about."""
        chosen = self.best(state)
        candidate, tally = self.candidate(state, chosen), self._tallies(state)[chosen]
        labels = dict(zip(self.base.task.labels, candidate.labels, strict=True))
        if self.scorer.encoder:
            texts = dict(zip(labels, candidate.describe(), strict=True))
            form: Values = {"template": candidate.template, "labels": labels, "descriptions": texts}
        else:
            shown = candidate.template.replace(LABELS, ", ".join(candidate.labels))
            form = {
                "messages": [{"role": "user", "content": shown}],
                "placeholder": INPUT,
                "template": candidate.template,
                "labels": labels,
            }
        origin = {
            "candidate": chosen,
            "origin": candidate.origin,
            "reward": tally.mean,
            "scored_on": tally.count,
            "rounds": state.values["round"],
        }
        return self.described(form, origin) | {
            "calibrated": self.scorer.calibrate and not self.scorer.generates,
            "content_free": CONTENT_FREE,
        }

    def restore(self, content: dict[str, Any]) -> State:
        """The state whose only candidate is the one in the file, with what was counted of it."""
        candidate = Candidate(
            content["template"], tuple(content["labels"].values()), content["provenance"]["origin"]
        )
        number, origin = content["provenance"]["candidate"], content["provenance"]
        tally = [origin["scored_on"], origin["reward"] * origin["scored_on"], 0.0]
        return self.state(
            {
                "round": origin["rounds"],
                "alive": [number],
                "tallies": {str(number): tally},
                "bred": {str(number): asdict(candidate)},
            }
        )

    def _make_pool(self) -> list[Candidate]:
        settings, encoder = self.settings, self.scorer.encoder
        templates = list(settings.instructions)
        if settings.instructions_file is not None:
            templates += read_templates(settings.instructions_file)
            if not templates:
                raise RecipeError(
                    f"method.instructions_file: {settings.instructions_file}: holds no template"
                )
        templates = templates or [PLAIN["encoder" if encoder else self.base.task.kind]]
        if self.scorer.generates and settings.verbalisers:
            raise RecipeError("method.verbalisers: a generation task has no labels")
        sets = label_sets(self.base.task.labels, settings.verbalisers)
        given = list(dict.fromkeys(Candidate(text, chosen) for text in templates for chosen in sets))
        for candidate in given:
            self.scorer.check(candidate, "method.instructions")
        made = offspring(
            given,
            given,
            settings.edits,
            self.synonyms,
            np.random.default_rng([self.context.seed, 20]),
            crossover=False,
        )
        return [*given, *made]

    def _choose(self, state: State, round_number: int) -> list[int]:
        settings, alive = self.settings, list(state.values["alive"])
        if settings.bandit == "successive_halving":
            return alive
        tallies = {i: tally for i, tally in self._tallies(state).items() if i in alive}
        if settings.bandit == "ucb":
            values = bandit.upper_bounds(tallies, settings.exploration)
        else:
            values = bandit.posterior_draws(tallies, [self.context.seed, 21, round_number])
        return bandit.highest(values, settings.candidates_per_round)

    def _breed(
        self, state: State, number: int, tallies: Mapping[int, Tally], alive: list[int]
    ) -> list[Candidate]:
        """The brood of this round; none after the last, which nobody could score."""
        settings = self.settings
        if not settings.breed or number % settings.breed_every or number >= self.context.rounds:
            return []
        bred = state.values["bred"]
        known = [*self.pool, *(self.candidate(state, int(i)) for i in bred)]
        order = bandit.ranking({i: tallies[i] for i in alive if tallies[i].count})
        parents = [self.candidate(state, i) for i in order[: max(2, len(order) // 4)]]
        if not parents:
            return []
        generator = np.random.default_rng([self.context.seed, 22, number])
        brood = offspring(parents, known, settings.breed, self.synonyms, generator, crossover=True)
        return [child for child in brood if self._fits(child)]

    def _fits(self, candidate: Candidate) -> bool:
        try:
            self.scorer.check(candidate, "bred")
        except RecipeError:
            return False
        return True

    def _tallies(self, state: State) -> dict[int, Tally]:
        """What was counted of the candidates that are in the race or were scored, by number."""
        rows = state.values["tallies"]
        numbers = sorted({*state.values["alive"], *map(int, rows)})
        return {i: Tally(*rows.get(str(i), (0, 0.0, 0.0))) for i in numbers}

    def _most(self, task: ScoreTask) -> int:
        """How many examples a client can score at most: in the centralised baseline, as many as a cohort."""
        return self.settings.examples * (1 if task.work.examples is None else self.context.clients)

    def _examples(self, task: ScoreTask, client: Client) -> list[int]:
        """Positions of the round's examples, none twice before all were used."""
        total, count = len(client.data.train), self.settings.examples
        if task.work.examples is not None:  # one client stands for the cohort
            share = task.work.examples / total
            count = min(math.ceil(count * self.context.clients * share), self._most(task))
        count = min(count, total)
        start = (task.round_number - 1) * count
        return example_order(total, start, start + count, [self.context.seed, 23, name_seed(client.name)])


def _candidate(bred: Mapping[str, BredCandidate], number: int) -> Candidate | None:
    if str(number) not in bred:
        return None
    row = bred[str(number)]
    return Candidate(row["template"], tuple(row["labels"]), row["origin"])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: float) -> float | int:
    """A whole number as such: shorter on the way."""
    return int(value) if float(value).is_integer() else float(value)
