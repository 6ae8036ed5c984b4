"""Chat templates: the tokens of a conversation, and which of them the assistant writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..core.errors import DataError, ModelError, TooLongError
from ..core.library_errors import in_one_line
from .conversations import Message, Messages, as_rows, exchanges
from .encode import NO_RULES, TARGET, TextError, TokenRules
from .examples import Example
from .settings import DataSettings
from .truncation import EXCHANGES

MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""Where a template itself says what the assistant writes."""

FAILURES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""Errors of the expressions in a template: the sandbox's limit of a range is an ``OverflowError``."""

PROBE = (Message("user", "one"), Message("assistant", "two"))
"""A conversation that every template takes."""

TURN = "<the user's turn>"
"""A text that a template itself does not write."""

Span = tuple[int, int]
"""Characters from the first to before the second."""


class EncodedConversation(NamedTuple):
    """Token ids of what precedes the last answer, and of that with its end-of-turn token.

    ``answers`` are the positions in ``prompt`` of the tokens of earlier answers, their end-of-turn tokens
    among them. ``lost`` is what was cut: tokens of dropped exchanges, and of the end of the answer.
    """

    prompt: list[int]
    answer: list[int]
    answers: list[int]
    lost: dict[str, int]


class _Rendered(NamedTuple):
    """The text of a prompt, its token ids, and the characters of each token."""

    text: str
    prompt: list[int]
    offsets: list[Span]


class _Refused(Exception):
    """What is wrong with one conversation, as the rest of a sentence."""


class _TooLong(_Refused):
    """That its last exchange alone is longer than ``data.max_length``."""


