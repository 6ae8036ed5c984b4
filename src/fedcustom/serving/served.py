"""A finished run, ready to be asked: what it answers, and how a request becomes a job for its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from .. import api
from ..core.errors import DataError, RunError, TooLongError
from ..library import INDEX, Library, Reply
from ..models.writing import Decoding
from .errors import ApiError
from .replies import Answer, said_of_cuts
from .requests import AskRequest, ChatRequest, ClassifyRequest, TextRequest, WritingRequest
from .worker import Accepted, Job, Piece

Kind = Literal["chat", "text", "classes", "documents"]

ROUTES: Mapping[Kind, tuple[str, ...]] = {
    "chat": ("/v1/chat/completions", "/v1/completions"),
    "text": ("/v1/completions",),
    "classes": ("/v1/classify",),
    "documents": ("/v1/ask", "/v1/chat/completions"),
}
"""What a model of each kind answers."""

TOO_LONG = "context_length_exceeded"
"""OpenAI's name of the error of an input that is too long."""

AT_ONCE = 64
"""Inputs that are classified before it is looked whether the caller still waits."""

CUT = "with truncation = 'auto' it is cut as in training"


class Served:
    """The model of a run, or the documents of one, or of an index.

    Args:
        directory: a run's directory, or an index.
        name: what the model is called; None: as the directory.
        most_tokens: the longest answer that a request may ask for.

    Raises:
        RunError: the directory holds no finished run and no index, or a run with one model for each client.
    """

    def __init__(self, directory: Path, name: str | None = None, most_tokens: int = 4096) -> None:
        self.name = name or directory.resolve().name
        self._most = most_tokens
        self._run: api.Run | None = None
        self._library: Library | None = None
        self._notes: list[str] = []
        if (directory / INDEX).exists():
            self._library = Library(directory, note=self._notes.append)
            self.kind: Kind = "documents"
            return
        self._run = api.load(directory)
        task = self._run.recipe.data.task
        if task == "classification":
            self.kind = "classes"
        elif task in ("chat", "preference") and self._run.converses:
            self.kind = "chat"
        elif self._run.recipe.data.writes:
            self.kind = "text"
        else:
            raise RunError(f"{directory}: holds no document index beside its run, and can answer nothing")

    def warm(self) -> None:
        """Load the model."""
        if self._run is not None:
            self._run.load_model()

    def check(self, model: str | None, route: str) -> None:
        """Refuse a request for another model, or for what this one does not answer.

        Raises:
            ApiError: says what there is.
        """
        if model is not None and model != self.name:
            raise ApiError(
                f"model: there is no {model!r}; allowed: {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        if route not in ROUTES[self.kind]:
            raise ApiError(
                f"{self.name} does not answer {route}; it answers {' and '.join(ROUTES[self.kind])}",
                param="model",
                code="unsupported_route",
            )

    # --- jobs, by what is asked ---

    def chat(self, asked: ChatRequest) -> Callable[[Job], Answer]:
        """An answer in a conversation.

        Raises:
            ApiError: the last message is not a user's.
        """
        rows = asked.rows()
        if self._library is not None:
            return lambda job: self._answer_from_documents(asked, rows)
        return lambda job: self._write({"messages": rows}, asked, "messages", job)

    def text(self, asked: TextRequest) -> Callable[[Job], Answer]:
        """A text after an input.

        Raises:
            ApiError: there is no input, or more than one.
        """
        given = asked.asked()
        return lambda job: self._write(given, asked, "prompt", job)

    def classify(self, asked: ClassifyRequest) -> Callable[[Job], dict[str, Any]]:
        """The labels of inputs, as :meth:`fedcustom.api.Run.predict` gives them."""
        return lambda job: self._classify(asked, job)

    def ask(self, asked: AskRequest) -> Callable[[Job], dict[str, Any]]:
        """Passages for a question, with their owners, and an answer that cites them."""
        return lambda job: self._ask(asked)

    # --- in the model's thread ---

    def _write(self, given: str | Mapping[str, Any], asked: WritingRequest, param: str, job: Job) -> Answer:
        run = self._known_run
        try:
            prompt = run.prompt(given)
        except TooLongError as error:
            raise ApiError(str(error), param=param, code=TOO_LONG) from None
        except DataError as error:
            raise ApiError(str(error), param=param) from None
        if prompt.cut and asked.truncation == "disabled":
            longest = run.recipe.data.max_length
            raise ApiError(
                f"{param}: is {prompt.cut} tokens longer than data.max_length = {longest}; {CUT}",
                param=param,
                code=TOO_LONG,
            )
        usual = Decoding.of(run.recipe.evaluation)
        how = asked.decoding(usual, self._tokens(asked, usual.max_new_tokens, len(prompt.ids), prompt.room))
        job.tell(Accepted())
        said = run.write(prompt, how, lambda text: job.tell(Piece(text)), job.stopped)
        usage = said.prompt_tokens, said.tokens
        return Answer(said.text, said.ended, usage, prompt.cut, run.take_cuts())

    def _tokens(self, asked: WritingRequest, usual: int, length: int, room: int | None) -> int:
        """The longest answer, for which the model must have positions."""
        wanted = asked.longest
        if wanted is not None and wanted > self._most:
            raise ApiError(f"max_tokens: {wanted}; at most {self._most} are allowed", param="max_tokens")
        if room is not None and (room < 1 or (wanted is not None and wanted > room)):
            raise ApiError(
                f"max_tokens: the input takes {length} tokens, after which the model has positions for "
                f"{max(room, 0)} more; {usual if wanted is None else wanted} are asked for",
                param="max_tokens",
                code=TOO_LONG,
            )
        if wanted is None:
            return usual if room is None else min(usual, room)
        return wanted

    def _classify(self, asked: ClassifyRequest, job: Job) -> dict[str, Any]:
        run, inputs = self._known_run, asked.inputs()
        cuts = run.count_cuts(inputs)
        if cuts.inputs and asked.truncation == "disabled":
            raise ApiError(
                f"input: {cuts.inputs} of {cuts.examples} are longer than data.max_length = "
                f"{run.recipe.data.max_length}; {CUT}",
                param="input",
                code=TOO_LONG,
            )
        said = list[dict[str, Any]]()
        for start in range(0, len(inputs), AT_ONCE):
            if job.stopped():
                raise job.reason()
            said += run.predict(inputs[start : start + AT_ONCE])
        found = [{"index": place, **each} for place, each in enumerate(said)]
        beside = said_of_cuts(sum(cuts.tokens.values()), run.take_cuts())
        return {"object": "list", "model": self.name, "data": found, **beside}

    def _ask(self, asked: AskRequest) -> dict[str, Any]:
        reply = self._searched(asked.question, asked.top)
        return {
            "object": "answer",
            "model": self.name,
            "answer": reply.answer,
            "cited": reply.cited,
            "passages": _numbered(reply),
            "clients_asked": reply.clients_asked,
            "bytes": {"down": reply.bytes_down, "up": reply.bytes_up},
            **said_of_cuts(0, self._taken_notes()),
        }

    def _answer_from_documents(self, asked: ChatRequest, rows: Sequence[Mapping[str, str]]) -> Answer:
        if names := asked.decoding_fields():
            raise ApiError(
                f"{names[0]}: answers from documents are written as the recipe says (method.answer_tokens); "
                "leave it out",
                param=names[0],
                code="unsupported_parameter",
            )
        if len(rows) > 1 and asked.truncation == "disabled":
            raise ApiError(
                f"messages: a search takes one question, not {len(rows)} messages; with truncation = 'auto' "
                "all but the last are left out",
                param="messages",
            )
        reply = self._searched(rows[-1]["content"], None)
        passages = _numbered(reply)
        cited = [passage for passage in passages if passage["number"] in reply.cited]
        named = cited if reply.answer else passages
        sources = "\n".join(f"[{each['number']}] {each['client']}: {each['document']}" for each in named)
        text = f"{reply.answer or 'No answer was written; these passages were found.'}\n\n{sources}".strip()
        notes = self._taken_notes()
        if len(rows) > 1:
            notes.append(f"{len(rows) - 1} earlier messages were left out")
        return Answer(text, notes=notes, citations=named)

    def _searched(self, question: str, top: int | None) -> Reply:
        assert self._library is not None
        self._notes.clear()
        return self._library.ask(question, top=top)

    def _taken_notes(self) -> list[str]:
        notes = list(self._notes)
        self._notes.clear()
        return notes

    @property
    def _known_run(self) -> api.Run:
        assert self._run is not None
        return self._run


def _numbered(reply: Reply) -> list[dict[str, Any]]:
    """Passages with the numbers by which they are cited."""
    return [{"number": number, **asdict(one)} for number, one in enumerate(reply.passages, start=1)]
