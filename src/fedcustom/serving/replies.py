"""Replies in OpenAI's shapes: whole ones, and the pieces of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """A text that was written.

    Attributes:
        text: the text.
        ended: whether it ended by itself or at a stop text, and not at the greatest length.
        usage: tokens of prompt and answer; None where they are not counted.
        cut: tokens of the input that were left out.
        notes: sentences on what else was cut or left out.
        citations: of an answer from documents, the passages that it stands on.
    """

    text: str
    ended: bool = True
    usage: tuple[int, int] | None = None
    cut: int = 0
    notes: Sequence[str] = ()
    citations: Sequence[Mapping[str, Any]] | None = None

    def usage_content(self) -> Json | None:
        """The counts by OpenAI's names."""
        if self.usage is None:
            return None
        prompt, written = self.usage
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def beside(self) -> Json:
        """What is said beside OpenAI's fields: what was cut, where anything was."""
        return said_of_cuts(self.cut, self.notes)

    @property
    def reason(self) -> str:
        """Why the text ends."""
        return "stop" if self.ended else "length"


def said_of_cuts(cut: int, notes: Sequence[str]) -> Json:
    """``truncated_tokens`` and ``notes``, where there is something to say."""
    return ({"truncated_tokens": cut} if cut else {}) | ({"notes": list(notes)} if notes else {})


@dataclass(frozen=True)
class Shape:
    """The form of one reply, whole or in pieces.

    Attributes:
        model: the model's name.
        chat: whether it is a message of a conversation.
    """

    model: str
    chat: bool
    number: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> Json:
        """The reply in one."""
        usage = answer.usage_content()
        body = self._body("", [self._choice(answer.reason, message=self._message(answer), text=answer.text)])
        return body | answer.beside() | ({"usage": usage} if usage else {})

    def first(self) -> Json | None:
        """The piece before the text."""
        return self._piece({"role": "assistant", "content": ""}, "", None) if self.chat else None

    def piece(self, text: str) -> Json:
        """A piece of the text."""
        return self._piece({"content": text}, text, None)

    def last(self, answer: Answer) -> Json:
        """The piece after the text."""
        delta = {} if answer.citations is None else {"citations": list(answer.citations)}
        return self._piece(delta, "", answer.reason) | answer.beside()

    def counted(self, answer: Answer) -> Json:
        """The piece that has the numbers of tokens and no text."""
        return self._body(".chunk", []) | {"usage": answer.usage_content()}

    def _piece(self, delta: Json, text: str, reason: str | None) -> Json:
        return self._body(".chunk", [self._choice(reason, delta=delta, text=text)])

    def _message(self, answer: Answer) -> Json:
        message: Json = {"role": "assistant", "content": answer.text, "refusal": None}
        return message if answer.citations is None else message | {"citations": list(answer.citations)}

    def _choice(self, reason: str | None, *, text: str, **chat: Json) -> Json:
        content: Json = dict(chat) if self.chat else {"text": text}
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def _body(self, piece: str, choices: list[Json]) -> Json:
        name = f"chat.completion{piece}" if self.chat else "text_completion"
        number = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.number}"
        return {
            "id": number, "object": name, "created": self.created, "model": self.model, "choices": choices,
        }  # fmt: skip
