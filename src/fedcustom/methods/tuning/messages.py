"""Messages of methods that train tensors: training, and fitting the head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from ..contents import Content
from ..messages import (
    INLINE,
    ChangeUpdate,
    Positive,
    RoundTask,
    TrainingTask,
    Update,
    Whole,
    Work,
    message_kinds,
)

LabelCounts = Annotated[tuple[Whole, ...], Field(max_length=1_000_000, fail_fast=True)]
"""How many examples there are of each label, in the labels' order."""


@dataclass(frozen=True, kw_only=True)
class TrainTask(TrainingTask):
    """Train from the state in ``tensors``, for as long as ``work`` says.

    Attributes:
        label_counts: The examples of each label of all clients to whose vectors the head was fitted; None
            before.
        head_unfitted: The head, which would be frozen, could not be fitted before.
    """

    kind: ClassVar[str] = "train"
    contents: ClassVar[tuple[Content, ...]] = ("updates", "counts")

    label_counts: LabelCounts | None = None
    head_unfitted: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainUpdate(ChangeUpdate):
    """The change of the trained tensors, with the mean training loss over the examples of so many optimiser
    steps. Where rows are hidden there is no loss, and the examples are those on average.
    """

    loss: float | None = None
    examples: Positive
    steps: Positive


@dataclass(frozen=True, kw_only=True)
class HeadTask(RoundTask):
    """A task of which a head is fitted: its answer is figures to compute with."""

    exact_answer: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class FitHeadTask(HeadTask):
    """Send sums over the vectors of the model in ``tensors`` (:class:`~.head_fit.HeadFit`)."""

    kind: ClassVar[str] = "fit head"
    contents: ClassVar[tuple[Content, ...]] = ("sums", "counts")

    learning_rate_factor: float = 1.0
    work: Work = field(default=Work(), metadata={INLINE: True})


@dataclass(frozen=True, kw_only=True)
class ScaleHeadTask(HeadTask):
    """Send the losses of a head at several temperatures."""

    kind: ClassVar[str] = "scale head"
    contents: ClassVar[tuple[Content, ...]] = ("sums",)
    exchange: ClassVar[int] = 2
    exact_tensors: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class HeadGradientTask(HeadTask):
    """Send the loss and gradient of a head."""

    kind: ClassVar[str] = "head gradient"
    contents: ClassVar[tuple[Content, ...]] = ("sums",)
    exchange: ClassVar[int] = 3
    exact_tensors: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class HeadSumsUpdate(Update):
    """Sums over a client's vectors; the weight is its number of examples. Where the client hides its rows,
    its noise has this standard ``deviation`` in each number.
    """

    deviation: float | None = None


@dataclass(frozen=True, kw_only=True)
class HeadLossesUpdate(Update):
    """The sums of a head's losses, one for each temperature."""


@dataclass(frozen=True, kw_only=True)
class HeadGradientUpdate(Update):
    """A head's gradient, and ``objective``, the sum of its losses."""

    objective: float


@dataclass(frozen=True, kw_only=True)
class CountLabelsTask(FitHeadTask):
    """Send how many examples of each label there are, and how often texts repeat, of which the server is
    shown the sum over clients. The model in ``tensors`` is that whose vectors are summed next.
    """

    kind: ClassVar[str] = "count labels"
    contents: ClassVar[tuple[Content, ...]] = ("counts",)


@dataclass(frozen=True, kw_only=True)
class SumNoisedTask(FitHeadTask):
    """Send sums over the vectors of the model in ``tensors`` with noise that hides each row, of which the
    server is shown the sum over clients.
    """

    kind: ClassVar[str] = "sum noised vectors"
    contents: ClassVar[tuple[Content, ...]] = ("sums", "counts")


@dataclass(frozen=True, kw_only=True)
class SumVectorsTask(HeadTask):
    """Send sums over the vectors of labels that are common enough, of which the server is shown the sum over
    clients.

    Attributes:
        counted: Of each label, the examples of all clients that may take part.
        needed: Of each label, how many these have to be at the least.
        owners: Of each label, how many clients have such examples.
    """

    kind: ClassVar[str] = "sum vectors"
    contents: ClassVar[tuple[Content, ...]] = ("sums", "counts")
    exchange: ClassVar[int] = 2

    counted: LabelCounts
    needed: LabelCounts
    owners: LabelCounts


@dataclass(frozen=True, kw_only=True)
class SumLossesTask(ScaleHeadTask):
    """Send the losses of a head at several temperatures, of which the server is shown the sum over clients.
    All clients have so many ``examples`` in it.
    """

    kind: ClassVar[str] = "sum losses"
    contents: ClassVar[tuple[Content, ...]] = ("sums",)
    exchange: ClassVar[int] = 3

    examples: Positive


@dataclass(frozen=True, kw_only=True)
class SumGradientsTask(HeadGradientTask):
    """Send the loss and gradient of a head, of which the server is shown the sum over clients. All clients
    have so many ``examples`` in it; ``step`` counts such exchanges of a round, from 1.
    """

    kind: ClassVar[str] = "sum gradients"
    contents: ClassVar[tuple[Content, ...]] = ("sums", "counts")
    exchange: ClassVar[int] = 4

    examples: Positive
    step: Annotated[int, Field(ge=1, le=1000)]

    @property
    def place(self) -> int:
        """After the exchanges before it."""
        return self.exchange + self.step - 1


@dataclass(frozen=True, kw_only=True)
class LabelCountsUpdate(Update):
    """Whole numbers by label: of examples, and of clients by how often a text repeats. The weight is the
    number of examples.
    """


@dataclass(frozen=True, kw_only=True)
class NoisedSumsUpdate(Update):
    """Noised counts and sums of vectors by label, and the noise's variance in each number. The weight is the
    number of examples.
    """


@dataclass(frozen=True, kw_only=True)
class VectorSumsUpdate(Update):
    """Sums of vectors by label, and of their products, with numbers of examples and of vectors that were
    shortened. The weight is the number of examples in them.
    """


@dataclass(frozen=True, kw_only=True)
class LossSumsUpdate(Update):
    """Sums of a head's losses, one for each temperature, with the number that were cut."""


@dataclass(frozen=True, kw_only=True)
class GradientSumsUpdate(Update):
    """A head's gradient and the sum of its losses, with numbers of examples by label and of losses that were
    cut.
    """


OPEN_KINDS = message_kinds(
    (FitHeadTask, HeadSumsUpdate),
    (ScaleHeadTask, HeadLossesUpdate),
    (HeadGradientTask, HeadGradientUpdate),
)
"""Messages of which a head is fitted where the server is shown each client's answer."""

SUMMED_KINDS = message_kinds(
    (CountLabelsTask, LabelCountsUpdate),
    (SumNoisedTask, NoisedSumsUpdate),
    (SumVectorsTask, VectorSumsUpdate),
    (SumLossesTask, LossSumsUpdate),
    (SumGradientsTask, GradientSumsUpdate),
)
"""The same where it is shown sums over clients alone."""

HEAD_KINDS = (*OPEN_KINDS, *SUMMED_KINDS)
"""The kinds of tasks of which a head is fitted."""

MESSAGES = message_kinds((TrainTask, TrainUpdate)) | OPEN_KINDS
"""The messages of a run whose server is shown each client's answer."""
