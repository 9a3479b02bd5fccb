r"""The stream of `rbd export-diff`, versions 1 and 2: values in, values out. Numbers are little-endian.

A stream is a banner, then records, then `e`. In version 2 every record but `e` has its body's length behind its tag.

    part     version 1                            version 2
    banner   "rbd diff v1\n"                      "rbd diff v2\n"
    from     "f" u32 n, name[n]                   "f" u64 4+n, u32 n, name[n]
    to       "t" u32 n, name[n]                   "t" u64 4+n, u32 n, name[n]
    size     "s" u64 size                         "s" u64 8, u64 size
    write    "w" u64 offset, u64 n, data[n]       "w" u64 16+n, u64 offset, u64 n, data[n]
    zero     "z" u64 offset, u64 n                "z" u64 16, u64 offset, u64 n
    end      "e"                                  "e"

`f`, `t` and `s` come before all `w` and `z`, in any order, each at most once, and `s` always: it is the disk's size at
the end. Without `f` the stream counts from nothing: bytes that it does not name are zero. Ranges lie within the size.
Other records in version 2 (Ceph writes "p", the protection of a snapshot) are skipped. In version 1 nothing says where
such a record ends, and it is refused.

The writer also keeps to what Ceph demands: names of at most 4096 bytes, no empty range, ranges ascending and apart
(`rbd merge-diff`), and records of a bounded size, as Ceph reads each into memory whole. A reader accepts ranges in any
order: the last one counts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, NoReturn, TypeAlias

from lmdbitmap.errors import FormatError, InvalidArgument
from lmdbitmap.geometry import MAX_SIZE, check_range
from lmdbitmap.interfaces import Buffer

BANNERS: Final = {1: b"rbd diff v1\n", 2: b"rbd diff v2\n"}
FROM_SNAP, TO_SNAP, IMAGE_SIZE, WRITE, ZERO, END = b"f", b"t", b"s", b"w", b"z", b"e"
MAX_NAME_BYTES: Final = 4096
"""Bytes that Ceph reads of a snapshot's name."""
MAX_WRITE_BYTES: Final = 4 << 20
"""Data in one record that we write: an object of an RBD image. Ceph reads a record into memory whole."""
MAX_ZERO_BYTES: Final = 1 << 30
"""Zeroes in one record that we write: Ceph makes one request of it, with an operation for each 4 MiB at once."""

_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_RANGE: Final = struct.Struct("<QQ")
_BANNER_BYTES: Final = len(BANNERS[1])
_NEXT_STEP: Final = "have the stream made again, and compare what is sent with what arrives"


class Head(NamedTuple):
    """A stream's metadata: the disk's size at its end, and the points in time it leads from and to."""

    version: int
    size: int
    from_name: str | None = None
    to_name: str | None = None


class Data(NamedTuple):
    """A piece of the disk. The buffer is the decoder's own, and valid until it reads on."""

    offset: int
    data: Buffer


class Zeroes(NamedTuple):
    offset: int
    length: int


class End(NamedTuple):
    pass


Event: TypeAlias = Head | Data | Zeroes | End


# --- writing ---


