"""TLS for NBD, with X.509 certificates from a folder laid out as for QEMU and libnbd.

    FOLDER/ca-cert.pem       the authority that must have signed the other side's certificate
    FOLDER/server-cert.pem   this server's certificate and its chain; for a client, client-cert.pem
    FOLDER/server-key.pem    its secret key; for a client, client-key.pem
    FOLDER/ca-crl.pem        revoked certificates; may be missing

Our server refuses a client without a certificate of that authority before the client learns which disks there are. Our
client shows a certificate if it has one, and insists on the server's.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import ssl
import stat
from collections.abc import Iterator
from typing import Final

from lmdbitmap.errors import InvalidArgument, os_errors_at

_log = logging.getLogger(__name__)

AUTHORITY: Final = "ca-cert.pem"
CERTIFICATE: Final = "server-cert.pem"
KEY: Final = "server-key.pem"
CLIENT_CERTIFICATE: Final = "client-cert.pem"
CLIENT_KEY: Final = "client-key.pem"
REVOKED: Final = "ca-crl.pem"


def server_context(folder: str) -> ssl.SSLContext:
    """Return a server's context: TLS 1.2 or newer, for clients whose certificates it can verify.

    Raises `NotFound` or `StorageError` for files that cannot be read, `InvalidArgument` for bad contents.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    # A client that leaves without a word gets no alert. OpenSSL 1.1.1 has no such option, and sends none.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    _show(context, folder, CERTIFICATE, KEY)
    warn_of_open_key(os.path.join(folder, KEY))
    _believe(context, folder)
    return context


def client_context(folder: str = "", *, verifies: bool = True) -> ssl.SSLContext:
    """Return a client's context; without a `folder` it trusts the system's authorities. Raises as `server_context`."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    if not verifies:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if not folder:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        return context
    if any(os.path.lexists(os.path.join(folder, name)) for name in (CLIENT_CERTIFICATE, CLIENT_KEY)):
        _show(context, folder, CLIENT_CERTIFICATE, CLIENT_KEY)
    if verifies:
        _believe(context, folder)
    return context


def _context(protocol: int) -> ssl.SSLContext:
    """Return a context without renegotiation, for which a sending thread would have to receive."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def _show(context: ssl.SSLContext, folder: str, certificate: str, key: str) -> None:
    """Load the certificate that identifies us to the other side."""
    certificate_path, key_path = _readable(folder, certificate), _readable(folder, key)
    with _said_plainly(folder, certificate, key):
        context.load_cert_chain(certificate_path, key_path, password=functools.partial(_no_password, key))


def _believe(context: ssl.SSLContext, folder: str) -> None:
    """Verify the other side by the folder's authority, and by no other."""
    _load(context, folder, AUTHORITY)
    if os.path.lexists(os.path.join(folder, REVOKED)):  # a link to nothing is an error, and no empty list
        _load(context, folder, REVOKED)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load(context: ssl.SSLContext, folder: str, name: str) -> None:
    path = _readable(folder, name)
    with _said_plainly(folder, name):
        context.load_verify_locations(path)


def _readable(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    with os_errors_at(path), open(path, "rb"):
        return path


@contextlib.contextmanager
def _said_plainly(folder: str, *names: str) -> Iterator[None]:
    try:
        yield
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument(
            f"{' and '.join(names)} in {folder} cannot be used ({error})",
            next_step="put them there in PEM, a key without a password",
        ) from error


def _no_password(key: str) -> str:
    raise ValueError(f"{key} is encrypted")


def warn_of_open_key(path: str) -> None:
    if os.path.exists(path) and stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        _log.warning("other users may read %s; run: chmod 600 %s", path, path)
