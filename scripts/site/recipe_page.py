"""The reference of all recipe settings, made from their classes."""

from __future__ import annotations

from fedcustom.recipe.help import settings_help
from fedcustom.recipe.recipe import Recipe

BEGINNING = """# Recipe settings

A recipe is a TOML file. This page is made from the settings classes, as is `fedcustom recipe --help-all`.
Ranges and choices are what is allowed; *unset* means that the text says what happens. A key such as
`training.batch_size` is the line `batch_size` in the section `[training]`; on the command line it is
`--set training.batch_size=32`.
"""

HEADER = "| setting | type | default | effect |\n|---|---|---|---|\n"


def page() -> str:
    """The page in Markdown: one table for each section and for each method."""
    parts, rows = [BEGINNING, "\n## Top level\n\n" + HEADER], 0
    for key, kind, default, text in settings_help(Recipe):
        if key.startswith("["):
            heading = key.replace("'", '"')
            parts.append(f"\n## `{heading}`\n\n{_cell(text)}\n\n{HEADER}")
            continue
        if "." not in key and rows and not parts[-1].startswith("\n## Top level"):
            parts.append(f"\n## `{key}`\n\n{HEADER}")  # a setting of the recipe itself, after sections
        parts[-1] += f"| `{key}` | {_cell(kind)} | `{_cell(default)}` | {_cell(text)} |\n"
        rows += 1
    return "".join(part.removesuffix(HEADER) for part in parts)


def _cell(text: str) -> str:
    """A text in a cell of a table."""
    for character in ("\\", "|", "<", ">", "*", "_"):
        text = text.replace(character, f"\\{character}") if character != "<" else text.replace("<", "&lt;")
    return text.replace("\n", " ")
