"""The client's side of NBD option haggling: bytes in, bytes out, no socket and no clock.

    greeting -> EXTENDED_HEADERS, or STRUCTURED_REPLY -> SET_META_CONTEXT -> GO
    (old servers refuse the first, or all three; in the end they are asked by EXPORT_NAME)
    with TLS, before all but the greeting: STARTTLS, and both sides shake hands anew

`negotiation` is a generator: it yields bytes to send, a number of bytes to receive, or `BEGIN_TLS`, and returns what
the server has agreed to. Where TLS is wanted, only the server's greeting is accepted without it. Every number that a
server sends is checked before it is used or its bytes are awaited. At most `_MAX_REPLY_DATA` bytes are wanted at once,
and replies to one option are counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from enum import Enum
from typing import Final, NamedTuple, NoReturn, TypeAlias
from uuid import UUID

from lmdbitmap.errors import Busy, FormatError, InvalidArgument, LmdbitmapError, NotFound
from lmdbitmap.geometry import MAX_SIZE
from lmdbitmap.nbd import protocol as nbd

MAX_PAYLOAD: Final = 32 << 20
"""The longest READ or WRITE that we send, whatever the server takes. Servers that give no limit take this much."""
_MAX_BLOCK: Final = 1 << 16
_MAX_REPLY_DATA: Final = 64 << 10
_MAX_REPLIES: Final = 256
_OLDSTYLE_MAGIC: Final = 0x00420281861253
_CHANGEABLE_FLAGS: Final = (
    nbd.NBD_FLAG_ROTATIONAL | nbd.NBD_FLAG_SEND_DF | nbd.NBD_FLAG_CAN_MULTI_CONN | nbd.NBD_FLAG_SEND_CACHE
)
"""Transmission flags that we never rely on."""


class FarExport(NamedTuple):
    """The export a server agreed to: `flags` are its transmission flags, sizes are bytes."""

    size: int
    flags: int
    minimum: int = 1
    """Offsets and lengths of requests are multiples of it."""
    maximum: int = MAX_PAYLOAD
    """The longest READ and WRITE, a multiple of `minimum`."""
    structured: bool = False
    """Whether replies may come in chunks."""
    context_id: int | None = None
    """Id of the wanted context in BLOCK_STATUS replies; None if the server does not have the context."""
    description: str = ""
    """For people only, except in `is_of` and `disk`."""
    extended: bool = False
    """Whether headers are extended, with 64-bit lengths; such replies are structured too."""

    def has(self, flag: int) -> bool:
        return bool(self.flags & flag)

    def is_of(self, disk: UUID) -> bool:
        """Whether the description names that tracked disk, as our server does. A false one only gets itself refused."""
        return self.description.endswith(nbd.of_disk(disk))

    @property
    def disk(self) -> UUID | None:
        """The tracked disk that the description names; None if it names none."""
        with contextlib.suppress(ValueError):
            disk = UUID(self.description[-36:])
            return disk if self.is_of(disk) else None
        return None


def require_same(old: FarExport, new: FarExport) -> None:
    """Raise `FormatError` unless the new agreement holds everything that was relied on before."""
    missing = (old.flags ^ new.flags) & (old.flags | nbd.NBD_FLAG_READ_ONLY) & ~_CHANGEABLE_FLAGS
    same_sizes = (new.size, new.minimum) == (old.size, old.minimum) and new.maximum >= old.maximum
    is_another = None not in (old.disk, new.disk) and old.disk != new.disk
    if missing or not same_sizes or is_another or (old.context_id is not None and new.context_id is None):
        raise nonsense("export after a new connection", str(old), new)


class _Act(Enum):
    BEGIN_TLS = "begin TLS"


BEGIN_TLS: Final = _Act.BEGIN_TLS
"""Encrypt all that follows, in both directions. No byte that the server sent before may count as encrypted."""
Step: TypeAlias = "bytes | int | _Act"
Reply: TypeAlias = tuple[int, bytes]


def negotiation(
    name: str, *, tls: bool = False, context: str = nbd.NBD_META_BASE_ALLOCATION
) -> Generator[Step, bytes, FarExport]:
    """Haggle for the export called `name`. Yields bytes to send, a number of bytes to receive, or `BEGIN_TLS`.

    BLOCK_STATUS will report `context` if the server has it. Raises `FormatError` if the other side does not speak NBD,
    `NotFound` if it does not know the name, `InvalidArgument` if the export cannot be used, `Busy` while the server
    shuts down.
    """
    handshake_flags = yield from _greeting()
    if tls:
        yield from _begin_tls(handshake_flags)
    if not handshake_flags & nbd.NBD_FLAG_FIXED_NEWSTYLE:
        return (yield from _export_name(name, handshake_flags, structured=False, context_id=None))
    extended = (yield from _ask(nbd.NBD_OPT_EXTENDED_HEADERS))[-1][0] == nbd.NBD_REP_ACK
    structured = extended or (yield from _ask(nbd.NBD_OPT_STRUCTURED_REPLY))[-1][0] == nbd.NBD_REP_ACK
    context_id = (yield from _selected_context(name, context)) if structured else None
    replies = yield from _ask(nbd.NBD_OPT_GO, _info_query(name))
    outcome, message = replies[-1]
    if outcome == nbd.NBD_REP_ERR_UNSUP and not extended:
        return (yield from _export_name(name, handshake_flags, structured, context_id))
    if outcome != nbd.NBD_REP_ACK:
        yield nbd.OPTION.pack(nbd.IHAVEOPT, nbd.NBD_OPT_ABORT, 0)
        _refuse(name, outcome, message)
    return _export(replies[:-1], structured, context_id)._replace(extended=extended)


def _greeting() -> Generator[Step, bytes, int]:
    """Server: u64 `NBDMAGIC`, u64 `IHAVEOPT`, u16 flags. Client: u32 flags, those of the server's that we know."""
    magic, style, flags = nbd.GREETING.unpack((yield nbd.GREETING.size))
    if magic != nbd.NBDMAGIC or style not in (nbd.IHAVEOPT, _OLDSTYLE_MAGIC):
        raise nonsense("greeting", "that of an NBD server", f"{magic:#x} {style:#x}")
    if style == _OLDSTYLE_MAGIC:
        raise nonsense("greeting", "newstyle negotiation", "the oldstyle one of before 2011")
    known = nbd.NBD_FLAG_FIXED_NEWSTYLE | nbd.NBD_FLAG_NO_ZEROES
    yield nbd.CLIENT_FLAGS.pack(flags & known)
    return int(flags)


