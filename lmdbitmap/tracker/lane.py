"""The hot path: lanes through the filter, one thread in each, and the gate that closes all lanes for a moment.

Speed outranks beauty in `FilterLane.pwrite` and `write_many`, and nowhere else. A write to settled blocks costs one
look at the bitmap and the system call. Every other write takes the slow path below them.

Law 2 (freeze) is kept without a lock on the fast path. A lane is `busy` from before it looks at its size and bitmap
until its write is done. The thread that closes the gate first takes the size away, then waits:

    lane                                    Gate.drained
    busy = True                             lane.size = -1            (every lane)
    end <= size, and settled? then write    wait until not lane.busy  (every lane)
    busy = False                            ... nobody writes here ...
                                            lane.settled, lane.size = the new ones

A lane that looks too late sees a disk on which nothing fits. It takes the slow path, and waits at the gate without
being busy. The interpreter's global lock guarantees the order of these plain attribute accesses. Without that lock
(free threading) this module would need real atomics.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lmdbitmap.bits import Run
from lmdbitmap.errors import InvalidArgument, StorageError
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import BlockDevice, Buffer
from lmdbitmap.work.buffers import in_bytes

if TYPE_CHECKING:
    from bitarray import bitarray

_CLOSED = -1
_DRAIN_POLL_S = 0.0001
_QUICK_POLLS = 100
_LONGEST_POLL_S = 0.01
_SLOWER = 1.1
_WAIT_S = 0.0002
"""Marking that takes longer was a wait: new dirt in an armed extent takes microseconds, a commit many times this."""
_NO_FAILURES: Mapping[int, int] = {}
_OFF_THE_DISK_OR_REFUSED = (IndexError, InvalidArgument, OSError)
"""Raised on the fast path, which checks no lower bound: a negative offset, an empty write at the end, a full disk."""


@runtime_checkable
class WritesTogether(Protocol):
    """A device, such as a remote one, that takes many writes in one call."""

    def pwrite_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, Exception]:
        """Do all (offset, data) pairs, in any order. Return the failures by position."""


class Gate:
    """The gate that every write passes: unseen on the fast path, by `entering` on the slow one. `drained` closes it."""

    def __init__(self, geometry: Geometry, settled: bitarray) -> None:
        self.geometry = geometry
        self.settled = settled
        self._lock = threading.Lock()
        self._lanes: weakref.WeakSet[FilterLane] = weakref.WeakSet()
        self._shut: StorageError | None = None
        self.is_slow = False
        """Whether every write takes the slow path, as if nothing were settled. Set it while the gate is closed."""

    def add(self, lane: FilterLane) -> None:
        with self._lock:
            self._lanes.add(lane)
            self._open(lane)

    @contextlib.contextmanager
    def entering(self, lane: FilterLane) -> Iterator[Geometry]:
        """Enter by the slow path: wait while the gate is closed, then be busy. Yields the disk's geometry."""
        try:
            with self._lock:
                if self._shut is not None:
                    raise self._shut
                lane.busy = True
            yield self.geometry
        finally:
            lane.busy = False

    @contextlib.contextmanager
    def drained(self) -> Iterator[None]:
        """Keep the gate closed in the block: nobody writes. Set `geometry` and `settled` there for what follows."""
        with self._lock:
            if self._shut is not None:
                raise self._shut
            lanes = list(self._lanes)
            try:
                for lane in lanes:
                    lane.size = _CLOSED
                _await_idle(lanes)
                yield
            finally:
                for lane in lanes:
                    self._open(lane)

    @property
    def is_shut(self) -> bool:
        return self._shut is not None

    def shut(self, refusal: StorageError) -> None:
        """Refuse every write, and every `drained`, from now on. Called inside `drained`."""
        self._shut = refusal

    def forsake(self, refusal: StorageError) -> None:
        """Refuse every write in a forked child. The lock is made anew: its holder's thread does not exist here."""
        self._lock = threading.Lock()
        self._shut = refusal
        for lane in list(self._lanes):
            lane.size = _CLOSED

    def _open(self, lane: FilterLane) -> None:
        if self._shut is None:
            lane.settled = self.settled
            lane.size = _CLOSED if self.is_slow else self.geometry.size


