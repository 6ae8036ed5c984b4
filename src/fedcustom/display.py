"""How a run shows itself: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .directory import Row
from .recipe import Recipe
from .remedies import in_words


class Display:
    """Shows round, loss, metric and time left; warnings stand on lines of their own.

    On a terminal one line is redrawn; elsewhere there is one line a round, at most one a second besides the
    last. ``quiet`` shows warnings alone.
    """

    def __init__(self, console: Console, name: str = "", *, quiet: bool = False) -> None:
        self.console, self.name, self.quiet = console, name, quiet
        self.bar: Progress | None = None
        self.recipe: Recipe | None = None
        self.last_line = 0.0

    def started(self, recipe: Recipe, done: int, directory: Path) -> None:
        """Begin with ``done`` rounds behind."""
        self.recipe, self.begun, self.before = recipe, time.monotonic(), done
        self.name = self.name or f"{recipe.baseline} {recipe.method.name}"
        if self.quiet:
            return
        if remedies := in_words(recipe):
            self.console.print(
                f"{self.name}: against label skew, {remedies}", highlight=False, soft_wrap=True
            )
        if done:
            self.console.print(
                f"{self.name}: going on after round {done} of {recipe.rounds.count}", highlight=False
            )
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
            )
            self.bar.add_task(self.name, total=recipe.rounds.count, completed=done, figures="starting")
            self.bar.start()

    def round(self, row: Row) -> None:
        """Show a round's figures."""
        if self.quiet or self.recipe is None:
            return
        rounds, number = self.recipe.rounds.count, row["round"]
        figures = f"round {number}/{rounds}"
        if row.get("train_loss") is not None:
            figures += f"  loss {row['train_loss']:.4f}"
        elif number in self.recipe.training.rounds_of_head_fits(rounds):
            figures += f"  head {row.get('method', {}).get('head', 'fitted')}"
        if "development" in row:
            metric = self.recipe.metric
            figures += f"  {metric} {row['development'][metric]:.4f}"
        if number > self.before:
            left = (time.monotonic() - self.begun) / (number - self.before) * (rounds - number)
            figures += f"  {duration(left)} left"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=number, figures=figures)
        elif number == rounds or time.monotonic() - self.last_line >= 1:
            self.console.print(f"{self.name}: {figures}", highlight=False, soft_wrap=True)
            self.last_line = time.monotonic()

    def note(self, text: str) -> None:
        """Show a warning."""
        self.console.print(text, style="yellow", highlight=False, soft_wrap=True)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Show the result."""
        self.close()
        if not self.quiet:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in summary["metrics"].items())
            sent = summary["bytes"]
            if "down_per_query" in sent:
                metrics += f"  bytes a query {sent['down_per_query']:,} down, {sent['up_per_query']:,} up"
            self.console.print(
                f"{self.name}: test {metrics}  ({duration(summary['seconds']['total'])})",
                highlight=False,
                soft_wrap=True,
            )

    def close(self) -> None:
        """Take the live line away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
