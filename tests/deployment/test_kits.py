"""Keys and certificates of a federation, without a run: who has which key, and whom the server accepts."""

from __future__ import annotations

import io
import json
import socket
import ssl
import threading
import time
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from fedcustom.core.errors import DeploymentError
from fedcustom.deployment.membership import Membership, check_certificates
from fedcustom.deployment.nvflare import authority, requests
from fedcustom.deployment.nvflare.access_list import AccessList, fingerprint
from fedcustom.deployment.nvflare.certificates import (
    Certificate,
    colons,
    read_certificate,
    restrict_permissions,
    same_digest,
)
from fedcustom.deployment.nvflare.job_channel import JobChannel
from fedcustom.deployment.nvflare.kits import provision
from fedcustom.deployment.nvflare.messenger import Messenger, Request, Timeouts
from fedcustom.deployment.settings import FederationSettings, load_federation, save_federation
from fedcustom.deployment.site.process import check_certificate
from helpers.keys import key_bodies, where_key_is

MEMBERS = ["north", "south", "west"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation with a site that holds its own key (north), one with a kit made here (south), and one that
    has no certificate yet (west).
    """
    base = tmp_path_factory.mktemp("keys")
    provision(base / "f", "localhost", 8123, ["south"])
    save_federation(base / "f", FederationSettings(server="localhost", port=8123, sites=MEMBERS))
    file, key = requests.make_request(base / "north", "north")
    authority.sign(base / "f", file, base / "north.signed.zip", fingerprint=colons(key))
    requests.install(base / "north", base / "north.signed.zip")
    return base


@pytest.fixture
def federation(made: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    import shutil

    return shutil.copytree(made, tmp_path / "copy", dirs_exist_ok=True)


def test_every_private_key_is_in_one_file(made: Path) -> None:
    places = {path for body in key_bodies(made) for path in where_key_is(body, made)}
    assert places == {
        made / "north/startup/client.key", made / "f/sites/south/startup/client.key",
        made / "f/server/startup/server.key", made / "f/admin/startup/client.key",
    }  # fmt: skip
    assert len(key_bodies(made)) == len(places)
    state = json.loads((made / "f" / "authority" / "cert.json").read_text())
    assert set(state) == {"root_cert", "root_pri_key"}
    holders = [p for p in made.rglob("*") if p.is_file() and b"PRIVATE KEY" in p.read_bytes()]
    assert set(holders) == places | {made / "f/authority/cert.json"}
    for path in made.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            assert not any(b"PRIVATE" in archive.read(name) for name in archive.namelist())


def test_only_the_owner_reads_a_kit(made: Path) -> None:
    for folder in ("f/server", "f/admin", "f/sites", "f/authority", "north"):
        for path in [made / folder, *(made / folder).rglob("*")]:
            expected = 0o700 if path.is_dir() or path.suffix == ".sh" else 0o600
            assert path.stat().st_mode & 0o777 == expected, path


def test_permissions_of_links_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data.csv").touch(mode=0o644)
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "link").symlink_to(tmp_path / "data.csv")
    restrict_permissions(tmp_path / "kit")
    assert (tmp_path / "data.csv").stat().st_mode & 0o777 == 0o644


def changed_request(source: Path, to: Path, **changes: Any) -> Path:
    """A request whose description was falsified."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["request.json"] = json.dumps(json.loads(members["request.json"]) | changes).encode()
    with zipfile.ZipFile(to, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return to


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cert_type": "lead", "kind": "user"}, "asks for the role of 'lead'; only sites are signed"),
        ({"cert_type": "server", "kind": "server"}, "only sites are signed"),
        ({"cert_type": "lead"}, "only sites are signed"),
        ({"name": "east"}, "'east' is no member; members: north, south, west"),
        ({"name": "localhost"}, "is the server's or the administrator's name"),
        ({"name": "lead@fedcustom.org"}, "cannot be a site's name"),
        ({"name": "../west"}, "cannot be a site's name"),
        ({"name": None}, "'None' is no member"),
        ({"name": "south"}, "its key belongs to north"),
        ({"public_key_sha256": "0" * 64}, "cert approve: .*does not match"),
        ({"csr_sha256": "0" * 64}, "CSR hash does not match"),
    ],
)
def test_what_is_not_signed(federation: Path, changes: dict[str, Any], message: str) -> None:
    source = federation / "north/request.signed/north.request.zip"
    request = changed_request(source, federation / "x.zip", **changes)
    before = authority.register(federation / "f")
    with pytest.raises(DeploymentError, match=message):
        authority.sign(federation / "f", request, federation / "out.zip")
    assert authority.register(federation / "f") == before
    assert not (federation / "out.zip").exists()