def _begin_tls(handshake_flags: int) -> Generator[Step, bytes, None]:
    if not handshake_flags & nbd.NBD_FLAG_FIXED_NEWSTYLE:
        raise _no_tls("it is too old for it")
    *before, (outcome, message) = yield from _ask(nbd.NBD_OPT_STARTTLS)
    if outcome != nbd.NBD_REP_ACK:
        yield nbd.OPTION.pack(nbd.IHAVEOPT, nbd.NBD_OPT_ABORT, 0)
        raise _no_tls(_said(message) or f"error {outcome & ~nbd.NBD_REP_FLAG_ERROR}")
    if before or message:
        raise nonsense("reply to STARTTLS", "an acknowledgement and nothing else", f"{len(before)} more")
    yield BEGIN_TLS


def _no_tls(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"the NBD server does not speak TLS ({why}), and without it nothing is said to an nbds: URI",
        next_step="give the server its certificates; where its network may be trusted, write nbd: for nbds:",
    )


def _ask(option: int, data: bytes = b"") -> Generator[Step, bytes, list[Reply]]:
    """Send an option; return all replies to it. The last one is an acknowledgement or an error."""
    yield nbd.OPTION.pack(nbd.IHAVEOPT, option, len(data)) + data
    replies: list[Reply] = []
    while len(replies) < _MAX_REPLIES:
        magic, answered, kind, length = nbd.OPTION_REPLY.unpack((yield nbd.OPTION_REPLY.size))
        if (magic, answered) != (nbd.NBD_REP_MAGIC, option) or length > _MAX_REPLY_DATA:
            raise nonsense("option reply", f"one to option {option}", f"{magic:#x} {answered} {length}")
        replies.append((kind, (yield length) if length else b""))
        if kind == nbd.NBD_REP_ACK or kind & nbd.NBD_REP_FLAG_ERROR:
            return replies
    raise nonsense("option replies", f"at most {_MAX_REPLIES}", "one more")


def _selected_context(name: str, context: str) -> Generator[Step, bytes, int | None]:
    """Select the context; return its id, or None if the server does not have it."""
    query = _string(name) + (1).to_bytes(4, "big") + _string(context)
    replies = yield from _ask(nbd.NBD_OPT_SET_META_CONTEXT, query)
    if replies[-1][0] != nbd.NBD_REP_ACK:
        return None
    wanted = context.encode()
    ids = [
        int.from_bytes(data[:4], "big")
        for kind, data in replies
        if kind == nbd.NBD_REP_META_CONTEXT and data[4:] == wanted
    ]
    return ids[0] if len(ids) == 1 else None


def _info_query(name: str) -> bytes:
    """u32 length of the name, name, u16 2, u16 `NBD_INFO_BLOCK_SIZE`, u16 `NBD_INFO_DESCRIPTION`.

    A client that asks for the block sizes must respect them.
    """
    wanted = (nbd.NBD_INFO_BLOCK_SIZE, nbd.NBD_INFO_DESCRIPTION)
    return _string(name) + b"".join(number.to_bytes(2, "big") for number in (len(wanted), *wanted))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return len(encoded).to_bytes(4, "big") + encoded