class Encoder:
    """Encodes one stream, piece by piece. Ranges are given in ascending order, and do not overlap."""

    def __init__(self, head: Head) -> None:
        """Raise `InvalidArgument` for a version, size or name that no stream can have."""
        if head.version not in BANNERS:
            raise InvalidArgument(
                f"there is no version {head.version} of a diff stream", next_step="choose 1 or 2"
            )
        _check_name(head.from_name)
        _check_name(head.to_name)
        check_range(0, head.size, MAX_SIZE)
        self._head = head
        self._position = 0

    def head(self) -> bytes:
        """Return banner and metadata, in the order in which Ceph writes them."""
        _, size, from_name, to_name = self._head
        names = [(FROM_SNAP, from_name), (TO_SNAP, to_name)]
        records = [self._named(tag, name.encode()) for tag, name in names if name is not None]
        return b"".join([BANNERS[self._head.version], *records, self._record(IMAGE_SIZE, _U64.pack(size))])

    def _named(self, tag: bytes, name: bytes) -> bytes:
        return self._record(tag, _U32.pack(len(name)) + name)

    def data(self, offset: int, data: Buffer) -> Iterator[Buffer]:
        """Yield records of the bytes at `offset`."""
        view = memoryview(data)
        self._advance(offset, len(view))
        for start in range(0, len(view), MAX_WRITE_BYTES):
            part = view[start : start + MAX_WRITE_BYTES]
            yield self._record(WRITE, _RANGE.pack(offset + start, len(part)), more_bytes=len(part))
            yield part

    def zeroes(self, offset: int, length: int) -> Iterator[bytes]:
        """Yield records of a range that reads as zeroes."""
        self._advance(offset, length)
        for start in range(offset, offset + length, MAX_ZERO_BYTES):
            yield self._record(ZERO, _RANGE.pack(start, min(MAX_ZERO_BYTES, offset + length - start)))

    def end(self) -> bytes:
        return END

    def _advance(self, offset: int, length: int) -> None:
        check_range(offset, length, self._head.size)
        assert offset >= self._position, "ranges ascend"
        self._position = offset + length

    def _record(self, tag: bytes, body: bytes, more_bytes: int = 0) -> bytes:
        length = b"" if self._head.version == 1 else _U64.pack(len(body) + more_bytes)
        return tag + length + body


def _check_name(name: str | None) -> None:
    if name is not None and not _is_name(name):
        raise InvalidArgument(
            f"{name!r:.100} cannot name a point in time of a diff stream",
            next_step=f"choose a printable name of 1 to {MAX_NAME_BYTES} bytes",
        )


def _is_name(name: object) -> bool:
    return isinstance(name, str) and name.isprintable() and 1 <= len(name.encode()) <= MAX_NAME_BYTES


# --- reading ---


