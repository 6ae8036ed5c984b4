"""A proposed recipe as a commented TOML file, which is checked as a run would check it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import tomli_w

from ..core.errors import RecipeError
from ..core.files import write_text
from ..data.build import build_data, check_first_rows, with_builtin_columns
from ..data.truncation import CutCount
from ..federated.base_model import load_for
from ..federated.build import check_cohort, check_fit
from ..federated.resolve import resolved
from ..federated.truncation import fitted_data
from ..recipe.recipe import Recipe, load_recipe
from .propose import Line, Proposal

TITLES = {
    "classification": "Learn a label of texts",
    "generation": "Learn to write a text",
    "chat": "Learn the assistant's turns of conversations",
    "preference": "Learn which of two answers is preferred",
    "retrieval": "Find the documents that answer questions",
}

COMMENT_AT = 34
"""Column at which comments begin, where the setting is shorter."""


@dataclass(frozen=True)
class Checked:
    """What a written recipe resolves to: numbers of clients and of rows by part, and what is cut of these."""

    clients: int
    rows: dict[str, int]
    cuts: dict[str, CutCount]


def to_text(proposal: Proposal, name: str) -> str:
    """The recipe's file, with a comment on each value that was chosen from the data.

    Args:
        name: the file's name, for the commands in its head.
    """
    head = [
        f"{TITLES[proposal.task]} from {proposal.source}: a proposal to start from.",
        *proposal.notes,
        f"  fedcustom check {name}      # what it resolves to, without training",
        f"  fedcustom run {name}",
    ]
    lines = [*(f"# {' '.join(text.split(chr(10)))}" for text in head), ""]
    section = ""
    for line in proposal.lines:
        if line.section != section:
            section = line.section
            lines += ["", f"[{section}]"]
        setting = tomli_w.dumps({line.key: line.value}).strip()
        comment = f"# {' '.join(line.comment.split())}" if line.comment else ""
        if comment and len(setting) >= COMMENT_AT:
            lines += [comment, setting]
        else:
            lines.append(f"{setting:<{COMMENT_AT}}{comment}".rstrip())
    return "\n".join(lines) + "\n"


def beside_file(proposal: Proposal, out: Path) -> Proposal:
    """The proposal with paths as the recipe's file has to name them: relative to the file, where they were
    given relative to the current folder.
    """

    def moved(line: Line) -> Line:
        if (line.section, line.key) not in (("data", "source"), ("model", "base")):
            return line
        given = Path(line.value).expanduser()
        if line.value.startswith("builtin:") or not given.exists():
            return line
        path = given if given.is_absolute() else Path(os.path.relpath(given, out.parent))
        return replace(line, value=path.as_posix())

    return replace(proposal, lines=tuple(map(moved, proposal.lines)))


def write_proposal(proposal: Proposal, out: Path, *, force: bool = False) -> Checked:
    """Check a proposal as a run would, up to its first round, and write it; then load what was written.

    Raises:
        RecipeError: there is such a file already, unless ``force``.
        FedcustomError: the data do not fit the proposed recipe; no file is written then.
    """
    refuse_existing(out, force=force)
    checked = check_runs(proposal.recipe())
    write_text(out, to_text(beside_file(proposal, out), out.name))
    load_recipe(out)
    return checked


def refuse_existing(out: Path, *, force: bool) -> None:
    """Refuse to overwrite a file.

    Raises:
        RecipeError: there is such a file or folder.
    """
    if out.is_dir():
        raise RecipeError(f"{out}: is a folder; name a file by --out")
    if out.exists() and not force:
        raise RecipeError(f"{out}: is there already; --force overwrites it, --out names another file")


def check_runs(recipe: Recipe) -> Checked:
    """What a recipe resolves to, checked as a run does before its first round.

    Raises:
        FedcustomError: as a run of the recipe would.
    """
    recipe = resolved(recipe)
    settings, clients = with_builtin_columns(recipe.data, recipe.clients)
    check_first_rows(settings, clients)
    check_fit(recipe)
    data = build_data(settings, clients, recipe.seed, recipe.public)
    check_cohort(recipe, data)
    base = load_for(recipe, data.task)
    data, cuts = fitted_data(recipe, settings, base, data)
    train = sum(len(client.train) for client in data.clients.values())
    rows = {"train": train, "development": len(data.development), "test": len(data.test)}
    return Checked(len(data.clients), rows, cuts)
