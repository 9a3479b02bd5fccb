"""TLS for NBD over TCP, with X.509 on both sides, from a folder laid out as QEMU and libnbd have it.

    FOLDER/ca-cert.pem       whose word is believed about clients
    FOLDER/server-cert.pem   who this server is, and those who vouch for it
    FOLDER/server-key.pem    its secret
    FOLDER/ca-crl.pem        clients who are believed no more; may be missing

A client without a certificate of that authority is refused before it learns which disks there are.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
from typing import Final

from lmdbitmap.errors import InvalidArgument, os_errors_at

_log = logging.getLogger(__name__)

AUTHORITY: Final = "ca-cert.pem"
CERTIFICATE: Final = "server-cert.pem"
KEY: Final = "server-key.pem"
REVOKED: Final = "ca-crl.pem"


def server_context(folder: str) -> ssl.SSLContext:
    """What a server needs to speak TLS 1.2 or newer to clients whose certificates it can verify.

    Raises `NotFound` or `StorageError` for files that cannot be read, `InvalidArgument` for what is in them.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key, authority, revoked = (
        os.path.join(folder, name) for name in (CERTIFICATE, KEY, AUTHORITY, REVOKED)
    )
    for path in (certificate, key, authority):
        with os_errors_at(path), open(path, "rb"):
            pass
    _warn_of_open_key(key)
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
        context.load_verify_locations(authority)
        if os.path.exists(revoked):
            context.load_verify_locations(revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument(
            f"the certificates in {folder} cannot be used ({error})",
            next_step=f"put {AUTHORITY}, {CERTIFICATE} and {KEY} there, in PEM, the key without a password",
        ) from error
    return context


def _no_password() -> str:
    raise ValueError(f"{KEY} is encrypted")


def _warn_of_open_key(path: str) -> None:
    if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        _log.warning("other users may read %s; run: chmod 600 %s", path, path)
