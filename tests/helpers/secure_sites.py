"""A federation in this process: a server and its sites, with certificates, and no engine between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors.torch
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedcustom.data.build import build_data, with_builtin_columns
from fedcustom.deployment.local import local_site_file, write_parts
from fedcustom.deployment.nvflare.messenger import Request, SiteReply
from fedcustom.deployment.parties import gather
from fedcustom.deployment.settings import FederationSettings
from fedcustom.deployment.site.resident import Resident
from fedcustom.deployment.site.secure_sums import kit_identity
from fedcustom.deployment.site.settings import load_site
from fedcustom.federated.resolve import resolved
from fedcustom.federated.run import run_recipe
from fedcustom.federated.run_directory import Checkpoints
from fedcustom.recipe.recipe import load_recipe
from fedcustom.transport.channel import Packed


class Authority:
    """Signs certificates."""

    def __init__(self, name: str = "authority") -> None:
        self.key, self.name = ec.generate_private_key(ec.SECP256R1()), name
        self.certificate = self.signed(name, self.key.public_key())

    def signed(self, name: str, key: Any, days: tuple[int, int] = (-1, 30)) -> x509.Certificate:
        begin, end = (datetime.now(UTC) + timedelta(days=each) for each in days)
        subject, issuer = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, self.name)
        )
        builder = x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number(), begin, end)
        return builder.sign(self.key, SHA256())

    def kit(self, folder: Path, name: str, *, kind: str = "ec", **more: Any) -> Path:
        """A kit's key and certificate, as the engine's have them."""
        startup = folder / "startup"
        startup.mkdir(parents=True, exist_ok=True)
        key: Any = ec.generate_private_key(ec.SECP256R1())
        if kind == "rsa":
            key = rsa.generate_private_key(65537, 2048)
        certificate = self.signed(name, key.public_key(), **more)
        (startup / "client.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        (startup / "client.key").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        (startup / "rootCA.pem").write_bytes(self.certificate.public_bytes(Encoding.PEM))
        entry = {"identity": "localhost", "name": "fedcustom"}
        (startup / "fed_client.json").write_text(json.dumps({"servers": [entry]}))
        return folder


Trick = Callable[[str, dict[str, Any]], dict[str, Any] | None]
"""Given a site and a request, an answer in its place; or None, for the site's own."""


@dataclass
class SecureSites:
    """Sites with a recipe's clients' data, and a messenger that asks them one after the other."""

    folder: Path
    content: Mapping[str, Any]
    policy: Mapping[str, Any] = field(default_factory=dict)
    trick: Trick | None = None
    notes: list[str] = field(default_factory=list)
    seen: list[tuple[str, dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    sites: dict[str, Resident] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recipe = resolved(load_recipe(self.content))
        self.authority = Authority()
        settings, clients = with_builtin_columns(self.recipe.data, self.recipe.clients)
        data = build_data(settings, clients, self.recipe.seed, self.recipe.public)
        self.names = list(data.clients)
        self.authority.kit(self.folder / "server", "localhost")
        for number, (name, client) in enumerate(data.clients.items()):
            kit = self.authority.kit(self.folder / name, name, kind="ec" if number else "rsa")
            parts = {"train": client.train, "development": client.development, "test": client.test}
            own = write_parts(kit / "data", parts, data)
            (kit / "data" / "site.toml").write_text(local_site_file(own, data, self.recipe, 1))
            self.start(name)
        self.channel = SimpleNamespace(sites=frozenset(self.names))
        self.note = self.notes.append

    def start(self, name: str, **policy: Any) -> None:
        """A site's process starts, or starts anew."""
        kit = self.folder / name
        settings = load_site(kit / "data" / "site.toml")
        changed = settings.policy.model_copy(update={**self.policy, **policy})
        settings = settings.model_copy(update={"policy": changed})
        identify = kit_identity(kit, changed.peers)
        self.sites[name] = Resident(name, settings, kit / "data", kit / "fedcustom", identify=identify)

    def seen_by(self, name: str) -> list[str]:
        """The errors of a site."""
        return [str(said["error"]) for site, _, said in self.seen if site == name and "error" in said]

    def unmasked(self, name: str) -> dict[str, Any]:
        """What a site has written down of the sums that it unmasked, of one run."""
        (file,) = (self.folder / name / "fedcustom" / "secure_sums").glob("*.json")
        return dict(json.loads(file.read_text()))

    def include_returned(self, names: Any) -> None:
        """All are there."""

    def request(
        self, requests: Mapping[str, Request], min_replies: int, timeout: float | None = None
    ) -> Iterator[tuple[str, SiteReply]]:
        """What the engine does: JSON and files."""
        for name, request in requests.items():
            message = json.loads(json.dumps(request.head))
            if request.tensors:
                body = self.folder / "request.safetensors"
                safetensors.torch.save_file({n: t.contiguous() for n, t in request.tensors.items()}, body)
                message["body"] = str(body)
            said = self.trick(name, message) if self.trick is not None else None
            said = self.sites[name].handle(message) if said is None else said
            self.seen.append((name, message, said))
            if failure := said.get("error") or said.get("refused"):
                yield name, SiteReply(failure=str(failure))
                continue
            values = json.loads(json.dumps(said["values"]))
            tensors = safetensors.torch.load_file(said["body"]) if "body" in said else {}
            packed = Packed(tensors, said.get("layout"))
            yield name, SiteReply(values, packed, packed.length(values))

    def run(self, out: Path, **more: Any) -> dict[str, Any]:
        """A whole deployed run."""
        settings, messenger = FederationSettings(server="localhost", sites=self.names), self

        def parties(recipe: Any, directory: Path, private: Path, callback: Any, transforms: Any) -> Any:
            fake: Any = messenger
            return gather(recipe, settings, messenger.folder, fake, directory)

        return run_recipe(self.recipe, out, gather=parties, **more)


def last(out: Path) -> dict[str, torch.Tensor]:
    checkpoints = Checkpoints(out / "checkpoints")
    return dict(checkpoints.load(max(checkpoints.rounds())).state.tensors)


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def failing(
    site: str, stage: str, number: int = 1, exchange: int | None = None
) -> Callable[[str, dict[str, Any]], Any]:
    """A site that is lost in one stage of a round: in that of each sum, or of the sum of one exchange."""

    def trick(name: str, message: dict[str, Any]) -> dict[str, Any] | None:
        values = message.get("values", {})
        if exchange is not None and (message["kind"] != "secure" or values.get("exchange", 1) != exchange):
            return None
        kind = values.get("stage") if message["kind"] == "secure" else message["kind"]
        found = values.get("round") if message["kind"] == "secure" else message.get("round")
        return {"error": "lost"} if (name, kind, found) == (site, stage, number) else None

    return trick
