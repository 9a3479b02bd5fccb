"""Bitmaps in memory: plain buffers, read and changed in place at C speed.

A bitmap is any buffer of whole bytes. Bit `i` is byte `i / 8`, bit `i % 8`, least significant first. Each call passes
the order, never leaving it to a library's default. Functions on ranges of bits take a view, which shares the buffer
and costs no copy. Functions that walk or combine whole records take buffers. A view of a read-only buffer is read-only.

Ranges are half-open; an empty range is a no-op. A range outside the bitmap is a bug of the caller, not bad input: it is
asserted here and checked where the numbers came in.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TypeAlias

from bitarray import bitarray

from lmdbitmap.errors import os_errors_at
from lmdbitmap.geometry import REGION_BYTES, Geometry
from lmdbitmap.interfaces import Buffer

Bits: TypeAlias = Buffer | mmap.mmap
"""A buffer that holds a bitmap."""
BitView: TypeAlias = bitarray
"""What `bitmap_view` returns, for modules that do not import bitarray."""
Run: TypeAlias = tuple[int, int]
"""Bits [start, stop), all ones, with a zero or an end on either side."""

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_STRETCH_BITS = 1 << 19
"""Bits that `runs` examines at once: all that it keeps in memory, and no more than the cache holds."""
_SPREAD = [b"".join(b"\xff" * 8 if byte >> bit & 1 else bytes(8) for bit in range(8)) for byte in range(256)]
"""For every value of one byte of an armed mask, the 64 bytes of exact bits that it stands for."""


def anonymous_memory(length: int) -> mmap.mmap:
    """Return memory that reads as zeroes and takes no space until touched. Raise `StorageError` if there is no room."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    with os_errors_at(f"{length} bytes of memory for a bitmap (a larger granularity needs less)"):
        return mmap.mmap(-1, max(length, REGION_BYTES), flags=flags)


def bitmap_view(buffer: Bits) -> bitarray:
    """Return the bits of `buffer`, shared, not copied. The buffer cannot be resized or closed while a view lives."""
    return bitarray(endian="little", buffer=buffer)


def set_range(view: bitarray, start: int, stop: int) -> None:
    """Set bits [start, stop)."""
    _check_range(view, start, stop)
    view[start:stop] = 1


def one_runs(view: bitarray, start: int, stop: int) -> Iterator[Run]:
    """Yield the runs of ones inside [start, stop) of a view, with one search per run: for ranges with few runs."""
    return _alike_runs(view, start, stop, 1)


def zero_runs(view: bitarray, start: int, stop: int) -> Iterator[Run]:
    """Yield the runs of zeros inside [start, stop), as `one_runs` does those of ones."""
    return _alike_runs(view, start, stop, 0)


def _alike_runs(view: bitarray, start: int, stop: int, bit: int) -> Iterator[Run]:
    _check_range(view, start, stop)
    while (first := view.find(bit, start, stop)) >= 0:
        last = view.find(1 - bit, first, stop)
        start = stop if last < 0 else last
        yield first, start


def any_one(view: bitarray, start: int, stop: int) -> bool:
    """Whether a bit of [start, stop) is set."""
    _check_range(view, start, stop)
    return view.find(1, start, stop) >= 0


def count_ones(buffer: Bits, start: int = 0, stop: int | None = None) -> int:
    """Return the number of bits set in [start, stop)."""
    view = bitmap_view(buffer)
    stop = len(view) if stop is None else stop
    _check_range(view, start, stop)
    return view.count(1, start, stop)


def truncate(buffer: Bits, bit_count: int) -> None:
    """Clear every bit from `bit_count` on; a count beyond the buffer clears nothing."""
    bitmap_view(buffer)[bit_count:] = 0


