"""Batched training: many clients' optimisation in one batch over the frozen base model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ....core.environment import free_memory
from ....core.errors import UpdateError
from ....core.memory_errors import out_of_memory
from ....core.tensors import Tensors
from ....data.tokens import TokenizedExample, of_one_length
from ....models.checkpointing import keeping_all
from ....privacy.example_mechanism import RowPrivacy
from ....training.local import LocalResult, make_optimizer
from ....training.settings import TrainingSettings
from .bounded_rows import BoundedRows
from .parallel_passes import ParallelPasses

RowLosses = Callable[[Mapping[str, Tensor], Sequence[TokenizedExample], Tensor], Tensor]
"""From some clients' tensors, (clients, ...), examples in rows, and the client that owns each row, (rows,) in
rising order, to each row's summed loss, (rows,).
"""

MOST_TOKENS = 4096
"""Tokens of one pass on a CPU; more do not make matrix products faster, but need memory."""

LEAST_TOKENS = 512
"""Passes smaller than this are not split further to save padding, or to run side by side."""


@dataclass
class Work:
    """What one client is to do: the examples of each of its batches, and what is added to its gradients.

    With ``privacy`` each row is hidden: its gradient is bounded, sums are noised, and no loss is told.
    """

    batches: list[list[TokenizedExample]]
    shift: Tensors = field(default_factory=dict)
    privacy: RowPrivacy | None = None
    losses: list[float] = field(default_factory=list)

    def result(self) -> LocalResult | UpdateError:
        """What came of it; optimiser moments are not kept."""
        if self.privacy is not None:  # nothing but the noised steps depends on the rows
            mechanism, steps = self.privacy.mechanism, len(self.batches)
            return LocalResult(None, max(1, round(steps * mechanism.expected)), steps, {})
        sizes = [len(batch) for batch in self.batches]
        for step, loss in enumerate(self.losses):
            if not math.isfinite(loss):
                return UpdateError(
                    f"the training loss is not finite after {step} steps; lower training.learning_rate"
                )
        mean = sum(loss * size for loss, size in zip(self.losses, sizes, strict=True)) / sum(sizes)
        return LocalResult(mean, sum(sizes), len(sizes), {})


def train_together(
    stacks: Mapping[str, Tensor],
    work: Sequence[Work],
    losses_of: RowLosses,
    settings: TrainingSettings,
    factor: float,
    *,
    units_of: Callable[[TokenizedExample], int],
    head: frozenset[str] = frozenset(),
    matrices: Mapping[str, int] | None = None,
    fixed: Mapping[str, Tensor] | None = None,
    room: PassBudget | None = None,
    lanes: int = 1,
    equal: bool = False,
) -> list[LocalResult | UpdateError]:
    """Train the clients' tensors, ``stacks`` of (clients, ...), in place; each as if it were alone.

    The same batches, losses, clipping and optimiser steps as :func:`~.local.train_locally` makes for one
    client after the other, so that results agree to rounding. In each step, examples of similar length go
    through the model together, whosever they are; a client that is done takes no further part.

    A client's loss is the sum of its rows' losses over the sum of what ``units_of`` counts in them (examples
    or target tokens). ``fixed`` are tensors of each client's own, stacked likewise, that are not trained;
    ``room`` may be kept for the next cohort. ``losses_of`` is called by up to ``lanes`` threads at a time,
    with ``equal`` for examples of one length. Either all ``work`` has privacy, or none.
    """
    order = sorted(range(len(work)), key=lambda i: -len(work[i].batches))
    chosen = None if order == sorted(order) else torch.tensor(order)  # None: no copies are needed

    def in_order(tensors: Mapping[str, Tensor]) -> Tensors:
        return {name: stack if chosen is None else stack[chosen] for name, stack in tensors.items()}

    ours = in_order(stacks)
    trainer = _Trainer(ours, [work[i] for i in order], losses_of, units_of, settings, factor, head)
    trainer.matrices = matrices or {}
    trainer.fixed = in_order(fixed or {})
    trainer.room = room or PassBudget()
    trainer.equal = equal
    with ParallelPasses(lanes) as trainer.lanes:
        trainer.train()
    if chosen is not None:
        for name, stack in stacks.items():
            stack[chosen] = ours[name]
    return [item.result() for item in work]


class PassBudget:
    """How many tokens a pass may have: as many as half of the free memory can hold, by what one example was
    found to need. ``resident`` tensors are the base model's, which need no further memory; ``share`` is which
    part of all activations a pass keeps at a time.
    """

    def __init__(self, resident: Iterable[Tensor] = (), share: float = 1.0) -> None:
        self.share = share
        self.resident = {tensor.untyped_storage().data_ptr() for tensor in resident}
        self.bytes_per_token: float | None = None

    def tokens(self, length: int, forward: Callable[[], object], device: torch.device) -> int:
        """Tokens of one pass; ``forward`` makes that of one example of ``length`` tokens."""
        if self.bytes_per_token is None:
            with saved_bytes() as saved, keeping_all():
                forward()
            kept = sum(size for storage, size in saved.items() if storage not in self.resident)
            self.bytes_per_token = max(1, kept * self.share) / length
        fitting = int(0.5 * free_memory(device) / self.bytes_per_token)
        return max(1, fitting if device.type != "cpu" else min(MOST_TOKENS, fitting))


@dataclass(frozen=True)
class _Row:
    """One example of a step: whose it is, and its part of that client's loss."""

    client: int
    example: TokenizedExample
    weight: float


