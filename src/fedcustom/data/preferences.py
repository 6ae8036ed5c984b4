"""Preference pairs: a prompt with a chosen and a rejected answer, as TRL writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import DataError
from .conversations import Messages, check_order, turns, with_system
from .settings import CHOSEN, REJECTED, DataSettings
from .templates import fields


class Pair(NamedTuple):
    """What precedes the answers, and the two of them."""

    prompt: Messages
    chosen: str
    rejected: str


def pair_columns(data: DataSettings) -> tuple[str, ...]:
    """The columns from which pairs are made (:func:`~.conversations.with_conversation_columns`)."""
    return tuple(
        dict.fromkeys((*fields(data.prompt), *(name for one in _answers(data) for name in fields(one))))
    )


def pair_of(row: Mapping[str, Any], data: DataSettings, where: str) -> Pair:
    """The pair of a row. An answer is a text, or a list with one message of the assistant. Or both answers
    are whole conversations, which are the same up to their last message (TRL's implicit prompt).

    Raises:
        DataError: a cell is missing or empty, the answers are the same or are none of the assistant, or the
            conversations differ before their last message; names the line and what is wrong.
    """
    chosen, rejected = (turns(template, row, "assistant", where) for template in _answers(data))
    whole = {name: one[0].role != "assistant" for name, one in ((CHOSEN, chosen), (REJECTED, rejected))}
    if whole[CHOSEN] != whole[REJECTED]:
        long, short = (CHOSEN, REJECTED) if whole[CHOSEN] else (REJECTED, CHOSEN)
        raise DataError(f"{where}: {long} is a whole conversation, and {short} an answer alone")
    if whole[CHOSEN]:
        prompt = _common(chosen, rejected, where)
        _check_prompt_column(row, data, prompt, where)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    elif data.prompt:
        prompt = turns(data.prompt, row, "user", where)
    else:
        raise DataError(
            f"{where}: there is no column of a prompt, and chosen and rejected are answers alone; name the "
            "prompt in data.prompt"
        )
    answers = _answer(chosen, CHOSEN, where), _answer(rejected, REJECTED, where)
    if answers[0].strip() == answers[1].strip():
        raise DataError(f"{where}: chosen and rejected are the same answer; a pair has to have two")
    return Pair(_checked(with_system(prompt, data.system), where), *answers)


def prompt_of_row(row: Mapping[str, Any], data: DataSettings, where: str) -> Messages:
    """The prompt of a row that is to be answered, whose answers are not looked at where it has a prompt.

    Raises:
        DataError: see :func:`pair_of`.
    """
    if not data.prompt:
        return pair_of(row, data, where).prompt
    return _checked(with_system(turns(data.prompt, row, "user", where), data.system), where)


def _answers(data: DataSettings) -> tuple[str, str]:
    return data.chosen or f"{{{CHOSEN}}}", data.rejected or f"{{{REJECTED}}}"


def _common(chosen: Messages, rejected: Messages, where: str) -> Messages:
    """What two conversations have in common: all but the last message of each."""
    for number, (one, other) in enumerate(zip(chosen[:-1], rejected[:-1], strict=False), start=1):
        if one != other:
            raise DataError(
                f"{where}: message {number} of chosen and that of rejected differ; the two have to be one "
                "conversation up to their last answers"
            )
    if len(chosen) != len(rejected):
        raise DataError(
            f"{where}: chosen has {len(chosen)} messages and rejected {len(rejected)}; the two have to be "
            "one conversation up to their last answers"
        )
    return chosen[:-1]


def _check_prompt_column(row: Mapping[str, Any], data: DataSettings, prompt: Messages, where: str) -> None:
    """Refuse a prompt beside whole conversations that is none of their turns."""
    if not data.prompt:
        return
    names = fields(data.prompt)
    if any(isinstance(row.get(name), list | tuple | np.ndarray) for name in names):
        raise DataError(
            f"{where}: column {names[0]!r} holds messages, and chosen and rejected begin with role "
            f"{prompt[0].role if prompt else 'user'!r}; they have to be answers alone"
        )
    (said,) = turns(data.prompt, row, "user", where)
    if all(said.content.strip() != message.content.strip() for message in prompt):
        raise DataError(
            f"{where}: the prompt is none of the messages that chosen and rejected have in common"
        )


def _answer(messages: Messages, name: str, where: str) -> str:
    if len(messages) != 1:
        raise DataError(
            f"{where}: {name} has {len(messages)} messages behind the prompt; one answer is allowed"
        )
    if messages[0].role != "assistant":
        raise DataError(
            f"{where}: {name} ends with role {messages[0].role!r}; it has to end with an answer of the "
            "assistant"
        )
    return messages[0].content


def _checked(prompt: Messages, where: str) -> Messages:
    check_order(prompt, where)
    if prompt[-1].role == "assistant":
        raise DataError(
            f"{where}: the prompt ends with an answer of the assistant, so there is nothing to answer"
        )
    return prompt
