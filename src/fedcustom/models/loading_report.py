"""Loading report: which weights of a model did not come from its checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.errors import ModelError

NAMED = 3
"""How many modules or weights a report names; the rest are counted."""


@dataclass(frozen=True)
class LoadingReport:
    """Names of weights: those that loading ``initialised``, since the checkpoint lacks them or has them in
    another shape; those of the checkpoint that are ``unexpected``, for which the model has no place; and
    those whose shape is ``mismatched``, a part of the initialised ones. ``head`` names the top-level modules
    of a classification head.
    """

    initialised: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    head: tuple[str, ...] = ()

    @property
    def concerns_body(self) -> bool:
        """Whether more than a head is newly initialised, or a head of the checkpoint was replaced."""
        return bool(self.mismatched) or any(name.split(".")[0] not in self.head for name in self.initialised)

    def in_words(self) -> str:
        """One line for the user; empty where checkpoint and model have the same weights."""
        head = [name for name in self.initialised if name.split(".")[0] in self.head]
        body = [name for name in self.initialised if name not in set(head)]
        said = []
        if head:
            text = f"{_count(head)} of the head newly initialised ({_modules(head)})"
            if self.mismatched:
                text += f", {len(self.mismatched)} of them of another shape in the checkpoint"
            said.append(text)
        if body:
            said.append(
                f"{_count(body)} that the checkpoint lacks newly initialised ({_modules(body)}; not trained "
                "unless the method trains them, and saved with the customised model)"
            )
        if self.unexpected:
            said.append(f"{_count(self.unexpected)} of the checkpoint not used ({_modules(self.unexpected)})")
        return "; ".join(said)


def load_reported(
    loader: Any, path: str, name: str, head_of: Callable[[nn.Module], tuple[str, ...]] | None, **options: Any
) -> tuple[Any, LoadingReport]:
    """A model loaded by ``transformers``, and what of it did not come from the checkpoint.

    Args:
        loader: A class with ``from_pretrained``.
        path: Folder or hub id.
        name: What the recipe calls the model.
        head_of: Gives the top-level modules of a model's classification head; None: it has none.
        options: Those of ``from_pretrained``.

    Raises:
        ModelError: a weight outside the head has another shape in the checkpoint than in the model.
    """
    model, found = loader.from_pretrained(
        path, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    head = head_of(model) if head_of else ()
    mismatched = sorted(tuple(entry) for entry in found["mismatched_keys"])
    wrong = [entry for entry in mismatched if entry[0].split(".")[0] not in head]
    if wrong:
        weight, stored, built = wrong[0]
        more = f"; so have {len(wrong) - 1} more weights" if len(wrong) > 1 else ""
        raise ModelError(
            f"model.base: {name}: {weight} has shape {tuple(stored)} in the checkpoint and {tuple(built)} by "
            f"its config.json{more}; checkpoint and configuration belong to different models"
        )
    names = tuple(entry[0] for entry in mismatched)
    report = LoadingReport(
        initialised=tuple(sorted({*found["missing_keys"], *names})),
        unexpected=tuple(sorted(found["unexpected_keys"])),
        mismatched=names,
        head=head,
    )
    return model, report


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} weight{'' if len(names) == 1 else 's'}"


def _modules(names: Sequence[str]) -> str:
    """The modules that weights belong to, a few of them by name."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    more = f" and {len(modules) - NAMED} more" if len(modules) > NAMED else ""
    return ", ".join(modules[:NAMED]) + more