class ChatTemplate:
    """The chat template of a tokenizer, with the token that ends an answer.

    What the assistant writes is what the template's own ``{% generation %}`` marks say. Without marks it is
    what follows the rendering of all earlier messages with the prompt for an answer, to the end-of-turn token
    (that is one of the tokenizer's added tokens). So a token counts by its position, whatever its id is: the
    end-of-turn token may be the padding token.

    Raises:
        ModelError: there is no template, it is no Jinja, or it does not tell where an answer begins or ends.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self._where = tokenizer, f"the chat template of {name}"
        if not tokenizer.chat_template:
            raise ModelError(
                f"model.base: the tokenizer of {name} has no chat template; name a Jinja file in "
                "data.chat_template"
            )
        if not tokenizer.is_fast:
            raise ModelError(f"model.base: conversations need a fast tokenizer; that of {name} is none")
        try:
            self.text = str(tokenizer.get_chat_template())
            self.marked = MARKS.search(self.text) is not None
            shown = self._render(PROBE, prompt=False)
            self.control = tuple(
                text
                for text, token in ((str(added), added) for added in tokenizer.added_tokens_decoder.values())
                if text.strip() and (token.special or text in self.text)
            )
            self.end, self._end_text = self._end_of_turn(shown)
            self._spans(PROBE)
        except _Refused as refused:
            raise ModelError(f"{self._where}: a conversation of user and assistant {refused}") from None
        except ValueError as error:
            raise ModelError(f"{self._where}: {in_one_line(error)}") from None

    def encode(
        self, examples: Sequence[Example], data: DataSettings, rules: TokenRules = NO_RULES
    ) -> Iterator[EncodedConversation]:
        """Token ids of conversations, in their order; an example without messages is a user's turn.

        A prompt of more than ``data.max_length`` tokens loses its oldest exchanges, a user's turn with all
        that answers it; the system message stays. An answer of more than ``data.max_target_length`` tokens
        loses its end, with the end-of-turn token. An example without a target has that token for an answer.

        Raises:
            DataError: the template takes no such conversation, or its last user turn alone is too long; names
                file and line.
        """
        if data.system is not None and (token := self._control_token(data.system)):
            raise DataError(f"data.system: holds the control token {token!r}; take it out")
        for position, example in enumerate(examples):
            try:
                found = self._encode(example, data)
                if problem := rules.problem([*found.prompt, *found.answer], self.tokenizer):
                    raise _Refused(problem)
            except _Refused as refused:
                if example.where:
                    row = isinstance(refused, _TooLong) and example.target  # and no turn that is typed
                    hint = " (data.too_long = 'leave-out' leaves such rows out)" if row else ""
                    kind = TooLongError if isinstance(refused, _TooLong) else DataError
                    raise kind(f"{example.where}: the conversation {refused}{hint}") from None
                raise TextError(position, len(examples), str(refused)) from None
            yield found

    def around_a_turn(self) -> tuple[list[int], list[int]]:
        """Token ids before and after the text of a conversation's only turn, a user's, up to where the answer
        begins.

        Raises:
            ModelError: the template does not write that text once, as it is.
        """
        try:
            shown = self._render((Message("user", TURN),), prompt=True)
        except _Refused as refused:
            raise ModelError(f"{self._where}: a conversation of one user turn {refused}") from None
        parts = shown.split(TURN)
        if len(parts) != 2:
            raise ModelError(f"{self._where}: writes a user's turn {len(parts) - 1} times")
        before, after = (self._tokens(part)[0] for part in parts)
        return before, after

    def fits(self, example: Example, data: DataSettings) -> bool:
        """Whether a conversation's last exchange is within ``data.max_length``; what else is wrong with it is
        said by :meth:`encode`.
        """
        try:
            self._encode(example, data)
        except _TooLong:
            return False
        except _Refused:
            pass
        return True

    def kept(self, example: Example, data: DataSettings) -> Messages:
        """The messages that :meth:`encode` keeps of what precedes a conversation's last answer.

        Raises:
            DataError: the template takes no such conversation; names file and line.
        """
        try:
            return self._cut(example, data)[0]
        except _Refused as refused:
            where = example.where or "a conversation"
            raise DataError(f"{where}: the conversation {refused}") from None

    def _encode(self, example: Example, data: DataSettings) -> EncodedConversation:
        messages, (given, prompt, offsets), whole = self._cut(example, data)
        if len(prompt) > data.max_length:
            raise _TooLong(
                f"takes {len(prompt)} tokens with its last exchange alone; data.max_length = "
                f"{data.max_length}"
            )
        if not prompt:
            raise _Refused("makes an empty prompt")
        lost = {EXCHANGES: whole - len(prompt)} if whole > len(prompt) else {}
        if not example.target:
            _, spans = self._spans(messages)
            return EncodedConversation(prompt, [self.end], _inside(offsets, spans), lost)
        full, spans = self._spans((*messages, Message("assistant", example.target)))
        answer = self._answer(full, spans[-1][1], given, prompt)
        if (over := len(answer) - data.max_target_length) > 0:
            answer, lost[TARGET] = answer[: data.max_target_length], over
        return EncodedConversation(prompt, answer, _inside(offsets, spans), lost)

    def _cut(self, example: Example, data: DataSettings) -> tuple[Messages, _Rendered, int]:
        """The messages that are kept of a conversation, their prompt, and the length of the whole one."""
        messages = example.messages or (Message("user", example.text),)
        self._refuse_control_tokens([*messages, Message("assistant", example.target)])
        system, parts = exchanges(messages)
        rendered = self._prompt(messages)
        whole = len(rendered.prompt)
        while len(rendered.prompt) > data.max_length and len(parts) > 1:
            parts = parts[1:]
            messages = (*system, *(message for part in parts for message in part))
            rendered = self._prompt(messages)
        return messages, rendered, whole

    def _prompt(self, messages: Messages) -> _Rendered:
        text = self._render(messages, prompt=True)
        return _Rendered(text, *self._tokens(text))

    def _answer(self, full: str, stop: int, given: str, prompt: list[int]) -> list[int]:
        """The tokens behind a prompt, which stays as it is where the model is to continue it."""
        ids = self._tokens(full[:stop])[0]
        if ids[: len(prompt)] == prompt:
            return ids[len(prompt) :]
        # A token reaches from the prompt into the answer: text such as "\n" may join the prompt's end.
        return self._tokens(full[len(given) : stop])[0]

    def _spans(self, messages: Messages) -> tuple[str, list[Span]]:
        """The rendering of messages, and the characters of each answer to its end-of-turn token.

        Raises:
            _Refused: the template does not tell them, or leaves out a message.
        """
        if self.marked:
            full, spans = self._marked_spans(messages)
        else:
            full = self._render(messages, prompt=False)
            spans = [
                self._span(full, messages, place)
                for place, message in enumerate(messages)
                if message.role == "assistant"
            ]
        for number, message in enumerate(messages, start=1):
            if message.content.strip() not in full:
                raise _Refused(
                    f"loses a part of message {number} (role {message.role!r}) in the chat template"
                )
        return full, spans

    def _span(self, full: str, messages: Messages, place: int) -> Span:
        before = self._render(messages[:place], prompt=True)
        last = place + 1 == len(messages)
        after = full if last else self._render(messages[: place + 1], prompt=False)
        limit = len(after) if full.startswith(after) else _shared(full, after)
        content = messages[place].content.strip()
        at = full.find(content, len(before), limit)
        if not full.startswith(before) or at < 0:
            raise _Refused(
                f"has an answer (message {place + 1}) that cannot be told from the rest: the template writes "
                "the messages before it in another way when it follows; mark answers with {% generation %}"
            )
        end = full.find(self._end_text, at + len(content), limit)
        if end < 0:
            raise _Refused(f"has an answer (message {place + 1}) that the template does not end")
        return len(before), end + len(self._end_text)

    def _marked_spans(self, messages: Messages) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        wanted = sum(message.role == "assistant" for message in messages)

        def call() -> Any:
            return render_jinja_template(
                conversations=[as_rows(messages)],
                chat_template=self.text,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )

        (full,), (marks,) = self._rendered(call)
        if len(marks) != wanted:
            raise _Refused(f"has {wanted} answers, of which the template marks {len(marks)}")
        spans = list[Span]()
        for start, stop in marks:
            if self._end_text not in full[start:stop]:
                if not full.startswith(self._end_text, stop):
                    raise _Refused("has an answer whose end-of-turn token the template does not mark")
                stop += len(self._end_text)
            spans.append((start, stop))
        before = self._render(messages[:-1], prompt=True) if messages[-1].role == "assistant" else ""
        if before and (not full.startswith(before) or full[len(before) : spans[-1][0]].strip()):
            raise _Refused(
                "has a last answer of which the template does not mark all that follows the prompt for it"
            )
        return full, spans

    def _end_of_turn(self, shown: str) -> tuple[int, str]:
        rest = shown[shown.rfind(PROBE[-1].content) + len(PROBE[-1].content) :]
        added = self.tokenizer.added_tokens_decoder
        for token in self._tokens(rest)[0]:
            if token in added:
                return token, str(added[token].content)
        raise _Refused("ends an answer with no special token, by which a model could learn to stop")

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        for number, message in enumerate(messages, start=1):
            if token := self._control_token(message.content):
                raise _Refused(f"holds the control token {token!r} in message {number}; take it out")

    def _control_token(self, text: str) -> str | None:
        """The first control token that the text holds."""
        return next((token for token in self.control if token in text), None)

    def _tokens(self, text: str) -> tuple[list[int], list[Span]]:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(found["input_ids"]), list(found["offset_mapping"])

    def _render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        rows = as_rows(messages)
        return str(
            self._rendered(
                lambda: self.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=prompt)
            )
        )

    def _rendered(self, call: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return call()
        except (TemplateError, *FAILURES) as error:  # of the template's own code
            raise _Refused(f"is refused by the chat template: {in_one_line(error)}") from None


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Positions of the tokens that begin in one of the spans, which stand in their order. The last may take
    space behind its span along (``rstrip`` of an added token).
    """
    found, rest = list[int](), list(spans)
    for position, (start, _) in enumerate(offsets):
        while rest and start >= rest[0][1]:
            rest.pop(0)
        if rest and rest[0][0] <= start:
            found.append(position)
    return found
