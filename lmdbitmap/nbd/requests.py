"""Which requests of the transmission phase are allowed, and the error that answers the others. Pure.

Where the specification leaves a choice, QEMU's is taken: a READ, WRITE, TRIM, CACHE or WRITE_ZEROES of no
bytes succeeds and does nothing; a BLOCK_STATUS of no bytes is EINVAL; FUA is accepted on every command.
"""

from __future__ import annotations

from typing import Final

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.handshake import MAX_PAYLOAD

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


def refusal(
    request: nbd.Request,
    *,
    size: int,
    read_only: bool,
    in_chunks: bool,
    contexts: bool,
    extended: bool = False,
) -> int:
    """The NBD error that answers a request which must not be done on a disk of `size` bytes, or 0.

    Whether the client agreed on replies `in_chunks`, selected any `contexts`, and agreed on `extended` headers: behind
    those a WRITE may say that it has a payload, and nothing else may have one.
    """
    allowed_flags = _FLAGS_ALLOWED.get(request.type)
    if allowed_flags is None:
        return nbd.NBD_EINVAL
    if extended and request.type == nbd.NBD_CMD_WRITE:
        allowed_flags |= nbd.NBD_CMD_FLAG_PAYLOAD_LEN
    if request.flags & ~allowed_flags:
        return nbd.NBD_EINVAL
    if request.flags & nbd.NBD_CMD_FLAG_DF and not in_chunks:
        return nbd.NBD_EINVAL
    if request.type == nbd.NBD_CMD_BLOCK_STATUS and not (contexts and request.length):
        return nbd.NBD_EINVAL
    if read_only and request.type in _CHANGING:
        return nbd.NBD_EPERM
    if request.length > MAX_PAYLOAD and request.type in _WITH_PAYLOAD:
        return nbd.NBD_EINVAL
    if request.type == nbd.NBD_CMD_FLUSH:
        return 0
    if request.offset + request.length > size:
        return nbd.NBD_ENOSPC if request.type in _FILLING else nbd.NBD_EINVAL
    return 0


def error_of(failure: Exception) -> int:
    """The NBD error that tells a client of a failure: never 0, `NBD_EIO` where the protocol has no word."""
    if isinstance(failure, OSError):
        return nbd.nbd_error(failure.errno)
    return nbd.NBD_EINVAL if isinstance(failure, InvalidArgument) else nbd.NBD_EIO
