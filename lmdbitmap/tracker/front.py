"""The interface of an attached disk for servers and agents: reads of the image, and a lane per writing thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from lmdbitmap.interfaces import Allocation, Buffer, TrackableDevice
from lmdbitmap.tracker.lane import FilterLane


class Front:
    """A base for the `BlockDevice` and `ServedDisk` in front of `device`. A subclass makes the lanes."""

    read_only = False

    def __init__(self, device: TrackableDevice) -> None:
        self.device = device
        self._threads = threading.local()

    def lane(self) -> FilterLane:
        """A new lane, for one thread at a time."""
        raise NotImplementedError  # pragma: no cover

    @property
    def fd(self) -> int | None:
        """The image's descriptor, for reads only: a write to it would not be tracked."""
        return self.device.fd

    def pread(self, length: int, offset: int) -> bytes:
        return self.device.pread(length, offset)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.device.pread_into(buffer, offset)

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        return self.device.allocation(offset, length)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write through the calling thread's lane; see `FilterLane.pwrite`."""
        self._my_lane().pwrite(data, offset)

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        self._my_lane().write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def discard(self, offset: int, length: int) -> None:
        self._my_lane().discard(offset, length)

    def _my_lane(self) -> FilterLane:
        try:
            return self._threads.lane  # type: ignore[no-any-return]
        except AttributeError:
            self._threads.lane = self.lane()
            return self._threads.lane  # type: ignore[no-any-return]
