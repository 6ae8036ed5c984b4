"""Base classes of the methods' settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, model_validator

from ..core.settings import Settings
from ..models.size_class import ModelKind, Rates
from ..training.settings import TrainingSettings
from .contents import CONTENTS, Content


class MethodSettingsBase(Settings):
    """A method's section of the recipe. ``with_head`` is whether a classification task gives its base model a
    head, or leaves it as it was pretrained. ``not_for`` names sections and settings of the recipe that have
    no meaning for the method: they must be left at their defaults; ``tasks`` are what it can learn.

    ``sends_weights`` is whether clients send weights of a model, ``sends_whole_model`` whether they send all
    of them, ``sends_predictions`` whether what travels is what models say of public texts: a report compares
    traffic by them. ``only_fits`` is whether the method's one round fits the head, and nothing is trained by
    steps. ``fills_prompts`` is whether inputs are put into prompts of the method. ``one_round`` is whether a
    run has one round, whatever ``rounds.count`` says; ``to_beat`` whether the method is a baseline that
    others have to beat, since it customises no more than a head. ``pads`` is whether its batches are padded
    even where padding changes what a model makes of a text.

    The properties are what other packages ask of a method's settings: nothing outside this package looks at
    their fields. Those of type ``str | None`` name the setting that makes it so, as in
    ``method.variant = 'flora'``, and are None where nothing does.
    """

    if TYPE_CHECKING:
        name: str

    with_head: ClassVar[bool] = True
    sends_weights: ClassVar[bool] = True
    sends_whole_model: ClassVar[bool] = False
    sends_predictions: ClassVar[bool] = False
    only_fits: ClassVar[bool] = False
    fills_prompts: ClassVar[bool] = False
    one_round: ClassVar[bool] = False
    to_beat: ClassVar[bool] = False
    pads: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification", "generation")
    not_for: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def title_of(cls, settings: Mapping[str, str]) -> str | None:
        """What tables call a run, by the settings of its recipe (``{"method.rank": "8"}``); None: as the
        method is titled.
        """
        return None

    def default_learning_rate(self, kind: ModelKind) -> float | None:
        """The learning rate for a kind of model where the recipe sets none; None where nothing is trained."""
        return None

    @property
    def has_server_model(self) -> bool:
        """Whether there is one model in the end, and not one for each client alone."""
        return True

    @property
    def has_hidden_units(self) -> bool:
        """Whether what is trained is, or can be fitted by, hidden units in wider feed-forward networks."""
        return False

    @property
    def is_whole(self) -> bool:
        """Whether the server's model is of use without what clients keep, so that it is selected by its own
        quality.
        """
        return False

    @property
    def context_tokens(self) -> int:
        """Positions of the base model's context that the method takes from every input."""
        return 0

    @property
    def named_models(self) -> tuple[str, ...]:
        """Pretrained models beside ``model.base`` that a party may load."""
        return ()

    @property
    def opens_file(self) -> str | None:
        """The setting that names a file which every party opens, as in ``method.instructions_file``."""
        return None

    @property
    def sends_texts(self) -> str | None:
        """The setting by which clients send vectors in training from which texts can be guessed, as in
        ``method.shared_negatives``.
        """
        return None

    @property
    def reads_targets(self) -> bool:
        """Whether the model reads targets as they are (of retrieval: whether the encoder is trained)."""
        return True

    @property
    def examples_scored(self) -> int | None:
        """The setting's number of examples on which a client computes an answer; None: all that it has."""
        return None

    def answer_contents(self, kind: str, usual: tuple[Content, ...], task: str) -> tuple[Content, ...]:
        """The contents of an answer to a task of this ``kind``, of which its class says the ``usual`` ones,
        where ``data.task`` is ``task``.
        """
        return usual

    def exchanges(self, kind: str) -> bool:
        """Whether a run may ask its clients for this ``kind`` of task, of those that the method has."""
        return True

    def check_limits(self) -> None:
        """Refuse settings with which a client would fill its memory; called at a site.

        Raises:
            PolicyError: names the setting.
        """

    def needed_contents(self, training: TrainingSettings, task: str) -> dict[Content, str]:
        """The kinds of content that a recipe with this method cannot do without, each with the setting that
        asks for it: all, unless a method says less. ``task`` is ``data.task``.
        """
        return dict.fromkeys(CONTENTS, f"method.name = {self.name!r}")

    @property
    def replaces_rule(self) -> str | None:
        """The setting that merges by a rule of the method's own, so that what the server sends next is no
        change of a state that every client can compute.
        """
        return None

    @property
    def needs_same_state(self) -> str | None:
        """The setting whose rule needs the updates of a round to start from one state, so that late answers
        do not fit.
        """
        return self.replaces_rule

    @property
    def needs_single_updates(self) -> str | None:
        """What does not go with a server that is shown sums alone: the method, where clients do not send
        changes of tensors, or the setting whose rule looks at each client's.
        """
        return f"method.name = {self.name!r}"

    @property
    def unbounded(self) -> str | None:
        """The setting by which one client's part in what the server releases has no bound, so that clients
        cannot be hidden (``privacy.unit = "client"``).
        """
        return self.needs_single_updates

    @property
    def unsliced(self) -> str | None:
        """The setting by which a row of a batch has no gradient of its own in training, so that none can be
        bounded (``privacy.unit = "example"``).
        """
        return f"method.name = {self.name!r}"

    @property
    def trains_every_round(self) -> str | None:
        """The setting that needs every round to train, so that none can be given to fitting the head."""
        return None

    @property
    def turns_tensors(self) -> str | None:
        """The setting by which clients get the state in other coordinates in each round."""
        return None

    @property
    def redraws_tensors(self) -> bool:
        """Whether a client sends other tensors in each round, so that nothing can be carried over."""
        return self.replaces_rule is not None or self.turns_tensors is not None

    @property
    def changes_base(self) -> str | None:
        """The setting by which matrices of the base model are trained or changed, so that they cannot be
        stored in few bits.
        """
        return None

    @property
    def personal(self) -> bool:
        """Whether each client's model has tensors, or a form, of its own."""
        return False

    def check_sections(self, baseline: str, sections: Mapping[str, Any]) -> None:
        """Refuse sections of the recipe that have no meaning for the method: those in ``not_for``.

        Raises:
            ValueError: names the setting.
        """
        task = sections["data"].task
        if task not in self.tasks:
            raise ValueError(
                f"data.task = {task!r}: allowed for method.name = {self.name!r}: {', '.join(self.tasks)}"
            )
        quantization = sections["model"].quantization
        if quantization and (setting := self.changes_base):
            raise ValueError(
                f"model.quantization = {quantization!r}: {setting} changes the matrices of the base itself, "
                "which have to be exact for that; leave it unset, or use a method that keeps them frozen "
                "(lora with variant fedit)"
            )
        for key in self.not_for:
            section, _, name = key.partition(".")
            given = sections[section]
            for each in [name] if name else type(given).model_fields:
                default = type(given).model_fields[each].get_default(call_default_factory=True)
                value = getattr(given, each)
                if value != default and (default is not None or value):  # 0 and [] say off, as unset does
                    raise ValueError(
                        f"{section}.{each} = {value!r}: has no meaning for method.name = "
                        f"{self.name!r}; leave it at its default"
                    )


