"""Texts of clients and files, as a terminal and a log show them."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

import fedcustom
from fedcustom.cli.console import PlainConsole
from fedcustom.cli.progress_bar import ProgressDisplay
from fedcustom.core.errors import UpdateError
from fedcustom.core.text import printable
from fedcustom.methods.tuning.client import TuningClient
from helpers.runs import rows_of

FOREIGN = [
    "[/x]",
    "[bold]",
    "[link=file:///etc/passwd]x[/link]",
    "\x1b[2J\x1b]0;title\x07",
    "\ud800",
    "a\rb\x08c",
    ":smile:",
]


@given(st.text(st.characters(codec=None)))
def test_printable_text_can_be_written_and_obeyed_by_no_terminal(text: str) -> None:
    shown = printable(text, lines=False)
    shown.encode("utf-8")
    assert all(character == "\t" or character >= " " for character in shown)
    assert "\x7f" not in shown
    assert "\u202e" not in shown
    assert printable(shown, lines=False) == shown


def test_what_people_write_stays_as_it_is() -> None:
    for text in ("Überraschung, naïve, 東京, עברית, 👩‍👩‍👧, a\tb", "two\nlines"):
        assert printable(text) == text


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("text", FOREIGN)
def test_a_display_shows_any_text(text: str, terminal: bool) -> None:
    console = PlainConsole(file=io.StringIO(), force_terminal=terminal, width=200, legacy_windows=False)
    display = ProgressDisplay(console, name=text)
    display.on_phase(f"round 1, {text}")
    display.on_note(f"client {text} left out: {text}")
    display.close()
    table = Table(text)
    table.add_row(text)
    console.print(table)
    console.print(f"error: {text}", style="bold red")
    shown = console.file.getvalue()
    plain = printable(text, lines=False)
    assert f"client {plain} left out: {plain}" in shown
    if not terminal:
        assert "\x1b" not in shown
    assert "\x1b[2J" not in shown
    assert "\x1b]0" not in shown


@pytest.mark.parametrize("text", FOREIGN)
def test_a_run_outlives_a_client_whose_error_is_such_a_text(
    small: dict[str, Any], tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, failed = TuningClient.close, list[str]()

    def failing(self: TuningClient, job: Any, *rest: Any) -> Any:
        if not failed:
            failed.append(job.client.name)
            raise UpdateError(text)
        return close(self, job, *rest)

    monkeypatch.setattr(TuningClient, "close", failing)
    console = PlainConsole(file=io.StringIO(), force_terminal=True, width=200)
    fedcustom.run(small, {"rounds.count": 1}, out=tmp_path, callbacks=[ProgressDisplay(console)])
    assert list(rows_of(tmp_path)[-1]["left_out"]) == failed
    assert printable(text, lines=False).strip() in (tmp_path / "warnings.log").read_text(encoding="utf-8")


def test_an_output_in_ascii_takes_every_text() -> None:
    script = (
        "from fedcustom.cli.console import write_any_text, out_console, json_line\n"
        "write_any_text()\n"
        "out_console.print('caf\\u00e9 \\ud83d\\ude00')\n"
        "print(json_line({'label': 'caf\\u00e9'}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.decode("ascii").splitlines()
    assert first.startswith("caf")
    assert json.loads(second) == {"label": "café"}
