"""What the settings of every method say besides their fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from ..core.settings import Settings
from ..models.kind import ModelKind, Rates


class MethodSettingsBase(Settings):
    """A method's section of the recipe. ``with_head`` is whether a classification task gives its base model a
    head, or leaves it as it was pretrained. ``not_for`` names sections and settings of the recipe that have
    no meaning for the method: they must be left at their defaults; ``tasks`` are what it can learn.
    """

    with_head: ClassVar[bool] = True
    tasks: ClassVar[tuple[str, ...]] = ("classification", "generation")
    not_for: ClassVar[tuple[str, ...]] = ()

    def default_learning_rate(self, kind: ModelKind) -> float | None:
        """The learning rate for a kind of model where the recipe sets none; None where nothing is trained."""
        return None

    @property
    def has_server_model(self) -> bool:
        """Whether there is one model in the end, and not one for each client alone."""
        return True

    @property
    def is_whole(self) -> bool:
        """Whether the server's model is of use without what clients keep, so that it is selected by its own
        quality.
        """
        return False

    def check_sections(self, baseline: str, sections: Mapping[str, Any]) -> None:
        """Refuse sections of the recipe that have no meaning for the method: those in ``not_for``.

        Raises:
            ValueError: names the setting.
        """
        task = sections["data"].task
        if task not in self.tasks:
            raise ValueError(
                f"data.task = {task!r}: allowed for method.name = {getattr(self, 'name', '')!r}: "
                f"{', '.join(self.tasks)}"
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
                        f"{getattr(self, 'name', '')!r}; leave it at its default"
                    )


class TuningSettings(MethodSettingsBase):
    """That of a method that trains tensors; of ``rates`` one is used where the recipe sets no learning rate
    (docs/learning_rates.md). ``only_fits`` is whether its one round fits the head, and nothing is trained by
    steps.
    """

    rates: ClassVar[Rates]
    only_fits: ClassVar[bool] = False

    def default_learning_rate(self, kind: ModelKind) -> float:
        """The learning rate for a kind of model where the recipe sets none."""
        return self.rates.of(kind)


class UpperLayersSettings(TuningSettings):
    """That of a method that can be kept to a model's upper layers."""

    first_layer: int = Field(
        0,
        ge=0,
        description="Layers below this one (0: the first) are left as they are; what they give for an "
        "example is computed once (bitfit: with the number of layers, the head alone is trained)",
    )
