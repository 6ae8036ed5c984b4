"""The technique protocol: which tensors a method trains, and how they act in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ...aggregation.settings import AggregationSettings
from ...core.tensors import Tensors
from ...data.examples import Example
from ...data.settings import DataSettings
from ...evaluation.settings import EvaluationSettings
from ...models.load import Base
from ...models.products import use_few_shapes
from ...models.settings import ModelSettings
from ...privacy.example_mechanism import ExamplePrivacy
from ...privacy.settings import PrivacySettings
from ...training.settings import TrainingSettings
from ..protocol import AggregateTransform
from .aggregation_hooks import AggregationHooks
from .release import ClientRelease, OwnNoise
from .summed_head import SumTerms

Keeps = Literal["nothing", "optimizer", "everything"]


@dataclass(frozen=True)
class Context:
    """What a method is built from, alike on the server and at every client.

    ``keeps`` says what a client keeps to itself between rounds: nothing (federated learning), its optimiser's
    moments (the centralised baseline, whose training never stops), or everything (the local baseline, which
    sends nothing). ``keep_local`` names parts of what is trained that stay with each client (``head``, or a
    part of tensors' names); ``clients`` is how many clients there are, ``names`` who they are, ``root`` what
    the server itself trains on where a rule asks for that, ``public`` texts that everybody may see. ``model``
    says how ``base`` was loaded, for methods that load others like it; ``transforms`` act on what the
    aggregation rule gives, in their order. ``privacy`` is the recipe's section where it hides clients, and
    ``release`` how the server, which alone has the key of the noise, releases what they send, or
    ``own_noise`` how each client noises what it sends. With
    ``row_privacy`` clients hide each of their training rows. ``sums_only`` is whether the server is shown the
    sum of the clients' changes, and no client's own; ``sum_terms`` is what clients ask of sums of which
    a head is fitted.
    """

    base: Base
    data: DataSettings
    training: TrainingSettings
    aggregation: AggregationSettings
    evaluation: EvaluationSettings
    rounds: int
    seed: int
    keeps: Keeps = "nothing"
    keep_local: tuple[str, ...] = ()
    clients: int = 1
    names: Sequence[str] = ()
    root: list[Example] = field(default_factory=list)
    public: list[Example] = field(default_factory=list)
    model: ModelSettings = field(default_factory=lambda: ModelSettings())
    transforms: tuple[AggregateTransform, ...] = ()
    privacy: PrivacySettings | None = None
    release: ClientRelease | None = None
    own_noise: OwnNoise | None = None
    row_privacy: ExamplePrivacy | None = None
    sums_only: bool = False
    sum_terms: SumTerms = field(default_factory=SumTerms)


@dataclass
class TrainableModel:
    """A base model with the tensors that a method trains.

    ``parameters`` are trained by a client's optimiser; :meth:`read` and :meth:`write` are what travels. They
    are the same tensors unless a method says otherwise. ``head`` names those of the classification head.
    ``corrects`` is whether a gradient has the form in which tensors travel, as corrections of drift need it.
    ``scale`` is what a client's state has its ``scaled`` matrices' outputs multiplied by, where that is not
    the same for all (LoRA of different ranks); :meth:`inwards` sets it in the model. ``matrices`` names the
    parameters that an optimiser of matrices takes as such, and how many lie side by side in each. ``remarks``
    are what users should know of how the method fits the model. ``base_model`` is the model without what the
    method attached, for methods that change what it computes from the start (prompts, key-value prefixes);
    with the first tensors of all others the model computes what the base does. ``whole`` is whether
    :attr:`save` writes all of the model's weights.
    """

    model: Any
    parameters: dict[str, nn.Parameter]
    head: frozenset[str]
    save: Callable[[Path], None]
    load: Callable[[Path], None]
    read_hook: Callable[[Tensors], Tensors] | None = None
    write_hook: Callable[[Tensors], Tensors] | None = None
    active_dropout: list[nn.Module] = field(default_factory=list)
    hooks: AggregationHooks | None = None
    corrects: bool = True
    scale: Callable[[Tensors], float] = lambda tensors: 1.0
    scaled: frozenset[str] = frozenset()
    matrices: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    base_model: Any | None = None
    whole: bool = False

    def read(self) -> Tensors:
        """A copy of the tensors that travel."""
        with torch.no_grad():
            tensors = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
            return self.read_hook(tensors) if self.read_hook else tensors

    def forms(self) -> Mapping[str, Tensor]:
        """Tensors with the names and shapes of :meth:`read`'s, copied only where they must be computed."""
        return self.read() if self.read_hook else self.parameters

    def inwards(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Tensors in the form in which they travel, in that in which they are trained."""
        return self.write_hook(dict(tensors)) if self.write_hook else dict(tensors)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors that travelled into the model."""
        with torch.no_grad():
            values = self.inwards(tensors)
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])


class Technique(Protocol):
    """Which tensors a method trains, and how they act in the model."""

    def attach(self, base: Base, seed: int) -> TrainableModel:
        """Change ``base.model`` in place so that exactly the method's tensors and the head are trained.

        Raises:
            ModelError: the method does not fit the model.
        """


def prepare_precision(base: Base, original: Iterable[nn.Parameter]) -> None:
    """Keep trained parameters in float32; with bfloat16, the base's frozen matrices (among ``original``, its
    parameters before the method was attached) are stored in it as well, and a processor makes its products in
    few shapes.
    """
    for parameter in base.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for parameter in original:
        if not parameter.requires_grad and base.precision == "bfloat16" and parameter.dim() > 1:
            parameter.data = parameter.data.to(torch.bfloat16)
    if base.precision == "bfloat16" and base.device.type == "cpu" and not base.compile:
        use_few_shapes(base.model)
