"""What a run cuts of its inputs and targets, counted before the first round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..core.errors import DataError
from ..data.examples import Example, FederatedData
from ..data.settings import DataSettings
from ..data.truncation import CutCount
from ..data.truncation_count import Owned, Reading, count_cuts, parts_of
from ..models.load import Base
from ..recipe.recipe import Recipe


def count_truncation(
    recipe: Recipe, data: DataSettings, base: Base, federation: FederatedData
) -> dict[str, CutCount]:
    """Count what is cut of each part of the data, by the tokenizer of ``model.base``.

    Args:
        data: the recipe's data settings, with a party's own templates where it has such.

    Raises:
        DataError, ModelError: a text cannot be taken by the model; see
            :func:`~fedcustom.data.truncation_count.count_cuts`.
    """
    parts = parts_of(federation)
    scored = [owned for name in ("development", "test") for _, owned in parts.get(name, ())]
    _refuse_cut_options(recipe, data, base, [example for examples in scored for example in examples])
    return count_parts(recipe, data, base, parts)


def _refuse_cut_options(recipe: Recipe, data: DataSettings, base: Base, examples: Sequence[Example]) -> None:
    """See that no option has to be cut: a likelihood of its beginning says little of it.

    Raises:
        DataError: says how many are too long.
    """
    each = [replace(example, target=option) for example in examples for option in example.options]
    if each and (cut := count_parts(recipe, data, base, {"options": [("", each)]})["options"].targets):
        raise DataError(
            f"column {data.options!r}: {cut} of {len(each)} options are longer than "
            f"data.max_target_length = {data.max_target_length} tokens with their end; raise it"
        )


def count_parts(
    recipe: Recipe, data: DataSettings, base: Base, parts: Mapping[str, Owned]
) -> dict[str, CutCount]:
    """The same of lists of examples; of the part ``public`` only inputs are looked at."""
    method = recipe.method
    reading = Reading(
        sequence_to_sequence=base.sequence_to_sequence,
        in_prompts=method.fills_prompts and base.architecture != "encoder",
        targets=method.reads_targets,
        chat=base.chat,
    )
    return count_cuts(base.tokenizer, parts, data, reading, base.token_rules)
