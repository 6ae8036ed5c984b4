"""One text, written token by token: greedy, beam search or sampling, with stop texts and a way to end it."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation.settings import EvaluationSettings
from .inference import decoded, generated, to_device
from .load import Base

PART_OF_A_CHARACTER = "\ufffd"
"""What a text ends in as long as a part of its last character has come."""


@dataclass(frozen=True)
class Decoding:
    """How a text is written.

    Attributes:
        max_new_tokens: the longest text, in tokens.
        beams: beams of the search; 1 is greedy. Of no effect with a ``temperature``.
        temperature: what logits are divided by before a token is drawn; 0 takes the likeliest.
        top_p: tokens are drawn among the likeliest that have so much probability together.
        seed: of the draws; None takes another one for each text.
        stop: texts before which the written text ends.
    """

    max_new_tokens: int
    beams: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: EvaluationSettings) -> Decoding:
        """That of a recipe's evaluation, which draws no tokens."""
        return cls(settings.max_new_tokens, settings.beams)

    def options(self) -> dict[str, Any]:
        """Arguments of ``generate`` of ``transformers``."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "num_beams": self.beams, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": 1,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,  # all tokens: transformers draws among 50 by default
        }


@dataclass(frozen=True)
class Written:
    """A text that a model wrote.

    Attributes:
        text: without surrounding space.
        ended: whether the model ended it, or a stop text did; else the greatest length, or the caller.
        prompt_tokens: how many tokens the prompt has, without those that the method puts before it.
        tokens: how many tokens were written, with the one that ends the text.
    """

    text: str
    ended: bool
    prompt_tokens: int
    tokens: int


@torch.inference_mode()
def write(
    model: Any,
    base: Base,
    source: Sequence[int],
    how: Decoding,
    on_text: Callable[[str], None] = lambda text: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Written:
    """The text that a model writes after a prompt, told piece by piece (of a beam search, all at once).

    Args:
        model: the customised form of ``base``.
        source: the prompt's token ids.
        on_text: is told each piece as soon as it is certain.
        stopped: is asked after each token whether to end.
    """
    ids = torch.tensor([[int(token) for token in source]])
    batch = to_device({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, base.device)
    stream = _Stream(base, how.stop, on_text)
    searches = how.beams > 1 and how.temperature == 0

    def ends(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(tokens),), stream.stopped or stopped(), device=tokens.device)

    with _drawing(how, base):
        output = generated(
            model,
            base,
            batch,
            streamer=None if searches else stream,
            stopping_criteria=[ends],
            **how.options(),
        )[0].tolist()
    if base.sequence_to_sequence:
        output = output[1:]  # the token that every text of the decoder begins with
    text, stop = _up_to(decoded(base, output), how.stop)
    stream.tell(text.strip())
    ended = stop or any(token in base.stops for token in output)
    return Written(text.strip(), ended, len(source), _count(output, base))


class _Stream:
    """Tells of a text as its tokens come (a streamer of ``transformers``), and of stop texts in it."""

    def __init__(self, base: Base, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self._base, self._stop, self._on_text = base, stop, on_text
        self._ids, self._told, self._begun = list[int](), "", False
        self.stopped = False

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, and after that each token."""
        if not self._begun:
            self._begun = True
            return
        self._ids += value.flatten().tolist()
        text, self.stopped = _up_to(decoded(self._base, self._ids), self._stop)
        if self.stopped:
            self.tell(text.strip())
        elif not text.endswith(PART_OF_A_CHARACTER):
            self.tell(_certain(text, self._stop).strip())

    def end(self) -> None:
        """There is no more; :func:`write` tells the rest."""

    def tell(self, text: str) -> None:
        """Tell what is new of a text."""
        if text.startswith(self._told) and len(text) > len(self._told):
            self._on_text(text[len(self._told) :])
            self._told = text


def _up_to(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop text, and whether there is one."""
    places = [place for place in (text.find(each) for each in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _certain(text: str, stop: Sequence[str]) -> str:
    """The text without an end that may become a stop text."""
    held = (
        size
        for each in stop
        for size in range(min(len(each) - 1, len(text)), 0, -1)
        if text.endswith(each[:size])
    )
    return text[: len(text) - max(held, default=0)]


@contextlib.contextmanager
def _drawing(how: Decoding, base: Base) -> Iterator[None]:
    """The generator of random numbers, seeded, for the time of the context alone."""
    if how.temperature == 0:
        yield
        return
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(secrets.randbits(63) if how.seed is None else how.seed)
        yield


def _count(output: Sequence[int], base: Base) -> int:
    """How many tokens were written: up to the first that ends a text, and not the padding behind it."""
    stop = next((place for place, token in enumerate(output) if token in base.stops), len(output) - 1)
    return stop + 1
