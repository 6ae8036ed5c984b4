"""A conversation with a customised model in the terminal, or line by line through pipes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

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
        DataError: standard input is not UTF-8; or it is no terminal, and the model cannot take a turn.
    """
    terminal = sys.stdin.isatty()
    run.check_chat()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        note(f"{RESET} forgets the conversation; {QUIT} or Ctrl-D ends")
    history: list[dict[str, str]] = []
    for number, text in enumerate(_typed() if terminal else _piped(), start=1):
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
                raise DataError(f"standard input, line {number}: {error}") from None
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


def _typed() -> Iterator[str]:
    """The lines that are typed, without surrounding space."""
    while True:
        try:
            yield input(PROMPT).strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            raise DataError("standard input: not UTF-8 text") from None


def _piped() -> Iterator[str]:
    """The lines of standard input without surrounding space, as UTF-8 whatever the locale is."""
    for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), start=1):
        try:
            text = line if isinstance(line, str) else line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"standard input, line {number}: not UTF-8 text") from None
        yield text.strip()


def _show(text: str) -> None:
    """Print a piece of an answer. What a terminal would obey is escaped."""
    print(printable(text), end="", flush=True)
