"""What a report knows of methods: how they are written and drawn, and what they send.

All of it is what methods registered; of one that is not registered here (a run of another machine's, with a
plug-in that this one lacks) the defaults hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from ..methods import registry
from ..methods.registry import Registration
from ..methods.settings import MethodSettingsBase


def registered(method: str) -> Registration | None:
    """What a method registered; None where it is not known here."""
    return registry.methods().get(method)


def settings(method: str) -> type[MethodSettingsBase]:
    """The class of a method's settings; of one that is not known, the base of all."""
    found = registered(method)
    return MethodSettingsBase if found is None else found.settings


def title(method: str) -> str:
    """A method as people write it."""
    found = registered(method)
    return method.replace("_", " ") if found is None else found.title


def own_title(method: str, recipe: Mapping[str, str]) -> str | None:
    """What a run is called by the settings of its recipe, where that is not the method's title."""
    return settings(method).title_of(recipe)


def is_to_beat(method: str) -> bool:
    """Whether a method is a baseline for others to beat, which customises no more than a head."""
    return settings(method).to_beat


def has_colours(method: str) -> bool:
    """Whether a method has colours of its own."""
    found = registered(method)
    return found is not None and found.colours is not None


@cache
def palette() -> str:
    """The methods' own colours as CSS: on light pages, and on dark ones."""
    own = [each for each in registry.methods().values() if each.colours is not None]
    light, dark = (
        "".join(f"  --method-{each.name}: {each.colours[shade]};\n" for each in own if each.colours)
        for shade in (0, 1)
    )
    dark = "".join(f"  {line}\n" for line in dark.splitlines())
    return (
        f":root {{\n{light}}}\n\n"
        f"@media screen and (prefers-color-scheme: dark) {{\n  :root {{\n{dark}  }}\n}}\n"
    )
