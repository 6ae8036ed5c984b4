"""The federated loop: FedAvg (McMahan et al. 2017, algorithm 1) as six steps a round."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

from ..core import environment
from ..core.errors import AggregationError, RunError, UpdateError
from ..core.files import write_json
from ..methods import UNFINISHED, Aggregate, Answer, State, Task, client_labels, peeked
from ..methods.tuning.parts import RATE_FACTOR
from ..recipe import Recipe
from ..transport.protocol import Reply
from .callbacks import Callback, Callbacks, HistoryWriter
from .cost_estimate import outline
from .norm_gate import NormGate
from .rate_search import learning_rate_in, search_rate
from .round_record import RoundRecord
from .run_directory import Checkpoint, Row, RunDirectory
from .schedule import Assignment, Plan, last_uses, plan_rounds
from .selection import better_state
from .simulation import Federation
from .state_check import check_aggregate


class FedAvg:
    """Federated averaging: in each round a cohort of clients trains from the global state, and the server
    aggregates their weighted deltas into the next one.

    McMahan et al. 2017, *Communication-Efficient Learning of Deep Networks from Decentralized Data*,
    algorithm 1. The method has a verb for each step (:class:`~fedcustom.methods.protocol.Method`), and with
    it the trained tensors, the aggregation rule and the server optimiser. Buffered asynchronous aggregation
    (FedBuff) is a schedule in which clients start from earlier states; centralised training is one client
    that holds all data, local training is clients whose updates are not aggregated.

    Args:
        recipe: A complete recipe.
        federation: The run's parties; their transport is all the loop knows of where clients are.
        directory: Where checkpoints and rows are written, and from where the run is resumed.
        callbacks: Told of every event.
    """

    def __init__(
        self, recipe: Recipe, federation: Federation, directory: RunDirectory, callbacks: Callbacks
    ) -> None:
        self.recipe = recipe.settled(len(federation.data.clients))
        self.federation, self.directory, self.callbacks = federation, directory, callbacks
        self.writer: Callback = HistoryWriter(directory.history)
        self.plan: Plan = []
        self.uses: dict[int, int] = {}
        self.states: dict[int, State] = {}
        self.untuned: dict[str, float] = {}
        self.saved = 0
        self.norm_gate = self._gate()

    def run(self) -> None:
        """Run the rounds that are left, each to its checkpoint.

        Raises:
            RunError: too few clients answered in a round.
        """
        done = self.resume()
        for number in range(done + 1, self.recipe.rounds.count + 1):
            self.callbacks.on_round_start(number)
            self.search_learning_rate(number)
            row = self.round(number)
            self.end_round(number, row)
            self.checkpoint(number)
        self.states.clear()  # the final evaluation reads the checkpoint of the best round

    def round(self, number: int) -> Row:
        """One round: its state is kept, its row returned."""
        cohort = self.select(number)
        tasks = self.configure(number, cohort)
        record = RoundRecord(number, cohort)
        replies = self.train(record, tasks)
        candidates = self.aggregate(record, replies, asked=len(tasks))
        self.states[number], row = self.evaluate(record, candidates)
        return row

    # --- the steps ---

    def select(self, number: int) -> Mapping[str, Assignment]:
        """The cohort of a round, and how much each client is to do (drawn beforehand by the seed)."""
        return self.plan[number - 1]

    def configure(self, number: int, cohort: Mapping[str, Assignment]) -> dict[str, Task]:
        """A task for each client of the cohort, from the state that it starts from."""
        tasks: dict[str, Task] = {}
        for since in sorted({assignment.since for assignment in cohort.values()}):
            amounts = {name: a.amount for name, a in cohort.items() if a.since == since}
            tasks |= self.federation.method.configure(self.states[since], since + 1, amounts)
        return {name: tasks[name] for name in cohort}

    def train(self, record: RoundRecord, tasks: Mapping[str, Task]) -> Iterator[Reply]:
        """Send the tasks, and give the replies as they come."""
        self._phase(record.number, self._kind(record.number), of=len(tasks))
        record.elapsed = -time.perf_counter()
        absent = {name for name, assignment in record.cohort.items() if assignment.absent}
        return self.federation.transport.exchange(tasks, record.number, absent)

    def aggregate(self, record: RoundRecord, replies: Iterator[Reply], asked: int) -> list[Aggregate]:
        """What the round may end with: one state, or two after a round that fits the head. Where it needs a
        further exchange, only those count that answered in all of them.

        Raises:
            RunError: fewer than ``rounds.min_clients`` of the clients ``asked`` answered.
        """
        number, state = record.number, self.states[record.number - 1]
        first, answers = peeked(self._accepted(record, replies))
        try:
            aggregate = self.federation.method.aggregate
            following = Aggregate(state) if first is None else aggregate(state, answers)
            check_aggregate(following.state)
        except (AggregationError, UpdateError) as error:
            following = self._refused(record, state, error)
        needed = min(self.recipe.rounds.min_clients, asked)
        if len(record.answered) < max(1, needed):
            raise RunError(
                f"round {number}: {len(record.answered)} of {asked} clients answered, "
                f"rounds.min_clients = {needed}; the last reason: {list(record.left_out.values())[-1]}"
            )
        candidates = [following]
        while UNFINISHED in following.state.values:
            waits = not following.may_end
            try:
                following = self._next_exchange(record, following.state)
                if waits and len(record.answered) < needed:
                    raise AggregationError(
                        f"{len(record.answered)} clients answered in all exchanges, "
                        f"rounds.min_clients = {needed}"
                    )
            except (AggregationError, UpdateError) as error:
                following = self._refused(record, state, error)
                candidates = [following]
            if not waits and following.state.tensors is not candidates[-1].state.tensors:
                candidates = [candidates[-1], following]
            candidates[-1] = following
        record.elapsed += time.perf_counter()
        return candidates

    def evaluate(self, record: RoundRecord, candidates: list[Aggregate]) -> tuple[State, Row]:
        """The state that the round ends with, the best of the candidates on the development split, and the
        round's row.
        """
        number, recipe, rows = record.number, self.recipe, self.directory.history.rows
        row = record.row(recipe, learning_rate_in(self.directory.path, recipe), rows[-1] if rows else {})
        chosen = candidates[-1]
        fits = number in self._fits()
        if fits or number % recipe.evaluation.every == 0 or number == recipe.rounds.count:
            self._phase(number, "evaluating")
            begun = time.perf_counter()
            before = self.states[number - 1]
            if fits and number > 1 and before is not candidates[0].state:
                candidates.insert(0, Aggregate(before))
            chosen, row["development"] = better_state(recipe, candidates, self.federation.evaluation)
            row["seconds"]["evaluate"] = round(time.perf_counter() - begun, 4)
            self.callbacks.on_evaluate(number, dict(row["development"]))
        if chosen.report:
            row["method"] = chosen.report
        spending = self.federation.private or self.federation.hidden
        if spending is not None and (spent := spending.spent(number)):
            row["epsilon"] = round(spent, 6)
        row["peak_memory_bytes"] = environment.peak_memory()
        return chosen.state, row

    def end_round(self, number: int, row: Row) -> None:
        """Write the round's row, and draw the rounds to come again where clients told of their labels."""
        self.writer.on_round_end(row)
        self.callbacks.on_round_end(deepcopy(row))
        if number in self._fits() and number < self.recipe.rounds.count:
            self._plan(self.states[number])
        needed = [since for since in self.states if self.uses.get(since, 0) > number]
        self.states = {since: self.states[since] for since in {*needed, number}}

    def checkpoint(self, number: int) -> None:
        """Write the checkpoint of a round where one is due: every ``rounds.checkpoint_every`` rounds, after
        the best and the last round, where later rounds need an earlier state, and where a callback failed.

        Raises:
            Exception: that of the callback, once the run can be resumed.
        """
        best, rounds = self.directory.best_round(self.recipe), self.recipe.rounds
        earlier = [since for since in self.states if since < number]
        due = number % rounds.checkpoint_every == 0 or number in (best, rounds.count) or earlier
        if due or self.callbacks.failure:
            self._phase(number, "writing its checkpoint")
            checkpoints, memories = self.directory.checkpoints, self.federation.memories
            checkpoint = Checkpoint(number, self.states[number], *memories.snapshot(), self.untuned)
            checkpoints.save(checkpoint, keep=[best, *earlier])
            self.states[number] = checkpoints.mapped(checkpoint)
            del checkpoint
            memories.saved(checkpoints.rounds())
            self.callbacks.on_checkpoint(number)
        self.callbacks.raise_failure()

    # --- before the first round ---

    def resume(self) -> int:
        """Go back to the last checkpoint or the first state and plan the rounds; how many are done."""
        checkpoint, federation = self.directory.last_checkpoint(), self.federation
        state, done = federation.origin, 0
        if checkpoint is not None:
            state, done, self.untuned = checkpoint.state, checkpoint.round_number, checkpoint.untuned
            federation.memories.restore(done, checkpoint.memories, checkpoint.files)
        self.norm_gate = self._gate(self.directory.history.rows)
        self.callbacks.on_run_start(self.recipe, done, self.directory.path)
        self._plan(state)
        self.callbacks.on_outline(
            outline(self.recipe, federation.data, federation.method, federation.origin, self.plan)
        )
        self.uses, self.states = last_uses(self.plan), {done: state}
        for since, until in self.uses.items():
            if since < done < until:
                earlier = self.directory.checkpoints.load(since).state if since else federation.origin
                self.states[since] = earlier
        self.federation = replace(federation, origin=State({}))  # held no longer than it is needed
        self.callbacks.raise_failure()  # nothing is lost yet
        if done == 0:
            self.evaluate_untuned(state)
        return done

    def evaluate_untuned(self, state: State) -> None:
        """Round 0: the quality of the untuned model, where the recipe asks for it."""
        if not self.recipe.evaluation.untuned:
            return
        self.callbacks.on_phase("evaluating the untuned model")
        begun = time.perf_counter()
        self.untuned = self.federation.evaluation.test(state)
        row: Row = {"round": 0, "development": self.federation.evaluation.development(state)}
        row["seconds"] = {"train": 0.0, "evaluate": round(time.perf_counter() - begun, 4), "aggregate": 0.0}
        row["peak_memory_bytes"] = environment.peak_memory()
        self.callbacks.on_evaluate(0, dict(row["development"]))
        self.writer.on_round_end(row)
        self.callbacks.on_round_end(deepcopy(row))

    def search_learning_rate(self, number: int) -> None:
        """Search for the learning rate before the first round that trains, where the recipe asks for it; the
        state takes it along, and ``search.json`` tells of it.
        """
        state, fits = self.states[number - 1], self._fits()
        if not self.recipe.training.search_rates or RATE_FACTOR in state.values or number in fits:
            return
        tell = lambda text: self._phase(number, text)  # noqa: E731
        found = search_rate(self.recipe, state, self.plan, number, self.federation, tell)
        write_json(self.directory.path / "search.json", found.described())
        self.callbacks.on_note(found.in_words(self.recipe.metric))
        usual = self.recipe.training.learning_rate
        assert isinstance(usual, float)
        values = {**state.values, RATE_FACTOR: found.learning_rate / usual}
        self.states[number - 1] = replace(state, values=values)

    # --- parts of the steps ---

    def _plan(self, state: State) -> None:
        """Draw the cohorts of all rounds, by the labels that clients told of as far as they did."""
        self.callbacks.on_phase("planning the rounds")
        private = self.federation.private
        turns = private.turns() if private else None
        self.plan = plan_rounds(self.recipe, self.federation.data, client_labels(state), turns)

    def _next_exchange(self, record: RoundRecord, state: State) -> Aggregate:
        """A further exchange of an unfinished round, with those who answered so far, or of them those who
        have more to say.
        """
        method, number = self.federation.method, record.number
        amounts = {name: record.cohort[name].amount for name in record.answered}
        tasks = method.configure(state, number, amounts)
        record.answered = [name for name in record.answered if name not in tasks]
        record.exchanges += 1
        replies = self.federation.transport.exchange(tasks, number)
        following = method.aggregate(state, self._accepted(record, replies))
        check_aggregate(following.state)
        return following

    def _accepted(self, record: RoundRecord, replies: Iterator[Reply]) -> Iterator[Answer]:
        """The sound answers, one by one; the others are noted with a warning that names the client."""
        exponent, kind = self.recipe.participation.staleness_exponent, self._kind(record.number)
        kind += f", exchange {record.exchanges}" if record.exchanges > 1 else ""
        done = 0
        # enumerate would hold on to each until the next one is there
        for reply in self.norm_gate.passed(replies, record.sizes):
            done += 1
            self._phase(record.number, kind, done, len(record.cohort))
            record.note(reply)
            if reply.update is None:
                if reply.detail and not reply.summed:  # a simulated drop-out is no surprise
                    reason = record.left_out[reply.client]
                    self.warn(
                        f"round {record.number}: client {reply.client} left out: {reason}", reply.detail
                    )
                continue
            late = 0 if reply.clients else record.staleness(reply.client)
            discount = (1 + late) ** -exponent if late else 1.0
            yield Answer(reply.client, reply.task, reply.update, discount, reply.clients)
            del reply  # before the next one comes

    def _refused(self, record: RoundRecord, state: State, error: Exception) -> Aggregate:
        """The state before a round whose aggregate cannot be trained from: the run goes on from there."""
        record.refused = str(error)
        self.warn(
            f"round {record.number}: refused, the state stays that of round {record.number - 1}: {error}"
        )
        return Aggregate(state)

    def warn(self, text: str, detail: str = "") -> None:
        """Tell the user, and keep it with its ``detail`` in ``warnings.log``."""
        self.callbacks.on_note(text)
        self.directory.warn(text, detail)

    def _gate(self, rows: Sequence[Row] = ()) -> NormGate:
        """The norm gate. Where clients are hidden, none is left out by what others send: all are bounded."""
        return NormGate(self.recipe.aggregation, rows, alone=self.federation.private is not None)

    def _fits(self) -> frozenset[int]:
        """The rounds in which clients fit the head."""
        return self.recipe.training.rounds_of_head_fits(self.recipe.rounds.count)

    def _kind(self, number: int) -> str:
        """The clients' work in a round, in a word or two."""
        return "fitting the head" if number in self._fits() else "training"

    def _phase(self, number: int, text: str, done: int = 0, of: int = 0) -> None:
        """Tell the present activity in a round."""
        self.callbacks.on_phase(f"round {number} of {self.recipe.rounds.count}, {text}", done, of)
