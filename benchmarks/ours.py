"""This project's own engine on a job: the whole run, as ``fedcustom run`` makes it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedcustom.core.environment import peak_memory
from fedcustom.federated.callbacks import Callback
from fedcustom.federated.run import run_recipe
from fedcustom.recipe.recipe import Recipe, load_recipe


class Stopwatch(Callback):
    """The seconds from the end of one round to that of the next: training, merging, checkpoint and history,
    all but the evaluation. ``processor`` is processor time, which a busy machine disturbs less; the last
    round's holds the evaluation too.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.processor: list[float] = []
        self.last = self.last_processor = 0.0
        self.ended = self.evaluating = 0.0
        """When the last round ended, in seconds since 1970, and how much of the time until then went into
        evaluation, which no other engine does.
        """

    def on_run_start(self, recipe: Recipe, done: int, directory: Path) -> None:
        """The first round begins."""
        self.last, self.last_processor = time.perf_counter(), time.process_time()

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        """A round ended."""
        now, processor = time.perf_counter(), time.process_time()
        self.seconds.append(now - self.last - row["seconds"]["evaluate"])
        self.losses.append(row["train_loss"])
        self.processor.append(processor - self.last_processor)
        self.last, self.last_processor = now, processor
        self.ended, self.evaluating = time.time(), self.evaluating + row["seconds"]["evaluate"]


def main() -> None:
    """``ours.py JOB RESULT``."""
    job, folder = Path(sys.argv[1]), Path(sys.argv[2])
    watch, begun = Stopwatch(), time.perf_counter()
    run_recipe(load_recipe(job / "recipe.toml"), folder / "run", callbacks=[watch])
    content = {
        "rounds": watch.seconds,
        "processor": watch.processor,
        "losses": watch.losses,
        "memory": peak_memory(),
        "ended": watch.ended,
        "evaluating": watch.evaluating,
    }
    content["total"] = time.perf_counter() - begun
    (folder / "run" / "model").rename(folder / "model")
    (folder / "result.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
