"""A conversation with a customised model in the terminal, or line by line through pipes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from ..api import Run
from ..core.errors import DataError
from ..core.text import printable

PROMPT = "> "
RESET, QUIT = "/reset", "/quit"


def converse(run: Run, note: Callable[[str], None]) -> None:
    """Read a user's turns from standard input and print the answers, until the input or ``/quit`` ends it.

    In a terminal, a turn that the model cannot take is refused and forgotten, and so is one whose answer is
    stopped by Ctrl-C.

    Raises:
        RunError: the run was not made on conversations, or has one model for each client.
        DataError: where standard input is no terminal: the model cannot take a turn.
    """
    terminal = sys.stdin.isatty()
    run.check_chat()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        note(f"{RESET} forgets the conversation; {QUIT} or Ctrl-D ends")
    history: list[dict[str, str]] = []
    while (text := _turn(terminal)) is not None:
        if text == QUIT:
            return
        if text == RESET:
            history = []
        if text in ("", RESET):
            continue
        asked = [*history, {"role": "user", "content": text}]
        try:
            reply = run.chat(asked, _show)
        except DataError as error:
            if not terminal:
                raise
            note(f"{error}; the turn is forgotten")
            continue
        except KeyboardInterrupt:
            if not terminal:
                raise
            print()
            note("stopped; the turn is forgotten")
            continue
        print(flush=True)
        history = [*asked, {"role": "assistant", "content": reply.text}]
        if reply.dropped:
            limit = run.recipe.data.max_length
            note(f"{reply.dropped} tokens of the oldest exchanges were left out (data.max_length = {limit})")
        if not reply.ended:
            note(
                f"the answer was stopped (evaluation.max_new_tokens = {run.recipe.evaluation.max_new_tokens})"
            )
        if not reply.text:
            note("the answer is empty; the turn is forgotten")
            history = asked[:-1]


def _turn(terminal: bool) -> str | None:
    """The next line without surrounding space; None where there is no more."""
    if not terminal:
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input(PROMPT).strip()
    except EOFError:
        print()
        return None


def _show(text: str) -> None:
    """Print a piece of an answer. What a terminal would obey is escaped."""
    print(printable(text), end="", flush=True)
