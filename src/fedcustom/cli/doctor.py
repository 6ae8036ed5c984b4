"""The ``doctor`` command."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .console import err_console, json_line, out_console

STYLES = {"failed": "bold red", "warning": "yellow", "unknown": "yellow", "absent": "dim"}


def doctor(
    json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON: a list of check, status, found, remedy")
    ] = False,
) -> None:
    """Check the installation and this machine: versions, extras, combinations that do not work together, GPU,
    bfloat16, memory, folders. Each finding stands with its remedy. The exit code is 1 if a check fails.

    Example: fedcustom doctor
    """
    from ..doctor import examine

    found = examine()
    if json:
        print(json_line([asdict(one) for one in found]))
    else:
        width = max(len(one.check) for one in found) + 2
        for one in found:
            remedy = f"; {one.remedy}" if one.remedy else ""
            line = f"{one.status:<9}{one.check:<{width}}{one.found}{remedy}"
            out_console.print(line, style=STYLES.get(one.status), soft_wrap=True)
    failed = [one.check for one in found if one.status == "failed"]
    if failed:
        err_console.print(f"failed: {', '.join(failed)}", style="bold red", soft_wrap=True)
        raise typer.Exit(1)


__all__ = ["doctor"]
