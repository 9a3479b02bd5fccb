"""Disk images: raw files and block devices.

- Every range is checked against `size` first. So no write makes a file longer. A read that meets the end of the file
  means that another program truncated it: that is EIO, never short data.
- Nothing depends on the descriptor's position: pread and pwrite pass an offset, and of lseek only the return value is
  used. So threads share the descriptor without a lock. The caller must ensure two things: no write is in flight past
  the new end of a `resize`, and nothing at all is in flight at `close`.
- An open image holds the byte-range locks that QEMU takes (image_locks.py) until it is closed.
- Holes of a file read as zeroes. Nothing is known about a block device: all of it is data.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Iterator

from lmdbitmap.errors import InvalidArgument, os_errors_at
from lmdbitmap.geometry import MAX_SIZE, ceil_div, check_range
from lmdbitmap.interfaces import Allocation, Buffer, ImageIdentity, joined
from lmdbitmap.system import kernel, linux
from lmdbitmap.system.file_systems import FILESYSTEM_KINDS
from lmdbitmap.system.files import pwrite_whole
from lmdbitmap.system.image_locks import lock_image
from lmdbitmap.work.buffers import in_bytes, read_whole

ZERO_CHUNK_BYTES = 1 << 20
PAGE_BYTES = 4096
_STAT_BLOCK_BYTES = 512
_READ_AHEAD_BYTES = 512 << 10
_EARLIEST_NS, _LATEST_NS = -(1 << 63), (1 << 63) - 1
"""All times that a sign of life can hold (storage/owner_file.py)."""

DATA = (False, False)
HOLE = (True, True)


class FileDevice:
    """A raw file or a block device. Make one with `FileDevice.open`."""

    def __init__(
        self,
        path: str,
        fd: int,
        *,
        read_only: bool,
        locked: bool = True,
        is_block_device: bool = False,
        sector_bytes: int = 1,
    ) -> None:
        self.path = path
        self.is_block_device = is_block_device
        self.locked = locked
        """Whether the image's locks keep QEMU out; False on a file system without locks."""
        self._fd = fd
        self._read_only = read_only
        self._size = os.lseek(fd, 0, os.SEEK_END)
        self._sector_bytes = sector_bytes
        self._resizing = threading.Lock()
        self._on_tmpfs: bool | None = None

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, read_only: bool = False, share_writes: bool = False
    ) -> FileDevice:
        """Open and lock an image. `share_writes` lets a reader open it while another program writes.

        Raises `NotFound`, `InvalidArgument` if it is not an image, `Busy` if QEMU or another lmdbitmap has it open in
        a way that conflicts with ours, `StorageError` for everything else.
        """
        place = os.fspath(path)
        if share_writes and not read_only:
            raise InvalidArgument("a writer cannot share writes", next_step="open the image read-only")
        is_block_device = _is_block_device(place)
        with os_errors_at(place):
            fd = os.open(place, _open_flags(read_only, is_block_device))
            try:
                return cls(
                    place,
                    fd,
                    read_only=read_only,
                    locked=lock_image(fd, place, writes=not read_only, share_writes=share_writes),
                    is_block_device=is_block_device,
                    sector_bytes=linux.logical_sector_bytes(fd) if is_block_device else 1,
                )
            except BaseException:
                os.close(fd)
                raise

    @property
    def size(self) -> int:
        return self._size

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def fd(self) -> int | None:
        return self._fd if self._fd >= 0 else None

    def identity(self) -> ImageIdentity:
        """Return the image's current identity.

        A block device is identified by its number, its size and the kernel's counters: the inode and mtime of its node
        say nothing about its data. An mtime that 64 bits cannot hold, as one after the year 2262, is the nearest that
        they can: no write leaves such a time. Raises `StorageError`.
        """
        with os_errors_at(self.path):
            status = os.fstat(self._fd)
            if self.is_block_device:
                size, trace = os.lseek(self._fd, 0, os.SEEK_END), kernel.device_trace(status.st_rdev)
                return ImageIdentity(status.st_rdev, 0, size, 0, trace)
        mtime_ns = min(max(status.st_mtime_ns, _EARLIEST_NS), _LATEST_NS)
        return ImageIdentity(status.st_dev, status.st_ino, status.st_size, mtime_ns)

    def pread(self, length: int, offset: int) -> bytes:
        check_range(offset, length, self._size)
        data = os.pread(self._fd, length, offset)
        if len(data) == length:
            return data
        return read_whole(self.pread_into, length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        buffer = in_bytes(buffer)
        check_range(offset, len(buffer), self._size)
        while buffer:
            count = os.preadv(self._fd, [buffer], offset)
            if count == 0:
                raise OSError(
                    errno.EIO,
                    f"the image ends at byte {offset} or before: it was cut while it was open",
                    self.path,
                )
            buffer = buffer[count:]
            offset += count

    def will_need(self, offset: int, length: int) -> None:
        """Ask the kernel to start reading a range that will be needed soon. This is only advice.

        It is asked in steps: of one range Linux reads no more than one request of the device or its `read_ahead_kb`.
        """
        with contextlib.suppress(OSError):
            for start in range(offset, offset + length, _READ_AHEAD_BYTES):
                step = min(_READ_AHEAD_BYTES, offset + length - start)
                os.posix_fadvise(self._fd, start, step, os.POSIX_FADV_WILLNEED)

    def pwrite(self, data: Buffer, offset: int) -> None:
        data = in_bytes(data)
        self._check_write(offset, len(data))
        pwrite_whole(self._fd, data, offset)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self._check_write(offset, length)
        start, stop = self._whole_sectors(offset, length)
        if start < stop and self._zero_in_place(start, stop - start, may_unmap, fast_only):
            self._write_zeroes_out(offset, start)
            self._write_zeroes_out(stop, offset + length)
        elif start < stop and fast_only:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), self.path)
        else:
            self._write_zeroes_out(offset, offset + length)

    def _zero_in_place(self, offset: int, length: int, may_unmap: bool, fast_only: bool) -> bool:
        """Try to zero the range with fallocate; return whether that worked.

        fallocate works on block devices too. There PUNCH_HOLE fails rather than write zeroes out, and ZERO_RANGE (the
        same as the BLKZEROOUT ioctl) may write them.
        """
        if may_unmap and linux.fallocate(self._fd, linux.FALLOC_FL_PUNCH_HOLE, offset, length):
            return True
        if self.is_block_device and fast_only:
            return False
        return linux.fallocate(self._fd, linux.FALLOC_FL_ZERO_RANGE, offset, length)

    def _write_zeroes_out(self, start: int, stop: int) -> None:
        zeroes = memoryview(bytes(min(stop - start, ZERO_CHUNK_BYTES)))
        for offset in range(start, stop, ZERO_CHUNK_BYTES):
            self.pwrite(zeroes[: stop - offset], offset)

    def discard(self, offset: int, length: int) -> None:
        """Discard a range. This is advice: does nothing if the file system or the device cannot discard."""
        self._check_write(offset, length)
        start, stop = self._whole_sectors(offset, length)
        if start >= stop:
            return
        if self.is_block_device:
            linux.block_discard(self._fd, start, stop - start)
        else:
            linux.fallocate(self._fd, linux.FALLOC_FL_PUNCH_HOLE, start, stop - start)

    def flush(self) -> None:
        if self._fd < 0:
            raise closed_error()
        os.fdatasync(self._fd)

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        check_range(offset, length, self._size)
        if self.is_block_device or self._is_slow_to_find_holes():
            return joined([Allocation(length, *DATA)])
        return joined(self._holes_and_data(offset, offset + length))

    def _holes_and_data(self, start: int, stop: int) -> Iterator[Allocation]:
        """Walk a file that may change meanwhile: every step advances, and unknown ranges count as data.

        Each step takes the descriptor anew: that of an image which was closed meanwhile may be another file's by now.
        """
        while start < stop:
            data = _next_data(self._fd, start, stop)
            yield Allocation(data - start, *HOLE)
            hole = _next_hole(self._fd, data, stop) if data < stop else stop
            yield Allocation(hole - data, *DATA)
            start = hole

    def _is_slow_to_find_holes(self) -> bool:
        """Return whether finding holes would block writers for long.

        To find the end of data, tmpfs looks at each page: a GiB takes 16 ms, during which no write proceeds. So a fully
        allocated file on tmpfs counts as data, even where it was only preallocated.
        """
        status = os.fstat(self._fd)
        return status.st_blocks * _STAT_BLOCK_BYTES >= status.st_size and self._is_on_tmpfs

    @property
    def _is_on_tmpfs(self) -> bool:
        """Asked once. Not a `cached_property`: up to Python 3.11 all images would wait for one that does not answer."""
        if self._on_tmpfs is None:
            try:
                self._on_tmpfs = FILESYSTEM_KINDS.get(linux.filesystem_number(self._fd)) == "tmpfs"
            except OSError:  # unknown: ask for holes
                self._on_tmpfs = False
        return self._on_tmpfs

    def resize(self, size: int) -> None:
        """Set the size; the added range reads as zeroes. Raises `InvalidArgument` for a block device."""
        if self.is_block_device:
            raise InvalidArgument(
                f"{self.path} is a block device",
                next_step="resize it with the tool that made it (lvresize, …)",
            )
        check_size(size)
        self._check_write(0, 0)
        with self._resizing:
            os.ftruncate(self._fd, size)
            self._size = size

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> FileDevice:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _check_write(self, offset: int, length: int) -> None:
        check_range(offset, length, self._size)
        if self._read_only:
            raise read_only_error(self.path)

    def _whole_sectors(self, offset: int, length: int) -> tuple[int, int]:
        """Return (start, stop) of the part that can be zeroed or discarded: whole sectors; for a file, all of it."""
        sector = self._sector_bytes
        return ceil_div(offset, sector) * sector, (offset + length) // sector * sector