@dataclass(frozen=True)
class _Pass:
    """What a pass gave: the parts of losses, (rows,), none where rows are hidden, and the gradients of the
    tensors of the clients whose rows those are, (clients, ...).
    """

    rows: Sequence[_Row]
    losses: list[float]
    clients: Tensor
    gradients: Tensors

    def add_to(self, gradients: Tensors, work: Sequence[Work]) -> None:
        """Add to what this step's other passes gave."""
        for name, gradient in self.gradients.items():
            gradients[name].index_add_(0, self.clients.to(gradient.device), gradient)
        for row, loss in zip(self.rows, self.losses, strict=True) if self.losses else ():
            work[row.client].losses[-1] += loss


class _Trainer:
    """Steps of clients that stand in falling order of how many steps they make."""

    def __init__(
        self,
        stacks: Tensors,
        work: Sequence[Work],
        losses_of: RowLosses,
        units_of: Callable[[TokenizedExample], int],
        settings: TrainingSettings,
        factor: float,
        head: frozenset[str],
    ) -> None:
        self.stacks, self.work, self.losses_of, self.units_of = stacks, work, losses_of, units_of
        self.settings, self.factor, self.head = settings, factor, head
        self.matrices: Mapping[str, int] = {}
        self.fixed: Tensors = {}
        self.room = PassBudget()
        self.equal = False
        self.anchors = {n: t.clone() for n, t in stacks.items()} if settings.proximal else {}
        self.shifts = {
            name: torch.stack([item.shift[name] for item in work]).to(stack.device)
            for name, stack in stacks.items()
            if all(name in item.shift for item in work)
        }
        self.limit: int | None = None
        self.lanes = ParallelPasses(1)
        privacies = [item.privacy for item in work if item.privacy is not None]
        self.bounded = BoundedRows(privacies, list(stacks), head) if privacies else None
        if privacies and len(privacies) < len(work):
            raise ValueError("some of the clients of a cohort hide their rows, and some do not")

    def train(self) -> None:
        """All steps of all clients."""
        active = 0
        parameters: dict[str, nn.Parameter] = {}
        optimizer: torch.optim.Optimizer | None = None
        for step in range(len(self.work[0].batches)):
            count = sum(step < len(item.batches) for item in self.work)
            if count != active:  # who is done leaves; the others' moments stay
                moments = {name: optimizer.state[p] for name, p in parameters.items()} if optimizer else {}
                parameters = {name: nn.Parameter(stack[:count]) for name, stack in self.stacks.items()}
                optimizer = make_optimizer(parameters, self.settings, self.factor, self.head, self.matrices)
                for name, kinds in moments.items():
                    optimizer.state[parameters[name]] = {
                        kind: value[:count] if value.dim() else value for kind, value in kinds.items()
                    }
                active = count
            self._gradients(parameters, step, count)
            assert optimizer is not None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _gradients(self, parameters: dict[str, nn.Parameter], step: int, count: int) -> None:
        """The gradients of every client's loss of this step, corrected and clipped client by client; where
        rows are hidden, the noised sums of their bounded gradients in place of the loss's.
        """
        gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
        rows = [row for client in range(count) for row in self._rows(client, step)]
        parts = self._parts(parameters, rows) if rows else []
        for found in self.lanes.each(lambda part: self._pass(parameters, part), parts):
            for done in found:
                done.add_to(gradients, self.work)
        if self.bounded is not None:
            self.bounded.release(gradients, step, count)
        for name, anchor in self.anchors.items():
            gradients[name].add_(self.stacks[name][:count] - anchor[:count], alpha=self.settings.proximal)
        for name, shift in self.shifts.items():
            gradients[name].add_(shift[:count])
        if self.settings.clip_norm:
            clip_each(list(gradients.values()), self.settings.clip_norm)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name]

    def _rows(self, client: int, step: int) -> list[_Row]:
        """A client's rows of a step: their losses are parts of its mean, or, where they are hidden, each the
        row's own mean.
        """
        item = self.work[client]
        batch = item.batches[step]
        if self.bounded is not None:
            return [_Row(client, example, 1 / max(1, self.units_of(example))) for example in batch]
        item.losses.append(0.0)
        units = max(1, sum(map(self.units_of, batch)))
        return [_Row(client, example, 1 / units) for example in batch]

    def _parts(self, parameters: Mapping[str, nn.Parameter], rows: Sequence[_Row]) -> list[list[_Row]]:
        """The rows of each pass of a step."""
        lengths = [_length(row.example) for row in rows]
        if self.limit is None:
            self.limit = self._fitting(parameters, rows)
        at_once = max(1, min(self.lanes.count, sum(lengths) // LEAST_TOKENS))
        limit = min(self.limit // at_once, math.ceil(sum(lengths) / at_once))
        groups = of_one_length([row.example for row in rows]) if self.equal else [list(range(len(rows)))]
        most = self.bounded.most_rows(parameters, at_once) if self.bounded is not None else len(rows)
        return [
            [rows[group[i]] for i in sorted(chosen[start : start + most])]
            for group in groups
            for chosen in passes([lengths[i] for i in group], limit)
            for start in range(0, len(chosen), most)
        ]

    def _pass(self, parameters: Mapping[str, nn.Parameter], rows: Sequence[_Row]) -> list[_Pass]:
        """Forward and backward for some rows; where memory runs out, for one half after the other."""
        try:
            return [self._whole(parameters, rows)]
        except (RuntimeError, MemoryError) as error:
            if len(rows) == 1 or not out_of_memory(error):
                raise
        # Not in the handler: the error would keep what the failed pass held.
        half = len(rows) // 2
        self.limit = max(1, (self.limit or MOST_TOKENS) // 2)
        return self._pass(parameters, rows[:half]) + self._pass(parameters, rows[half:])

    def _whole(self, parameters: Mapping[str, nn.Parameter], rows: Sequence[_Row]) -> _Pass:
        """Forward and backward for some rows."""
        clients = sorted({row.client for row in rows})
        own, losses = self._forward(parameters, rows, clients)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        gradients = {name: tensor.grad for name, tensor in own.items() if tensor.grad is not None}
        if self.bounded is None:
            return _Pass(rows, losses.detach().tolist(), torch.tensor(clients), gradients)
        place = {client: position for position, client in enumerate(clients)}
        owners = torch.tensor([place[row.client] for row in rows])
        sums = self.bounded.sums(gradients, owners, len(clients))
        return _Pass(rows, [], torch.tensor(clients), sums)

    def _forward(
        self, parameters: Mapping[str, nn.Parameter], rows: Sequence[_Row], clients: Sequence[int]
    ) -> tuple[Tensors, Tensor]:
        """The tensors of the clients whose rows these are, and the rows' parts of their clients' losses.
        Where rows are hidden, each has a slice of its own, so that its gradient is its own too.
        """
        owned = self.bounded is None
        slices = list(clients) if owned else [row.client for row in rows]
        chosen = torch.tensor(slices)
        own = {
            name: p.detach().index_select(0, chosen.to(p.device)).requires_grad_()
            for name, p in parameters.items()
        }
        fixed = {name: stack[chosen] for name, stack in self.fixed.items()}
        place = {client: position for position, client in enumerate(clients)}
        positions = [place[row.client] for row in rows] if owned else list(range(len(rows)))
        owners = torch.tensor(positions, device=next(iter(own.values())).device)
        losses = self.losses_of({**own, **fixed}, [row.example for row in rows], owners)
        weights = torch.tensor([row.weight for row in rows], device=losses.device)
        return own, losses * weights

    def _fitting(self, parameters: Mapping[str, nn.Parameter], rows: Sequence[_Row]) -> int:
        """Tokens of one pass."""
        longest = max(rows, key=lambda row: _length(row.example))
        device = next(iter(parameters.values())).device
        return self.room.tokens(
            _length(longest.example), lambda: self._forward(parameters, [longest], [longest.client]), device
        )


class saved_bytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for its backward pass, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage.nbytes()
            # An operation that keeps its own output would keep itself, and all of the graph, for ever.
            return tensor.detach()

        super().__init__(pack, lambda tensor: tensor)

    def __enter__(self) -> dict[int, int]:  # type: ignore[override]
        super().__enter__()
        return self.storages


def passes(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Which rows go through the model together: those of similar length, with at most ``limit`` tokens after
    padding where that is possible.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    result: list[list[int]] = []
    width = 0
    for i in order:
        group = result[-1] if result else []
        full = (len(group) + 1) * width > limit
        wasteful = lengths[i] < 0.8 * width and len(group) * width >= LEAST_TOKENS
        if not group or full or wasteful:
            result.append([])
            width = lengths[i]
        result[-1].append(i)
    return result


def clip_each(gradients: Sequence[Tensor], largest: float) -> None:
    """Scale each client's gradients, (clients, ...), in place such that their joint norm is at most
    ``largest`` (as :func:`torch.nn.utils.clip_grad_norm_` does for one).
    """
    device = gradients[0].device
    norms = torch.stack(
        [torch.linalg.vector_norm(gradient.flatten(1), dim=1).to(device) for gradient in gradients]
    )
    scale = (largest / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
    if bool((scale < 1).any()):
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)).to(gradient.device))


def _length(example: TokenizedExample) -> int:
    return example.length
