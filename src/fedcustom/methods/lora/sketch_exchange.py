"""The two exchanges of a round of ``fedask``: sketches of clients' products, and their projections.

The maths is ``aggregation/lora_sketch.py``. What travels are differences from what a client was sent: with
X of the state and X_k of the client, ``(X_k - X) Omega`` and ``(X_k - X)^T Q``. The server adds those of the
state, which it knows. So the numbers are small where clients change little, as a bound of secure sums and
the limits of norms expect.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...aggregation.lora_factors import LoraFactors
from ...aggregation.lora_sketch import (
    difference,
    estimated_error,
    factors_of,
    missed_by_basis,
    projected,
    random_sketch,
    sketch_basis,
    sketch_columns,
    sketched,
)
from ...core.errors import AggregationError, UpdateError
from ...core.seeds import name_seed
from ...core.tensors import Tensors, is_finite, named, part, without
from ..messages import ChangeUpdate, Messages, Task, Update, message_kinds, typed
from ..protocol import UNFINISHED, Aggregate, Answer, Client, Memory, State
from ..tuning.messages import TrainUpdate
from ..tuning.update_checks import check_forms, check_weight
from .matrix import Matrix
from .messages import ProjectionUpdate, ProjectTask
from .settings import LoraSettings

FACTORS = "factors/"
"""Before the name of a factor in a client's memory, between the exchanges of a round: of the difference of
its product from that of the state, whose rank is 2 ``rank``.
"""

FACTORS_ROUND = "factors_round"
"""The number in a client's memory of the round that these factors are of."""

BASIS, PROJECTION, SKETCH = "basis/", "projection/", "sketch/"
"""Before a matrix's name: its Q in a task and in the server's part of an unfinished state, and what clients
answer of it.
"""

MISSED = "sketch_missed"
"""The value of an unfinished state: what the bases miss (:func:`~.lora_sketch.missed_by_basis`), squared."""

SLACK = 1e-3
"""By how much an inner product of a basis's columns may differ from 0 or 1."""


