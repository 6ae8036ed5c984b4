"""What a run cuts of its inputs and targets, and leaves out, counted before the first round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..core.errors import DataError, ModelError
from ..data.chat_template import ChatTemplate
from ..data.examples import ClientData, Example, FederatedData
from ..data.settings import DataSettings
from ..data.truncation import CutCount
from ..data.truncation_count import Owned, Reading, count_cuts, parts_of
from ..models.load import Base
from ..recipe.recipe import Recipe


def fitted_data(
    recipe: Recipe, data: DataSettings, base: Base, federation: FederatedData
) -> tuple[FederatedData, dict[str, CutCount]]:
    """The data without conversations that are too long, where ``data.too_long`` leaves them out; and how much
    is left out and cut of each part, by the tokenizer of ``model.base``.

    Args:
        data: the recipe's data settings, with a party's own templates where it has such.

    Raises:
        DataError: a client has nothing left to train on, or all have nothing to be scored on.
        ModelError: conversations are to be left out, and the model has no chat template to measure them by.
        DataError, ModelError: a text cannot be taken by the model; see
            :func:`~fedcustom.data.truncation_count.count_cuts`.
    """
    whole = {name: _examples(owned) for name, owned in parts_of(federation).items()}
    federation = fitted_rows(data, base, federation)
    parts = parts_of(federation)
    scored = [owned for name in ("development", "test") for _, owned in parts.get(name, ())]
    _refuse_cut_options(recipe, data, base, [example for examples in scored for example in examples])
    counts = count_parts(recipe, data, base, parts)
    left_out = {name: count - _examples(parts.get(name, ())) for name, count in whole.items()}
    empty = CutCount()
    counts |= {
        name: replace(counts.get(name, empty), left_out=count) for name, count in left_out.items() if count
    }
    return federation, counts


def fitted_rows(data: DataSettings, base: Base, federation: FederatedData) -> FederatedData:
    """The data without conversations that are too long, where ``data.too_long`` leaves them out.

    Raises:
        DataError, ModelError: see :func:`fitted_data`.
    """
    if data.too_long != "leave-out":
        return federation
    if base.chat is None:
        raise ModelError(
            f"data.too_long = 'leave-out': {base.name} has no chat template, so that prompts are plain "
            "texts, which are cut; leave it unset, or name a Jinja file in data.chat_template"
        )
    return _without_too_long(federation, base.chat, data)


def _examples(owned: Owned) -> int:
    return sum(len(examples) for _, examples in owned)


def _without_too_long(federation: FederatedData, chat: ChatTemplate, data: DataSettings) -> FederatedData:
    """The data without examples whose last exchange alone exceeds ``data.max_length``."""
    known: dict[int, bool] = {}  # an example of a client's part may stand in that of all, too

    def fitting(examples: Sequence[Example]) -> list[Example]:
        for example in examples:
            if id(example) not in known:
                known[id(example)] = chat.fits(example, data)
        return [example for example in examples if known[id(example)]]

    clients = {}
    for name, client in federation.clients.items():
        train = fitting(client.train)
        if client.train and not train:
            raise DataError(
                f"client {name!r}: every conversation to train on is longer than data.max_length = "
                f"{data.max_length} with its last exchange alone"
            )
        clients[name] = ClientData(name, train, fitting(client.development), fitting(client.test))
    left = replace(
        federation,
        clients=clients,
        development=fitting(federation.development),
        test=fitting(federation.test),
    )
    for name, before, after in (
        ("development", federation.development, left.development),
        ("test", federation.test, left.test),
    ):
        if before and not after:
            raise DataError(
                f"{name}: every conversation is longer than data.max_length = {data.max_length} with its "
                "last exchange alone"
            )
    return left


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
