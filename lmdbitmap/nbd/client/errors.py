"""The errors that callers get when a far server refuses, goes away, or is silent."""

from __future__ import annotations

import errno
import os
from typing import Final

from lmdbitmap.errors import Busy
from lmdbitmap.interfaces import FarAway
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.link import AWAY, SILENT, Request

_KNOWN: Final = frozenset(
    (
        nbd.NBD_EPERM, nbd.NBD_EIO, nbd.NBD_ENOMEM, nbd.NBD_EINVAL, nbd.NBD_ENOSPC, nbd.NBD_EOVERFLOW,
        nbd.NBD_ENOTSUP,
    )
)  # fmt: skip


def refusal(error: int, name: str) -> OSError:
    """The server's refusal as an OSError. Unknown error numbers count as EINVAL, as the protocol demands."""
    number = error if error in _KNOWN else errno.EINVAL
    return OSError(number, f"its server answered: {os.strerror(number)}", name)


def failure(error: int, name: str, silence_s: float | None) -> OSError | Busy:
    """The exception for a request that failed with `error`, which is not 0."""
    if error == AWAY:
        return FarAway(errno.ETIMEDOUT, "its server went away and has not come back", name)
    if error == SILENT:
        return Busy(
            f"{name}: not a byte of an answer came within {silence_s:g} s",
            next_step="see what keeps it waiting, end it if need be, and try again",
        )
    return refusal(error, name)


def require_answer(request: Request) -> None:
    """Raise if the server only said that it is shutting down: it has then answered nothing."""
    if request.error == nbd.NBD_ESHUTDOWN:
        raise ConnectionAbortedError(errno.ECONNABORTED, "the NBD server is shutting down")


def words(why: object) -> object:
    """The reason, for the log."""
    return (why.strerror if isinstance(why, OSError) else None) or why