def test_another_fingerprint_is_not_signed(federation: Path) -> None:
    request = federation / "north/request.signed/north.request.zip"
    with pytest.raises(DeploymentError, match="not the one given; nothing was signed"):
        authority.sign(
            federation / "f", request, federation / "out.zip", fingerprint="SHA256:" + "AB:" * 31 + "CD"
        )


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"{}", b"\x00" * 9_000_000, "bomb", "list", "missing"]
)
def test_files_that_are_no_requests(federation: Path, content: bytes | str) -> None:
    file = federation / "x.zip"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content != "missing":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("request.json", b" " * 50_000_000 if content == "bomb" else b"[1]")
            archive.writestr("signed.json", b" " * 50_000_000 if content == "bomb" else b"[1]")
        file.write_bytes(buffer.getvalue())
    with pytest.raises(DeploymentError, match=r"x\.zip: is no signing request"):
        authority.sign(federation / "f", file, federation / "out.zip")
    with pytest.raises(DeploymentError, match=r"x\.zip: is no signed file"):
        requests.install(federation / "north", file)


def test_what_is_not_installed(federation: Path) -> None:
    signed = federation / "north.signed.zip"
    with pytest.raises(DeploymentError, match="not the one given; nothing was installed"):
        requests.install(federation / "north", signed, fingerprint="00" * 32)
    with pytest.raises(DeploymentError, match=r"is for a key that .* does not hold"):
        requests.install(federation / "elsewhere", signed)
    with pytest.raises(DeploymentError, match=r"is the kit of south; .* is for north"):
        requests.install(federation / "f/sites/south", signed)
    with pytest.raises(DeploymentError, match="is the kit of north, not of west"):
        requests.make_request(federation / "north", "west")


def test_revocation_and_return_with_another_key(federation: Path) -> None:
    folder, access = federation / "f", AccessList(federation / "f/server/access.json")
    der = certificate_der(federation / "north/startup/client.crt")
    assert access.accepts(der)
    assert access.accepts(der, "north")
    assert not access.accepts(der, "south")
    assert [c.name for c in authority.revoke(folder, "north")] == ["north"]
    assert not access.accepts(der)
    assert access.names() == {"localhost", "lead@fedcustom.org", "south"}
    with pytest.raises(DeploymentError, match="no certificate that is accepted; sites that have one: south"):
        authority.revoke(folder, "north")
    with pytest.raises(DeploymentError, match="is no site"):
        authority.revoke(folder, "localhost")
    with pytest.raises(DeploymentError, match="its key was revoked"):
        authority.sign(folder, federation / "north/request.signed/north.request.zip", federation / "x.zip")
    file, key = requests.make_request(federation / "north", "north")
    certificate = authority.sign(folder, file, federation / "again.zip")
    assert certificate.key == key
    requests.install(federation / "north", federation / "again.zip")
    assert access.accepts(certificate_der(federation / "north/startup/client.crt"), "north")
    assert not access.accepts(der), "the old certificate stays revoked under the same name"


def test_renewal(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, file = federation / "f", federation / "north/startup/client.crt"
    assert authority.renew(folder) == [], "nothing is due"
    with pytest.raises(DeploymentError, match="is renewed while no run is under way"):
        authority.renew(folder, ["localhost"], running=True)
    with pytest.raises(DeploymentError, match="nobody: has no certificate; those who have: localhost, lead@"):
        authority.renew(folder, ["nobody"])
    old, old_key = read_certificate(file), (federation / "north/startup/client.key").read_bytes()
    (renewal,) = authority.renew(folder, ["north"], days=100)
    assert renewal.file == folder / "north.signed.zip"
    requests.install(federation / "north", renewal.file)
    new = read_certificate(file)
    assert (new.key, new.serial) == (old.key, renewal.certificate.serial)
    assert new.serial != old.serial
    assert abs((new.until - datetime.now(UTC)) - timedelta(days=100)) < timedelta(hours=1)
    assert (federation / "north/startup/client.key").read_bytes() == old_key
    access = AccessList(folder / "server/access.json")
    assert access.accepts(certificate_der(file), "north")
    server = folder / "server/startup/server.crt"
    before = read_certificate(server)
    ((renewed),) = authority.renew(folder, ["localhost"])
    assert read_certificate(server) == renewed.certificate
    assert renewed.certificate.key != before.key
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server, folder / "server/startup/server.key")  # they belong together


