"""The forms of requests and replies, one of which a client agrees on: simple, structured, or extended. Pure.

| form | a request | its length | READ, BLOCK_STATUS are answered | all else is answered |
|---|---|---|---|---|
| `SIMPLE` | 28 bytes | 32 bits | READ by a simple reply and its data | by a simple reply |
| `STRUCTURED` | the same | the same | in chunks | by a simple reply |
| `EXTENDED` | 32 bytes | 64 bits; of a payload where a flag says so | in chunks | by a chunk |

What a reply repeats of its request is its *label*: the cookie as it came, and in the extended form the request's
offset.

Magic, flags and type are one word here, and the cookie is bytes, as the hot loop has them (connection.py).
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Final, NamedTuple

from lmdbitmap.interfaces import Buffer
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.handshake import MAX_PAYLOAD

SIMPLE_OK: Final = struct.pack(">II", nbd.NBD_SIMPLE_REPLY_MAGIC, 0)
"""A simple reply without its cookie."""
DATA: Final = struct.Struct(">Q8sIQ")
"""`nbd.OFFSET_DATA_REPLY`."""
EXTENDED_DATA: Final = struct.Struct(">Q8sQQQ")
"""`nbd.EXTENDED_DATA_REPLY`: head, cookie, the request's offset, length, the data's offset."""
_DONE: Final = nbd.NBD_REPLY_FLAG_DONE << 16
_DATA_MORE: Final = nbd.NBD_STRUCTURED_REPLY_MAGIC << 32 | nbd.NBD_REPLY_TYPE_OFFSET_DATA
DATA_DONE: Final = _DATA_MORE | _DONE
_EXTENDED_DATA_MORE: Final = nbd.NBD_EXTENDED_REPLY_MAGIC << 32 | nbd.NBD_REPLY_TYPE_OFFSET_DATA
EXTENDED_DATA_DONE: Final = _EXTENDED_DATA_MORE | _DONE
_EXTENDED_OK: Final = nbd.NBD_EXTENDED_REPLY_MAGIC << 32 | _DONE | nbd.NBD_REPLY_TYPE_NONE
_EXTENDED_EMPTY: Final = struct.Struct(">Q8sQQ")
_EXTENDED_LABELLED: Final = struct.Struct(">Q16sQQ")
_FIRST: Final = operator.itemgetter(0)
_LABEL: Final = struct.Struct(">QQ")
"""Label of the extended form: cookie, offset."""
_OFFSET: Final = struct.Struct(">Q")
_ANSWERED_IN_CHUNKS: Final = frozenset({nbd.NBD_CMD_READ, nbd.NBD_CMD_BLOCK_STATUS})
assert DATA.size == nbd.OFFSET_DATA_REPLY.size
assert EXTENDED_DATA.size == nbd.EXTENDED_DATA_REPLY.size


class Layout(NamedTuple):
    """What the hot loop looks up in every batch."""

    unpack: Callable[[Buffer, int], tuple[int, bytes, int, int]]
    header_size: int
    plain_read: int


class Form:
    """The simple form, and the base of the others."""

    header = struct.Struct(">Q8sQI")
    """`nbd.REQUEST`."""
    plain_read = nbd.NBD_REQUEST_MAGIC << 32 | nbd.NBD_CMD_READ
    """The head of a READ without flags."""
    plain_writes: tuple[int, ...] = (nbd.NBD_REQUEST_MAGIC << 32 | nbd.NBD_CMD_WRITE,)
    """Heads of a WRITE without flags, in each way a client may say it; one client uses one of them."""
    in_chunks = False
    data_size = nbd.SIMPLE_REPLY.size
    """Bytes before a READ's data."""

    @property
    def layout(self) -> Layout:
        return Layout(self.header.unpack_from, self.header.size, self.plain_read)

    def parse(self, header: Buffer) -> nbd.Request:
        """Parse a request header; the payload is still to come. Raise `FormatError` if it is none."""
        return nbd.parse_request(header)

    def label(self, cookie: bytes, offset: int) -> bytes:
        return cookie

    def label_of(self, request: nbd.Request) -> bytes:
        return self.label(request.cookie.to_bytes(8, "big"), request.offset)

    def successes(
        self, cookies: list[bytes], writes: Sequence[tuple[int, memoryview]], labels: list[bytes]
    ) -> bytes:
        """Replies to the `writes` with these `cookies`, and to the requests with these `labels`: all succeeded."""
        return SIMPLE_OK + SIMPLE_OK.join(cookies + labels)

    def outcome(self, command: int, label: bytes, error: int = 0) -> bytes:
        """Reply without data: the request failed with `error`, or succeeded if that is 0."""
        return nbd.simple_reply(_cookie(label), error)

    def data(self, label: bytes, offset: int, length: int, *, done: bool) -> bytes:
        """Header for `length` bytes of a READ at `offset`; `done` if they are its last."""
        return SIMPLE_OK + label

    def status(
        self, label: bytes, context_id: int, descriptors: Sequence[tuple[int, int]], *, done: bool
    ) -> bytes:
        raise NotImplementedError  # no client of this form has selected a context


