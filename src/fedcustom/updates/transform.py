"""Transforms of updates: what happens to a client's update on its way, and to what the rule makes of them.

The transforms of a run stand in one list. Their order is fixed (:func:`~.pipeline.update_transforms`):

1. the simulated attack (:mod:`.attack`), for a hostile client falsifies what it would have sent;
2. the caller's own transforms, in the caller's order: clipping first, then noise;
3. compression with error feedback (:class:`~.encode.Compression`), for it decides the bytes. Whatever stands
   before it sees the numbers as they were trained; what follows it would see codes.

A round goes through the list three times::

    at the client    on_client      first to last    the delta that the method made -> what travels
    at the server    on_server      last to first    what came -> the delta, before it is checked
    at the server    on_aggregate   first to last    the rule's delta -> what the server optimiser follows

The second pass is for :class:`ServerTransform` alone.

**Not everything passes by.** These see no transform:

- the answers of rounds that fit the head (``Task.exact_answer``), and the head that comes of them: sums over
  examples, which must arrive as they are;
- in ``on_aggregate``, tensors that a method combines by a rule of its own (most LoRA variants, the prefix
  rules);
- what methods send and aggregate that train no tensors, or other things beside them (prompts, predictions,
  passages): ``on_aggregate`` is not called at all, and ``on_client`` for some of their messages only;
- a round that nobody answered: ``on_aggregate`` is not called.

Clipping and noise that some of the answers pass by protect nobody. A caller's transform is therefore refused
at the start where one of the first three applies, unless it says that it ``may_be_skipped``
(:func:`~fedcustom.federated.build.check_transforms`).

A caller's transforms are a part of the run's identity as its recipe is (:mod:`.identity`): a run is resumed
with those that it began with, in their order.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from ..core.tensors import Tensors
from ..methods.messages import RoundTask, Task, Update
from ..methods.protocol import AggregateContext, Memory
from .layout import Layout


@dataclass(frozen=True)
class UpdateContext:
    """What both ends know of an update: the client that it is of, and the task that it answers."""

    client: str
    task: Task

    @property
    def round_number(self) -> int:
        """The round of the task, from 1; a late answer's is the round in which it was asked. 0 outside
        rounds.
        """
        return self.task.round_number if isinstance(self.task, RoundTask) else 0


@dataclass(frozen=True)
class ClientContext(UpdateContext):
    """What is known at the client: also its private memory, which a transform may change."""

    memory: Memory


@dataclass(frozen=True, kw_only=True)
class EncodedUpdate(Update):
    """An update whose tensors are codes (``changes_bytes``); ``layout`` is what the receiver must be told of
    the names, shapes and dtypes that they stand for, ``answer`` the method's update without its tensors.
    """

    answer: Update
    layout: Layout = None

    @classmethod
    def of(cls, update: Update, codes: Tensors, layout: Layout) -> EncodedUpdate:
        """An update with these codes in place of its tensors."""
        return cls(codes, update.weight, answer=replace(update, tensors={}), layout=layout)

    def decoded(self, tensors: Tensors) -> Update:
        """The update with the tensors that the codes stand for."""
        return replace(self.answer, tensors=tensors)


class UpdateTransform(Protocol):
    """One entry of the list. Subclass it for these defaults, which change nothing, or match its form.

    ``name`` is what errors call it: the setting that asks for it, as in ``attack.kind = 'alie'``. It says of
    itself:

    - ``needs_individual_updates``: others than its client must see a client's update, so that a sum of all
      would not do;
    - ``changes_bytes``: what it returns are codes of another form or length, so that it has to stand last,
      and to be a :class:`ServerTransform`;
    - ``is_linear``: the sum of what it returns is what it returns for the sum;
    - ``may_be_skipped``: the run is as its caller wants it also where something does not pass by (see the
      module's docstring). Not so for clipping, noise, or anything else that protects.

    Its settings are its public attributes as they are when the run begins, unless :meth:`identity` gives
    others; the names of attributes that are no settings begin with an underscore.
    """

    name: str = "transform"
    needs_individual_updates: bool = False
    changes_bytes: bool = False
    is_linear: bool = False
    may_be_skipped: bool = False

    def identity(self) -> Mapping[str, object] | None:
        """Its settings, by which a run that is resumed sees that it is the same: values that JSON can hold;
        None: its public attributes.
        """
        return None

    def on_client(self, update: Update, context: ClientContext) -> Update:
        """A client's update in place of the one that its method made, or that the transform before this one
        returned. An exception leaves the client out of the round.
        """
        return update

    def on_aggregate(self, delta: Tensors, context: AggregateContext) -> Tensors:
        """The cohort's delta in place of the one that the aggregation rule gave, in the same names and
        shapes; the server optimiser follows it. Called by methods that train tensors, once in each round that
        trains and that somebody answered. Tensors that a method combines by a rule of its own are not in
        ``delta``; what a drift correction sends is.
        """
        return delta


def acts(transform: UpdateTransform, hook: str) -> bool:
    """Whether a transform has a hook of its own, in place of the default that changes nothing."""
    return getattr(type(transform), hook, None) is not getattr(UpdateTransform, hook)


@runtime_checkable
class ServerTransform(Protocol):
    """A transform that also acts on each update as it arrives at the server."""

    def on_server(self, update: Update, context: UpdateContext) -> Update:
        """The update that the method checks and aggregates. Nothing in ``update`` is trusted.

        Raises:
            WireError: what came is no update; the client is left out of the round.
        """


@runtime_checkable
class JointTransform(Protocol):
    """A transform of several clients' updates at once, which only a simulation can do: its ``members`` work
    before the round's other clients.
    """

    members: Container[str]

    def on_clients(self, updates: Mapping[str, Update], cohort: int) -> dict[str, Update]:
        """The members' updates, by client, in place of those that their methods made; ``cohort`` is the
        number of clients in the round.
        """
