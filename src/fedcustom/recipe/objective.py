"""The training objective and the data's task: one says the other, and what contradicts is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.settings import TaskKind
from ..training.settings import TrainingSettings


def with_task_of_objective(values: Any) -> Any:
    """A recipe's content, with ``data.task = "preference"`` where it names the objective ``dpo`` and no
    task.
    """
    if not isinstance(values, Mapping):
        return values
    training, data = values.get("training"), values.get("data", {})
    asks = isinstance(training, Mapping) and training.get("objective") == "dpo"
    if asks and isinstance(data, Mapping) and "task" not in data:
        return {**values, "data": {**data, "task": "preference"}}
    return values


def check_objective(task: TaskKind, training: TrainingSettings) -> None:
    """Refuse an objective that does not go with the task, and settings of one that is not used.

    Raises:
        ValueError: names the setting.
    """
    if task == "preference":
        return
    if training.objective is not None:
        raise ValueError(
            f"training.objective = {training.objective!r}: learns from pairs of answers, data.task = "
            f"'preference', not {task!r}"
        )
    for key in ("beta", "label_smoothing"):
        if (value := getattr(training, key)) is not None:
            raise ValueError(f"training.{key} = {value}: is for data.task = 'preference', not {task!r}")