def test_a_new_member(federation: Path) -> None:
    file, _ = requests.make_request(federation / "east", "east")
    members = Membership(federation / "f", pytest.fail)
    assert members() == {"north", "south"}, "west has no certificate yet"
    authority.sign(federation / "f", file, federation / "east.zip", add=True)
    assert load_federation(federation / "f").sites == [*MEMBERS, "east"]
    assert members() == {"north", "south", "east"}


def test_who_is_a_member_at_this_moment(federation: Path) -> None:
    notes: list[str] = []
    members = Membership(federation / "f", notes.append)
    settings = load_federation(federation / "f")
    save_federation(federation / "f", settings.model_copy(update={"sites": ["north", "west"]}))
    assert members() == {"north"}
    (federation / "f/federation.toml").write_text("sites = [")
    assert members() == {"north"}
    assert members() == {"north"}
    assert len(notes) == 1
    assert "federation.toml" in notes[0]
    (federation / "f/server/access.json").unlink()
    assert members() == frozenset()
    assert "nobody is let in" in notes[1]


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", "7", '{"north": "text"}', '{"north": []}', "[" * 99_999]
)
def test_a_damaged_access_list_accepts_nobody(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "access.json"
    file.write_text(json.dumps({"north": [fingerprint(b"certificate")]}))
    access = AccessList(file)
    assert access.accepts(b"certificate", "north")
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert not access.accepts(b"certificate")
    assert access.names() == frozenset()


def certificate_der(file: Path) -> bytes:
    return x509.load_pem_x509_certificate(file.read_bytes()).public_bytes(serialization.Encoding.DER)


def expiring(folder: Path, file: Path, days: float) -> None:
    """Replace a certificate by one of the same key that ends in so many days."""
    state = json.loads((folder / "authority" / "cert.json").read_text())
    signer: Any = serialization.load_pem_private_key(state["root_pri_key"].encode(), None)
    old, now = x509.load_pem_x509_certificate(file.read_bytes()), datetime.now(UTC)
    builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=90)).not_valid_after(now + timedelta(days=days))
    new = builder.sign(signer, hashes.SHA256())
    file.write_bytes(new.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize(("days", "warned"), [(31.0, False), (29.5, True), (0.5, True)])
def test_warnings_before_a_certificate_expires(federation: Path, days: float, warned: bool) -> None:
    notes: list[str] = []
    for file in ("north/startup/client.crt", "f/server/startup/server.crt", "f/admin/startup/client.crt"):
        expiring(federation / "f", federation / file, days)
    check_certificates(federation / "f", notes.append)
    check_certificate(federation / "north", notes.append)
    assert len(notes) == (3 if warned else 0)
    assert all(f"in {int(days)} days" in note and "renew" in note for note in notes)


@pytest.mark.parametrize("file", ["f/server/startup/server.crt", "f/admin/startup/client.crt"])
def test_nobody_starts_with_an_expired_certificate(federation: Path, file: str) -> None:
    expiring(federation / "f", federation / file, -1)
    with pytest.raises(DeploymentError, match=r"expired on .*; renew it: fedcustom deploy renew"):
        check_certificates(federation / "f", pytest.fail)
    expiring(federation / "f", federation / "north/startup/client.crt", -1)
    with pytest.raises(DeploymentError, match="its certificate expired on"):
        check_certificate(federation / "north", pytest.fail)


def test_a_members_certificate_that_is_due_is_warned_of_and_renewed(federation: Path) -> None:
    folder, notes = federation / "f", list[str]()
    file = folder / "authority/certificates.json"
    content = json.loads(file.read_text())
    for entry in content["certificates"]:
        if entry["name"] == "north":
            entry["until"] = (datetime.now(UTC) + timedelta(days=9.5)).isoformat()
    file.write_text(json.dumps(content))
    check_certificates(folder, notes.append)
    assert [note.split(";")[0].split(" expires")[0] for note in notes] == ["the certificate of north"]
    assert [renewal.certificate.name for renewal in authority.renew(folder)] == ["north"]


def test_states_of_a_certificate() -> None:
    until = datetime(2030, 5, 31, tzinfo=UTC)
    certificate = Certificate("a", "1", "2", "3", until)
    assert certificate.state(until - timedelta(days=31)) == "valid until 2030-05-31"
    assert certificate.state(until - timedelta(days=30)) == "expires on 2030-05-31, in 30 days"
    assert certificate.state(until) == "expired on 2030-05-31"


def test_fingerprints_as_people_type_them() -> None:
    digest = "ab" * 32
    for typed in (digest, digest.upper(), colons(digest), colons(digest).lower(), f" sha256:{digest} "):
        assert same_digest(typed, digest)
    for typed in ("", digest[:-2], digest + "00", "SHA256:"):
        assert not same_digest(typed, digest)


# --- the server's check of connections ---


@pytest.fixture
def checked_server(federation: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The engine's TCP server with the access list, without the rest of the engine; gives its port."""
    from nvflare.fuel.f3.drivers import tcp_driver
    from nvflare.private.fed.utils import identity_utils

    from fedcustom.deployment.nvflare.server_train import enforce

    verifier = identity_utils.IdentityVerifier
    monkeypatch.setattr(tcp_driver, "TcpStreamServer", tcp_driver.TcpStreamServer)
    monkeypatch.setattr(verifier, "verify_common_name", verifier.verify_common_name)
    enforce(AccessList(federation / "f/server/access.json"))
    startup = federation / "f/server/startup"
    params = {
        "scheme": "stcp", "host": "127.0.0.1", "port": 0, "secure": True,
        "ca_cert": str(startup / "rootCA.pem"),
        "server_cert": str(startup / "server.crt"), "server_key": str(startup / "server.key"),
    }  # fmt: skip
    driver = SimpleNamespace(add_connection=lambda _: None, close_connection=lambda _: None)
    server = tcp_driver.TcpStreamServer(driver, SimpleNamespace(params=params))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield int(server.server_address[1])
    server.shutdown()
    server.socket.close()


def connect(port: int, federation: Path, startup: Path) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=str(federation / "f/server/startup/rootCA.pem"))
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    plain = socket.create_connection(("127.0.0.1", port), timeout=20)
    return context.wrap_socket(plain, server_hostname="localhost")


def is_open(connection: ssl.SSLSocket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return bool(connection.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


def test_connections_are_closed_when_their_certificate_is_revoked(
    federation: Path, checked_server: int
) -> None:
    silent = [socket.create_connection(("127.0.0.1", checked_server)) for _ in range(20)]  # keep nobody out
    north = connect(checked_server, federation, federation / "north/startup")
    south = connect(checked_server, federation, federation / "f/sites/south/startup")
    assert is_open(north, 1.0)
    assert is_open(south, 0.1)
    authority.revoke(federation / "f", "north")
    assert not is_open(north, 10.0)
    assert is_open(south, 1.5)
    again = connect(checked_server, federation, federation / "north/startup")
    assert not is_open(again, 10.0)
    for connection in (north, south, again, *silent):
        connection.close()


def test_a_certificate_that_the_authority_signed_is_not_enough(federation: Path, checked_server: int) -> None:
    expiring(federation / "f", federation / "north/startup/client.crt", 90)  # valid, signed, not registered
    connection = connect(checked_server, federation, federation / "north/startup")
    assert not is_open(connection, 10.0)
    connection.close()


def test_registration_needs_a_listed_certificate_of_that_name(federation: Path, checked_server: int) -> None:
    from nvflare.lighter.utils import load_private_key_file, sign_content
    from nvflare.private.fed.utils.identity_utils import IdentityVerifier, InvalidAsserterCert

    verifier = IdentityVerifier(str(federation / "f/server/startup/rootCA.pem"))

    def register(name: str, startup: Path) -> bool:
        signature = sign_content(
            name + "nonce", load_private_key_file(startup / "client.key"), return_str=False
        )
        certificate = x509.load_pem_x509_certificate((startup / "client.crt").read_bytes())
        return verifier.verify_common_name(
            asserted_cn=name, nonce="nonce", asserter_cert=certificate, signature=signature
        )

    assert register("north", federation / "north/startup")
    with pytest.raises(InvalidAsserterCert):
        register("south", federation / "north/startup")
    authority.revoke(federation / "f", "north")
    with pytest.raises(InvalidAsserterCert, match="not on the access list"):
        register("north", federation / "north/startup")


def test_no_server_without_an_access_list(tmp_path: Path) -> None:
    from fedcustom.deployment.nvflare.server_train import enforce

    with pytest.raises(DeploymentError, match="nobody is let in"):
        enforce(AccessList(tmp_path / "access.json"))
    (tmp_path / "access.json").write_text("{}")
    with pytest.raises(DeploymentError, match="accepts nobody"):
        enforce(AccessList(tmp_path / "access.json"))


# --- jobs ---


class QuietListener:
    """A listener that nobody connects to."""

    def accept(self) -> Any:
        from fedcustom.deployment.nvflare.bridge import BridgeError

        raise BridgeError("nobody")

    def close(self) -> None: ...


def test_only_members_are_put_into_a_job(tmp_path: Path) -> None:
    members, notes, submitted = {"north", "south"}, list[str](), list[list[str]]()
    channel = JobChannel(tmp_path, QuietListener(), notes.append, lambda: frozenset(members))  # type: ignore[arg-type]
    ends: list[dict[str, Any]] = []
    bridge: Any = SimpleNamespace(send=ends.append, close=lambda: None)

    def submit(sites: list[str]) -> str:
        submitted.append(sites)
        channel._events.put((bridge, {"kind": "ready", "sites": sites}))
        return "job"

    channel.session = SimpleNamespace(  # type: ignore[assignment]
        registrations=lambda: {site: f"token of {site}" for site in ("east", "north", "south")},
        submit=submit,
        close=lambda: None,
        abort=lambda job: None,
    )
    channel.start(["east", "north", "south"], time.monotonic() + 5)
    assert submitted == [["north", "south"]], "and nobody waits for east, which is connected but no member"
    assert channel.connected() == {"north", "south"}
    members.remove("south")
    assert channel.receive(0.01) is None
    assert (channel.sites, ends) == (frozenset(), [{"kind": "end"}])
    assert any("south: revoked or removed" in note for note in notes)
    channel.start(["north", "south"], time.monotonic() + 5)
    assert submitted[-1] == ["north"]


def test_a_revoked_site_is_not_waited_for(tmp_path: Path) -> None:
    channel: Any = SimpleNamespace(
        sites=frozenset({"north"}), job_number=1, connected=lambda: frozenset({"north"}),
        cancel=lambda number: None, members=lambda: frozenset({"north"}),
        receive=lambda timeout: None, send=lambda *_: 1,
    )  # fmt: skip
    messenger = Messenger(channel, tmp_path / "spool", Timeouts(2.0, 60.0, 2.0), 1000, print)
    request, start = Request({"kind": "work"}), time.monotonic()
    replies = messenger.request({"south": request, "north": request}, min_replies=2)
    site, reply = next(replies)
    assert (site, reply.failure) == ("south", "revoked, or removed from the federation")
    assert time.monotonic() - start < 1.5, "though too few have answered"
    assert next(replies)[1].failure == "no answer in time"


# --- commands ---


def test_commands(command: Any, federation: Path) -> None:
    folder = ("--federation", federation / "f")
    checked = command("deploy", "check", *folder)
    assert checked.code == 0
    lines = checked.out.splitlines()
    assert lines[0].startswith("authority: valid until ")
    assert [line.split(":")[0] for line in lines[1:]] == [
        "localhost",
        "lead@fedcustom.org",
        "south",
        "north",
        "west",
    ]
    assert lines[-1] == "west: no certificate; the site runs: fedcustom site request west"
    revoked = command("deploy", "revoke", "south", *folder)
    assert (revoked.code, revoked.out.split()[:2]) == (0, ["south:", "certificate"])
    assert "revoked on" in command("deploy", "check", *folder).out
    for arguments in (
        ("deploy", "revoke", "south", *folder),
        ("deploy", "renew", "nobody", *folder),
        ("deploy", "sign", federation / "none.zip", *folder),
        ("deploy", "check", "--federation", federation / "nowhere"),
        ("site", "request", "../x"),
        ("site", "install", federation / "north", federation / "none.zip"),
    ):
        refused = command(*arguments)
        assert refused.code == 2, arguments
        assert refused.error.startswith("error: ")
        assert len(refused.error.splitlines()) == 1 or len(refused.error) > 110
