"""NBD URIs, as the NBD project's doc/uri.md has them: where a far image is.

    nbd://host[:port]/export                     over TCP, port 10809 unless another is named
    nbd+unix:///export?socket=/path/of/socket    over a unix socket

The export's name and the socket's path are percent-encoded UTF-8. What asks for TLS is refused.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlsplit

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.nbd.protocol import NBD_MAX_STRING

NBD_PORT: Final = 10809
_HOST: Final = re.compile(r"[a-z0-9_.-]+|[0-9a-f:.]+(?:%[a-z0-9_.-]+)?")
_MAX_UNIX_PATH: Final = 107
_PLAIN: Final = ("nbd", "nbd+unix")
_ENCRYPTED: Final = ("nbds", "nbds+unix")


class Place(NamedTuple):
    """An export of a server: behind a unix socket, or at `host` and `port` where `socket_path` is empty."""

    export: str
    socket_path: str = ""
    host: str = ""
    port: int = 0

    @property
    def uri(self) -> str:
        """The one way to write this place down: two URIs of one place become the same."""
        name = quote(self.export, safe="")
        if self.socket_path:
            return f"nbd+unix:///{name}?socket={quote(self.socket_path)}"
        return f"nbd://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}/{name}"


def is_uri(image: str) -> bool:
    """Whether an image is named by an NBD URI, one that asks for TLS included, and not by a path."""
    scheme, found, _ = image.partition("://")
    return bool(found) and scheme.lower() in _PLAIN + _ENCRYPTED


def parse(uri: str) -> Place:
    """The place that `uri` names; raises `InvalidArgument` saying what of it cannot be used."""
    try:
        uri.encode()
        parts = urlsplit(uri)
        port = parts.port
    except ValueError as error:
        raise _refused(uri, str(error)) from error
    if port == 0:
        raise _refused(uri, "nobody listens at port 0")
    if parts.scheme in _ENCRYPTED:
        raise InvalidArgument(
            f"{uri} asks for TLS, which this version does not speak to other servers",
            next_step="serve the image on a unix socket, or reach its server through a tunnel",
        )
    if parts.scheme not in _PLAIN:
        raise _refused(uri, "it begins with neither nbd:// nor nbd+unix://")
    if parts.fragment or parts.username is not None:
        raise _refused(uri, "user names and fragments mean nothing here")
    export = _text(uri, parts.path.removeprefix("/"))
    if len(export.encode()) > NBD_MAX_STRING:
        raise _refused(uri, f"the export's name is longer than {NBD_MAX_STRING} bytes")
    arguments = _arguments(uri, parts.query)
    if parts.scheme == "nbd":
        _refuse_arguments(uri, arguments)
        return Place(export, host=_host(uri, parts.hostname), port=NBD_PORT if port is None else port)
    if parts.netloc:
        raise _refused(uri, f"with a socket there is no host {parts.netloc}: three slashes come first")
    return Place(export, socket_path=_socket_path(uri, arguments))


def _host(uri: str, host: str | None) -> str:
    if host and not _HOST.fullmatch(host):
        raise _refused(uri, f"{host!r} is no name or address of a host")
    return host or "localhost"


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
    if len(path.encode()) > _MAX_UNIX_PATH:
        raise _refused(uri, f"the socket's path is longer than {_MAX_UNIX_PATH} bytes")
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
        next_step="write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH",
    )
