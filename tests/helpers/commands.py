"""The command line, called in this process."""

from __future__ import annotations


class Result:
    """What a command said, and its exit code."""

    def __init__(self, code: int, out: str, error: str) -> None:
        self.code, self.out, self.error = code, out, error