class Decoder:
    """Decodes one stream, fed in pieces of any size; each byte may lie. Yields one `Head`, then ranges, then `End`.

    Memory is taken for one field at a time, which is a name at most. Raises `FormatError` with the offset in the
    stream, and is unusable after it. After its end a stream takes no more bytes.
    """

    def __init__(self, place: str = "stream") -> None:
        self.offset = 0
        """Bytes of the stream read so far."""
        self._place = place
        self._version = 0
        self._names: dict[bytes, str] = {}
        self._size: int | None = None
        self._head: Head | None = None
        self._ended = False
        # The field that is being collected, and the method that reads it when it is complete.
        self._field = bytearray()
        self._wanted = _BANNER_BYTES
        self._read: Callable[[bytes], tuple[Event, ...]] = self._banner
        self._tag = b""
        self._body_bytes: int | None = None
        # Bytes to pass on, or to skip, before the next field.
        self._passing = 0
        self._passing_to: int | None = None

    def feed(self, data: Buffer) -> Iterator[Event]:
        """Yield what `data` says. Exhaust this before the next feed; pieces of data are parts of `data`."""
        rest = memoryview(data)
        while rest:
            if self._ended:
                self._refuse("nothing after the end of the stream", "more bytes")
            if self._passing:
                piece, rest = rest[: self._passing], rest[self._passing :]
                yield from self._pass_on(piece)
                continue
            missing = self._wanted - len(self._field)
            piece, rest = rest[:missing], rest[missing:]
            self._field += piece
            if len(self._field) == self._wanted:
                yield from self._take_field()

    def finish(self) -> None:
        """Raise `FormatError` unless the stream has ended."""
        if not self._ended:
            self.offset += len(self._field)
            self._refuse("more of the stream, up to its end record", "no more bytes")

    def _pass_on(self, piece: memoryview) -> Iterator[Event]:
        self._passing -= len(piece)
        self.offset += len(piece)
        if self._passing_to is not None:
            yield Data(self._passing_to, piece)
            self._passing_to += len(piece)

    def _take_field(self) -> tuple[Event, ...]:
        field = bytes(self._field)
        self._field.clear()
        events = self._read(field)
        self.offset += len(field)
        return events

    def _await(self, length: int, read: Callable[[bytes], tuple[Event, ...]]) -> tuple[Event, ...]:
        self._wanted, self._read = length, read
        return ()

    def _await_record(self) -> tuple[Event, ...]:
        return self._await(1, self._record)

    # Each of these methods reads one field, and sets which one comes next.

    def _banner(self, field: bytes) -> tuple[Event, ...]:
        self._version = next((version for version, banner in BANNERS.items() if banner == field), 0)
        if not self._version:
            self._refuse("'rbd diff v1' or 'rbd diff v2' and the end of a line", ascii(field))
        return self._await_record()

    def _record(self, tag: bytes) -> tuple[Event, ...]:
        self._tag, self._body_bytes = tag, None
        if tag == END:
            self._ended = True
            return (*self._begun(), End())
        if self._version == 2:
            return self._await(_U64.size, self._body_length)
        return self._body()

    def _body_length(self, field: bytes) -> tuple[Event, ...]:
        (self._body_bytes,) = _U64.unpack(field)
        return self._body()

    def _body(self) -> tuple[Event, ...]:
        tag = self._tag
        if tag in (FROM_SNAP, TO_SNAP, IMAGE_SIZE):
            self._check_metadata()
            if tag != IMAGE_SIZE:
                return self._await(_U32.size, self._name_length)
            self._check_body(_U64.size)
            return self._await(_U64.size, self._image_size)
        if tag in (WRITE, ZERO):
            return self._await(_RANGE.size, self._range)
        if self._body_bytes is None:
            self._refuse("the tag f, t, s, w, z or e", ascii(tag))
        self._passing, self._passing_to = self._body_bytes, None
        return self._await_record()

    def _check_metadata(self) -> None:
        shown = ascii(self._tag.decode())
        if self._head is not None:
            self._refuse("no metadata after the first range", f"the tag {shown}")
        if self._tag in self._names or (self._tag == IMAGE_SIZE and self._size is not None):
            self._refuse("each kind of metadata once", f"the tag {shown} again")

    def _check_body(self, length: int) -> None:
        """Check the body's length, which version 2 gives twice."""
        if self._body_bytes not in (None, length):
            shown = ascii(self._tag.decode())
            self._refuse(f"{length} bytes in the record {shown}", f"{self._body_bytes} bytes")

    def _name_length(self, field: bytes) -> tuple[Event, ...]:
        (length,) = _U32.unpack(field)
        if not 1 <= length <= MAX_NAME_BYTES:
            self._refuse(f"a name of 1 to {MAX_NAME_BYTES} bytes", f"one of {length}")
        self._check_body(_U32.size + length)
        return self._await(length, self._name)

    def _name(self, field: bytes) -> tuple[Event, ...]:
        try:
            name = field.decode()
        except UnicodeDecodeError:
            name = ""
        if not _is_name(name):
            self._refuse("a name in printable UTF-8", _shown(field))
        self._names[self._tag] = name
        return self._await_record()

    def _image_size(self, field: bytes) -> tuple[Event, ...]:
        (size,) = _U64.unpack(field)
        if size > MAX_SIZE:
            self._refuse("a size below 2^63", size)
        self._size = size
        return self._await_record()

    def _range(self, field: bytes) -> tuple[Event, ...]:
        offset, length = _RANGE.unpack(field)
        begun = self._begun()
        assert self._head is not None
        if offset + length > self._head.size:
            self._refuse(
                f"a range on a disk of {self._head.size} bytes", f"bytes {offset}..{offset + length}"
            )
        self._check_body(_RANGE.size + (length if self._tag == WRITE else 0))
        self._await_record()
        if self._tag == ZERO:
            return (*begun, Zeroes(offset, length))
        self._passing, self._passing_to = length, offset
        return begun

    def _begun(self) -> tuple[Event, ...]:
        """Return the head, once, when no more metadata can come."""
        if self._head is not None:
            return ()
        if self._size is None:
            self._refuse("the size 's' before ranges and the end", f"the tag {self._tag.decode()!a}")
        self._head = Head(self._version, self._size, self._names.get(FROM_SNAP), self._names.get(TO_SNAP))
        return (self._head,)

    def _refuse(self, expected: str, found: object) -> NoReturn:
        raise FormatError(
            f"{self._place}, byte {self.offset}", expected=expected, found=found, next_step=_NEXT_STEP
        )


def _shown(field: bytes) -> str:
    text = ascii(field)
    return text if len(text) <= 80 else f"{text[:80]}..."
