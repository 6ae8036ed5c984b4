"""The server's routes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from .errors import ApiError
from .replies import Answer, Shape
from .requests import AskRequest, ChatRequest, ClassifyRequest, TextRequest, WritingRequest, parsed
from .requests import Request as AnyRequest
from .served import Served
from .worker import Event, Finished, Job, Piece, Worker

R = TypeVar("R", bound=AnyRequest)

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names of this machine, as browsers and clients write them."""

POLL_SECONDS = 0.2
"""How often it is looked whether the caller is still there."""

BODY_SECONDS = 30
"""How long a caller may take to send a request."""


@dataclass(frozen=True)
class Limits:
    """What one caller may take.

    Attributes:
        body: bytes of a request.
        waiting: requests that may wait for the one at work.
        seconds: time of a request, with that in which it waits.
    """

    body: int = 2**20
    waiting: int = 16
    seconds: float = 300.0


def make_app(
    served: Served,
    worker: Worker,
    limits: Limits,
    *,
    api_key: str | None = None,
    hosts: Sequence[str] | None = LOOPBACK,
) -> FastAPI:
    """The application.

    Args:
        served: the model.
        worker: its thread.
        limits: what one caller may take.
        api_key: what callers must send as a bearer token; None: nothing.
        hosts: the names by which requests may call this server; None: any. A web page whose own name points
            at this machine sends that name.
    """

    @asynccontextmanager
    async def until_the_end(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=until_the_end)
    started = int(time.time())
    wanted_key = hashlib.sha256(api_key.encode()).digest() if api_key is not None else None

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return refusal(error)

    @app.exception_handler(StarletteHTTPException)
    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        said = f"{request.method} {request.url.path}: {error.detail}"
        return refusal(ApiError(said, status=error.status_code, code="unknown_url"))

    def admit(request: Request) -> None:
        """Refuse a caller that may not ask."""
        host = request.headers.get("host", "")
        if hosts is not None and not any(host == name or host.startswith(f"{name}:") for name in hosts):
            raise ApiError("the request names another host than this machine", status=403, code="wrong_host")
        if wanted_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        if not hmac.compare_digest(given, wanted_key) or scheme.lower() != "bearer":
            raise ApiError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )

    async def read(request: Request, kind: type[R]) -> R:
        """The request, admitted and checked."""
        admit(request)
        sort = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sort != "application/json":  # which a web page of another origin cannot send
            raise ApiError("the content type must be application/json", status=415, code="content_type")
        asked = parsed(kind, await body_of(request, limits.body))
        served.check(asked.model, request.url.path)
        return asked

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    def described() -> dict[str, Any]:
        return {"id": served.name, "object": "model", "created": started, "owned_by": "fedcustom"}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        admit(request)
        return JSONResponse({"object": "list", "data": [described()]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        admit(request)
        if name != served.name:
            raise ApiError(
                f"model: there is no {name!r}; allowed: {served.name!r}",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip
        return JSONResponse(described())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = await read(request, ChatRequest)
        return await text_reply(request, asked, served.chat(asked), Shape(served.name, chat=True))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = await read(request, TextRequest)
        return await text_reply(request, asked, served.text(asked), Shape(served.name, chat=False))

    @app.post("/v1/classify")
    async def classify(request: Request) -> Response:
        asked = await read(request, ClassifyRequest)
        return JSONResponse(await result(request, worker.submit(served.classify(asked))))

    @app.post("/v1/ask")
    async def ask(request: Request) -> Response:
        asked = await read(request, AskRequest)
        return JSONResponse(await result(request, worker.submit(served.ask(asked))))

    async def text_reply(
        request: Request, asked: WritingRequest, work: Callable[[Job], Answer], shape: Shape
    ) -> Response:
        job = worker.submit(work)
        if not asked.stream:
            return JSONResponse(shape.whole(await result(request, job)))
        events = followed(request, job)
        first = await anext(events, None)
        if first is None:
            raise gone()
        if isinstance(first, ApiError):  # before anything is sent, so that it has a status of its own
            raise first
        lines = stream(first, events, shape, usage=asked.usage_in_stream)
        return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    return app


def refusal(error: ApiError) -> Response:
    """An error as a response."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.content(), error.status, headers)


def gone() -> ApiError:
    """The end of a request whose caller has closed the connection, and does not read it."""
    return ApiError("the caller has left", status=499)


async def body_of(request: Request, limit: int) -> bytes:
    """The bytes of a request.

    Raises:
        ApiError: they are too many, or take too long.
    """
    length = request.headers.get("content-length", "0")
    too_large = ApiError(f"the request has more than {limit:,} bytes", status=413, code="request_too_large")
    if not length.isdigit() or int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        said = f"the request took longer than {BODY_SECONDS} seconds to arrive"
        raise ApiError(said, status=408, code="timeout") from None
    return bytes(body)


async def followed(request: Request, job: Job) -> AsyncIterator[Event]:
    """A job's events up to its last. A caller that leaves cancels the job."""
    try:
        while True:
            try:
                event = await asyncio.wait_for(job.events.get(), POLL_SECONDS)
            except TimeoutError:
                if await request.is_disconnected():
                    return
                continue
            yield event
            if isinstance(event, Finished | ApiError):
                return
    finally:
        job.cancel()


async def result(request: Request, job: Job) -> Any:
    """What came of a job.

    Raises:
        ApiError: nothing, and why.
    """
    try:
        async for event in followed(request, job):
            if isinstance(event, ApiError):
                raise event
            if isinstance(event, Finished):
                return event.result
    except asyncio.CancelledError:  # the server ends, and the job has not within its grace
        raise gone() from None
    raise gone()


async def stream(
    first: Event, events: AsyncIterator[Event], shape: Shape, *, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of a text. ``usage``: tell at the end how many tokens there were."""
    if (opening := shape.first()) is not None:
        yield line(opening)
    told = not isinstance(first, Finished)
    if isinstance(first, Finished):
        events = _only(first)
    async for event in events:
        if isinstance(event, ApiError):
            yield line(event.content())
            return
        if isinstance(event, Piece):
            yield line(shape.piece(event.text))
        elif isinstance(event, Finished):
            if not told and event.result.text:  # what is written all at once
                yield line(shape.piece(event.result.text))
            yield line(shape.last(event.result))
            if usage:
                yield line(shape.counted(event.result))
            yield "data: [DONE]\n\n"


async def _only(event: Event) -> AsyncIterator[Event]:
    yield event


def line(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
