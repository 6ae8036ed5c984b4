"""Messages of a secure sum, and their bytes: JSON in which bytes are base64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ...core.bounded_json import read_json
from ...core.errors import SecureSumError, WireError
from ...core.text import printable
from .integers import Numbers

M = TypeVar("M", bound="Message")

MOST_NAMES = 4096
"""Sites in one message."""

MAX_BYTES = 16 * 2**20
"""Length of a message."""

Name = Annotated[str, Field(min_length=1, max_length=100)]
Names = Annotated[tuple[Name, ...], Field(max_length=MOST_NAMES)]
Key = Annotated[bytes, Field(min_length=32, max_length=32)]
Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
Signature = Annotated[bytes, Field(max_length=1024)]
Credential = Annotated[bytes, Field(max_length=16384)]


@dataclass(frozen=True)
class Message:
    """Base class of messages."""

    __pydantic_config__: ClassVar[Any] = ConfigDict(
        strict=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64"
    )


@dataclass(frozen=True)
class KeyOffer(Message):
    """A site's keys of one round, signed; what it answers to ``keys``.

    Attributes:
        name: The site.
        sealing: Public X25519 key for which shares are sealed.
        masking: Public X25519 key that pairwise masks come from.
        commitment: SHA-256 of the seed of the site's own mask.
        credential: What the signature is checked by.
        signature: Of all that, with the round (:func:`~.protocol.offer_statement`).
    """

    name: Name
    sealing: Key
    masking: Key
    commitment: Digest
    credential: Credential
    signature: Signature


@dataclass(frozen=True)
class Roster(Message):
    """Everybody's keys, in the order of the sites; the request ``shares``."""

    offers: Annotated[tuple[KeyOffer, ...], Field(max_length=MOST_NAMES)]

    @property
    def names(self) -> tuple[str, ...]:
        """The sites."""
        return tuple(offer.name for offer in self.offers)


@dataclass(frozen=True)
class SealedShares(Message):
    """A site's shares, sealed one by one for the sites of the roster, in its order (for itself: none); what
    it answers to ``shares``.
    """

    sealed: Annotated[tuple[Annotated[bytes, Field(max_length=256)], ...], Field(max_length=MOST_NAMES)]


@dataclass(frozen=True)
class Delivery(Message):
    """What others have sealed for one site, with their names (the site itself among them, with nothing); part
    of the request ``work``. Their vectors are expected.
    """

    senders: Names
    sealed: Annotated[tuple[Annotated[bytes, Field(max_length=256)], ...], Field(max_length=MOST_NAMES)]


@dataclass(frozen=True)
class Receipt(Message):
    """What a site says beside its masked vector: the SHA-256 of the task that it received, and whose vector
    of which round it is (:func:`~.protocol.vector_digest`).
    """

    task: Digest
    vector: Digest


@dataclass(frozen=True)
class Survivors(Message):
    """The sites whose vectors arrived; the request ``agree``."""

    names: Names


@dataclass(frozen=True)
class Agreement(Message):
    """A site's signature on the survivors (:func:`~.protocol.survivor_statement`)."""

    signature: Signature


@dataclass(frozen=True)
class Proof(Message):
    """Signatures of some of the survivors on one list of them; the request ``unmask``."""

    names: Names
    signatures: Annotated[tuple[Signature, ...], Field(max_length=MOST_NAMES)]


@dataclass(frozen=True)
class Reveal(Message):
    """One share of each sender, in their order: of its own mask if it is a survivor, else of its key."""

    shares: Annotated[tuple[Key, ...], Field(max_length=MOST_NAMES)]


@dataclass(frozen=True)
class Masked:
    """A site's masked vector with its receipt; in a transport they are a tensor and a message."""

    receipt: Receipt
    numbers: Numbers


def write_message(message: Message) -> bytes:
    """The bytes of a message."""
    return _adapter(type(message)).dump_json(message)


def read_message(form: type[M], payload: bytes) -> M:
    """A message of another party.

    Raises:
        SecureSumError: it is no such message; names what is wrong and none of its content.
    """
    try:
        read_json(payload, MAX_BYTES)
        found: M = _adapter(form).validate_json(payload)
    except WireError as error:
        raise SecureSumError(f"{form.__name__} of a secure sum: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = printable(".".join(str(part) for part in first["loc"])[:60], lines=False)
        raise SecureSumError(f"{form.__name__} of a secure sum: {where}: {first['msg'].lower()}") from None
    return found


_ADAPTERS: dict[type[Message], TypeAdapter[Any]] = {}


def _adapter(form: type[Message]) -> TypeAdapter[Any]:
    """The check of a kind of message, made once."""
    if form not in _ADAPTERS:
        _ADAPTERS[form] = TypeAdapter(form)
    return _ADAPTERS[form]
