"""A disk served without tracking: the baseline for benchmarks, and the simplest `ServedDisk`."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.interfaces import Allocation, BlockDevice, Buffer


class PlainDisk:
    """Serves a `BlockDevice` that it does not own: the opener closes the device."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device

    @property
    def size(self) -> int:
        return self._device.size

    @property
    def read_only(self) -> bool:
        return self._device.read_only

    @property
    def fd(self) -> int | None:
        return self._device.fd

    def lane(self) -> PlainLane:
        return PlainLane(self._device)

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        return self._device.allocation(offset, length)


class PlainLane:
    """Passes every call to the device; writes go straight to its descriptor if it has one."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        fd, size = self._device.fd, self._device.size
        failed: dict[int, int] = {}
        for index, (offset, data) in enumerate(writes):
            try:
                if fd is None or offset + data.nbytes > size or os.pwrite(fd, data, offset) != data.nbytes:
                    self._device.pwrite(data, offset)
            except OSError as error:
                failed[index] = error.errno or errno.EIO
            except InvalidArgument:
                failed[index] = errno.EINVAL
        return failed

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._device.pwrite(data, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self._device.pread_into(buffer, offset)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self._device.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def discard(self, offset: int, length: int) -> None:
        self._device.discard(offset, length)

    def flush(self) -> None:
        self._device.flush()

    def close(self) -> None:
        """Do nothing: a plain lane holds nothing."""
