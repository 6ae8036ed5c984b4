"""Few-shot prompts: training examples before an input, as many of them as the model has positions for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from ...data.conversations import Message, Messages
from ...data.encode import Cut, input_cut, shorten
from ...data.examples import Example
from ...data.settings import DataSettings
from ...data.tokens import TokenizedExample
from ...evaluation.settings import EvaluationSettings
from ...models.configuration import context_length
from ...models.load import Base
from ..prompt_engineering.templates import continuation
from ..tuning.objective import Supervised
from .messages import Shot, Turn

SEPARATOR = "\n\n"
"""What stands between the examples of a prompt that is no conversation."""

UNCUT = 2**30
"""Tokens: the length of a text that is not cut."""


@dataclass
class Room:
    """How many prompts had room for fewer examples than they were to have.

    Attributes:
        wanted: how many examples a prompt is to have.
        had: how many each prompt has.
    """

    wanted: int = 0
    had: dict[tuple[str, Messages], int] = field(default_factory=dict)

    def in_words(self, name: str, limit: int) -> list[str]:
        """A sentence on the examples that were left out; none where there are none."""
        lacking = [self.wanted - count for count in self.had.values() if count < self.wanted]
        if not lacking:
            return []
        return [
            f"{len(lacking)} of {len(self.had)} prompts have fewer than {self.wanted} examples "
            f"(method.shots): {sum(lacking)} of {self.wanted * len(self.had)} were left out, the longest "
            f"first; {name} has {limit} positions"
        ]


class FewShot:
    """Prompts with examples before the input.

    A prompt that is no conversation is ``<example><answer>``, a blank line, the next example, and so on to
    the input, in the recipe's own templates. In a conversation the examples are earlier turns, behind its
    system message; system messages of the examples are left out. Inputs of examples are cut as all inputs
    are, their answers are not. Where the model has too few positions for the prompt and the longest answer,
    the longest example is left out, and the next, until it has; an input without any is read as it is
    zero-shot.
    """

    def __init__(self, base: Base, data: DataSettings, evaluation: EvaluationSettings) -> None:
        self.base, self.data = base, data
        self.plain = Supervised(base, data)
        self.uncut = Supervised(base, data.model_copy(update={"max_length": UNCUT}))
        self.limit = context_length(base.model.config)
        apart = base.sequence_to_sequence  # an answer has positions of its own
        answer = 0 if apart else max(data.max_target_length, evaluation.max_new_tokens)
        self.room = UNCUT if self.limit is None else self.limit - answer
        self.left_out = Room()

    def shots_of(self, examples: Sequence[Example]) -> list[Shot]:
        """Training examples as they are shown."""
        if self.base.chat is None:
            asked = [[Turn(role="user", content=text)] for text in self._inputs(examples)]
        else:
            kept = [self.base.chat.kept(example, self.data) for example in examples]
            asked = [[_turn(m) for m in messages if m.role != "system"] for messages in kept]
        return [Shot(messages=a, answer=e.target) for a, e in zip(asked, examples, strict=True)]

    def tokens(self, shots: Sequence[Shot], examples: Sequence[Example]) -> list[TokenizedExample]:
        """Token ids of the examples behind the shots, as many of these as there is room for."""
        rows = self.plain.tokens(examples)
        if not shots or not examples:
            return rows
        sizes, inputs = self._sizes(shots), self._kept(examples)
        waiting = {place: list(range(len(shots))) for place in range(len(examples))}
        had = dict.fromkeys(waiting, 0)
        while waiting:
            places = list(waiting)
            shown = [
                self._with([shots[i] for i in waiting[place]], examples[place], inputs[place])
                for place in places
            ]
            for place, row in zip(places, self.uncut.tokens(shown), strict=True):
                chosen = waiting[place]
                if len(row.source) <= self.room:
                    rows[place], had[place] = row, len(chosen)
                    del waiting[place]
                    continue
                chosen.remove(max(chosen, key=lambda i: sizes[i]))
                if not chosen:
                    del waiting[place]
        self.left_out.wanted = len(shots)
        for place, example in enumerate(examples):
            self.left_out.had[example.text, example.messages] = had[place]
        return rows

    def messages(self, shots: Sequence[Shot], asked: str) -> list[dict[str, str]]:
        """A prompt with all shots, as messages: one of a user, unless prompts are conversations."""
        if self.base.chat is None:
            return [{"role": "user", "content": self._text(shots, asked)}]
        own = [Message("system", self.data.system)] if self.data.system else []
        turns = (*own, *_turns(shots), Message("user", asked))
        return [{"role": message.role, "content": message.content} for message in turns]

    def stop(self, shots: Sequence[Shot]) -> tuple[str, ...]:
        """The text at which what the model writes ends, since an example of its own would follow: the
        separator, unless an answer holds it.
        """
        if self.base.chat is not None or not shots or any(SEPARATOR in shot["answer"] for shot in shots):
            return ()
        return (SEPARATOR,)

    def _inputs(self, examples: Sequence[Example]) -> list[str]:
        """Texts as they are read zero-shot, cut where they are too long."""
        special = self.base.tokenizer.num_special_tokens_to_add()
        usual = input_cut(self.data)
        cut = Cut(max(1, usual.limit - special), usual.how, usual.side)
        return [text for text, _ in shorten(self.base.tokenizer, examples, cut)]

    def _kept(self, examples: Sequence[Example]) -> list[str] | list[Messages]:
        if self.base.chat is None:
            return self._inputs(examples)
        return [self.base.chat.kept(example, self.data) for example in examples]

    def _with(self, shots: Sequence[Shot], example: Example, asked: str | Messages) -> Example:
        if isinstance(asked, str):
            return replace(example, text=self._text(shots, asked), fields=())
        system = tuple(message for message in asked if message.role == "system")
        return replace(example, messages=(*system, *_turns(shots), *asked[len(system) :]))

    def _text(self, shots: Sequence[Shot], asked: str) -> str:
        return SEPARATOR.join([*(self._shown(shot) for shot in shots), asked])

    def _shown(self, shot: Shot) -> str:
        prompt, answer = shot["messages"][-1]["content"], shot["answer"]
        if self.base.sequence_to_sequence and not answer[:1].isspace():
            return prompt + continuation(prompt, answer)  # which are apart for this model, and here are not
        return prompt + answer

    def _sizes(self, shots: Sequence[Shot]) -> list[int]:
        """Tokens of each shot."""
        texts = ["\n".join([*(turn["content"] for turn in s["messages"]), s["answer"]]) for s in shots]
        return [len(ids) for ids in self.base.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _turn(message: Message) -> Turn:
    return cast(Turn, {"role": message.role, "content": message.content})


def _turns(shots: Sequence[Shot]) -> Messages:
    """Examples as turns of a conversation."""
    turns = list[Message]()
    for shot in shots:
        turns += [Message(turn["role"], turn["content"]) for turn in shot["messages"]]
        turns.append(Message("assistant", shot["answer"]))
    return tuple(turns)