def _export_name(
    name: str, handshake_flags: int, structured: bool, context_id: int | None
) -> Generator[Step, bytes, FarExport]:
    """Ask in the old way: u64 size, u16 flags, 124 zeroes. It has no error reply; a server that refuses hangs up."""
    encoded = name.encode()
    yield nbd.OPTION.pack(nbd.IHAVEOPT, nbd.NBD_OPT_EXPORT_NAME, len(encoded)) + encoded
    size, flags = nbd.EXPORT_NAME_REPLY.unpack((yield nbd.EXPORT_NAME_REPLY.size))
    if not handshake_flags & nbd.NBD_FLAG_NO_ZEROES:
        yield len(nbd.EXPORT_NAME_PADDING)
    return _checked(FarExport(size, flags, structured=structured, context_id=context_id))


def _export(infos: list[Reply], structured: bool, context_id: int | None) -> FarExport:
    """Parse `NBD_REP_INFO` replies; those of a type that we did not ask for are ignored."""
    found: FarExport | None = None
    minimum, maximum, description = 1, MAX_PAYLOAD, ""
    for kind, data in infos:
        info = int.from_bytes(data[:2], "big")
        if kind != nbd.NBD_REP_INFO or len(data) < 2:
            raise nonsense("reply to GO", "information", f"reply {kind} of {len(data)} bytes")
        if info == nbd.NBD_INFO_EXPORT:
            _, size, flags = nbd.INFO_EXPORT.unpack(_sized(data, nbd.INFO_EXPORT.size))
            found = FarExport(size, flags, structured=structured, context_id=context_id)
        elif info == nbd.NBD_INFO_BLOCK_SIZE:
            _, minimum, _, maximum = nbd.INFO_BLOCK_SIZE.unpack(_sized(data, nbd.INFO_BLOCK_SIZE.size))
        elif info == nbd.NBD_INFO_DESCRIPTION:
            description = data[2 : 2 + nbd.NBD_MAX_STRING].decode(errors="replace")
    if found is None:
        raise nonsense("reply to GO", "the export's size", "none")
    return _checked(_constrained(found._replace(description=description), minimum, maximum))


def _constrained(export: FarExport, minimum: int, maximum: int) -> FarExport:
    """Apply the block sizes. The preferred one is ignored: the guest decides the sizes of requests."""
    if not 1 <= minimum <= _MAX_BLOCK or minimum & (minimum - 1) or maximum < minimum:
        raise nonsense("block sizes", f"a power of two up to {_MAX_BLOCK} and more", f"{minimum}, {maximum}")
    longest = min(maximum, MAX_PAYLOAD)
    return export._replace(minimum=minimum, maximum=longest - longest % minimum)


def _checked(export: FarExport) -> FarExport:
    if export.size > MAX_SIZE:
        raise nonsense("export size", f"at most {MAX_SIZE}", export.size)
    if export.size % export.minimum:
        raise InvalidArgument(
            f"the NBD export has {export.size} bytes and takes requests for whole blocks of {export.minimum}:"
            " its last bytes cannot be reached",
            next_step="serve it with a smaller minimum block size",
        )
    return export


def _sized(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise nonsense("information", f"{size} bytes", len(data))
    return data


def _refuse(name: str, outcome: int, message: bytes) -> NoReturn:
    said = _said(message)
    raise _refusal(name, outcome, f" ({said})" if said else "")


def _said(message: bytes) -> str:
    return message[: nbd.NBD_MAX_STRING].decode(errors="replace")


def _refusal(name: str, outcome: int, said: str) -> LmdbitmapError:
    if outcome == nbd.NBD_REP_ERR_UNKNOWN:
        return NotFound(
            f"the NBD server has no export called {name!r}{said}",
            next_step="list those it has with `nbdinfo --list`",
        )
    if outcome == nbd.NBD_REP_ERR_TLS_REQD:
        return InvalidArgument(
            f"the NBD server demands TLS{said}",
            next_step="write nbds: in place of nbd:, and with tls-certificates= the folder that has ca-cert.pem",
        )
    if outcome == nbd.NBD_REP_ERR_SHUTDOWN:
        return Busy(f"the NBD server is shutting down{said}", next_step="start it again")
    return InvalidArgument(
        f"the NBD server refuses export {name!r} with error {outcome & ~nbd.NBD_REP_FLAG_ERROR}{said}",
        next_step="look at the server's configuration and log",
    )


def nonsense(place: str, expected: str, found: object) -> FormatError:
    """The error for an NBD server that breaks the protocol."""
    return FormatError(
        f"NBD server's {place}",
        expected=expected,
        found=found,
        next_step="see which program listens there; use another NBD server if it is one",
    )
