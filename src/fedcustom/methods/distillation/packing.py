"""Probabilities as few bits, and back: what travels between models that stay where they are.

A row of probabilities becomes integers that sum to ``M = 2^bits - 1`` (largest remainders, so each is off by
less than one quantum 1 / M). Its ``k`` largest travel with their labels; what is left of M is the rest of the
mass, one number that need not be sent. Where all labels travel, the last one's probability is that number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import UpdateError
from ...core.tensors import Tensors

Integers = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

PROBABILITIES, LABELS = "probabilities", "labels"


@dataclass(frozen=True)
class TopK:
    """Rows' largest probabilities: ``labels`` and ``probabilities`` of (rows, k), and ``rest`` of (rows,)."""

    labels: Integers
    probabilities: Floats
    rest: Floats

    def __getitem__(self, rows: Any) -> TopK:
        return TopK(self.labels[rows], self.probabilities[rows], self.rest[rows])


@dataclass(frozen=True)
class Format:
    """How rows over ``labels`` labels travel: the ``top_k`` largest (None: all) in ``bits`` bits each."""

    labels: int
    top_k: int | None
    bits: int

    @property
    def whole(self) -> bool:
        """Whether all labels travel."""
        return self.top_k is None or self.top_k >= self.labels

    @property
    def sent(self) -> int:
        """How many probabilities of a row travel."""
        return self.labels - 1 if self.whole or self.top_k is None else self.top_k

    @property
    def label_bits(self) -> int:
        """Bits of a label's number."""
        return max(1, (self.labels - 1).bit_length())


def largest(probabilities: Floats, format_: Format) -> TopK:
    """The rows' largest probabilities in falling order (of equals, the first), or all in their order."""
    rows = probabilities.shape[0]
    if format_.whole:
        labels = np.tile(np.arange(format_.labels), (rows, 1))
        return TopK(labels, probabilities, np.zeros(rows))
    labels = np.argsort(-probabilities, axis=1, kind="stable")[:, : format_.sent]
    kept = np.take_along_axis(probabilities, labels, axis=1)
    return TopK(labels, kept, np.clip(1 - kept.sum(axis=1), 0, 1))


def pack(rows: TopK, format_: Format) -> Tensors:
    """The rows as they travel: one tensor of bytes, or two where labels travel too."""
    everything = rows.probabilities if format_.whole else np.column_stack([rows.probabilities, rows.rest])
    numbers = quantise(everything, 2**format_.bits - 1)[:, : format_.sent]
    packed = {PROBABILITIES: pack_integers(numbers, format_.bits)}
    if not format_.whole:
        packed[LABELS] = pack_integers(rows.labels, format_.label_bits)
    return packed


def unpack(tensors: Tensors, rows: int, format_: Format) -> TopK:
    """What :func:`pack` packed. Trusts nothing.

    Raises:
        UpdateError: other names, dtypes or lengths than ``rows`` rows have, a row with more than the whole
        mass, a label that does not exist or that stands twice in a row.
    """
    wanted = {PROBABILITIES} if format_.whole else {PROBABILITIES, LABELS}
    if tensors.keys() != wanted:
        raise UpdateError(f"wrong tensor names: {', '.join(sorted(tensors)[:3]) or 'none'}")
    total = 2**format_.bits - 1
    numbers = unpack_integers(tensors[PROBABILITIES], (rows, format_.sent), format_.bits, PROBABILITIES)
    left = total - numbers.sum(axis=1)
    if rows and left.min() < 0:
        row = int(left.argmin())
        raise UpdateError(f"probabilities of row {row} sum to {1 - left[row] / total:.4f}, not to 1 at most")
    if format_.whole:
        labels = np.tile(np.arange(format_.labels), (rows, 1))
        return TopK(labels, np.column_stack([numbers, left]) / total, np.zeros(rows))
    labels = unpack_integers(tensors[LABELS], (rows, format_.sent), format_.label_bits, LABELS)
    if rows and labels.max() >= format_.labels:
        raise UpdateError(f"label {labels.max()}: there are {format_.labels}")
    in_order = np.sort(labels, axis=1)
    if (in_order[:, 1:] == in_order[:, :-1]).any():
        raise UpdateError("a label stands twice in a row")
    return TopK(labels, numbers / total, left / total)


def dense(rows: TopK, format_: Format) -> Tensor:
    """(rows, labels) in float32, each with sum 1: what did not travel shares the rest of the mass evenly."""
    if format_.whole:
        return torch.from_numpy(rows.probabilities).float()
    missing = max(1, format_.labels - rows.labels.shape[1])
    full = np.repeat(rows.rest[:, None] / missing, format_.labels, axis=1)
    np.put_along_axis(full, rows.labels, rows.probabilities, axis=1)
    return torch.from_numpy(full).float()


def quantise(rows: Floats, total: int) -> Integers:
    """Rows of probabilities with sum 1 as integers with sum ``total``, by largest remainders (of equals, the
    first); each differs from ``total * p`` by less than 1.
    """
    exact = total * rows / rows.sum(axis=1, keepdims=True)
    floor = np.floor(exact).astype(np.int64)
    missing = total - floor.sum(axis=1)
    order = np.argsort(floor - exact, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(rows.shape[1])[None, :], axis=1)
    result: Integers = floor + (ranks < missing[:, None])
    return result


def pack_integers(values: Integers, bits: int) -> Tensor:
    """Integers from 0 to 2^bits - 1 as ceil(n bits / 8) bytes, the highest bit first."""
    shifts = np.arange(bits - 1, -1, -1)
    digits = (values.reshape(-1, 1) >> shifts) & 1
    return torch.from_numpy(np.packbits(digits.astype(np.uint8)))


def unpack_integers(packed: Tensor, shape: tuple[int, int], bits: int, name: str) -> Integers:
    """What :func:`pack_integers` packed, in a shape.

    Raises:
        UpdateError: the tensor has another dtype or length.
    """
    count = shape[0] * shape[1]
    wanted = (count * bits + 7) // 8
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (wanted,):
        raise UpdateError(f"{name}: {packed.dtype} of {tuple(packed.shape)}, not torch.uint8 of ({wanted},)")
    digits = np.unpackbits(packed.numpy(), count=count * bits).reshape(count, bits).astype(np.int64)
    result: Integers = (digits << np.arange(bits - 1, -1, -1)).sum(axis=1).reshape(shape)
    return result


def pack_positions(positions: Integers, count: int) -> Tensor:
    """A set of positions below ``count`` as one bit each."""
    chosen = np.zeros(count, dtype=np.uint8)
    chosen[positions] = 1
    return torch.from_numpy(np.packbits(chosen))


def unpack_positions(packed: Tensor, count: int) -> Integers:
    """What :func:`pack_positions` packed, in rising order."""
    return np.flatnonzero(np.unpackbits(packed.numpy(), count=count)).astype(np.int64)
