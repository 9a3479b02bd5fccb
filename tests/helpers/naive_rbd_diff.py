"""A second implementation of `rbd export-diff` streams, plain and whole, to hold ours against."""

from __future__ import annotations

from typing import NamedTuple


class Stream(NamedTuple):
    """`ranges` are (offset, data), or (offset, how many zeroes)."""

    version: int
    size: int
    from_name: str | None
    to_name: str | None
    ranges: list[tuple[int, bytes | int]]


def written(stream: Stream) -> bytes:
    parts = [f"rbd diff v{stream.version}\n".encode()]
    for tag, name in (("f", stream.from_name), ("t", stream.to_name)):
        if name is not None:
            parts.append(record(stream.version, tag, u32(len(name.encode())) + name.encode()))
    parts.append(record(stream.version, "s", u64(stream.size)))
    for offset, content in stream.ranges:
        if isinstance(content, bytes):
            parts.append(record(stream.version, "w", u64(offset) + u64(len(content)) + content))
        else:
            parts.append(record(stream.version, "z", u64(offset) + u64(content)))
    return b"".join(parts) + b"e"


def record(version: int, tag: str, body: bytes) -> bytes:
    return tag.encode() + (u64(len(body)) if version == 2 else b"") + body


def u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def u64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def read(data: bytes) -> Stream:
    """Raises `ValueError` for what is no stream."""
    source = _Source(data)
    version = {b"rbd diff v1\n": 1, b"rbd diff v2\n": 2}[source.take(12)] if len(data) >= 12 else source.no()
    names: dict[bytes, str] = {}
    size: int | None = None
    ranges: list[tuple[int, bytes | int]] = []
    while (tag := source.take(1)) != b"e":
        length = source.number(8) if version == 2 else None
        start = source.position
        if tag in (b"f", b"t"):
            source.need(tag not in names and not ranges)
            count = source.number(4)
            source.need(1 <= count <= 4096)
            names[tag] = source.take(count).decode()
            source.need(names[tag].isprintable())
        elif tag == b"s":
            source.need(size is None and not ranges)
            size = source.number(8)
            source.need(size < 1 << 63)
        elif tag in (b"w", b"z"):
            offset, count = source.number(8), source.number(8)
            source.need(size is not None and offset + count <= size)
            ranges.append((offset, source.take(count) if tag == b"w" else count))
        else:
            source.need(version == 2)
            source.take(length or 0)
        source.need(length is None or source.position == start + length)
    source.need(size is not None and source.position == len(data))
    assert size is not None
    return Stream(version, size, names.get(b"f"), names.get(b"t"), ranges)


class _Source:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, length: int) -> bytes:
        self.need(length <= len(self._data) - self.position)
        self.position += length
        return self._data[self.position - length : self.position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def need(self, condition: bool) -> None:
        if not condition:
            raise ValueError

    def no(self) -> int:
        raise ValueError


def length_of(content: bytes | int) -> int:
    return len(content) if isinstance(content, bytes) else content


def applied(stream: Stream, before: bytes) -> bytes:
    """The disk after it; what the stream does not name stays, or is zero where the disk was shorter."""
    disk = bytearray(before[: stream.size].ljust(stream.size, b"\0"))
    for offset, content in stream.ranges:
        data = content if isinstance(content, bytes) else bytes(content)
        disk[offset : offset + len(data)] = data
    return bytes(disk)
