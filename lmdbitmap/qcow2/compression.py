"""The compression of clusters: zlib as QEMU knows it, or zstd. An image's header says which.

zlib is in the standard library. zstd is in it from Python 3.14 on; before, the package `backports.zstd` is the same. It
is imported when the first cluster needs it. Both let other threads run while they work.
"""

from __future__ import annotations

import sys
import threading
import zlib
from collections.abc import Callable
from types import ModuleType
from typing import Final, NamedTuple

from lmdbitmap.errors import InvalidArgument, NotFound
from lmdbitmap.interfaces import Buffer
from lmdbitmap.qcow2.layout import CompressionType

_ZLIB_WINDOW_BITS: Final = -12
"""Raw deflate with a window of 4 KiB: QEMU decompresses no other."""
_ZLIB_READ_WINDOW_BITS: Final = -15
"""Any raw deflate."""
_ZLIB_MEMORY_LEVEL: Final = 9
_ZSTD_WINDOW_LOG_MAX: Final = 23
"""A frame may not ask for more than 8 MiB of memory; no cluster needs more than 2."""

_LEVELS = {CompressionType.ZLIB: range(1, 10), CompressionType.ZSTD: range(1, 23)}
_DEFAULT_LEVELS = {CompressionType.ZLIB: 6, CompressionType.ZSTD: 3}
"""The libraries' default levels."""


class Compression(NamedTuple):
    """How to compress. Make one with `chosen`."""

    type: CompressionType
    level: int


def chosen(text: str) -> Compression:
    """Return the compression that `zlib`, `zstd`, or one with `:LEVEL` names. Raise `NotFound` without its library."""
    name, colon, level = text.partition(":")
    for kind, levels in _LEVELS.items():
        number = int(level) if level.isascii() and level.isdecimal() and len(level) < 3 else -1
        if name == kind.value and (not colon or number in levels):
            require(kind)
            return Compression(kind, number if colon else _DEFAULT_LEVELS[kind])
    raise InvalidArgument(
        f"{text!r} is no compression",
        next_step="choose zlib or zstd, or with a level: zlib:1 to zlib:9, zstd:1 to zstd:22",
    )


def require(kind: CompressionType) -> None:
    """Raise `NotFound` if its library is missing: better before the work than in the middle of it."""
    if kind is CompressionType.ZSTD:
        _zstd()


def compressor(compression: Compression) -> Callable[[Buffer], bytes]:
    """Return a function that compresses one cluster at a time, in any number of threads."""
    return (_Zlib if compression.type is CompressionType.ZLIB else _Zstd)(compression.level).compress


def decompressed(kind: CompressionType, data: bytes, length: int) -> bytes | None:
    """Return the `length` bytes that `data` begins with, compressed; None if it does not. Never makes more bytes."""
    return (_inflated if kind is CompressionType.ZLIB else _unpacked)(data, length)


class _Zlib:
    def __init__(self, level: int) -> None:
        self._level = level

    def compress(self, data: Buffer) -> bytes:
        work = zlib.compressobj(self._level, zlib.DEFLATED, _ZLIB_WINDOW_BITS, _ZLIB_MEMORY_LEVEL)
        return work.compress(data) + work.flush()


class _Zstd:
    """Keeps a compressor for each thread: making one takes as long as compressing a small cluster."""

    def __init__(self, level: int) -> None:
        self._library = _zstd()
        self._level = level
        self._own = threading.local()

    def compress(self, data: Buffer) -> bytes:
        work = getattr(self._own, "work", None)
        if work is None:
            work = self._own.work = self._library.ZstdCompressor(level=self._level)
        packed: bytes = work.compress(data, mode=work.FLUSH_FRAME)
        return packed


def _inflated(data: bytes, length: int) -> bytes | None:
    """Return the inflated bytes. Like QEMU, ignore what follows: one more byte could be a bomb."""
    try:
        whole = zlib.decompressobj(_ZLIB_READ_WINDOW_BITS).decompress(data, length)
    except zlib.error:
        return None
    return whole if len(whole) == length else None


def _unpacked(data: bytes, length: int) -> bytes | None:
    """Return the unpacked bytes. The frame has to end where the cluster does, as QEMU wants it."""
    library = _zstd()
    limits = {library.DecompressionParameter.window_log_max: _ZSTD_WINDOW_LOG_MAX}
    work = library.ZstdDecompressor(options=limits)
    try:
        whole: bytes = work.decompress(data, max_length=length + 1)
    except library.ZstdError:
        return None
    return whole if len(whole) == length and work.eof else None


def _zstd() -> ModuleType:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as missing:
        raise NotFound(
            "zstd needs a library that this Python does not have",
            next_step="run: pip install 'lmdbitmap[zstd]'",
        ) from missing
    return zstd