def runs(buffer: Bits, start: int = 0, stop: int | None = None) -> Iterator[Run]:
    """Yield the runs of ones inside [start, stop), ascending, in constant memory at millions a second.

    A run begins or ends where a bit differs from the one before it, so the runs are those edges in pairs. The pairs
    stay sorted and apart even while another thread changes the buffer; they may or may not show that change.
    """
    view = bitmap_view(buffer)
    stop = len(view) if stop is None else stop
    _check_range(view, start, stop)
    edges = chain.from_iterable(_edges(view, start, stop))
    return zip(edges, edges, strict=True)


def _edges(view: bitarray, start: int, stop: int) -> Iterator[Iterable[int]]:
    """Yield where bits differ from their predecessors, one iterable per stretch. Outside the range all bits are 0."""
    before = 0
    for base in range(start, stop, _STRETCH_BITS):
        stretch = view[base : min(base + _STRETCH_BITS, stop)]
        predecessors = stretch >> 1  # bitarray draws bit 0 leftmost: this moves every bit one number up
        predecessors[0] = before
        before = stretch[-1]
        yield map(base.__add__, (stretch ^ predecessors).search(1))
    if before:
        yield (stop,)


def or_into(target: Bits, source: Bits, target_offset: int = 0) -> None:
    """Set in `target`, from byte `target_offset` on, every bit that is set in `source`."""
    part = memoryview(target)[target_offset : target_offset + len(source)]
    assert len(part) == len(source), f"{len(source)} bytes do not fit at {target_offset} of {len(target)}"
    view = bitmap_view(part)
    view |= bitmap_view(source)


def and_into(target: Bits, source: Bits) -> None:
    """Keep in `target` only bits that are set in `source`, of the same length."""
    view, other = _facing(target, source)
    view &= other


def and_not_into(target: Bits, source: Bits) -> None:
    """Clear in `target` every bit that is set in `source`, of the same length."""
    view, other = _facing(target, source)
    view &= ~other


def xor_into(target: Bits, source: Bits) -> None:
    """Flip in `target` every bit that is set in `source`, of the same length."""
    view, other = _facing(target, source)
    view ^= other


def expand_mask(armed_mask: int) -> bytes:
    """Return the 512 bytes of exact bits that a 64-bit armed mask stands for: 64 ones per bit of the mask."""
    return b"".join([_SPREAD[byte] for byte in armed_mask.to_bytes(8, "little")])


def dirty_bits(armed_mask: int, exact: bytes) -> bytes:
    """Return the dirty bits of a region record: its exact bits, and every block of its armed extents."""
    if not armed_mask:
        return exact
    dirty = bytearray(expand_mask(armed_mask))
    or_into(dirty, exact)
    return bytes(dirty)


def regrain_outward(source_runs: Iterable[Run], source: Geometry, granularity_bits: int) -> Iterator[Run]:
    """Yield the same dirt in blocks of another granularity: every block that a source run touches, runs merged.

    `source_runs` are ascending runs of blocks of `source`; blocks past the disk's end are dropped.
    """
    target = Geometry(source.size, granularity_bits)
    touched = (target.blocks_outward(*source.bytes_of(start, stop)) for start, stop in source_runs)
    yield from joined_runs((blocks.start, blocks.stop) for blocks in touched)


def joined_runs(runs: Iterable[Run], gap: int = 0) -> Iterator[Run]:
    """Join runs that overlap, touch, or have at most `gap` bits between them; drop empty runs.

    `runs` are in the order of their starts.
    """
    held_start = held_stop = 0
    for start, stop in runs:
        if start >= stop:
            continue
        if held_start < held_stop and start <= held_stop + gap:
            held_stop = max(held_stop, stop)
            continue
        if held_start < held_stop:
            yield held_start, held_stop
        held_start, held_stop = start, stop
    if held_start < held_stop:
        yield held_start, held_stop


def _check_range(view: bitarray, start: int, stop: int) -> None:
    assert 0 <= start <= stop <= len(view), f"bits {start}..{stop} of {len(view)}"


def _facing(target: Bits, source: Bits) -> tuple[bitarray, bitarray]:
    assert len(target) == len(source), f"{len(target)} bytes and {len(source)}"
    return bitmap_view(target), bitmap_view(source)