class TuningSettings(MethodSettingsBase):
    """That of a method that trains tensors; of ``rates`` one is used where the recipe sets no learning rate
    (docs/learning_rates.md).
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification", "generation", "chat", "preference")
    rates: ClassVar[Rates]
    no_first_layer: ClassVar[str] = "has no meaning for this method"

    @model_validator(mode="before")
    @classmethod
    def _no_layers_to_leave_out(cls, values: Any) -> Any:
        """A setting that some of these methods have, and others cannot have."""
        if isinstance(values, dict) and "first_layer" in values and "first_layer" not in cls.model_fields:
            raise ValueError(
                f"first_layer = {values['first_layer']!r}: {cls.no_first_layer}; leave it unset, or use "
                "adapter, bitfit, ia3, ln_tuning, lora, or prefix with kind = 'memory'"
            )
        return values

    def default_learning_rate(self, kind: ModelKind) -> float:
        """The learning rate for a kind of model where the recipe sets none."""
        return self.rates.of(kind)

    @property
    def needs_single_updates(self) -> str | None:
        """A rule of its own."""
        return self.replaces_rule

    @property
    def unbounded(self) -> str | None:
        """A rule of its own; and the method, where nothing is trained by steps."""
        return f"method.name = {self.name!r}" if self.only_fits else self.needs_single_updates

    @property
    def unsliced(self) -> str | None:
        """Where nothing is trained by steps."""
        return f"method.name = {self.name!r}" if self.only_fits else None

    def needed_contents(self, training: TrainingSettings, task: str) -> dict[Content, str]:
        """Updates, and sums where a head is fitted."""
        name = f"method.name = {self.name!r}"
        needed: dict[Content, str] = {"counts": name}
        if not self.only_fits:
            needed["updates"] = name
        if training.fit_head_rounds or self.only_fits:
            needed["sums"] = name if self.only_fits else "training.fit_head_rounds"
        return needed


class UpperLayersSettings(TuningSettings):
    """That of a method that can be kept to a model's upper layers."""

    first_layer: int = Field(
        0,
        ge=0,
        description="Layers below this one (0: the first) are left as they are; what they give for an "
        "example is computed once (bitfit: with the number of layers, the head alone is trained)",
    )


class OptionalUpperLayersSettings(TuningSettings):
    """That of a method that can be kept to a model's upper layers, where written recipes leave the setting
    out until it is set.
    """

    first_layer: int | None = Field(
        None,
        ge=0,
        description="Layers below this one (0: the first) are left as they are; what they give for an "
        "example is computed once; unset: 0",
    )

    @property
    def lowest(self) -> int:
        """The first layer that is trained."""
        return self.first_layer or 0
