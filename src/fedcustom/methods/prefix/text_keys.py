"""Keys of attention slots from a text: those that its tokens have in the frozen base model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...core.errors import ModelError
from ...models.load import Base
from .attention_places import Attention, Place, trial_records


def text_keys(base: Base, places: Sequence[Place], text: str, slots: int) -> dict[str, Tensor]:
    """Keys of (heads, slots, d) for each block, by the name of its query matrix.

    Slot j has the keys of the text's token j, which is read by itself at position 0, where no rotation
    changes a key. A text that is too short is repeated. Where heads share keys, each has a copy.

    Raises:
        ModelError: the keys of a block cannot be told, or do not have its queries' size.
    """
    tokens = base.tokenizer(text, add_special_tokens=False, truncation=True, max_length=slots)["input_ids"]
    tokens = (tokens * (slots // len(tokens) + 1))[:slots]
    queries = {base.model.get_submodule(place.query): place for place in places}
    found: dict[str, Tensor] = {}
    last: Place | None = None
    for record in trial_records(base, [[token] for token in tokens]):
        if not isinstance(record, Attention):
            last = queries.get(record.module, last)
        elif last is not None:
            keys = record.keys.transpose(0, 1).float()
            if keys.shape[2] == last.size and last.heads % len(keys) == 0:
                found[last.query] = keys.repeat_interleave(last.heads // len(keys), 0).cpu()
            last = None
    if missing := [place.query for place in places if place.query not in found]:
        raise ModelError(
            f"method.init = 'text' does not fit {base.name}: the keys beside {missing[0]} cannot be told; "
            "use 'random'"
        )
    return found
