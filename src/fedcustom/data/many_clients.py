"""Clients that are made when they are asked for: of a million, memory holds which rows are whose."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from .examples import ClientData, Example

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Members:
    """Which rows each client holds: ``rows`` (rows,) client by client, and where each one's end, ``ends``
    (clients + 1,), from 0.
    """

    def __init__(self, rows: np.ndarray[Any, Any], ends: Numbers) -> None:
        self.rows: np.ndarray[Any, Any] = rows.astype(np.int32) if len(rows) < 2**31 else rows
        self.ends = ends

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> list[int]:
        """The rows of one client."""
        found: list[int] = self.rows[self.ends[number] : self.ends[number + 1]].tolist()
        return found

    @property
    def sizes(self) -> Numbers:
        """How many rows each client holds, (clients,)."""
        return np.diff(self.ends)


class NumberedNames(Sequence[str]):
    """``client-0``, ``client-1`` and so on, with as many digits as the last one needs."""

    def __init__(self, count: int) -> None:
        self._size, self._digits = count, len(str(count - 1))

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self._size))]
        return f"client-{range(self._size)[place]:0{self._digits}d}"

    def index(self, name: Any, start: int = 0, stop: int | None = None) -> int:
        """The place of a name.

        Raises:
            ValueError: it is none of them.
        """
        number = str(name).removeprefix("client-")
        if number.isdecimal() and int(number) < self._size and self[int(number)] == name:
            return int(number)
        raise ValueError(name)


class SortedNames(Sequence[str]):
    """Names in their order, as UTF-8 of one width, (clients,); none ends with a zero character."""

    def __init__(self, names: np.ndarray[Any, np.dtype[np.bytes_]]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [name.decode() for name in self.names[place].tolist()]
        return bytes(self.names[place]).decode()

    def index(self, name: Any, start: int = 0, stop: int | None = None) -> int:
        """The place of a name.

        Raises:
            ValueError: it is none of them.
        """
        place = bisect_left(self, str(name))
        if place < len(self) and self[place] == name:
            return place
        raise ValueError(name)


class ManyClients(Mapping[str, ClientData]):
    """Clients by name, in their order. ``make`` makes the client of a number, who has no part of his own to
    be scored on; examples of all are ``examples``.
    """

    def __init__(
        self,
        names: Sequence[str],
        members: Members,
        examples: Sequence[Example],
        make: Callable[[str, int, list[Example]], ClientData],
    ) -> None:
        self.names, self.members, self.examples, self._make = names, members, examples, make

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, name: str) -> ClientData:
        try:
            number = self.names.index(name)
        except ValueError:
            raise KeyError(name) from None
        return self._make(name, number, [self.examples[row] for row in self.members[number]])

    def digest(self) -> str:
        """BLAKE2b of 16 bytes of who has how many rows and which, in hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for name in self.names:
            digest.update(f"{len(name)} {name}".encode("utf-8", "surrogatepass"))
        digest.update(self.members.ends.astype("<i8").tobytes())
        digest.update(self.members.rows.astype("<i8").tobytes())
        return digest.hexdigest()


def train_sizes(clients: Mapping[str, ClientData]) -> list[int]:
    """How many examples each client trains on, in their order."""
    if isinstance(clients, ManyClients):
        found: list[int] = clients.members.sizes.tolist()
        return found
    return [len(client.train) for client in clients.values()]


def names_of(clients: Mapping[str, ClientData]) -> Sequence[str]:
    """The clients' names in their order, to be read by place."""
    return clients.names if isinstance(clients, ManyClients) else list(clients)


def sorted_members(names: Iterator[str]) -> tuple[SortedNames, Members]:
    """Rows by the client that each names, clients in the order of their names.

    Raises:
        ValueError: a name ends with a zero character, or is none that UTF-8 has.
    """
    parts, chunk = [], list[bytes]()
    for name in names:
        if name.endswith("\0"):
            raise ValueError(name)
        chunk.append(name.encode())
        if len(chunk) == 2**16:
            parts.append(np.array(chunk, dtype=np.bytes_))
            chunk = []
    parts.append(np.array(chunk, dtype=np.bytes_)) if chunk else None
    distinct, owner = np.unique(np.concatenate(parts), return_inverse=True)
    owner = owner.astype(np.int32)
    ends = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(distinct)))])
    return SortedNames(distinct), Members(np.argsort(owner, kind="stable"), ends)
