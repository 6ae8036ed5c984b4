"""New inputs of a model that is finished: texts, rows and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..core.errors import DataError
from .cells import Row
from .conversations import conversation_of, with_conversation_columns
from .examples import Example, asked_in, input_of
from .preferences import prompt_of_row
from .settings import MESSAGES, DataSettings
from .templates import fields


def input_example(data: DataSettings, item: str | Mapping[str, Any], number: int) -> Example:
    """One input as an example: a row with the recipe's columns or, where the template names one column only,
    a text, which stands for that column. For conversations a text is a user's turn; an answer at the end of a
    row's messages is what is asked for, and is left out.

    Args:
        number: the input's place among all, from 0, for messages.

    Raises:
        DataError: a column is missing, or its cell is empty, no plain value or no conversation.
    """
    template = data.text if data.task == "classification" else data.prompt
    where = item.place if isinstance(item, Row) else f"input {number + 1}"
    names = set(fields(template))
    if isinstance(item, str):
        if len(names) != 1:
            raise DataError(f"{where}: the recipe's template {template!r} needs columns, not one text")
        item = dict.fromkeys(names, item)
    if data.task == "preference":
        return _asked_of_pair(data, item, where)
    if data.task != "chat":
        return replace(input_of(template, item, where), label=0)
    if data.messages is not None and data.messages not in item and names <= item.keys():
        data = data.model_copy(update={"messages": None})
    data = with_conversation_columns(data, list(item))
    messages = conversation_of(item, data, where, answered=False)
    return asked_in(messages[:-1] if messages[-1].role == "assistant" else messages, where)


def _asked_of_pair(data: DataSettings, item: Mapping[str, Any], where: str) -> Example:
    """The prompt of a row of preferences, or a conversation in the column ``messages``."""
    if MESSAGES in item:
        messages = conversation_of(
            item, data.model_copy(update={"messages": MESSAGES}), where, answered=False
        )
        return asked_in(messages[:-1] if messages[-1].role == "assistant" else messages, where)
    return asked_in(prompt_of_row(item, with_conversation_columns(data, list(item)), where), where)