class SketchExchange:
    """Sketches of products, and the exchange after that of training, in which they are projected
    (:class:`~..tuning.further_exchange.FurtherExchange`).

    The mean that is projected is that of the clients that answered both exchanges; the bases are of all that
    answered the first one. Where nobody answers the second, the round comes to nothing.

    Discloses: both differences, of which, without secure sums, the server can compute the change of a
    client's product B A, exactly where 2 ``rank`` is no more than s. A client remembers its factors from one
    exchange to the next, and forgets them with its answer.
    """

    messages: Messages = message_kinds((ProjectTask, ProjectionUpdate))

    def __init__(
        self,
        settings: LoraSettings,
        matrices: Sequence[Matrix],
        seed: int,
        weight: Callable[[Update], float] = lambda update: update.weight,
    ) -> None:
        self.settings, self.matrices, self.seed, self.weight = settings, matrices, seed, weight

    # --- the first exchange, which is that of training ---

    def omega(self, matrix: Matrix, round_number: int) -> Tensor:
        """The random matrix of (in, s) that all share in a round."""
        seed = [self.seed, 14, round_number, name_seed(matrix.name)]
        return random_sketch(matrix.a.shape[1], self.columns(matrix), seed)

    def columns(self, matrix: Matrix) -> int:
        """The columns s of a matrix's sketch."""
        return sketch_columns(self.settings.rank, self.settings.columns_beyond_rank, matrix.shape)

    def sketch_forms(self, wanted: Tensors) -> Tensors:
        """What is sent in place of the factors in ``wanted``."""
        found = dict(wanted)
        for matrix in self.matrices:
            del found[matrix.a_name]
            like = found.pop(matrix.b_name)
            found[SKETCH + matrix.name] = _form(like, (matrix.shape[0], self.columns(matrix)))
        return found

    def pack(self, update: TrainUpdate, sent: Tensors, round_number: int, memory: Memory) -> TrainUpdate:
        """The update with a sketch in place of factors, which the client's ``memory`` takes."""
        packed, kept = dict(update.tensors), Tensors()
        for matrix in self.matrices:
            before = _product(matrix, sent)
            after = LoraFactors(before.a + packed.pop(matrix.a_name), before.b + packed.pop(matrix.b_name))
            moved = difference(after, before)
            kept |= {matrix.a_name: moved.a, matrix.b_name: moved.b}
            sketch = sketched(moved, self.omega(matrix, round_number))
            packed[SKETCH + matrix.name] = sketch.to(before.b.dtype)
        memory.tensors = without(memory.tensors, FACTORS) | named(kept, FACTORS)
        memory.values[FACTORS_ROUND] = round_number
        return replace(update, tensors=packed)

    def unfinished(self, state: State, moved: Mapping[str, Tensor], round_number: int) -> Aggregate:
        """The state after the first exchange, with what is to be sent in the second.

        Args:
            state: With the factors that clients were sent, and everything else as it was merged.
            moved: The mean of the clients' sketches of (out, s), by the matrix's name.
            round_number: From 1.
        """
        bases, missed = Tensors(), 0.0
        for matrix in self.matrices:
            sent = sketched(_product(matrix, state.tensors), self.omega(matrix, round_number))
            sketch = sent + moved[matrix.name].double()
            bases[matrix.name] = sketch_basis(sketch).to(state.tensors[matrix.b_name].dtype)
            missed += missed_by_basis(sketch, matrix.shape)
        if not (is_finite(bases) and math.isfinite(missed)):
            raise AggregationError("the mean of the clients' sketches holds numbers that are not finite")
        values = {**state.values, UNFINISHED: ProjectTask.kind, MISSED: missed}
        return Aggregate(State(state.tensors, {**state.server, **named(bases, BASIS)}, values), may_end=False)

    # --- the second exchange ---

    def tasks(self, state: State, names: Iterable[str], round_number: int) -> dict[str, Task]:
        """The bases, for each client that answered the first exchange."""
        bases = named(part(state.server, BASIS), BASIS)
        return {name: ProjectTask(bases, round_number=round_number) for name in names}

    def forms(self, task: Task) -> Tensors:
        """Those of the projections that answer a task with these bases."""
        found = Tensors()
        for matrix in self.matrices:
            basis = typed(task, ProjectTask).tensors[BASIS + matrix.name]
            found[PROJECTION + matrix.name] = _form(basis, (matrix.shape[1], basis.shape[1]))
        return found

    def execute(self, task: Task, client: Client) -> ProjectionUpdate:
        """The projections of the client's products less those of what it was sent; it forgets its factors.

        Raises:
            UpdateError: what was sent are no bases, or the client has no factors of this round.
        """
        asked, memory = typed(task, ProjectTask), client.memory
        self._check_bases(asked.tensors)
        if memory.values.get(FACTORS_ROUND) != asked.round_number:
            raise UpdateError(
                f"round {asked.round_number}: no trained factors are here to be projected; they were asked "
                "for before the round's training, or a second time"
            )
        kept, found = part(memory.tensors, FACTORS), Tensors()
        for matrix in self.matrices:
            basis = asked.tensors[BASIS + matrix.name]
            found[PROJECTION + matrix.name] = projected(_product(matrix, kept), basis).to(basis.dtype)
        memory.tensors = without(memory.tensors, FACTORS)
        del memory.values[FACTORS_ROUND]
        return ProjectionUpdate(found, float(len(client.data.train)))

    def check(self, task: Task, update: Update) -> None:
        """Refuse other tensors than projections on the task's bases, numbers that are not finite, and a
        weight that is none.
        """
        answer = typed(update, ChangeUpdate)
        if not is_finite(answer.tensors):
            raise UpdateError("an update holds numbers that are not finite")
        check_forms(answer.tensors, self.forms(task))
        check_weight(answer.weight)

    def aggregate(self, kind: str, state: State, answers: Iterable[Answer]) -> Aggregate:
        """The state with the factors of the projected mean product, and the report of the round.

        Raises:
            AggregationError: nobody answered.
        """
        total, weight = dict[str, Tensor](), 0.0
        for answer in answers:
            own = self.weight(typed(answer.update, ChangeUpdate))
            for name, tensor in part(answer.update.tensors, PROJECTION).items():
                more = tensor.double() * own
                total[name] = total[name].add_(more) if name in total else more
            weight += own
            del answer  # before the next one comes
        if not weight:
            raise AggregationError(
                "nobody answered the second exchange of the round, in which products are projected"
            )
        bases, whole, kept, merged = part(state.server, BASIS), [], [], Tensors()
        for matrix in self.matrices:
            basis, like = bases[matrix.name], state.tensors[matrix.b_name]
            projection = projected(_product(matrix, state.tensors), basis) + total[matrix.name] / weight
            best = factors_of(basis, projection, self.settings.rank, 1.0)
            whole.append(LoraFactors(projection.T, basis.double()))
            kept.append(best)
            # Directions that the clients left empty keep rows of A, or they could never be trained again.
            empty = best.b.norm(dim=0) <= 1e-6 * best.b.norm()
            a = torch.where(empty[:, None], matrix.a.double(), best.a)
            merged |= {matrix.a_name: a.to(like.dtype), matrix.b_name: best.b.to(like.dtype)}
        error = estimated_error(float(state.values[MISSED]), whole, kept)
        values = {key: value for key, value in state.values.items() if key not in (UNFINISHED, MISSED)}
        following = State({**state.tensors, **merged}, without(state.server, BASIS), values)
        return Aggregate(following, {"estimated_aggregation_error": error} if math.isfinite(error) else {})

    def first_task(self, sent: Tensors, round_number: int) -> Task:
        """A task with bases of the right forms, all zero."""
        bases = {
            BASIS + matrix.name: _form(sent[matrix.b_name], (matrix.shape[0], self.columns(matrix)))
            for matrix in self.matrices
        }
        return ProjectTask(bases, round_number=round_number)

    # --- parts ---

    def _check_bases(self, tensors: Tensors) -> None:
        """Refuse anything but orthonormal columns: longer ones would enlarge what is sent.

        Raises:
            UpdateError: names the tensor.
        """
        wanted = {
            BASIS + matrix.name: _form(matrix.b, (matrix.shape[0], self.columns(matrix)))
            for matrix in self.matrices
        }
        if tensors.keys() != wanted.keys():
            raise UpdateError("a task to project holds other tensors than the bases of all adapted matrices")
        for name, like in wanted.items():
            basis = tensors[name]
            if basis.shape != like.shape or not basis.is_floating_point():
                raise UpdateError(f"{name} has shape {tuple(basis.shape)}, not {tuple(like.shape)}")
            gram = basis.double().T @ basis.double()
            gap = float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max())
            if not gap <= SLACK:  # NaN is not
                raise UpdateError(f"{name}: its columns are not orthonormal")


def _product(matrix: Matrix, tensors: Mapping[str, Tensor]) -> LoraFactors:
    return LoraFactors(tensors[matrix.a_name], tensors[matrix.b_name])


def _form(like: Tensor, shape: tuple[int, int]) -> Tensor:
    """Zeros of a shape that take no memory, of the dtype of another tensor."""
    return torch.zeros(1, dtype=like.dtype).expand(shape)
