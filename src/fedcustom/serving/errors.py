"""Errors of the interface, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

INVALID = "invalid_request_error"
"""The type of an error that the caller can mend."""


class ApiError(Exception):
    """A refusal: an HTTP status, one line, and OpenAI's names for what is wrong.

    Args:
        message: one line: what is wrong, and what is allowed.
        status: the HTTP status.
        code: OpenAI's name of the error, for programs.
        param: the field of the request that it is about.
        kind: OpenAI's type of error.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        kind: str = INVALID,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.code, self.param, self.kind = message, status, code, param, kind

    def content(self) -> dict[str, Any]:
        """The body of the response."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def too_busy(waiting: int) -> ApiError:
    """The refusal of a request for which there is no place in the queue."""
    return ApiError(
        f"{waiting} requests are waiting already, and no more may; try again later",
        status=429,
        code="rate_limit_exceeded",
        kind="rate_limit_error",
    )


def timed_out(seconds: float) -> ApiError:
    """The end of a request that took too long, with the time in which it waited for others."""
    return ApiError(
        f"the request took longer than {seconds:g} seconds, with the time that it waited for others",
        status=504,
        code="timeout",
        kind="timeout_error",
    )


def internal() -> ApiError:
    """What is said of an error in this program; its traceback is in the server's log."""
    return ApiError(
        "internal error; the server's log has the traceback", status=500, kind="server_error", code="internal"
    )


def shutting_down() -> ApiError:
    """The end of a request when the server stops."""
    return ApiError("the server is being stopped", status=503, kind="server_error", code="shutting_down")
