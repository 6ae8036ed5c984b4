"""Requests: what of OpenAI's fields is understood, what may be there without effect, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from ..core.bounded_json import read_json
from ..core.errors import WireError
from ..core.text import printable
from ..models.writing import Decoding
from .errors import ApiError

R = TypeVar("R", bound="Request")

NO_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity"}
)
"""Fields about OpenAI's own service, which change no answer."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields of OpenAI's that are not supported, with the values by which they ask for nothing."""

Truncation = Literal["auto", "disabled"]
"""Whether an input that is longer than ``data.max_length`` is cut as in training, or refused."""

Columns = dict[str, Any]
"""A row with the recipe's columns."""

Texts = Annotated[list[str], Field(min_length=1, max_length=4)]
Stop = Annotated[str, Field(min_length=1)] | Texts


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def row(self) -> dict[str, str]:
        """Role and text, as recipes name them."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": role, "content": text}


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


PLACES = frozenset(name for kind in (Message, Part, StreamOptions) for name in kind.model_fields)
"""Fields inside of others."""


class Request(BaseModel):
    """A request: unknown fields are refused, and values are not converted between types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None


class WritingRequest(Request):
    """What requests for a text have in common. A field that is not given is as the run's recipe has it."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    truncation: Truncation = "disabled"

    @field_validator("top_p")
    @classmethod
    def _draws(cls, top_p: float | None, given: ValidationInfo) -> float | None:
        """Texts are drawn only where a temperature asks for it, so ``top_p`` alone would do nothing."""
        if top_p not in (None, 1) and not given.data.get("temperature"):
            raise ValueError("has an effect with a temperature above 0 alone")
        return top_p

    @property
    def longest(self) -> int | None:
        """The longest answer in tokens, where it is given."""
        return self.max_tokens

    @property
    def usage_in_stream(self) -> bool:
        """Whether the last piece of a stream tells how many tokens there were."""
        return self.stream_options is not None and self.stream_options.include_usage

    def decoding(self, usual: Decoding, tokens: int) -> Decoding:
        """How the text is written.

        Args:
            usual: as the run's recipe has it.
            tokens: the longest text.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Decoding(
            tokens,
            usual.beams,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(stop),
        )

    def decoding_fields(self) -> list[str]:
        """The fields that say how a text is written and ask for something."""
        asked = {
            "max_tokens": self.longest,
            "temperature": self.temperature,
            "top_p": None if self.top_p == 1 else self.top_p,
            "stop": self.stop,
        }
        return [name for name, value in asked.items() if value]


class ChatRequest(WritingRequest):
    """``POST /v1/chat/completions``"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def longest(self) -> int | None:
        """The longest answer in tokens, where it is given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def rows(self) -> list[dict[str, str]]:
        """The conversation, whose last message is the user's.

        Raises:
            ApiError: it is another's.
        """
        rows = [message.row() for message in self.messages]
        if rows[-1]["role"] != "user":
            role = rows[-1]["role"]
            raise ApiError(
                f"messages: the last one must be the user's, not of role {role!r}", param="messages"
            )
        return rows


class TextRequest(WritingRequest):
    """``POST /v1/completions``"""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] | None = None
    row: Columns | None = None

    def asked(self) -> str | Columns:
        """The one input: a text, or a row with the recipe's columns.

        Raises:
            ApiError: there is none, or there are two.
        """
        prompt = self.prompt[0] if isinstance(self.prompt, list) else self.prompt
        if self.row is not None and not prompt:
            return self.row
        if self.row is not None or prompt is None:
            raise ApiError("give either a prompt, or a row with the recipe's columns", param="prompt")
        return prompt


class ClassifyRequest(Request):
    """``POST /v1/classify``"""

    input: str | Columns | Annotated[list[str | Columns], Field(min_length=1)]
    truncation: Truncation = "auto"

    def inputs(self) -> list[str | Columns]:
        """The inputs, one at least."""
        return list(self.input) if isinstance(self.input, list) else [self.input]


class AskRequest(Request):
    """``POST /v1/ask``"""

    question: str = Field(min_length=1)
    top: int | None = Field(None, ge=1)


def parsed(kind: type[R], body: bytes) -> R:
    """A request's JSON as what it must be.

    Raises:
        ApiError: it is no JSON, or a field is unknown, malformed or not supported.
    """
    try:
        values = read_json(body)
    except WireError as error:
        raise ApiError(str(error).replace("a message", "the request", 1)) from None
    given = {name: value for name, value in values.items() if value is not None and name not in NO_EFFECT}
    for name, neutral in NEUTRAL.items():
        if name in given and name not in kind.model_fields:
            value = given.pop(name)
            if not any(_same(value, each) for each in neutral):
                allowed = " or ".join(map(repr, neutral))
                raise ApiError(
                    f"{name}: is not supported; allowed: {allowed}, or nothing",
                    param=name,
                    code="unsupported_parameter",
                )
    if isinstance(messages := given.get("messages"), list):
        given["messages"] = [_without_nulls(message) for message in messages]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _refusal(kind, error) from None


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; a boolean is no number."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _without_nulls(message: Any) -> Any:
    """A message without fields that say nothing, such as those that the client library adds."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if value is not None}


def _refusal(kind: type[Request], error: ValidationError) -> ApiError:
    """One thing that is wrong, in one line: the first field's, and of alternatives that of which the type is
    right.
    """
    errors = error.errors(include_url=False, include_input=False)
    name = str(errors[0]["loc"][0]) if errors[0]["loc"] else ""
    same = [each for each in errors if each["loc"][:1] == errors[0]["loc"][:1]]
    chosen = next((each for each in same if not each["type"].endswith("_type")), same[0])
    # Of the places in between, pydantic names alternatives too, by their types.
    parts = [str(part) for part in chosen["loc"] if isinstance(part, int) or part in PLACES or part == name]
    where = printable(".".join(parts), lines=False, longest=60)
    if chosen["type"] == "extra_forbidden":
        if name in kind.model_fields:
            unknown = printable(str(chosen["loc"][-1]), lines=False, longest=60)
            return ApiError(f"{where}: {unknown} is not a known field", param=name, code="unknown_parameter")
        allowed = ", ".join(sorted(kind.model_fields))
        said = f"{where}: is not a known field; allowed: {allowed}"
        return ApiError(said, param=name, code="unknown_parameter")
    if chosen["type"] == "missing":
        return ApiError(f"{where}: is missing", param=name, code="missing_required_parameter")
    return ApiError(f"{where}: {chosen['msg'][:1].lower()}{chosen['msg'][1:]}", param=name)
