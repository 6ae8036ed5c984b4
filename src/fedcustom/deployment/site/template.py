"""The ``site.toml`` that comes with a kit, prepared from the recipe for the site to complete."""

from __future__ import annotations

import json
from pathlib import Path

from ...core.files import write_text
from ...data.conversations import with_conversation_columns
from ...data.examples import columns
from ...data.settings import MESSAGES, PROMPT
from ...methods.contents import MEANING
from ...recipe.recipe import Recipe
from .data import needed
from .models import is_local
from .policy import models_of
from .settings import PolicySettings

FILE = "site.toml"


def site_template(recipe: Recipe) -> str:
    """A complete ``site.toml`` for the recipe. What the recipe asks for and the policy denies by default
    stands there as a comment: the site has to choose it.
    """
    data = with_conversation_columns(recipe.data, [MESSAGES, PROMPT])
    scores = {key: value for key in ("references", "options") if (value := getattr(data, key)) is not None}
    scoring = [*columns(data, scoring=False), *scores.values()]
    lines = [
        "# Prepared from the recipe. This file, not the recipe, decides what is read and what may leave:",
        "# check every line, then: fedcustom site check --data site.toml",
        "",
        "[data]                      # paths are relative to this file",
        'train = "train.jsonl"',
        f"columns = {_toml(list(dict.fromkeys(scoring)))}   # no other column is read",
    ]
    lines += [f"{key} = {_toml(getattr(data, key))}" for key in needed(data)]
    if data.task == "classification":
        lines.append('max_labels = 50             # or all labels by name: labels = ["...", "..."]')
    lines += [f"{key} = {_toml(value)}" for key, value in scores.items()]
    lines += ["", "[policy]"]
    defaults = PolicySettings()
    for content, setting in recipe.method.needed_contents(recipe.training, data.task).items():
        if not getattr(defaults, content):
            lines += [f"# The recipe ({setting}) asks for {MEANING[content]}:", f"# {content} = true"]
    if data.chat_template is not None and not defaults.chat_templates:
        lines += ["# The recipe brings a chat template (data.chat_template):", "# chat_templates = true"]
    models = models_of(recipe)
    if any(is_local(name) for name, _ in models):
        names = [f"{name}@{revision}" if revision else name for name, revision in models]
        lines += ["# The recipe names models in folders:", f"# base_models = {_toml(names)}"]
    if len(lines) == lines.index("[policy]") + 1:
        lines.append("# The recipe asks for nothing that is not allowed by default.")
    return "\n".join(lines) + "\n"


def write_site_template(kit: Path, recipe: Recipe) -> Path:
    """Write the file into a site's kit; returns its path."""
    write_text(kit / FILE, site_template(recipe))
    return kit / FILE


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
