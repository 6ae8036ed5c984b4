"""Noise: random numbers as a function of a key, a round and a name, so that none has to be stored."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..core.errors import RecipeError
from ..core.tensors import Tensors

BYTES = 32
"""Length of a key."""

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class NoiseKey:
    """A key of 256 bits. Its numbers are the key stream of AES-256 in counter mode under a sub-key for each
    round and name (HKDF-SHA256), so that they are the same when a run is resumed and independent of each
    other to whoever lacks the key. ``secret`` says whether nobody else can know it.

    Normal numbers are Box-Muller's, in float64; with 53 bits no one is above 8.6. Sums are rounded to float32
    when they are released: the guarantee is that of real numbers, as usual (Mironov 2012 shows what rounding
    can reveal of naive sums of few terms).
    """

    key: bytes = field(repr=False)
    secret: bool = True

    def __post_init__(self) -> None:
        if len(self.key) != BYTES:
            raise ValueError(f"a key has {BYTES} bytes, not {len(self.key)}")

    @classmethod
    def fresh(cls) -> NoiseKey:
        """A key of the operating system's."""
        return cls(secrets.token_bytes(BYTES))

    @classmethod
    def seeded(cls, seed: int) -> NoiseKey:
        """A key that everybody can make from the recipe's seed: for research, without a guarantee."""
        return cls(hashlib.sha256(f"fedcustom noise {seed}".encode()).digest(), secret=False)

    def of(self, client: str) -> NoiseKey:
        """The key of one client, independent of all others' to whoever lacks this one."""
        return NoiseKey(self._derived(f"fedcustom client/{client}"), self.secret)

    def uniform(self, round_number: int, name: str, count: int) -> Numbers:
        """Independent numbers in (0, 1), (count,)."""
        words = np.frombuffer(self._stream(round_number, name, 8 * count), dtype="<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, round_number: int, name: str, count: int) -> Numbers:
        """Independent standard normal numbers, (count,)."""
        half = (count + 1) // 2
        first, second = self.uniform(round_number, name, 2 * half).reshape(2, half)
        radius, angle = np.sqrt(-2 * np.log(first)), 2 * math.pi * second
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def normal_like(self, round_number: int, purpose: str, tensors: Mapping[str, Tensor]) -> Tensors:
        """Standard normal tensors of these names and shapes, in float64, each by its own name."""
        return {
            name: torch.from_numpy(
                self.normal(round_number, f"{purpose}/{name}", tensor.numel()).copy()
            ).reshape(tensor.shape)
            for name, tensor in tensors.items()
        }

    def _stream(self, round_number: int, name: str, length: int) -> bytes:
        sub_key = self._derived(f"fedcustom noise/{round_number}/{name}")
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        return Cipher(algorithms.AES(sub_key), modes.CTR(bytes(16))).encryptor().update(bytes(length))

    def _derived(self, purpose: str) -> bytes:
        """A key for one purpose (HKDF-SHA256)."""
        try:
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ModuleNotFoundError:
            raise RecipeError(
                "[privacy]: noise needs the package cryptography: pip install 'fedcustom[privacy]'"
            ) from None
        return HKDF(algorithm=SHA256(), length=BYTES, salt=None, info=purpose.encode()).derive(self.key)
