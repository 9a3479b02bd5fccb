"""The interfaces that packages share: a block device, a lane to a disk, a disk that can be served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Anything that holds bytes; memoryviews are flat, of format `B`."""


class Allocation(NamedTuple):
    """`length` bytes that are alike: `hole` takes no space, `zero` is known to read as zeroes."""

    length: int
    hole: bool
    zero: bool


def joined(parts: Iterable[Allocation]) -> Iterator[Allocation]:
    """Join neighbours that are alike; drop empty parts."""
    last = Allocation(0, hole=False, zero=False)
    for part in parts:
        if last.length == 0 or part[1:] == last[1:]:
            last = part._replace(length=last.length + part.length)
        elif part.length:
            yield last
            last = part
    if last.length:
        yield last


def overlaid(
    below: Iterable[Allocation], above: Iterable[tuple[int, tuple[bool, bool] | None]]
) -> Iterator[Allocation]:
    """Yield the (length, (hole, zero)) of `above`; where that pair is None, what `below` says of the same bytes."""
    parts = iter(below)
    part = Allocation(0, hole=False, zero=False)
    for length, known in above:
        while length:
            if not part.length:
                part = next(parts)
            size = min(part.length, length)
            yield part._replace(length=size) if known is None else Allocation(size, *known)
            part = part._replace(length=part.length - size)
            length -= size


class DeviceTrace(NamedTuple):
    """The kernel's counters of a block device in one boot. They change with every write, and with the device."""

    boot_id: str
    disk_sequence: int
    sectors_written: int
    label: str


class ImageIdentity(NamedTuple):
    """The facts of an image that stay the same while no other program writes it. No ctime: a chown changes it.

    For a block device, `device` is its number, and `inode` and `mtime_ns` are 0. Its `trace` is None where the
    kernel does not say enough.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int
    trace: DeviceTrace | None = None

    @property
    def is_block_device(self) -> bool:
        return self.inode == 0

    @property
    def last_change(self) -> tuple[int, int]:
        """The two facts that a write changes: the mtime, and the sectors written."""
        return self.mtime_ns, 0 if self.trace is None else self.trace.sectors_written


class StoreMark(NamedTuple):
    """The inode of a store's database file, the number of its newest transaction, and when the file was made.

    A copy is made later, and mostly has another inode: that of a file which was removed is given to a new one. An old
    copy that was put back has a lower transaction number, until it has gone on for a while.
    """

    inode: int
    transaction: int
    born_ns: int = 0
    """0 if the file system does not tell, or an older version left the mark."""

    def lacks(self, other: StoreMark) -> bool:
        """Whether it is older, be it of the same file or of a copy."""
        return self.transaction < other.transaction

    def is_of_the_file_of(self, other: StoreMark) -> bool:
        return self.inode == other.inode and (
            self.born_ns == other.born_ns or 0 in (self.born_ns, other.born_ns)
        )


class FarAway(TimeoutError):
    """The far side of a device does not answer now. It keeps all that it acknowledged: a later try may succeed."""


class BlockDevice(Protocol):
    """A disk image. Offsets and lengths are bytes; every method is safe for many threads.

    Ranges outside the device raise `InvalidArgument`; a refusal of the operating system raises `OSError`
    with its errno. Reads and writes are whole or raise.
    """

    @property
    def size(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def fd(self) -> int | None:
        """A descriptor on which plain pread and pwrite at the same offsets are equivalent, or None."""

    def pread(self, length: int, offset: int) -> bytes: ...
    def pread_into(self, buffer: memoryview, offset: int) -> None: ...
    def pwrite(self, data: Buffer, offset: int) -> None: ...
    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        """Make the range read as zeroes; `fast_only` raises OSError(ENOTSUP) rather than write them out."""

    def discard(self, offset: int, length: int) -> None:
        """Tell the device that the range is not needed. Its content is undefined afterwards."""

    def flush(self) -> None:
        """Return when everything written before the call is on stable storage."""

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        """Describe the range without a gap, neighbours differing; unknown is neither hole nor zero."""

    def resize(self, size: int) -> None: ...
    def close(self) -> None: ...


class TrackableDevice(BlockDevice, Protocol):
    """An image whose continuity can be proved."""

    def identity(self) -> ImageIdentity:
        """Return the image's identity now; `mtime_ns` is 0 where the modification time says nothing.

        On a block device, writes that are not flushed do not show yet.
        """
        ...


@runtime_checkable
class LeavesDoubt(Protocol):
    """A device whose writes may take place long after they failed, or once more after they were done."""

    def in_doubt(self) -> Sequence[tuple[int, int]]:
        """Return the bytes in doubt, as (start, stop). A write in doubt is among them by the time that it has ended."""


@runtime_checkable
class FlushesByItself(Protocol):
    """A device that also flushes unasked, and so may be the only one to learn that data was lost."""

    def tell_of_loss(self, tell: Callable[[OSError], None]) -> None:
        """Have `tell` called, from any thread, when a flush failed for good: it will not be retried."""


class Lane(Protocol):
    """A way to a disk, for one thread at a time: make one per thread or connection."""

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        """Do all (offset, data) pairs, in any order; answer {index: errno} of those that failed."""

    def pwrite(self, data: Buffer, offset: int) -> None: ...
    def pread_into(self, buffer: memoryview, offset: int) -> None: ...
    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class PatientLane(Lane, Protocol):
    """A lane whose writes may wait for more than the image. It calls `has_waited` after each write that had to."""

    has_waited: Callable[[], None]


class ServedDisk(Protocol):
    """The part of a disk that a server uses. `lane()` may be called from any thread, once per connection."""

    @property
    def size(self) -> int: ...
    @property
    def read_only(self) -> bool: ...
    @property
    def fd(self) -> int | None:
        """As for `BlockDevice`, for *reads* only: writes go through a lane."""

    def lane(self) -> Lane: ...
    def allocation(self, offset: int, length: int) -> Iterator[Allocation]: ...
