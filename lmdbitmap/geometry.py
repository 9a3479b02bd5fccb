"""All arithmetic between bytes and blocks. Ranges are half-open; an empty range is a no-op everywhere.

byte     0        g        2g       3g    size
         |--------|--------|--------|-----|        the last block may be short
block        0        1        2       3
extent   64 blocks, the unit of arming; 64 extents are one region of 4096 blocks, the unit of storage
"""

from __future__ import annotations

from dataclasses import dataclass

from lmdbitmap.errors import InvalidArgument

EXTENT_BLOCKS = 64
"""Blocks guarded by one bit of the armed mask: one 64-bit word of exact bits."""
REGION_EXTENTS = 64
"""Extents in a region: one 64-bit armed mask."""
REGION_BLOCKS = REGION_EXTENTS * EXTENT_BLOCKS
"""Blocks in a region: one record of the store."""
REGION_BYTES = REGION_BLOCKS // 8
"""Bytes of exact bits in one region record."""

MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
MAX_SIZE = 2**63 - 1
"""The largest offset of the operating system and of NBD, in bytes."""


def granularity_bits_of(granularity: int) -> int:
    """Return the exponent of a granularity in bytes. Raise `InvalidArgument` unless a power of two, 512 B to 2 GiB."""
    bits = granularity.bit_length() - 1
    if granularity != 1 << max(bits, 0) or not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        raise InvalidArgument(
            f"granularity {granularity} is not a power of two between 512 and {1 << MAX_GRANULARITY_BITS} bytes",
            next_step="choose one such as 65536",
        )
    return bits


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def check_range(offset: int, length: int, size: int) -> None:
    """Raise `InvalidArgument` unless [offset, offset + length) lies on a disk of `size` bytes."""
    if offset < 0 or length < 0 or offset + length > size:
        raise InvalidArgument(
            f"bytes {offset}..{offset + length} are not on a disk of {size} bytes",
            next_step="stay between 0 and the disk's size",
        )


@dataclass(frozen=True, slots=True)
class Geometry:
    """A disk of `size` bytes seen as blocks of `1 << granularity_bits` bytes."""

    size: int
    granularity_bits: int

    def __post_init__(self) -> None:
        if not (isinstance(self.size, int) and 0 <= self.size <= MAX_SIZE):
            raise InvalidArgument(
                f"disk size {self.size!r} is no whole number within 0..2^63-1", next_step="check the image"
            )
        bits = self.granularity_bits
        if not (isinstance(bits, int) and MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS):
            raise InvalidArgument(
                f"granularity_bits {bits!r} is no whole number within {MIN_GRANULARITY_BITS}..{MAX_GRANULARITY_BITS}",
                next_step="give the exponent, such as 16 for blocks of 65536 bytes",
            )

    @property
    def granularity(self) -> int:
        return 1 << self.granularity_bits

    @property
    def block_count(self) -> int:
        return ceil_div(self.size, self.granularity)

    @property
    def region_count(self) -> int:
        return ceil_div(self.block_count, REGION_BLOCKS)

    def check_range(self, offset: int, length: int) -> None:
        check_range(offset, length, self.size)

    def check_blocks(self, start: int, stop: int) -> None:
        """Raise `InvalidArgument` unless [start, stop) are blocks of the disk."""
        if not 0 <= start <= stop <= self.block_count:
            raise InvalidArgument(
                f"blocks {start}..{stop} are not on a disk of {self.block_count} blocks",
                next_step="stay between 0 and the disk's number of blocks",
            )

    def blocks_outward(self, offset: int, length: int) -> range:
        """Every block that [offset, offset + length) touches: the rounding for marking."""
        self.check_range(offset, length)
        if length == 0:
            return range(0)
        bits = self.granularity_bits
        return range(offset >> bits, ((offset + length - 1) >> bits) + 1)

    def blocks_inward(self, offset: int, length: int) -> range:
        """Only the blocks that [offset, offset + length) covers wholly: the rounding for clearing."""
        self.check_range(offset, length)
        first = ceil_div(offset, self.granularity)
        end = offset + length
        stop = self.block_count if end == self.size else end >> self.granularity_bits
        return range(first, stop) if first < stop else range(0)

    def bytes_of(self, block_start: int, block_stop: int) -> tuple[int, int]:
        """(offset, length) in bytes of blocks [block_start, block_stop), clipped to the disk."""
        offset = min(block_start << self.granularity_bits, self.size)
        end = min(block_stop << self.granularity_bits, self.size)
        return offset, max(end - offset, 0)

    def bytes_in(self, block_count: int, *, with_last: bool) -> int:
        """Return the bytes in `block_count` blocks. `with_last`: the disk's last one, perhaps short, is among them."""
        missing = -self.size % self.granularity if with_last else 0
        return (block_count << self.granularity_bits) - missing
