"""The bytes of the NBD protocol: its numbers in the specification's own names, and pure parsers and builders.

Values in, values out: no socket, no clock, no state. All integers on the wire are big-endian. A parser takes the whole
of what its header announced, and raises `FormatError` when the bytes are wrong. The caller that reads a header checks
its payload length before anything is allocated.

The specification: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, and for extended headers the
version on its branch extension-ext-header.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple
from uuid import UUID

from lmdbitmap.errors import FormatError
from lmdbitmap.interfaces import Buffer

# --- Handshake -------------------------------------------------------------------------------------------

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
NBD_REP_MAGIC: Final = 0x0003E889045565A9

NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11

NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_EXTENDED_HEADERS: Final = 11

NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ERR_UNSUP: Final = NBD_REP_FLAG_ERROR + 1
NBD_REP_ERR_POLICY: Final = NBD_REP_FLAG_ERROR + 2
NBD_REP_ERR_INVALID: Final = NBD_REP_FLAG_ERROR + 3
NBD_REP_ERR_PLATFORM: Final = NBD_REP_FLAG_ERROR + 4
NBD_REP_ERR_TLS_REQD: Final = NBD_REP_FLAG_ERROR + 5
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_FLAG_ERROR + 6
NBD_REP_ERR_SHUTDOWN: Final = NBD_REP_FLAG_ERROR + 7
NBD_REP_ERR_BLOCK_SIZE_REQD: Final = NBD_REP_FLAG_ERROR + 8
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_FLAG_ERROR + 9
NBD_REP_ERR_EXT_HEADER_REQD: Final = NBD_REP_FLAG_ERROR + 10

NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

NBD_MAX_STRING: Final = 4096
"""The longest name, query or message that the protocol allows, in bytes of UTF-8."""

GREETING: Final = struct.Struct(">QQH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")
OPTION_REPLY: Final = struct.Struct(">QIII")
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
INFO_EXPORT: Final = struct.Struct(">HQH")
INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")

EXPORT_NAME_PADDING: Final = bytes(124)

# --- Transmission ----------------------------------------------------------------------------------------

NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
NBD_EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
NBD_EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7

NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4
NBD_CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

NBD_REPLY_FLAG_DONE: Final = 1 << 0
NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
NBD_REPLY_TYPE_ERROR: Final = (1 << 15) + 1
NBD_REPLY_TYPE_ERROR_OFFSET: Final = (1 << 15) + 2

NBD_EPERM: Final = 1
NBD_EIO: Final = 5
NBD_ENOMEM: Final = 12
NBD_EINVAL: Final = 22
NBD_ENOSPC: Final = 28
NBD_EOVERFLOW: Final = 75
NBD_ENOTSUP: Final = 95
NBD_ESHUTDOWN: Final = 108

NBD_META_BASE_ALLOCATION: Final = "base:allocation"
NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1
LMDBITMAP_META_KEPT: Final = "lmdbitmap:kept"
"""Our own context (kept_context.py)."""
LMDBITMAP_STATE_KEPT: Final = 1 << 0
LMDBITMAP_STATE_QUIET: Final = 1 << 1

REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
STRUCTURED_REPLY: Final = struct.Struct(">IHHQI")
OFFSET_DATA_REPLY: Final = struct.Struct(">IHHQIQ")
"""A structured reply header and the offset that begins the payload of `NBD_REPLY_TYPE_OFFSET_DATA`."""
ERROR_PAYLOAD: Final = struct.Struct(">IH")
BLOCK_DESCRIPTOR: Final = struct.Struct(">II")
EXTENDED_REQUEST: Final = struct.Struct(">IHHQQQ")
EXTENDED_REPLY: Final = struct.Struct(">IHHQQQ")
EXTENDED_DATA_REPLY: Final = struct.Struct(">IHHQQQQ")
"""An extended reply header and the offset that begins the payload of `NBD_REPLY_TYPE_OFFSET_DATA`."""
BLOCK_STATUS_EXT: Final = struct.Struct(">II")
BLOCK_DESCRIPTOR_EXT: Final = struct.Struct(">QQ")


class OptionHeader(NamedTuple):
    option: int
    length: int


class InfoQuery(NamedTuple):
    """The request of `NBD_OPT_INFO` and `NBD_OPT_GO`."""

    export_name: str
    info_types: tuple[int, ...]


class MetaQuery(NamedTuple):
    """The request of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`."""

    export_name: str
    queries: tuple[str, ...]


class Request(NamedTuple):
    flags: int
    type: int
    cookie: int
    offset: int
    length: int
    payload: int = 0
    """Bytes of data that follow."""


# --- From the client -------------------------------------------------------------------------------------


def parse_client_flags(data: bytes) -> int:
    """u32 flags; any bit but FIXED_NEWSTYLE and NO_ZEROES is refused, as the specification demands."""
    (flags,) = CLIENT_FLAGS.unpack(data)
    if flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
        raise malformed("client flags", "no bits but 0 and 1", f"{flags:#x}")
    return int(flags)


def parse_option_header(data: bytes) -> OptionHeader:
    """u64 `IHAVEOPT`, u32 option, u32 length of the data that follows."""
    magic, option, length = OPTION.unpack(data)
    if magic != IHAVEOPT:
        raise malformed("option header", f"magic {IHAVEOPT:#x}", f"{magic:#x}")
    return OptionHeader(option, length)


def parse_export_name(data: bytes) -> str:
    """The whole payload is the name, UTF-8, at most 4096 bytes."""
    return _text(data)


def parse_info_query(data: bytes) -> InfoQuery:
    """u32 length of the name, name, u16 count, count * u16 information types; nothing after them."""
    name, position = _string_at(data, 0)
    if len(data) < position + _U16.size:
        raise malformed("NBD_OPT_GO", "a count of information requests", "the end of the option")
    (count,) = _U16.unpack_from(data, position)
    types = data[position + _U16.size :]
    if len(types) != count * _U16.size:
        raise malformed("NBD_OPT_GO", f"{count} information requests", f"{len(types)} bytes of them")
    return InfoQuery(name, struct.unpack(f">{count}H", types))


def parse_meta_query(data: bytes) -> MetaQuery:
    """u32 length of the export name, name, u32 count, count * (u32 length, query); nothing after them."""
    name, position = _string_at(data, 0)
    count, position = _u32_at(data, position)
    queries: list[str] = []
    while len(queries) < count:
        query, position = _string_at(data, position)
        queries.append(query)
    if position != len(data):
        raise malformed("metadata query", f"{position} bytes", len(data))
    return MetaQuery(name, tuple(queries))


def parse_request(data: Buffer) -> Request:
    """u32 magic, u16 flags, u16 type, u64 cookie, u64 offset, u32 length; a WRITE's data follows."""
    magic, flags, command, cookie, offset, length = REQUEST.unpack(data)
    if magic != NBD_REQUEST_MAGIC:
        raise malformed("request", f"magic {NBD_REQUEST_MAGIC:#x}", f"{magic:#x}")
    return Request(flags, command, cookie, offset, length, length if command == NBD_CMD_WRITE else 0)


def parse_extended_request(data: Buffer) -> Request:
    """u32 magic, u16 flags, u16 type, u64 cookie, u64 offset, u64 length.

    With PAYLOAD_LEN in the flags the length is that of the payload that follows, else that of the request's range. A
    WRITE must have the flag. QEMU's client (10.0) leaves it off and sends the data all the same, and QEMU's server
    accepts that. So here a WRITE has a payload in any case.
    """
    magic, flags, command, cookie, offset, length = EXTENDED_REQUEST.unpack(data)
    if magic != NBD_EXTENDED_REQUEST_MAGIC:
        raise malformed("extended request", f"magic {NBD_EXTENDED_REQUEST_MAGIC:#x}", f"{magic:#x}")
    has_payload = flags & NBD_CMD_FLAG_PAYLOAD_LEN or command == NBD_CMD_WRITE
    return Request(flags, command, cookie, offset, length, length if has_payload else 0)


def malformed(place: str, expected: str, found: object) -> FormatError:
    return FormatError(
        f"NBD {place}",
        expected=expected,
        found=found,
        next_step="connect with a client that speaks NBD newstyle",
    )


def _string_at(data: bytes, position: int) -> tuple[str, int]:
    """Return the text at `position` behind its u32 length, and the position after it."""
    length, position = _u32_at(data, position)
    if length > min(len(data) - position, NBD_MAX_STRING):
        raise malformed("string", f"at most {min(len(data) - position, NBD_MAX_STRING)} bytes", length)
    return _text(data[position : position + length]), position + length


def _u32_at(data: bytes, position: int) -> tuple[int, int]:
    if len(data) < position + _U32.size:
        raise malformed("option", f"4 bytes at {position}", f"the end at {len(data)}")
    return _U32.unpack_from(data, position)[0], position + _U32.size


def _text(data: bytes) -> str:
    if len(data) > NBD_MAX_STRING:
        raise malformed("string", f"at most {NBD_MAX_STRING} bytes", len(data))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise malformed("string", "UTF-8", f"{data[error.start : error.start + 1]!r}") from None


# --- To the client ---------------------------------------------------------------------------------------


def greeting() -> bytes:
    """u64 `NBDMAGIC`, u64 `IHAVEOPT`, u16 handshake flags: fixed newstyle, no zeroes."""
    return GREETING.pack(NBDMAGIC, IHAVEOPT, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)


def export_name_reply(size: int, flags: int, *, padded: bool) -> bytes:
    """u64 size, u16 transmission flags, and 124 zeroes unless the client waived them."""
    return EXPORT_NAME_REPLY.pack(size, flags) + (EXPORT_NAME_PADDING if padded else b"")


def option_reply(option: int, reply_type: int, data: bytes = b"") -> bytes:
    """u64 `NBD_REP_MAGIC`, u32 option, u32 reply type, u32 length, data."""
    return OPTION_REPLY.pack(NBD_REP_MAGIC, option, reply_type, len(data)) + data


def server_entry(name: str, description: str = "") -> bytes:
    """Payload of `NBD_REP_SERVER`: u32 length of the name, name, description."""
    encoded = name.encode()
    return _U32.pack(len(encoded)) + encoded + description.encode()


def info_export(size: int, flags: int) -> bytes:
    return INFO_EXPORT.pack(NBD_INFO_EXPORT, size, flags)


def info_text(info_type: int, text: str) -> bytes:
    """Payload of `NBD_INFO_NAME` and `NBD_INFO_DESCRIPTION`: u16 type, text."""
    return _U16.pack(info_type) + text.encode()


def of_disk(disk: UUID) -> str:
    """The end of a tracked disk's description, by which the disk is recognized over any connection."""
    return f", disk {disk}"


def info_block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    return INFO_BLOCK_SIZE.pack(NBD_INFO_BLOCK_SIZE, minimum, preferred, maximum)


def meta_context(context_id: int, name: str) -> bytes:
    """Payload of `NBD_REP_META_CONTEXT`: u32 id, name."""
    return _U32.pack(context_id) + name.encode()


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """u32 magic, u32 error, u64 cookie; the data of a simple READ follows when error is 0."""
    return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie)


def structured_reply(cookie: int, reply_type: int, payload: bytes = b"", *, done: bool = True) -> bytes:
    """u32 magic, u16 flags, u16 type, u64 cookie, u32 length, payload."""
    flags = NBD_REPLY_FLAG_DONE if done else 0
    header = STRUCTURED_REPLY.pack(NBD_STRUCTURED_REPLY_MAGIC, flags, reply_type, cookie, len(payload))
    return header + payload


def extended_reply(
    cookie: int, offset: int, reply_type: int, payload: bytes = b"", *, done: bool = True
) -> bytes:
    """u32 magic, u16 flags, u16 type, u64 cookie, u64 offset of the request, u64 length, payload."""
    flags = NBD_REPLY_FLAG_DONE if done else 0
    fields = (NBD_EXTENDED_REPLY_MAGIC, flags, reply_type, cookie, offset, len(payload))
    return EXTENDED_REPLY.pack(*fields) + payload


def error_payload(error: int, message: str = "") -> bytes:
    """Payload of `NBD_REPLY_TYPE_ERROR`: u32 error, u16 length of the message, message."""
    encoded = bounded_text(message)
    return ERROR_PAYLOAD.pack(error, len(encoded)) + encoded


def bounded_text(message: str) -> bytes:
    """Encode as much of a message as the protocol allows, cut between two characters."""
    return message.encode()[:NBD_MAX_STRING].decode(errors="ignore").encode()


def block_status_payload(context_id: int, descriptors: Iterable[tuple[int, int]]) -> bytes:
    """Payload of `NBD_REPLY_TYPE_BLOCK_STATUS`: u32 context id, then (u32 length, u32 status) each."""
    return _U32.pack(context_id) + b"".join(BLOCK_DESCRIPTOR.pack(*descriptor) for descriptor in descriptors)


def block_status_ext_payload(context_id: int, descriptors: Sequence[tuple[int, int]]) -> bytes:
    """Payload of `NBD_REPLY_TYPE_BLOCK_STATUS_EXT`: u32 context id, u32 count, then (u64 length, u64 status) each."""
    packed = (BLOCK_DESCRIPTOR_EXT.pack(*descriptor) for descriptor in descriptors)
    return BLOCK_STATUS_EXT.pack(context_id, len(descriptors)) + b"".join(packed)


_NBD_ERRORS: Final = {
    errno.EPERM: NBD_EPERM,
    errno.EACCES: NBD_EPERM,
    errno.EROFS: NBD_EPERM,
    errno.ENOMEM: NBD_ENOMEM,
    errno.EINVAL: NBD_EINVAL,
    errno.ENOSPC: NBD_ENOSPC,
    errno.EDQUOT: NBD_ENOSPC,
    errno.EFBIG: NBD_ENOSPC,
    errno.EOVERFLOW: NBD_EOVERFLOW,
    errno.ENOTSUP: NBD_ENOTSUP,
    errno.ESHUTDOWN: NBD_ESHUTDOWN,
}


def nbd_error(number: int | None) -> int:
    """Return the protocol's error for an errno of this system; `NBD_EIO` if it has none."""
    return NBD_EIO if number is None else _NBD_ERRORS.get(number, NBD_EIO)
