"""Help of every command: each has an example, and each argument and option its help."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import typer

from fedcustom.cli.app import app

MAIN = "import sys; sys.argv = ['fedcustom']; from fedcustom.cli.app import main; main()"


def commands(group: Any, path: str = "fedcustom") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def test_every_command_has_an_example() -> None:
    found = dict(commands(typer.main.get_command(app)))
    assert {"fedcustom new", "fedcustom check", "fedcustom doctor", "fedcustom deploy init"} <= set(found)
    for path, command in found.items():
        assert f"\n\nExample: {path}" in (command.help or ""), path
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{path}: {parameter.name}"


def completed(words: str) -> set[str]:
    """What a shell offers for the last of some words."""
    asked = {
        "_FEDCUSTOM_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", MAIN],
        env={**os.environ, **asked, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_the_shell_completes_commands_and_options() -> None:
    assert completed("fedcustom ch") == {"check", "chat"}
    assert completed("fedcustom new --la") == {"--label"}
    assert completed("fedcustom deploy re") == {"revoke", "renew"}
