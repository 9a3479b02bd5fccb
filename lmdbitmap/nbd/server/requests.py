"""Which requests of the transmission phase are allowed, and the errors that answer the others. Pure.

Where the specification leaves a choice, this follows QEMU: a READ, WRITE, TRIM, CACHE or WRITE_ZEROES of no bytes
succeeds and does nothing; a BLOCK_STATUS of no bytes is EINVAL; FUA is accepted on every command.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from lmdbitmap.errors import InvalidArgument, LmdbitmapError
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.handshake import MAX_PAYLOAD

_NAMES: Final = {
    nbd.NBD_CMD_READ: "READ",
    nbd.NBD_CMD_WRITE: "WRITE",
    nbd.NBD_CMD_FLUSH: "FLUSH",
    nbd.NBD_CMD_TRIM: "TRIM",
    nbd.NBD_CMD_CACHE: "CACHE",
    nbd.NBD_CMD_WRITE_ZEROES: "WRITE_ZEROES",
    nbd.NBD_CMD_BLOCK_STATUS: "BLOCK_STATUS",
}
_FLAGS_ALLOWED: Final = {
    nbd.NBD_CMD_READ: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_DF,
    nbd.NBD_CMD_WRITE: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_FLUSH: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_TRIM: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_CACHE: nbd.NBD_CMD_FLAG_FUA,
    nbd.NBD_CMD_WRITE_ZEROES: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_NO_HOLE | nbd.NBD_CMD_FLAG_FAST_ZERO,
    nbd.NBD_CMD_BLOCK_STATUS: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_REQ_ONE,
}
_CHANGING: Final = frozenset({nbd.NBD_CMD_WRITE, nbd.NBD_CMD_TRIM, nbd.NBD_CMD_WRITE_ZEROES})
_WITH_PAYLOAD: Final = frozenset({nbd.NBD_CMD_READ, nbd.NBD_CMD_WRITE})
_FILLING: Final = frozenset({nbd.NBD_CMD_WRITE, nbd.NBD_CMD_WRITE_ZEROES})

FAILURES: Final = (OSError, LmdbitmapError, MemoryError)
"""What costs its own request. Any other exception is a mistake of ours, and costs the connection."""


class Refusal(NamedTuple):
    """The NBD error that answers a request; for the log, what was expected and what was found."""

    error: int
    expected: str
    found: object


class Negotiated(NamedTuple):
    """Whether the client agreed on replies `in_chunks`, selected any `contexts`, and agreed on `extended` headers.

    With `extended` headers a WRITE may announce its payload; no other request may have one.
    """

    in_chunks: bool
    contexts: bool
    extended: bool = False


def named(request: nbd.Request) -> tuple[str, str]:
    """Return the command's name and its range, for the log."""
    return _NAMES.get(request.type, "an unknown command"), place(request.offset, request.length)


def place(offset: int, length: int) -> str:
    return f"{length} bytes at {offset}"


def refusal(request: nbd.Request, terms: Negotiated, size: int, *, read_only: bool) -> Refusal | None:
    """Return why a request must not be done on a disk of `size` bytes, or None if it may."""
    allowed_flags = _FLAGS_ALLOWED.get(request.type)
    if allowed_flags is None:
        return Refusal(nbd.NBD_EINVAL, "a command that is known", request.type)
    if terms.extended and request.type == nbd.NBD_CMD_WRITE:
        allowed_flags |= nbd.NBD_CMD_FLAG_PAYLOAD_LEN
    if request.flags & ~allowed_flags:
        return Refusal(nbd.NBD_EINVAL, f"no flags but {allowed_flags:#x}", f"{request.flags:#x}")
    if request.flags & nbd.NBD_CMD_FLAG_DF and not terms.in_chunks:
        return Refusal(nbd.NBD_EINVAL, "no flag DF without structured replies", f"{request.flags:#x}")
    if request.type == nbd.NBD_CMD_BLOCK_STATUS and not terms.contexts:
        return Refusal(nbd.NBD_EINVAL, "a metadata context that was selected", "none")
    if request.type == nbd.NBD_CMD_BLOCK_STATUS and not request.length:
        return Refusal(nbd.NBD_EINVAL, "a byte at least", "none")
    if read_only and request.type in _CHANGING:
        return Refusal(nbd.NBD_EPERM, "no change of a disk that is read-only", "one")
    if request.length > MAX_PAYLOAD and request.type in _WITH_PAYLOAD:
        return Refusal(nbd.NBD_EINVAL, f"at most {MAX_PAYLOAD} bytes", request.length)
    end = request.offset + request.length
    if request.type != nbd.NBD_CMD_FLUSH and end > size:
        error = nbd.NBD_ENOSPC if request.type in _FILLING else nbd.NBD_EINVAL
        return Refusal(error, f"an end at {size} at most", end)
    return None


def error_of(failure: Exception) -> int:
    """Return the NBD error for a failure: never 0, and `NBD_EIO` where the protocol has no error for it."""
    if isinstance(failure, OSError):
        return nbd.nbd_error(failure.errno)
    if isinstance(failure, MemoryError):
        return nbd.NBD_ENOMEM
    return nbd.NBD_EINVAL if isinstance(failure, InvalidArgument) else nbd.NBD_EIO