def _open_flags(read_only: bool, is_block_device: bool) -> int:
    """Return the flags for `open`.

    With O_EXCL the kernel refuses a block device that is mounted or in use: we would miss the writes of others.
    """
    if read_only:
        return os.O_RDONLY | os.O_CLOEXEC
    return os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if is_block_device else 0)


def _is_block_device(place: str) -> bool:
    """Return whether `place` is a block device; raise `InvalidArgument` if it is not a regular file either.

    This is checked before opening: opening a fifo blocks, and opening a tape or a watchdog has side effects.
    """
    try:
        with os_errors_at(place):
            mode = os.stat(place).st_mode
    except ValueError as refusal:
        raise InvalidArgument(
            f"{place!r} is no file name ({refusal})", next_step="name an image"
        ) from refusal
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise InvalidArgument(
            f"{place} is neither a regular file nor a block device", next_step="name a disk image"
        )
    return stat.S_ISBLK(mode)


def check_size(size: int) -> None:
    if not 0 <= size <= MAX_SIZE:
        raise InvalidArgument(f"size {size} is outside 0..2^63-1", next_step="choose a size in between")


def read_only_error(place: str) -> OSError:
    """Return EPERM, the error that an NBD server answers for a write to a read-only export."""
    return OSError(errno.EPERM, "the image is open read-only", place)


def closed_error() -> OSError:
    return OSError(errno.EBADF, "the image is closed")


# --- holes ---


def _next_data(fd: int, start: int, stop: int) -> int:
    try:
        return min(os.lseek(fd, start, os.SEEK_DATA), stop)
    except OSError as refusal:
        if refusal.errno == errno.ENXIO:  # a hole to the end of the file; past its end is no hole
            return min(max(os.fstat(fd).st_size, start), stop)
        if refusal.errno in linux.UNSUPPORTED:
            return start
        raise


def _next_hole(fd: int, start: int, stop: int) -> int:
    try:
        hole = os.lseek(fd, start, os.SEEK_HOLE)
    except OSError as refusal:
        if refusal.errno in linux.UNSUPPORTED | {errno.ENXIO}:
            return stop
        raise
    if hole <= start:  # punched since SEEK_DATA reported data here
        hole = start + PAGE_BYTES
    return min(hole, stop)
