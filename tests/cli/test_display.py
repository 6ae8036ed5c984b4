"""What a run says while it goes, by a clock that the test turns."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import fedcustom
from fedcustom.cli.progress_bar import ProgressDisplay, asked, size
from fedcustom.federated.callbacks import Outline
from fedcustom.federated.resolve import resolved
from fedcustom.recipe.recipe import load_recipe
from helpers.runs import rows_of


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(**options: Any) -> tuple[ProgressDisplay, Clock, StringIO]:
    """A display without its thread, its clock, and what it wrote."""
    clock, written = Clock(), StringIO()
    display = ProgressDisplay(Console(file=written, width=200), "one", clock=clock, **options)
    display._beat = lambda: None  # type: ignore[method-assign]
    return display, clock, written


def beat_until(display: ProgressDisplay, clock: Clock, end: float) -> None:
    """A beat a second, as the thread gives it."""
    while clock.now < end:
        clock.now += 1
        display.beat()


def test_a_line_every_ten_seconds_at_least() -> None:
    """The first one soon; a line of another kind puts the next one off; what ended is not spoken of."""
    display, clock, written = shown()
    display.on_phase("reading the data")
    beat_until(display, clock, 15)
    display.on_phase("round 1 of 3, training", 0, 1500)
    display.on_phase("round 1 of 3, training", 1200, 1500)
    beat_until(display, clock, 95)
    display.on_note("a warning")
    display.on_phase("")
    beat_until(display, clock, 200)
    assert written.getvalue().splitlines() == [
        "one: reading the data (2 s)",
        "one: reading the data (12 s)",
        *(f"one: round 1 of 3, training: 1,200 of 1,500 clients ({s} s)" for s in (7, 17, 27, 37, 47, 57)),
        "one: round 1 of 3, training: 1,200 of 1,500 clients (1 min 07 s)",
        "one: round 1 of 3, training: 1,200 of 1,500 clients (1 min 17 s)",
        "a warning",
    ]


def test_short_work_is_not_spoken_of(small: dict[str, Any]) -> None:
    display, clock, written = shown()
    for number in range(1, 40):
        display.on_phase(f"step {number}")
        beat_until(display, clock, clock.now + 1)
        display._line(f"step {number} done")
    assert written.getvalue().splitlines() == [f"one: step {number} done" for number in range(1, 40)]


def test_quiet_says_nothing() -> None:
    display, clock, written = shown(quiet=True)
    display.on_phase("reading the data")
    beat_until(display, clock, 30)
    display.on_outline(Outline(3, 3))
    assert (written.getvalue(), display._thread) == ("", None)


def test_the_thread_speaks_and_ends() -> None:
    clock, written = Clock(), StringIO()
    display = ProgressDisplay(Console(file=written, width=200), clock=clock)
    display.on_phase("reading the data")
    thread, clock.now = display._thread, 11.0
    assert thread is not None
    for _ in range(100):
        if written.getvalue():
            break
        time.sleep(0.1)
    display.on_phase("")
    assert written.getvalue() == "reading the data (11 s)\n"
    assert not thread.is_alive()


def test_on_a_terminal_the_live_line_says_it(small: dict[str, Any]) -> None:
    written = StringIO()
    display = ProgressDisplay(Console(file=written, width=200, force_terminal=True))
    display.on_phase("reading the data")
    display.on_run_start(resolved(load_recipe(small)).settled(4), 0, Path())
    display.on_phase("round 1 of 2, training", 3, 4)
    assert display._thread is None
    assert display.bar is not None
    (task,) = display.bar.tasks
    assert (task.description, task.total) == ("federated prefix", 2)
    assert task.fields["doing"] == "round 1 of 2, training: 3 of 4 clients"
    display.on_phase("")
    assert display.bar is None
    assert "reading the data" in written.getvalue()


def test_time_left_is_that_of_rounds_alike(small: dict[str, Any]) -> None:
    """Rounds that fit the head take as long as each other, and say nothing of those that train."""
    display, clock, written = shown()
    recipe = load_recipe(small, {"rounds.count": 7, "training.fit_head_rounds": [1, -1]})
    display.on_run_start(resolved(recipe).settled(4), 0, Path())
    for number, seconds in ((0, 100), (1, 50), (2, 4), (3, 6)):
        clock.now += seconds
        display.on_round_end({"round": number})
    lines = [line for line in written.getvalue().splitlines() if ": round" in line]
    assert ["left" in line for line in lines] == [False, False, True, True]
    assert lines[2].endswith("  1 min 06 s left")  # 4 rounds of 4 seconds, and one of 50
    assert lines[3].endswith("  1 min 05 s left")  # 3 of 5, and one of 50


@pytest.mark.parametrize(
    ("overrides", "outline", "words"),
    [
        (
            {},
            Outline(5000, 50, 6012, 304_456, 304_000, 609_000_000, None, 1_160_000_000),
            "5,000 clients with 6,012 training examples; 2 rounds of 50 clients (the default where there are "
            "more; rounds.clients_per_round changes it); 304 kB down and 304 kB up a client and round; about "
            "1.16 GB in all, 609 MB of them to fit the head",
        ),
        (
            {"rounds.clients_per_round": 3},
            Outline(4, 3, 128, 900, 1234, 0, 0, 12_800),
            "4 clients with 128 training examples; 2 rounds of 3 clients; 900 bytes down and 1.23 kB up a "
            "client and round; about 12.8 kB in all",
        ),
        ({}, Outline(4, 4), "4 clients; 2 rounds of all clients"),
        (
            {"baseline": "centralised", "rounds.count": 1},
            Outline(100, 50, 300),
            "100 clients with 300 training examples; 1 round over as many examples as those of 50 clients "
            "(the default where there are more; rounds.clients_per_round changes it)",
        ),
    ],
)
def test_what_is_asked_in_words(
    small: dict[str, Any], overrides: dict[str, Any], outline: Outline, words: str
) -> None:
    assert asked(resolved(load_recipe(small, overrides)), outline) == words


def test_sizes() -> None:
    found = [size(n) for n in (0, 999, 1000, 9994, 99_940, 99_960, 999_400, 999_600, 5 * 10**9, 10**15)]
    assert found == [
        "0 bytes", "999 bytes", "1.00 kB", "9.99 kB", "99.9 kB", "100 kB", "999 kB", "1.00 MB", "5.00 GB",
        "1000 TB",
    ]  # fmt: skip


class Heard(fedcustom.federated.callbacks.Callback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int]] = []
        self.outlines: list[Outline] = []

    def on_phase(self, text: str, done: int = 0, of: int = 0) -> None:
        self.phases.append((text, done, of))

    def on_outline(self, outline: Outline) -> None:
        self.outlines.append(outline)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        (
            {"name": "prefix", "kind": "kv", "length": 4},
            # By default clients keep back gradients in which a text stands out: no estimate can know which.
            {"training.fit_head_rounds": [1, -1], "training.fit_head_least_texts": 1},
        ),
        ({"name": "prefix", "length": 4}, {}),
        ({"name": "lora"}, {"rounds.clients_per_round": 3}),
        ({"name": "lora", "variant": "hetlora", "client_ranks": [1, 2, 3, 4]}, {}),
        ({"name": "prefix", "length": 4, "layers_sent": 1}, {}),
        ({"name": "bitfit"}, {"compression.kind": "int8", "compression.down": True}),
        (
            {"name": "lora"},
            {
                "aggregation.correction": "scaffold",
                "training.optimizer": "sgd",
                "training.clip_norm": 0,
                "training.learning_rate": 0.1,
            },
        ),
        ({"name": "full"}, {"personalisation.keep": ["head"]}),
    ],
)
def test_what_is_outlined_is_what_is_sent(
    small: dict[str, Any], tmp_path: Path, method: dict[str, Any], overrides: dict[str, Any]
) -> None:
    """To the digits of a few figures in each message."""
    heard = Heard()
    given = {**small, "method": method}
    run = fedcustom.run(given, {"rounds.count": 4, **overrides}, out=tmp_path / "run", callbacks=[heard])
    (outline,) = heard.outlines
    rows, sent = rows_of(run.directory)[1:], run.summary["bytes"]
    assert outline.clients == 4
    assert outline.examples == sum(client["examples"] for client in run.summary["clients"].values())
    assert outline.down == pytest.approx(sent["down_per_client_round"], rel=0.01)
    assert outline.up == pytest.approx(sent["up_per_client_round"], rel=0.01)
    assert outline.total == pytest.approx(sent["up_total"] + sent["down_total"], rel=0.01)
    fits = [row for row in rows if row["train_loss"] is None]
    fitting = sum(sum(row[f"bytes_{way}"].values()) for row in fits for way in ("up", "down"))
    assert outline.fitting == pytest.approx(fitting, rel=0.01)


def test_a_run_tells_its_phases(small: dict[str, Any], tmp_path: Path) -> None:
    """And ends by saying that there is nothing more to do, however it ends."""
    heard = Heard()
    overrides = {"rounds.count": 3, "training.fit_head_rounds": [1]}
    fedcustom.run(small, overrides, out=tmp_path / "run", callbacks=[heard])
    texts = list(dict.fromkeys(text for text, _, _ in heard.phases))
    assert texts[0] == "reading the data"
    assert texts[1].startswith("loading ")
    assert "evaluating the untuned model" in texts
    assert "round 3 of 3, evaluating" in texts
    assert texts[-3:] == ["evaluating the best round", "writing the model", ""]
    counted = [(done, 4) for done in range(5)]
    told = {text: [(done, of) for said, done, of in heard.phases if said == text] for text in texts}
    assert told["round 2 of 3, training"] == counted
    first, *further = told["round 1 of 3, fitting the head"]  # several exchanges, of all clients each
    assert [first, *further[:4]] == counted
    assert further == counted[1:] * (len(further) // 4)
    failed = Heard()
    with pytest.raises(fedcustom.FedcustomError):
        fedcustom.run(small, {"data.source": "nowhere.jsonl"}, out=tmp_path / "none", callbacks=[failed])
    assert [text for text, _, _ in failed.phases] == ["reading the data", ""]


def test_a_baseline_sends_nothing(small: dict[str, Any], tmp_path: Path) -> None:
    heard = Heard()
    fedcustom.run(small, {"baseline": "centralised"}, out=tmp_path / "run", callbacks=[heard])
    assert [(o.clients, o.cohort, o.total) for o in heard.outlines] == [(4, 4, None)]
