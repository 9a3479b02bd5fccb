"""What a flat file holds, and whether it can be trusted."""

from __future__ import annotations

import os
from collections import deque
from typing import NamedTuple

from lmdbitmap import bits
from lmdbitmap.errors import FormatError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.flat_file import in_qcow2
from lmdbitmap.flat_file.flatfile import FlatFile
from lmdbitmap.format import FlatHeader, Metadata, Zeroes


class Inspection(NamedTuple):
    """The result of `inspect_file`. With any `problems` (sentences) it is UNTRUSTED, and the whole disk is dirty."""

    path: str
    header: FlatHeader
    metadata: Metadata
    trust: Trust
    dirty_bytes: int
    problems: list[str]


def inspect_file(path: str | os.PathLike[str]) -> Inspection:
    """Read the whole file and return what it is worth. Raises `FormatError` if not even its header is sound."""
    if in_qcow2.is_image(path):
        raise FormatError(
            os.fspath(path),
            expected="a flat file",
            found="a qcow2 image",
            next_step="see its bitmaps with `qemu-img info`, and take one in with `lmdbitmap import --bitmap`",
        )
    with FlatFile.open(path) as file:
        header, problems = file.header, []
        try:
            last_is_dirty = _last_is_dirty(file)
            dirty_bytes = header.geometry.bytes_in(header.dirty_count, with_last=last_is_dirty)
        except Untrusted:
            problems.append("its CLEAN flag is not set, so everything counts as dirty")
        except FormatError as error:
            problems.append(str(error))
        if problems:
            return Inspection(file.path, header, file.metadata, Trust.UNTRUSTED, header.disk_size, problems)
        return Inspection(file.path, header, file.metadata, header.trust, dirty_bytes, [])


def _last_is_dirty(file: FlatFile) -> bool:
    """Read and prove all bits; return whether the disk's last block is dirty."""
    header = file.header
    last = deque(file.chunks(), maxlen=1)
    if not last or isinstance(last[0], Zeroes):
        return False
    position = header.bit_count - 1 - 8 * (header.bits_size - len(last[0]))
    return bits.any_one(bits.bitmap_view(last[0]), position, position + 1)
