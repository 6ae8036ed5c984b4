"""Weights & Biases: the configuration, figures by round, summary and model of a run."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...core.errors import RunError
from ...recipe.tracking import TrackingSettings
from .mlflow_run import FILES, PROJECT
from .tracker import Known, Outcome, Scalars, Start


class WandbRun:
    """A run of Weights & Biases, whose files are in ``<run>/wandb``. Neither the console, nor the machine,
    nor the code is captured.

    A run that goes on has the same id. What was sent before cannot be read offline, so the last step is
    remembered.
    """

    name = "wandb"

    def __init__(self, settings: TrackingSettings) -> None:
        self.settings = settings
        self._run: Any = None
        self._known: Known = {}
        self._directory = Path()
        self._recipe = ""

    @property
    def place(self) -> str:
        """The project."""
        return self.settings.project or PROJECT

    @property
    def variables(self) -> Mapping[str, str]:
        """No reports of errors."""
        return {"WANDB_ERROR_REPORTING": "false"}

    def open(self, start: Start, known: Known) -> Known:
        """Begin the run, or go on with it under its id."""
        import wandb

        self._known = {"id": secrets.token_hex(4), "last": -1, **known}
        self._directory, self._recipe = start.directory, start.recipe
        self._run = wandb.init(
            project=self.settings.project or PROJECT,
            name=start.name,
            group=start.group,
            id=self._known["id"],
            resume="allow",
            dir=str(start.directory),
            config={name: _typed(value) for name, value in start.parameters.items()},
            reinit="create_new",
            settings=wandb.Settings(
                mode="offline" if self._offline() else "online",
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                save_code=False,
                host="fedcustom",
                program="fedcustom",
                x_disable_meta=True,
                x_disable_stats=True,
                x_disable_machine_info=True,
                init_timeout=self.settings.seconds,
                finish_timeout=self.settings.seconds,
            ),
        )
        return self._known

    def log(self, step: int, scalars: Scalars) -> None:
        """Add the figures of a later step than the last one."""
        if step > self._known["last"]:
            self._run.log(dict(scalars), step=step, commit=True)
            self._known["last"] = step

    def finish(self, step: int, scalars: Scalars) -> None:
        """Add the final figures to the summary, the files, and the model where the recipe asks for it."""
        import wandb

        self._run.summary.update(dict(scalars))
        files = wandb.Artifact(f"run-{self._known['id']}", type="run")
        with files.new_file("recipe.toml", mode="w", encoding="utf-8") as recipe:
            recipe.write(self._recipe)  # without trackers, which name other places
        for name in FILES:
            if (path := self._directory / name).exists():
                files.add_file(str(path), name)
        self._run.log_artifact(files)
        model = self._directory / "model"
        if self.settings.model and model.is_dir():
            artifact = wandb.Artifact(f"model-{self._known['id']}", type="model")
            artifact.add_dir(str(model))
            self._run.log_artifact(artifact)

    def close(self, outcome: Outcome) -> None:
        """Bring everything to the disk or the server, for a bounded time."""
        if self._run is not None:
            self._run.finish(exit_code=0 if outcome == "finished" else 1)

    def _offline(self) -> bool:
        """Whether files alone are written.

        Raises:
            RunError: the server is asked for, and there is no API key; wandb would ask a terminal for it.
        """
        has_key, mode = _has_key(), os.environ.get("WANDB_MODE")
        offline = self.settings.offline
        if offline is None:
            offline = mode == "offline" if mode else not has_key
        if not offline and not has_key:
            raise RunError("there is no API key: set WANDB_API_KEY, or run wandb login")
        return offline


def _has_key() -> bool:
    """Whether the environment or ``~/.netrc`` has an API key, as ``wandb login`` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _typed(text: str) -> int | float | bool | str:
    """A parameter as a number or truth value where it is one, so that runs can be sorted by it."""
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
