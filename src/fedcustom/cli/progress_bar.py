"""Progress display: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..core.text import printable
from ..federated.callbacks import Callback, Outline
from ..federated.run_directory import Row
from ..recipe.label_skew import in_words
from ..recipe.recipe import Recipe

EVERY = 10.0
"""Seconds without a line after which what is being done is said again."""

FIRST = 2.0
"""Seconds after which it is said for the first time."""


class ProgressDisplay(Callback):
    """Shows round, loss, metric and time left, and what is being done; warnings stand on lines of their own.

    On a terminal one line is redrawn; elsewhere there is one line a round, at most one a second besides the
    last, and one at least every ten seconds as long as there is something to do: a thread says how far it is.
    ``quiet`` shows warnings alone. ``clock`` gives seconds, for tests.
    """

    def __init__(
        self,
        console: Console,
        name: str = "",
        *,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.name, self.quiet, self.clock = console, name, quiet, clock
        self.bar: Progress | None = None
        self.recipe: Recipe | None = None
        self.last_line = -math.inf
        self.spent: dict[bool, list[float]] = {}
        self.doing, self.since = "", 0.0
        self.counts = (0, 0)
        self.due: float | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def on_phase(self, text: str, done: int = 0, of: int = 0) -> None:
        """Show what is being done, or have it shown if it takes long."""
        if self.quiet:
            return
        with self._lock:
            if text != self.doing:
                self.doing, self.since = text, self.clock()
            self.counts = (done, of)
        if not text:
            self.close()
        elif self.console.is_terminal:
            self._live(doing=self._said())
        elif self._thread is None:
            self.due = self.clock() + FIRST
            self._ended.clear()
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def on_run_start(self, recipe: Recipe, done: int, directory: Path) -> None:
        """Begin with ``done`` rounds behind."""
        self.recipe, self.begun, self.before = recipe, self.clock(), done
        self.spent = {}
        self.name = self.name or f"{recipe.baseline} {recipe.method.name}"
        if self.quiet:
            return
        if remedies := in_words(recipe):
            against = "against label skew, " if recipe.baseline == "federated" else ""
            self._line(f"{against}{remedies}")
        if done:
            self._line(f"going on after round {done} of {recipe.rounds.count}")
        if self.console.is_terminal:
            self._live(description=self.name, total=recipe.rounds.count, completed=done, figures="starting")

    def on_outline(self, outline: Outline) -> None:
        """Say what the run is going to ask."""
        if not self.quiet and self.recipe is not None:
            self._line(asked(self.recipe, outline))

    def on_round_end(self, row: Row) -> None:
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
        if row.get("epsilon") is not None:
            figures += f"  epsilon {row['epsilon']:.2f}"
        if (left := self._left(number)) is not None:
            figures += f"  {duration(left)} left"
        if self.bar is not None:
            self._live(completed=number, figures=figures)
        elif number == rounds or self.clock() - self.last_line >= 1:
            self._line(figures)
            self.last_line = self.clock()

    def _left(self, number: int) -> float | None:
        """The seconds that the rounds after this one will take, by what those before took that did the same:
        trained, or fitted the head. None as long as some are of a kind that was not seen.
        """
        assert self.recipe is not None
        rounds = self.recipe.rounds.count
        fits = self.recipe.training.rounds_of_head_fits(rounds)
        begun, self.begun = self.begun, self.clock()
        if number <= self.before:  # the untuned model
            return None
        self.spent.setdefault(number in fits, []).append(self.begun - begun)
        to_fit = sum(one > number for one in fits)
        counts = {True: to_fit, False: rounds - number - to_fit}
        if any(count and kind not in self.spent for kind, count in counts.items()):
            return None
        means = {kind: sum(seconds) / len(seconds) for kind, seconds in self.spent.items()}
        return sum(count * means[kind] for kind, count in counts.items() if count)

    def on_note(self, text: str) -> None:
        """Show a warning."""
        plain = printable(text, lines=False)
        self.console.print(plain, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def on_information(self, text: str) -> None:
        """Show a fact that is no warning."""
        if not self.quiet:
            self.console.print(printable(text, lines=False), highlight=False, markup=False, soft_wrap=True)

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Show the result."""
        self.close()
        if not self.quiet:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in summary["metrics"].items())
            sent = summary["bytes"]
            if "down_per_query" in sent:
                metrics += f"  bytes a query {sent['down_per_query']:,} down, {sent['up_per_query']:,} up"
            self._line(f"test {metrics}  ({duration(summary['seconds']['total'])})")

    def close(self) -> None:
        """Take the live line away, and say nothing more of what is being done."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def beat(self) -> None:
        """Say what is being done, if nothing was said for long."""
        with self._lock:
            late = bool(self.doing) and self.due is not None and self.clock() >= self.due
        if late:
            self._line(self._said())

    def _beat(self) -> None:
        while not self._ended.wait(1.0):
            self.beat()

    def _said(self) -> str:
        """What is being done, how far it is, and for how long."""
        with self._lock:
            done, of = self.counts
            counted = f": {done:,} of {of:,} clients" if of else ""
            seconds = self.clock() - self.since
        passed = "" if self.console.is_terminal else f" ({duration(seconds)})"
        return f"{self.doing}{counted}{passed}"

    def _line(self, text: str) -> None:
        """Print a line that stays; the next word on what is being done can wait."""
        text = printable(f"{self.name}: {text}" if self.name else text)
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
        self.due = self.clock() + EVERY

    def _live(self, **changes: Any) -> None:
        """Bring the live line up to date; its clock runs by itself."""
        bar = self.bar
        if bar is None:
            bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}", markup=False),
                TextColumn("{task.fields[doing]}", style="dim", markup=False),
                TimeElapsedColumn(),
                console=self.console,
            )
            bar.add_task(printable(self.name or "fedcustom", lines=False), total=None, figures="", doing="")
        plain: dict[str, Any] = {
            key: printable(value, lines=False) if isinstance(value, str) else value
            for key, value in changes.items()
        }
        bar.update(bar.task_ids[0], **plain)
        if self.bar is None:
            self.bar = bar
            bar.start()


def asked(recipe: Recipe, outline: Outline) -> str:
    """An outline in words: ``5,000 clients with 6,012 training examples; 20 rounds of 50 clients (...)``."""
    examples = f" with {outline.examples:,} training examples" if outline.examples is not None else ""
    rounds = f"{recipe.rounds.count:,} round" + "s" * (recipe.rounds.count != 1)
    whose = f"of {_clients(outline.cohort)}" if outline.cohort < outline.clients else "of all clients"
    if recipe.baseline == "centralised":
        whose = whose.replace("of", "over as many examples as those of", 1)
    if outline.cohort < outline.clients and recipe.rounds.clients_per_round is None:
        whose += " (the default where there are more; rounds.clients_per_round changes it)"
    parts = [f"{_clients(outline.clients)}{examples}", f"{rounds} {whose}"]
    if outline.total is not None:
        each = f"{size(outline.down or 0)} down and {size(outline.up or 0)} up a client and round"
        if not (outline.down or outline.up):
            each = "no round trains"
        fits = f", {size(outline.fitting)} of them to fit the head" if outline.fitting else ""
        if outline.searching:
            fits += f", {size(outline.searching)} to search for a learning rate"
        parts += [each, f"about {size(outline.total)} in all{fits}"]
    return "; ".join(parts)


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count:,} clients"


def size(count: int) -> str:
    """``950 bytes``, ``12.3 kB``, ``305 kB``, ``1.2 GB``: three figures, powers of 1,000."""
    if count < 1000:
        return f"{count} bytes"
    scaled, unit = count / 1000, "kB"
    for larger in ("MB", "GB", "TB"):
        if scaled < 999.5:
            break
        scaled, unit = scaled / 1000, larger
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{scaled:.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
