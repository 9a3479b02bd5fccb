"""NBD URIs, as in the NBD project's doc/uri.md: where a far image is.

    nbd://host[:port]/export                     over TCP, port 10809 unless another is named
    nbd+unix:///export?socket=/path/of/socket    over a unix socket
    nbds://…, nbds+unix://…                      the same over TLS, and never without it

The export's name and all parameters are percent-encoded UTF-8. The TLS parameters are those of libnbd:

    tls-certificates=FOLDER    ca-cert.pem, the authority to trust; client-cert.pem and client-key.pem, if we have
                               to identify ourselves. Without a folder the system's authorities are trusted
    tls-hostname=NAME          the name in the server's certificate, if that is not the host's name
    tls-verify-peer=false      trust any server; the default is `true`
    tls-type=x509              the only kind there is here
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlsplit

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.nbd.protocol import NBD_MAX_STRING

NBD_PORT: Final = 10809
_HOST: Final = re.compile(r"[a-z0-9_.-]+|[0-9a-f.]*:[0-9a-f:.]*(?:%[A-Za-z0-9_.-]+)?")
_ZONE: Final = "%25"
"""Comes before the network interface of a link-local address (RFC 6874); most programs also take a bare `%`."""
_IGNORED: Final = frozenset("\t\r\n")
"""Characters that `urlsplit` leaves out, so that the URI would name another place."""
MAX_UNIX_PATH: Final = 107
"""Most bytes of a path in a socket's address."""
_PLAIN: Final = ("nbd", "nbd+unix")
_ENCRYPTED: Final = ("nbds", "nbds+unix")
_TRUTHS: Final = {"true": True, "1": True, "false": False, "0": False}


class Credentials(NamedTuple):
    """How TLS is spoken to a server. An empty value was not given."""

    folder: str = ""
    hostname: str = ""
    verifies: bool = True

    @property
    def arguments(self) -> list[str]:
        """The parameters of a URI, always in the same order."""
        said = [
            ("tls-certificates", self.folder),
            ("tls-hostname", self.hostname),
            ("tls-verify-peer", "" if self.verifies else "false"),
        ]
        return [f"{name}={quote(value)}" for name, value in said if value]


class NbdAddress(NamedTuple):
    """An export of a server: behind a unix socket, or at `host` and `port` if `socket_path` is empty."""

    export: str
    socket_path: str = ""
    host: str = ""
    port: int = 0
    tls: Credentials | None = None
    """None without TLS."""

    @property
    def uri(self) -> str:
        """The canonical URI: two URIs of one place become the same."""
        name = quote(self.export, safe="")
        scheme = "nbd" if self.tls is None else "nbds"
        arguments = [] if self.tls is None else self.tls.arguments
        if self.socket_path:
            path = quote(self.socket_path, errors="surrogateescape")
            words = "&".join([f"socket={path}", *arguments])
            return f"{scheme}+unix:///{name}?{words}"
        host = f"[{self.host.replace('%', _ZONE)}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}/{name}" + "?" * bool(arguments) + "&".join(arguments)

    @property
    def bare(self) -> NbdAddress:
        """The place alone, without TLS."""
        return self._replace(tls=None)

    @property
    def certified_name(self) -> str:
        """The name that the server's certificate must have. A unix socket is on this very host.

        An address is certified without our name for the network interface.
        """
        name = (self.tls.hostname if self.tls else "") or self.host or "localhost"
        return name.partition("%")[0]


def is_uri(image: str) -> bool:
    """Whether an image is named by an NBD URI, with or without TLS, and not by a path."""
    scheme, found, _ = image.partition("://")
    return bool(found) and scheme.lower() in _PLAIN + _ENCRYPTED


def parse(uri: str) -> NbdAddress:
    """Return the place that `uri` names. Raise `InvalidArgument` if it cannot be used, and say why."""
    try:
        uri.encode()
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        raise _refused(uri, str(error)) from error
    if not _IGNORED.isdisjoint(uri):
        raise _refused(uri, "it has a tab or a line break in it")
    if port == 0:
        raise _refused(uri, "port 0 cannot be connected to")
    if parts.scheme not in _PLAIN + _ENCRYPTED:
        raise _refused(uri, "it begins with neither nbd:// nor nbd+unix://, nor nbds for TLS")
    if parts.fragment or parts.username is not None:
        raise _refused(uri, "user names and fragments mean nothing here")
    export = _text(uri, parts.path.removeprefix("/"))
    if len(export.encode()) > NBD_MAX_STRING:
        raise _refused(uri, f"the export's name is longer than {NBD_MAX_STRING} bytes")
    arguments = _arguments(uri, parts.query)
    tls = _credentials(uri, arguments) if parts.scheme in _ENCRYPTED else None
    if not parts.scheme.endswith("+unix"):
        _refuse_arguments(uri, arguments)
        port = NBD_PORT if port is None else port
        return NbdAddress(export, host=_host(uri, parts.hostname) or "localhost", port=port, tls=tls)
    if parts.netloc:
        raise _refused(uri, f"with a socket there is no host {parts.netloc}: three slashes come first")
    return NbdAddress(export, socket_path=_socket_path(uri, arguments), tls=tls)


def _host(uri: str, host: str | None) -> str:
    host = (host or "").replace(_ZONE, "%", 1)
    if host and not (_HOST.fullmatch(host) and _has_good_labels(host)):
        raise _refused(uri, f"{host!r} is no name or address of a host")
    return host


def _has_good_labels(host: str) -> bool:
    """Check that no label is empty or too long: the resolver would fail in words of its own."""
    try:
        host.encode("idna")
    except UnicodeError:
        return False
    return True


def _credentials(uri: str, arguments: dict[str, str]) -> Credentials:
    """Remove the TLS parameters from `arguments`, and return them."""
    for name, value in arguments.items():
        if name.startswith("tls-") and not value:
            raise _refused(uri, f"{name} is empty")
    if arguments.pop("tls-type", "x509") != "x509":
        raise _refused(uri, "TLS is spoken with certificates alone (tls-type=x509)")
    verifies = _TRUTHS.get(arguments.pop("tls-verify-peer", "true"))
    if verifies is None:
        raise _refused(uri, "tls-verify-peer is either true or false")
    hostname = _host(uri, arguments.pop("tls-hostname", "").lower())
    return Credentials(arguments.pop("tls-certificates", ""), hostname, verifies)


def _arguments(uri: str, query: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    found = {_text(uri, name): _text(uri, value) for name, _, value in pairs}
    if len(found) < len(pairs):
        raise _refused(uri, "a parameter is given twice")
    return found


def _socket_path(uri: str, arguments: dict[str, str]) -> str:
    path = arguments.pop("socket", "")
    _refuse_arguments(uri, arguments)
    if not path:
        raise _refused(uri, "it does not say which socket (?socket=/path)")
    if len(path.encode()) > MAX_UNIX_PATH:
        raise _refused(uri, f"the socket's path is longer than {MAX_UNIX_PATH} bytes")
    return path


def _refuse_arguments(uri: str, arguments: dict[str, str]) -> None:
    if arguments:
        raise _refused(uri, f"it has parameters that mean nothing here: {', '.join(sorted(arguments))}")


def _text(uri: str, encoded: str) -> str:
    try:
        text = unquote_to_bytes(encoded).decode()
    except UnicodeError as error:
        raise _refused(uri, "what is percent-encoded there is not UTF-8") from error
    if "\0" in text:
        raise _refused(uri, "it has a NUL in it")
    return text


def _refused(uri: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"{uri!r} is no NBD URI that can be used: {why}",
        next_step="write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH, or nbds in place of nbd",
    )
