"""Tensor payloads of the engine's messages: small ones travel inside the message, large ones as a file that
the receiver fetches in chunks, so that memory does not grow with their size.
"""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.streaming.download_service import Consumer, download_object
from nvflare.fuel.f3.streaming.file_downloader import FileDownloadable
from nvflare.fuel.f3.streaming.obj_downloader import ObjectDownloader

INLINE_LIMIT = 2**20
"""Bytes up to which tensors travel inside the message."""

CHUNK_SIZE = 4 * 2**20
"""Bytes of a chunk."""

DOWNLOAD_TIMEOUT = 600.0
"""Seconds that a file is kept available for its receiver."""


def attach_payload(message: Any, body: Path | None, cell: Any) -> None:
    """Attach a file of tensors to a message of the engine, whose network endpoint is ``cell``."""
    if body is None:
        return
    message["size"] = size = body.stat().st_size
    if size <= INLINE_LIMIT:
        message["body"] = body.read_bytes()
        return
    downloader = ObjectDownloader(cell=cell, timeout=DOWNLOAD_TIMEOUT, num_receivers=1)
    message["file"] = downloader.add_object(_ChunkedFile(str(body), chunk_size=CHUNK_SIZE))
    message["owner"] = cell.get_fqcn()


def receive_payload(message: Any, path: Path, cell: Any, max_bytes: int, abort_signal: Any) -> str:
    """Write the tensors of a message to a file; returns what is wrong with them, or an empty text.

    Nothing is fetched that is larger than ``max_bytes``, or larger than the message announced.
    """
    size = message.get("size")
    if size is None:
        return ""
    if not isinstance(size, int) or not 0 <= size <= max_bytes:
        return f"a message of {size} bytes; at most {max_bytes} are allowed"
    if "body" in message:
        body = message["body"]
        if not isinstance(body, bytes) or len(body) != size:
            return "a message is truncated"
        path.write_bytes(body)
        return ""
    consumer = _FileConsumer(path, size)
    download_object(
        from_fqcn=str(message.get("owner")), ref_id=str(message.get("file")), per_request_timeout=60.0,
        cell=cell, consumer=consumer, abort_signal=abort_signal,
    )  # fmt: skip
    if not consumer.error and consumer.received != size:
        consumer.error = "a message is truncated"
    if consumer.error:
        path.unlink(missing_ok=True)
    return consumer.error


class _ChunkedFile(FileDownloadable):  # type: ignore[misc]
    """A file that is served in chunks."""

    def produce(self, state: dict[str, Any], requester: str) -> tuple[str, Any, dict[str, Any]]:
        _collect_garbage()
        chunk: tuple[str, Any, dict[str, Any]] = super().produce(state, requester)
        return chunk


class _FileConsumer(Consumer):  # type: ignore[misc]
    """Writes chunks to a file, up to the size that was announced."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__()
        self.size, self.received, self.error = size, 0, ""
        self._file = path.open("wb")

    def consume(self, ref_id: str, state: dict[str, Any], data: Any) -> dict[str, Any]:
        if not isinstance(data, bytes) or self.received + len(data) > self.size:
            raise ValueError("more bytes than were announced")
        _collect_garbage()
        self._file.write(data)
        self.received += len(data)
        return {"received_bytes": self.received}

    def download_completed(self, ref_id: str) -> None:
        self._file.close()

    def download_failed(self, ref_id: str, reason: str) -> None:
        self.error = str(reason) or "the transfer failed"
        self._file.close()


_chunk_numbers = itertools.count()


def _collect_garbage() -> None:
    """Free the engine's earlier messages: they refer to one another, and what holds megabytes looks to the
    collector like any other small object, so that by itself it comes too late. Objects from before the
    first chunk are frozen, so that a collection takes milliseconds.
    """
    number = next(_chunk_numbers)
    if number == 0:
        gc.collect()
        gc.freeze()
    elif number % 4 == 0:
        gc.collect()
