"""Prompt templates with placeholders, and verbalisers of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import RecipeError, nearest

INPUT, LABEL, LABELS = "{input}", "{label}", "{labels}"
CONTENT_FREE = "N/A"
"""The input of which a model should have no opinion (Zhao et al. 2021)."""

PLAIN = {
    "classification": "Text: {input}\nThis text is about one of: {labels}.\nAnswer:",
    "generation": "{input}",
    "encoder": "{label}",
}
"""What stands where a recipe gives no template."""


@dataclass(frozen=True)
class Candidate:
    """One prompt: a template, and for classification the text of each label, in the labels' order."""

    template: str
    labels: tuple[str, ...] = ()
    origin: str = "given"

    def describe(self) -> list[str]:
        """The text of each label in the template, for an encoder."""
        return [self.template.replace(LABEL, text) for text in self.labels]

    def fill(self, text: str) -> str:
        """The prompt for one input. What the input itself holds is not taken for a placeholder."""
        before, _, after = self.template.partition(INPUT)
        return self._listed(before) + text + self._listed(after)

    def _listed(self, part: str) -> str:
        return part.replace(LABELS, ", ".join(self.labels))


def placeholders_in(template: str) -> set[str]:
    """The placeholders that occur in a template."""
    return {name for name in (INPUT, LABEL, LABELS) if name in template}


def continuation(prompt: str, text: str) -> str:
    """What follows a prompt: the text, after one space where the prompt ends in none."""
    return text if not prompt or prompt[-1].isspace() else f" {text}"


def check_template(template: str, *, encoder: bool, where: str) -> None:
    """Refuse a template that the model cannot use.

    Raises:
        RecipeError: it lacks the placeholder, has it twice, or has one that has no meaning.
    """
    wanted, foreign = (LABEL, (INPUT, LABELS)) if encoder else (INPUT, (LABEL,))
    kind = "an encoder" if encoder else "a language model"
    if template.count(wanted) != 1:
        raise RecipeError(f"{where}: {template!r} must hold {wanted} once, as a template for {kind}")
    for name in foreign:
        if name in template:
            raise RecipeError(f"{where}: {template!r} holds {name}, which {kind} has no use for")


def read_templates(path: str) -> list[str]:
    """The templates of a file, one a line; ``\\n`` in a line is a line break.

    Raises:
        RecipeError: the file cannot be read or is not UTF-8.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RecipeError(f"method.instructions_file: {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"method.instructions_file: {path}: not a text in UTF-8") from None
    return [line.strip().replace("\\n", "\n") for line in lines if line.strip()]


def label_sets(labels: Sequence[str], verbalisers: Mapping[str, str | list[str]]) -> list[tuple[str, ...]]:
    """How the labels are written: one set for each alternative, in the labels' order.

    A label without an entry is written as itself, with spaces for underscores. The j-th set takes the j-th
    alternative of each label, or its last.

    Raises:
        RecipeError: an entry is no label's, or two labels of a set are written alike.
    """
    for name in verbalisers:
        if name not in labels:
            raise RecipeError(f"method.verbalisers.{name}: there is no such label{nearest(name, labels)}")
    written = []
    for label in labels:
        texts = verbalisers.get(label, label.replace("_", " "))
        written.append([texts] if isinstance(texts, str) else texts)
    count = max((len(texts) for texts in written), default=1)
    sets = [tuple(texts[min(j, len(texts) - 1)] for texts in written) for j in range(count)]
    for chosen in sets:
        seen: dict[str, str] = {}
        for label, text in zip(labels, chosen, strict=True):
            if text in seen:
                raise RecipeError(
                    f"method.verbalisers: labels {seen[text]!r} and {label!r} are both written {text!r}"
                )
            seen[text] = label
    return list(dict.fromkeys(sets))
