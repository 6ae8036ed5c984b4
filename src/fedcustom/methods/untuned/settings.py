"""The recipe's section for the base model as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from ...training.settings import TrainingSettings
from ..contents import Content
from ..registry import register
from ..settings import MethodSettingsBase

SHOTS = 4
"""How many examples a comparison puts into the context."""

ZERO_SHOT, FEW_SHOT = "zero-shot", "few-shot"


@register(".method:Untuned", colours=("#57534e", "#b5aea8"), order=120)
class UntunedSettings(MethodSettingsBase):
    """The base model as it is, zero-shot or with training examples in its context, for others to beat."""

    with_head: ClassVar[bool] = False
    sends_weights: ClassVar[bool] = False
    one_round: ClassVar[bool] = True
    to_beat: ClassVar[bool] = True
    pads: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("generation", "chat")
    not_for: ClassVar[tuple[str, ...]] = ("personalisation", "compression", "attack", "participation")

    name: Literal["untuned"] = "untuned"
    shots: int = Field(
        0,
        ge=0,
        le=1000,
        description="Training examples in front of every prompt, drawn by the seed from all rows; 0: zero-"
        "shot. They leave their clients, so that more than 0 need baseline = 'centralised'",
    )

    @classmethod
    def title_of(cls, settings: Mapping[str, str]) -> str:
        """Zero-shot, or few-shot with the number of examples."""
        shots = settings.get("method.shots", "0")
        return ZERO_SHOT if shots == "0" else f"{FEW_SHOT} ({shots})"

    def answer_contents(self, kind: str, usual: tuple[Content, ...], task: str) -> tuple[Content, ...]:
        """No texts where none are asked for."""
        return usual if self.shots else ("counts",)

    def needed_contents(self, training: TrainingSettings, task: str) -> dict[Content, str]:
        """Counts; texts where examples are asked for."""
        needed: dict[Content, str] = {"counts": f"method.name = {self.name!r}"}
        return needed | {"texts": "method.shots"} if self.shots else needed

    def check_sections(self, baseline: str, sections: Mapping[str, Any]) -> None:
        """Refuse examples of clients who keep their data.

        Raises:
            ValueError: names the setting.
        """
        super().check_sections(baseline, sections)
        if self.shots and baseline != "centralised":
            raise ValueError(
                f"method.shots = {self.shots}: puts clients' training rows into everybody's prompt; needs "
                f"baseline = 'centralised', not {baseline!r}"
            )


UNTUNED: str = UntunedSettings().name
"""Its name, for those who run it beside other methods."""
