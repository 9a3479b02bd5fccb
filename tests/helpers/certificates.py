"""Certificates for tests, made with openssl: an authority, a server and a client."""

from __future__ import annotations

import atexit
import functools
import shutil
import ssl
import tempfile
from pathlib import Path

from tests.helpers.support import run


class Certificates:
    """Certificates of one authority, for a server and a client, in the layout that QEMU and libnbd share.

    They certify localhost. With a negative number of `days` they have expired.
    """

    def __init__(self, folder: Path, *, days: int = 9) -> None:
        self.folder = folder
        folder.mkdir()
        self._openssl(
            "req",
            "-x509",
            "-days",
            "9",
            "-subj",
            "/CN=authority",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",  # Python 3.13 believes no authority without
            "-keyout",
            "ca-key.pem",
            "-out",
            "ca-cert.pem",
        )
        for name in ("server", "client"):
            self._issue(name, days)

    def _issue(self, name: str, days: int) -> None:
        (self.folder / "extensions").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        self._openssl("req", "-subj", "/CN=localhost", "-keyout", f"{name}-key.pem", "-out", "request.pem")
        run(
            "openssl", "x509", "-req", "-in", "request.pem", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem",
            "-CAcreateserial", "-days", str(days), "-extfile", "extensions", "-out", f"{name}-cert.pem",
            cwd=self.folder,
        )  # fmt: skip

    def _openssl(self, *words: str) -> None:
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
        run("openssl", *words, *curve, "-nodes", cwd=self.folder)

    def without_client(self, folder: Path) -> Path:
        """A folder that has the authority's certificate alone."""
        folder.mkdir()
        (folder / "ca-cert.pem").write_bytes((self.folder / "ca-cert.pem").read_bytes())
        return folder

    def client_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.folder / "ca-cert.pem")
        context.load_cert_chain(self.folder / "client-cert.pem", self.folder / "client-key.pem")
        return context


@functools.cache
def shared_papers() -> Certificates:
    """For all tests of this process that leave them as they are: openssl takes its time."""
    folder = tempfile.mkdtemp(prefix="lmdbitmap-test-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Certificates(Path(folder, "papers"))