class FilterLane:
    """A way through the filter, for one thread at a time.

    `mark` returns when the runs are settled, or raises `StorageError`. `flush` flushes the disk; default: the device.
    """

    __slots__ = (
        "__weakref__",
        "_device",
        "_fd",
        "_flush",
        "_gate",
        "_mark",
        "_pwrite",
        "_pwrite_many",
        "_shift",
        "busy",
        "has_waited",
        "settled",
        "size",
    )

    settled: bitarray
    size: int
    has_waited: Callable[[], None]
    """Called after a write that had to wait for a commit, or at the gate."""

    def __init__(
        self,
        gate: Gate,
        device: BlockDevice,
        mark: Callable[[list[Run]], None],
        flush: Callable[[], None] | None = None,
    ) -> None:
        self.busy = False
        self.has_waited = _nothing
        self._flush = flush or device.flush
        self._device = device
        self._gate = gate
        self._mark = mark
        self._shift = gate.geometry.granularity_bits
        self._fd = -1 if device.fd is None else device.fd
        self._pwrite = _shortest_pwrite(device)
        self._pwrite_many = _widest_pwrite(device)
        self.settled = gate.settled
        self.size = _CLOSED
        gate.add(self)

    # -- fast ----------------------------------------------------------------------------------------------

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of `data`; its blocks are durably dirty before (law 1).

        Raises `InvalidArgument` outside the disk, `OSError` as the image does, and `StorageError` if the policy is
        strict and the dirtiness cannot be made durable.
        """
        if type(data) is not bytes:
            data = in_bytes(data)
        self.busy = True
        try:
            length, shift = len(data), self._shift
            end, first = offset + length, offset >> shift
            if (
                end <= self.size
                and self.settled[first]
                and ((end - 1) >> shift == first or self.settled.find(0, first, ((end - 1) >> shift) + 1) < 0)
                and self._pwrite(self._fd, data, offset) == length
            ):
                return
        except _OFF_THE_DISK_OR_REFUSED:
            pass  # the slow path says why
        finally:
            self.busy = False
        failed = self._write_slowly([(offset, memoryview(data))])
        if failed:
            raise failed[0]

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        """Do all (offset, data) pairs; those not settled share one commit. Return {index: errno}."""
        if self._fd < 0:
            return self._write_together(writes)
        unsettled: list[int] = []
        self.busy = True
        try:
            size, settled, shift, pwrite, fd = self.size, self.settled, self._shift, self._pwrite, self._fd
            for index, (offset, data) in enumerate(writes):
                end = offset + data.nbytes
                first = offset >> shift
                try:
                    if (
                        end <= size
                        and settled[first]
                        and (
                            (end - 1) >> shift == first
                            or settled.find(0, first, ((end - 1) >> shift) + 1) < 0
                        )
                        and pwrite(fd, data, offset) == end - offset
                    ):
                        continue
                except _OFF_THE_DISK_OR_REFUSED:
                    pass
                unsettled.append(index)  # or short, or refused: the slow path finishes it, or says why
        finally:
            self.busy = False
        if not unsettled:
            return _NO_FAILURES
        failed = self._write_slowly([_in_bytes(writes[index]) for index in unsettled])
        return {unsettled[position]: _errno_of(error) for position, error in failed.items()}

    def _write_together(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        """Do `write_many` on a remote device: hand it all settled writes in one call."""
        writes = [_in_bytes(write) for write in writes]
        self.busy = True
        try:
            settled = [
                index for index, (offset, data) in enumerate(writes) if self._is_settled(offset, len(data))
            ]
            done = self._pwrite_many([writes[index] for index in settled])
            failed = {settled[position]: error for position, error in done.items()}
        finally:
            self.busy = False
        unsettled = sorted(set(range(len(writes))).difference(settled))
        if unsettled:
            done = self._write_slowly([writes[index] for index in unsettled])
            failed |= {unsettled[position]: error for position, error in done.items()}
        return {index: _errno_of(error) for index, error in failed.items()}

    def _is_settled(self, offset: int, length: int) -> bool:
        """Whether all of a range is on the disk, not empty, and durably dirty."""
        if offset < 0 or length == 0 or offset + length > self.size:
            return False
        return self.settled.find(0, offset >> self._shift, ((offset + length - 1) >> self._shift) + 1) < 0

    # -- slow ----------------------------------------------------------------------------------------------

    def _write_slowly(self, writes: Sequence[tuple[int, memoryview]]) -> dict[int, Exception]:
        """Make the dirt of all `writes` durable in one commit, then write. Return the failures by position."""
        failed: dict[int, Exception] = {}
        begun_s = time.monotonic()
        with self._gate.entering(self) as geometry:
            runs: dict[int, Run] = {}
            for position, (offset, data) in enumerate(writes):
                try:
                    blocks = geometry.blocks_outward(offset, len(data))
                    runs[position] = (blocks.start, blocks.stop)
                except InvalidArgument as error:
                    failed[position] = error
            try:
                self._mark(list(runs.values()))
            except StorageError as error:
                return failed | dict.fromkeys(runs, error)
            if time.monotonic() - begun_s > _WAIT_S:
                self.has_waited()
            failed |= self._write_marked({position: writes[position] for position in runs})
        return failed

    def _write_marked(self, writes: Mapping[int, tuple[int, memoryview]]) -> dict[int, Exception]:
        """Write to blocks that are durably dirty. Return the failures by position."""
        if self._fd < 0:
            positions = list(writes)
            done = self._pwrite_many(list(writes.values()))
            return {positions[index]: error for index, error in done.items()}
        failed: dict[int, Exception] = {}
        for position, (offset, data) in writes.items():
            try:
                if self._pwrite(self._fd, data, offset) != len(data):
                    self._device.pwrite(data, offset)
            except OSError as error:
                failed[position] = error
        return failed

    def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = True, fast_only: bool = False
    ) -> None:
        with self._marked(offset, length):
            self._device.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    def discard(self, offset: int, length: int) -> None:
        with self._marked(offset, length):
            self._device.discard(offset, length)

    @contextlib.contextmanager
    def _marked(self, offset: int, length: int) -> Iterator[None]:
        """Inside the block the range is durably dirty, and may be changed (laws 1 and 2)."""
        with self._gate.entering(self) as geometry:
            blocks = geometry.blocks_outward(offset, length)
            self._mark([(blocks.start, blocks.stop)])
            yield

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self._device.pread_into(buffer, offset)

    def flush(self) -> None:
        """The bits are durable already: only the image is flushed."""
        self._flush()

    def close(self) -> None:
        """Nothing to give back: the gate forgets a lane that nobody holds."""


def _await_idle(lanes: Sequence[FilterLane]) -> None:
    """Wait until no lane is busy, by polling: a write in flight ends by itself, and the fast path signals nothing."""
    pauses = poll_pauses_s()
    for lane in lanes:
        while lane.busy:
            time.sleep(next(pauses))


def poll_pauses_s() -> Iterator[float]:
    """Yield the pauses between looks at busy lanes.

    They are short for as long as any local write takes, since writers wait at the gate meanwhile. A remote image may
    hang for hours: the pauses then grow, by at most a tenth of the time waited so far.
    """
    yield from itertools.repeat(_DRAIN_POLL_S, _QUICK_POLLS)
    pause_s = _DRAIN_POLL_S
    while True:
        pause_s = min(_SLOWER * pause_s, _LONGEST_POLL_S)
        yield pause_s


def _nothing() -> None:
    """Do nothing about a wait."""


def _in_bytes(write: tuple[int, memoryview]) -> tuple[int, memoryview]:
    return write[0], in_bytes(write[1])


def _shortest_pwrite(device: BlockDevice) -> Callable[[int, Buffer, int], int]:
    """Return the system call itself if the device has a descriptor, else a function of the same form."""
    if device.fd is not None:
        return os.pwrite

    def pwrite(_: int, data: Buffer, offset: int) -> int:
        device.pwrite(data, offset)
        return len(data)

    return pwrite


def _widest_pwrite(
    device: BlockDevice,
) -> Callable[[Sequence[tuple[int, memoryview]]], Mapping[int, Exception]]:
    """Return the device's own function for many writes in one call, or one that does them one after another."""
    if isinstance(device, WritesTogether):
        return device.pwrite_many

    def pwrite_many(writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, Exception]:
        failed: dict[int, Exception] = {}
        for position, (offset, data) in enumerate(writes):
            try:
                device.pwrite(data, offset)
            except (InvalidArgument, OSError) as error:
                failed[position] = error
        return failed

    return pwrite_many


def _errno_of(error: Exception) -> int:
    if isinstance(error, InvalidArgument):
        return errno.ENOSPC
    return (error.errno if isinstance(error, OSError) else None) or errno.EIO