class _Structured(Form):
    in_chunks = True
    data_size = DATA.size

    def outcome(self, command: int, label: bytes, error: int = 0) -> bytes:
        """READ and BLOCK_STATUS must use chunks for this too."""
        if command in _ANSWERED_IN_CHUNKS:
            return nbd.structured_reply(_cookie(label), *_told(error))
        return nbd.simple_reply(_cookie(label), error)

    def data(self, label: bytes, offset: int, length: int, *, done: bool) -> bytes:
        return DATA.pack(DATA_DONE if done else _DATA_MORE, label, length + _OFFSET.size, offset)

    def status(
        self, label: bytes, context_id: int, descriptors: Sequence[tuple[int, int]], *, done: bool
    ) -> bytes:
        payload = nbd.block_status_payload(context_id, descriptors)
        return nbd.structured_reply(_cookie(label), nbd.NBD_REPLY_TYPE_BLOCK_STATUS, payload, done=done)


class _Extended(Form):
    in_chunks = True
    header = struct.Struct(">Q8sQQ")
    """`nbd.EXTENDED_REQUEST`."""
    plain_read = nbd.NBD_EXTENDED_REQUEST_MAGIC << 32 | nbd.NBD_CMD_READ
    plain_writes = (
        nbd.NBD_EXTENDED_REQUEST_MAGIC << 32 | nbd.NBD_CMD_FLAG_PAYLOAD_LEN << 16 | nbd.NBD_CMD_WRITE,
        nbd.NBD_EXTENDED_REQUEST_MAGIC << 32 | nbd.NBD_CMD_WRITE,
    )
    data_size = EXTENDED_DATA.size

    def parse(self, header: Buffer) -> nbd.Request:
        """Drop a client that announces more than the largest payload, as the specification demands."""
        request = nbd.parse_extended_request(header)
        if request.payload > MAX_PAYLOAD:
            raise nbd.malformed("request", f"a payload of at most {MAX_PAYLOAD} bytes", request.payload)
        return request

    def label(self, cookie: bytes, offset: int) -> bytes:
        return cookie + _OFFSET.pack(offset)

    def successes(
        self, cookies: list[bytes], writes: Sequence[tuple[int, memoryview]], labels: list[bytes]
    ) -> bytes:
        if len(cookies) == 1 and not labels:
            return _EXTENDED_EMPTY.pack(_EXTENDED_OK, cookies[0], writes[0][0], 0)
        offsets = map(_FIRST, writes)
        done = b"".join(map(_EXTENDED_EMPTY.pack, repeat(_EXTENDED_OK), cookies, offsets, repeat(0)))
        return done + b"".join(self.outcome(nbd.NBD_CMD_FLUSH, label) for label in labels) if labels else done

    def outcome(self, command: int, label: bytes, error: int = 0) -> bytes:
        return _extended(label, *_told(error))

    def data(self, label: bytes, offset: int, length: int, *, done: bool) -> bytes:
        head = EXTENDED_DATA_DONE if done else _EXTENDED_DATA_MORE
        return _EXTENDED_LABELLED.pack(head, label, length + _OFFSET.size, offset)

    def status(
        self, label: bytes, context_id: int, descriptors: Sequence[tuple[int, int]], *, done: bool
    ) -> bytes:
        payload = nbd.block_status_ext_payload(context_id, descriptors)
        return _extended(label, nbd.NBD_REPLY_TYPE_BLOCK_STATUS_EXT, payload, done=done)


SIMPLE: Final = Form()
STRUCTURED: Final = _Structured()
EXTENDED: Final = _Extended()


def _told(error: int) -> tuple[int, bytes]:
    """Type and payload of a reply's only chunk."""
    return (nbd.NBD_REPLY_TYPE_ERROR, nbd.error_payload(error)) if error else (nbd.NBD_REPLY_TYPE_NONE, b"")


def _extended(label: bytes, reply_type: int, payload: bytes, *, done: bool = True) -> bytes:
    cookie, offset = _LABEL.unpack(label)
    return nbd.extended_reply(cookie, offset, reply_type, payload, done=done)


def _cookie(label: bytes) -> int:
    return int.from_bytes(label, "big")
