"""Limits of prompts at a client: a template is written out with all labels, as many times as long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...core.errors import PolicyError

MAX_TEMPLATE, MAX_LABEL_TEXT, MAX_PLACEHOLDERS = 10_000, 1_000, 10
"""Characters of a prompt's template and of a label's text in it, and how often a template may have a
placeholder.
"""

MAX_LISTED, MAX_DESCRIBED = 100_000, 10_000_000
"""Characters of all labels in one prompt, and of the descriptions of all labels."""

MAX_CANDIDATES, MAX_TEXTS = 10_000, 100_000


def check_template(key: str, template: str) -> None:
    """Refuse a template that is too long, or names the labels too often.

    Raises:
        PolicyError: names the ``key``.
    """
    if len(template) > MAX_TEMPLATE:
        raise PolicyError(f"{key}: a template has more than {MAX_TEMPLATE} characters")
    if template.count("{label") > MAX_PLACEHOLDERS:  # both {label} and {labels}
        raise PolicyError(f"{key}: a template names labels more than {MAX_PLACEHOLDERS} times")


def check_texts(key: str, texts: Sequence[Any]) -> None:
    """Refuse too many labels, or one that is too long or no text.

    Raises:
        PolicyError: names the ``key``.
    """
    if len(texts) > MAX_TEXTS or not all(isinstance(text, str) for text in texts):
        raise PolicyError(f"{key}: must be at most {MAX_TEXTS} texts")
    if any(len(text) > MAX_LABEL_TEXT for text in texts):
        raise PolicyError(f"{key}: a text has more than {MAX_LABEL_TEXT} characters")


def check_bred(bred: Any, most: int = MAX_CANDIDATES) -> None:
    """Refuse candidates that are too many, malformed, or too long with all labels written out.

    Raises:
        PolicyError: says which.
    """
    if not isinstance(bred, Mapping) or len(bred) > most:
        raise PolicyError(f"bred: must be an object of at most {most} candidates")
    for row in bred.values():
        template = row.get("template") if isinstance(row, Mapping) else None
        labels = row.get("labels") if isinstance(row, Mapping) else None
        if not isinstance(template, str) or not isinstance(labels, list | tuple):
            raise PolicyError("bred: a candidate has a template and labels, all of them texts")
        check_template("bred", template)
        check_texts("bred", labels)
        listed = template.count("{labels}") * sum(len(label) + 2 for label in labels)
        described = len(labels) * len(template) + template.count("{label}") * sum(map(len, labels))
        if listed > MAX_LISTED or described > MAX_DESCRIBED:
            raise PolicyError("bred: a candidate is too long with all labels written out")
