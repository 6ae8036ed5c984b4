"""Conversations: messages with roles, as OpenAI and TRL write them, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import numpy as np

from ..core.errors import DataError, nearest
from .cells import cell_text, text_of
from .settings import CHOSEN, COMPLETION, MESSAGES, PROMPT, REJECTED, DataSettings
from .templates import fields, fill

Role = Literal["system", "user", "assistant", "tool"]
ROLES = get_args(Role)

KEYS = ("role", "content")
"""What a message has. Others, such as calls of tools, are refused: a model would never see them."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Messages = tuple[Message, ...]


def with_conversation_columns(data: DataSettings, present: Sequence[str]) -> DataSettings:
    """The settings with the columns in which conversations stand, where the recipe names none: ``messages``,
    or else ``prompt`` and ``completion``, if a file has them (``present``); else those of the templates.

    Of preference pairs: ``chosen``, ``rejected`` and, if a file has it, ``prompt``. Where there is no column
    of a prompt, the two hold whole conversations, and the prompt's template is empty.
    """
    if data.task == "preference":
        return _with_pair_columns(data, present)
    untouched = all(
        getattr(data, key) == type(data).model_fields[key].default for key in ("prompt", "target")
    )
    if data.task != "chat" or data.messages is not None or not untouched:
        return data
    if MESSAGES in present:
        return data.model_copy(update={"messages": MESSAGES})
    if set(fields(data.prompt)) <= set(present):
        return data
    if PROMPT in present:
        return data.model_copy(update={"prompt": f"{{{PROMPT}}}", "target": f"{{{COMPLETION}}}"})
    return data.model_copy(update={"messages": MESSAGES})


def _with_pair_columns(data: DataSettings, present: Sequence[str]) -> DataSettings:
    prompt = data.prompt
    if prompt == type(data).model_fields["prompt"].default:
        if PROMPT in present:
            prompt = f"{{{PROMPT}}}"
        elif not set(fields(prompt)) <= set(present):
            prompt = ""
    chosen, rejected = data.chosen or f"{{{CHOSEN}}}", data.rejected or f"{{{REJECTED}}}"
    return data.model_copy(update={"prompt": prompt, "chosen": chosen, "rejected": rejected})


def conversation_columns(data: DataSettings) -> tuple[str, ...]:
    """The columns from which conversations are made."""
    return (data.messages,) if data.messages is not None else (*fields(data.prompt), *fields(data.target))


def conversation_of(row: Mapping[str, Any], data: DataSettings, where: str, *, answered: bool) -> Messages:
    """The messages of a row: those in ``data.messages``, or a user's turn and an answer by templates.

    A template that names nothing but one column takes a list of messages in its place. ``data.system`` stands
    before a conversation that has no system message of its own.

    Args:
        answered: whether the conversation has to end with an answer. If not, the answer's template is not
            looked at.

    Raises:
        DataError: a cell holds no conversation; names the line, the message and what is wrong.
    """
    if data.messages is not None:
        if data.messages not in row:
            raise DataError(f"{where}: no column {data.messages!r}")
        messages = _messages(row[data.messages], f"{where}: column {data.messages!r}")
    else:
        messages = turns(data.prompt, row, "user", where)
        if answered:
            messages += turns(data.target, row, "assistant", where)
    messages = with_system(messages, data.system)
    check_order(messages, where)
    if answered and messages[-1].role != "assistant":
        roles = [message.role for message in messages]
        problem = (
            "no turn of the assistant" if "assistant" not in roles else f"it ends with role {roles[-1]!r}"
        )
        raise DataError(f"{where}: {problem}; a conversation has to end with an answer of the assistant")
    return messages


def with_system(messages: Messages, system: str | None) -> Messages:
    """The messages behind a system message, unless they have one of their own."""
    if not system or (messages and messages[0].role == "system"):
        return messages
    return (Message("system", system), *messages)


def check_order(messages: Sequence[Message], where: str) -> None:
    """Refuse an order of roles that no template takes. Other orders are left to the model's template.

    Raises:
        DataError: a system message behind others, or a conversation that no user begins.
    """
    roles = [message.role for message in messages]
    begins = next((number for number, role in enumerate(roles) if role != "system"), len(roles))
    if "system" in roles[begins:]:
        number = roles.index("system", begins) + 1
        raise DataError(f"{where}: message {number}: role 'system' is allowed at the beginning alone")
    if begins == len(roles):
        raise DataError(f"{where}: no turn of a user")
    if roles[begins] != "user":
        raise DataError(
            f"{where}: message {begins + 1}: role {roles[begins]!r} begins the conversation; a user has to"
        )


def exchanges(messages: Sequence[Message]) -> tuple[Messages, list[Messages]]:
    """The system messages, and the exchanges after them: each begins with a user's turn that follows none."""
    begins = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    found = list[list[Message]]()
    for place in range(begins, len(messages)):
        message = messages[place]
        if not found or (message.role == "user" and messages[place - 1].role != "user"):
            found.append([])
        found[-1].append(message)
    return tuple(messages[:begins]), [tuple(one) for one in found]


def as_rows(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The messages as a chat template takes them, and as JSON holds them."""
    return [{"role": message.role, "content": message.content} for message in messages]


def turns(template: str, row: Mapping[str, Any], role: Role, where: str) -> Messages:
    """What a template makes of a row: a turn of ``role``; or the messages of a list, in the place of which a
    template that names nothing but its column may stand.

    Raises:
        DataError: a cell is empty, or holds neither a plain value nor messages.
    """
    names = fields(template)
    if len(names) == 1 and template == f"{{{names[0]}}}" and isinstance(row.get(names[0]), list | np.ndarray):
        return _messages(row[names[0]], f"{where}: column {names[0]!r}")
    text = fill(template, {name: cell_text(row, name, where) for name in names})
    if not text.strip():
        raise DataError(f"{where}: the text of role {role!r} is blank")
    return (Message(role, text),)


def _messages(value: object, where: str) -> Messages:
    if not isinstance(value, list | tuple | np.ndarray):
        kind = "nothing" if value is None else f"a value of type {type(value).__name__}"
        raise DataError(f"{where} holds {kind}; it must hold a list of messages with role and content")
    if not len(value):
        raise DataError(f"{where} holds an empty list of messages")
    return tuple(_message(one, f"{where}, message {number}") for number, one in enumerate(value, start=1))


def _message(value: object, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: must be an object with role and content")
    role = value.get("role")
    if role not in ROLES:
        raise DataError(f"{where}: role {role!r}{nearest(str(role), ROLES)}")
    if others := sorted(key for key in value.keys() - set(KEYS) if value[key] is not None):
        raise DataError(f"{where}: {others[0]!r} is not supported; allowed: {', '.join(KEYS)}")
    content = value.get("content")
    if isinstance(content, list | tuple | np.ndarray | Mapping):
        raise DataError(f"{where}: content must be one text; parts of several kinds are not supported")
    try:
        text = text_of(content)
    except ValueError as error:
        raise DataError(f"{where}: content {error}") from None
    if not text.strip():
        raise DataError(f"{where}: content is blank")
    return Message(cast(Role, role), text)
