"""Server process of the engine, with the access list enforced at every connection and registration.

The engine checks that a certificate was signed by the federation's authority, but knows no revoked ones. (Its
``disable_client`` bans a name: once the name is back with a new certificate, the old one is accepted too.)
Here a connection whose certificate is not on the list is closed after the TLS handshake, before the engine
reads a byte of it, and an open connection within a second of its certificate's removal from the list. Whoever
registers must present a listed certificate for that very name.

The handshake takes place in the connection's own thread and within a time limit, so that a stranger who
connects and says nothing does not keep others out.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import runpy
import socket
import ssl
import sys
import threading
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.drivers import tcp_driver
from nvflare.private.fed.utils import identity_utils

from ...core.errors import DeploymentError
from .access_list import FILE, AccessList, fingerprint

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a TLS handshake may take."""

ENGINE = "nvflare.private.fed.app.server.server_train"

log = logging.getLogger("fedcustom.access")


class CheckedServer(tcp_driver.TcpStreamServer):  # type: ignore[misc]
    """The engine's TCP server; connections with TLS are checked against ``access_list``."""

    access_list: AccessList

    def __init__(self, driver: Any, connector: Any) -> None:
        self._open: dict[ssl.SSLSocket, bytes] = {}
        self._open_lock = threading.Lock()
        super().__init__(driver, connector)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; its handshake follows in its own thread."""
        if self.ssl_context is None:
            return super().get_request()  # type: ignore[no-any-return]
        return socket.socket.accept(self.socket)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        """Handle one connection until it ends."""
        if self.ssl_context is None:
            super().process_request_thread(request, client_address)
            return
        try:
            request.settimeout(HANDSHAKE_TIMEOUT)
            secure = self.ssl_context.wrap_socket(request, server_side=True)
            secure.settimeout(None)
        except OSError as error:
            log.warning("no TLS connection with %s: %s", client_address, error)
            self.shutdown_request(request)
            return
        certificate = secure.getpeercert(binary_form=True) or b""
        with self._open_lock:
            # Listed before it is checked: a removal in between is then seen by one of the two.
            self._open[secure] = certificate
        try:
            if self.access_list.accepts(certificate):
                super().process_request_thread(secure, client_address)
            else:
                self._refuse(secure, certificate)
        finally:
            with self._open_lock:
                self._open.pop(secure, None)
            self.shutdown_request(secure)

    def service_actions(self) -> None:
        """Close the connections whose certificates are no longer listed; called twice a second."""
        with self._open_lock:
            connections = list(self._open.items())
        for connection, certificate in connections:
            if not self.access_list.accepts(certificate):
                self._refuse(connection, certificate)

    def _refuse(self, connection: ssl.SSLSocket, certificate: bytes) -> None:
        reason = self.access_list.problem or "not on the access list"
        log.warning("connection closed: certificate %s: %s", fingerprint(certificate), reason)
        with contextlib.suppress(OSError):
            # The socket below TLS: ``SSLSocket.shutdown`` would let a frame in transit go out in clear text.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)


def enforce(access_list: AccessList) -> None:
    """Make the engine, in this process, check every connection and every registration.

    Raises:
        DeploymentError: the list accepts nobody, or the engine's parts are not those that this was written
            for: better no server than an unchecked one.
    """
    if not access_list.names():
        raise DeploymentError(access_list.problem or f"{access_list.file}: accepts nobody")
    verifier = identity_utils.IdentityVerifier
    verify = verifier.verify_common_name
    if not {"asserted_cn", "asserter_cert"} <= inspect.signature(verify).parameters.keys():
        raise DeploymentError(
            "this version of nvflare verifies identities in another way; use the pinned one"
        )

    def verify_listed(self: Any, **arguments: Any) -> bool:
        from cryptography.hazmat.primitives.serialization import Encoding

        certificate = arguments["asserter_cert"].public_bytes(Encoding.DER)
        if not access_list.accepts(certificate, str(arguments["asserted_cn"])):
            log.warning("registration refused: certificate %s is not listed", fingerprint(certificate))
            raise identity_utils.InvalidAsserterCert("the certificate is not on the access list")
        return bool(verify(self, **arguments))

    verifier.verify_common_name = verify_listed
    CheckedServer.access_list = access_list
    tcp_driver.TcpStreamServer = CheckedServer


def main() -> None:
    """Run the engine's server for the kit that the command line names (``-m``), with its access list."""
    kit = Path(sys.argv[sys.argv.index("-m") + 1])
    enforce(AccessList(kit / FILE))
    runpy.run_module(ENGINE, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
