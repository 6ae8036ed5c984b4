"""TensorBoard: event files in the run's directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .tracker import Known, Outcome, Scalars, Start

FOLDER = "tensorboard"


class EventFiles:
    """Event files in ``<run>/tensorboard``: scalars by round, the recipe as text, and hyperparameters.

    A run that goes on adds a file. Steps that are there already are not written again.
    """

    name = "tensorboard"
    place = FOLDER
    variables: ClassVar[Mapping[str, str]] = {}

    def __init__(self) -> None:
        self._writer: Any = None
        self._steps: dict[str, set[int]] = {}

    def open(self, start: Start, known: Known) -> Known:
        """Read which steps are there, and open a file for more."""
        from torch.utils.tensorboard import SummaryWriter

        folder = start.directory / FOLDER
        self._steps = written_steps(folder)
        self._writer = SummaryWriter(str(folder), flush_secs=10)
        if not known:
            self._writer.add_text("recipe", f"```toml\n{start.recipe}\n```", 0)
            experiment, begin, _ = _hyperparameters(start.parameters)
            self._writer.file_writer.add_summary(experiment)
            self._writer.file_writer.add_summary(begin)
            self._writer.flush()
        return {"begun": True}

    def log(self, step: int, scalars: Scalars) -> None:
        """Write the figures that are not there yet, in single precision."""
        for name, value in scalars.items():
            steps = self._steps.setdefault(name, set())
            if step not in steps:
                self._writer.add_scalar(name, value, step)  # its server shows no float64
                steps.add(step)
        self._writer.flush()

    def finish(self, step: int, scalars: Scalars) -> None:
        """Write the final figures, and that the run has succeeded."""
        self.log(step, scalars)
        self._writer.file_writer.add_summary(_hyperparameters({})[2])
        self._writer.flush()

    def close(self, outcome: Outcome) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def _hyperparameters(values: Mapping[str, str]) -> tuple[Any, Any, Any]:
    """The summaries of the hparams plugin: of the experiment, of the run's begin and of its end."""
    from torch.utils.tensorboard import summary

    make: Any = summary.hparams
    found: tuple[Any, Any, Any] = make(dict(values), {})
    return found


def written_steps(folder: Path) -> dict[str, set[int]]:
    """The steps of each scalar that the event files in a folder have."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    found.Reload()
    return {tag: {event.step for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}
