"""A disk as it was at one moment, to be read while its guest writes on: copy before write.

Each cluster of the disk is, at any moment, one of

    untouched   the image still holds its old data
    zero        its old data is known to be zeroes
    slot N      its old data is in slot N of the scratch file; the image may hold newer

and goes from untouched to one of the others, once. Clusters may be unwanted: from then on nothing of them is kept, and
no reader may read them. `want_only` makes all clusters but some unwanted. `read_once`, for a reader that reads each
cluster only once, as a backup does, makes those unwanted that were read. Invariants:

1. A write reaches the image only when no wanted cluster that it touches is still untouched: `keep` comes before the
   write. An old cluster is whole in the scratch file before its state says so.
2. A reader reads untouched clusters from the image, and looks at the states *afterwards*. A cluster that is untouched
   then was untouched during the read, so no write had landed. The reader takes all others from where their state says.
   It never sees a torn block. A reader in another process does the same in steps: it reads the image itself, then asks
   (`kept`), and takes changed clusters from here (direct.py). Its answer, never the read before it, ends the keeping.
3. If the scratch file (scratch.py) is full or fails, also when the system writes it back later, the snapshot is
   *broken*. Its readers are told why, even after their read, and writers go on at once. The guest never waits for a
   reader.
4. The disk keeps its size while it is held: a shrink would drop bits that readers still count on (`Filter.resize`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from lmdbitmap import bits
from lmdbitmap.bits import BitView, Run
from lmdbitmap.errors import InvalidArgument, LmdbitmapError, NotFound, StorageError
from lmdbitmap.geometry import Geometry, ceil_div, check_range
from lmdbitmap.images.device import DATA, HOLE
from lmdbitmap.images.plain import PlainLane
from lmdbitmap.images.read_only import ReadOnlyDevice
from lmdbitmap.interfaces import Allocation, BlockDevice, joined, overlaid
from lmdbitmap.qcow2.layout import cluster_bits_for, cluster_bits_like
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker.changes import Changes, changes
from lmdbitmap.tracker.cluster_states import (
    FIRST_SLOT,
    LOOK_CLUSTERS,
    MOST_SLOTS,
    UNTOUCHED,
    ZERO,
    ClusterStates,
)
from lmdbitmap.tracker.scratch import ScratchFile
from lmdbitmap.work.buffers import in_bytes, new_buffer

log = logging.getLogger(__name__)

_COPY_BYTES: Final = 1 << 20
"""Bytes that are read and kept at once."""


class Snapshot(ReadOnlyDevice):
    """The disk at `checkpoint`. A `BlockDevice` and a `ServedDisk`, for any number of threads, until `release`."""

    checkpoint: Checkpoint
    """Set when the snapshot is taken (points.py)."""

    def __init__(self, store: Store, disk: Disk, device: BlockDevice, file: ScratchFile) -> None:
        self.store = store
        self.disk = disk
        """The disk's description at the checkpoint."""
        self.clusters = Geometry(disk.size, cluster_bits_like(disk.granularity_bits))
        self.broken: str | None = None
        self.before_release: Callable[[], None] = lambda: None
        self.guests_are_quiet: Callable[[], bool] = lambda: False
        """Whether the guests' connections are idle. Set from outside."""
        self._device = device
        self._file = file
        self._states = ClusterStates(self.clusters.block_count)
        self._wanted: BitView | None = None
        """A bit for each cluster that will be read; None if all may be read."""
        self._passed: BitView | None = None
        """A bit for each cluster that was read for the last time; None if any may be read again."""
        self._keeping = threading.Lock()
        """Held while states change."""
        self._slot_count = min(file.limit_bytes >> self.clusters.granularity_bits, MOST_SLOTS)
        self._used_slots = 0
        self._readers: set[int] = set()
        """The threads that are reading."""
        self._lock = threading.RLock()
        """For `with`. That of the condition could be interrupted by a signal right before it lets go of the lock."""
        self._reading = threading.Condition(self._lock)
        self._released = self._is_closed = False
        self._buffer = new_buffer(_COPY_BYTES)
        self._zeroes = bytes(self.clusters.granularity)

    @property
    def spared_processors(self) -> int:
        """Processors that a reader leaves to the guest, which writes on."""
        return 0 if self.guests_are_quiet() else 1

    @property
    def name(self) -> str:
        """The export name under which it is served: no disk's name has an @."""
        return f"{self.disk.name}@{self.checkpoint.name}"

    @property
    def size(self) -> int:
        return self.clusters.size

    @property
    def image_fd(self) -> int | None:
        """A descriptor of the image. Its reader must ask afterwards what was `kept`."""
        return self._device.fd

    @property
    def kept_bytes(self) -> int:
        """Bytes in the scratch file."""
        return self._used_slots << self.clusters.granularity_bits

    @property
    def limit_bytes(self) -> int:
        return self._file.limit_bytes

    def changes(self, *, since: str) -> Changes:
        """Return what changed from checkpoint `since` up to the snapshot's own; see changes.py."""
        return changes(self.store, self.disk.name, since=since, until=self.checkpoint.name)

    # -- before a write ------------------------------------------------------------------------------------

    def keep(self, offset: int, length: int) -> None:
        """Return when the range may change: its old data is kept, or the snapshot is broken. Never raises."""
        if length == 0 or self.broken is not None:
            return
        clusters = self.clusters.blocks_outward(offset, length)
        with self._keeping:
            if not self._file.is_open or self.broken is not None:
                return
            try:
                for start, stop in self._untouched(clusters.start, clusters.stop):
                    self._file.require_room()
                    self._keep_run(start, stop)
            except (OSError, LmdbitmapError, MemoryError) as error:
                self._break(f"old data could not be kept ({str(error) or 'no memory is left'})")

    def _untouched(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the runs of wanted clusters in [start, stop) that are untouched."""
        for first, last in self._wanted_runs(start, stop):
            for state, begin, end in self._states.runs(first, last):
                if state == UNTOUCHED:
                    yield begin, end

    def _wanted_runs(self, start: int, stop: int) -> Iterator[Run]:
        for first, last in (
            [(start, stop)] if self._wanted is None else bits.one_runs(self._wanted, start, stop)
        ):
            if self._passed is None:
                yield first, last
            else:
                yield from bits.zero_runs(self._passed, first, last)

    def _keep_run(self, start: int, stop: int) -> None:
        """Keep untouched clusters. Read a short run without asking for holes: that may take a file system longer."""
        offset, length = self.clusters.bytes_of(start, stop)
        position = start
        for part in self._device.allocation(offset, length) if length > _COPY_BYTES else ():
            zero = self.clusters.blocks_inward(offset, part.length) if part.zero else range(0)
            if zero:
                self._keep_data(position, zero.start)
                self._states.set(zero.start, [ZERO] * len(zero))
                position = zero.stop
            offset += part.length
        self._keep_data(position, stop)

    def _keep_data(self, start: int, stop: int) -> None:
        step = _COPY_BYTES >> self.clusters.granularity_bits
        for first in range(start, stop, step):
            if self.broken is None:
                self._keep_piece(first, min(first + step, stop))

    def _keep_piece(self, start: int, stop: int) -> None:
        offset, length = self.clusters.bytes_of(start, stop)
        self._device.pread_into(memoryview(self._buffer)[:length], offset)
        cluster_size = self.clusters.granularity
        data = [at for at in range(0, length, cluster_size) if not self._is_zero(at, length)]
        if self._used_slots + len(data) > self._slot_count:
            self._break(f"its scratch file is full ({self.limit_bytes} bytes)")
            return
        states = [ZERO] * (stop - start)
        for at in data:
            self._file.put(memoryview(self._buffer)[at : min(at + cluster_size, length)], self.kept_bytes)
            states[at // cluster_size] = FIRST_SLOT + self._used_slots
            self._used_slots += 1
        self._states.set(start, states)

    def _is_zero(self, at: int, length: int) -> bool:
        stop = min(at + self.clusters.granularity, length)
        return self._buffer.startswith(self._zeroes[: stop - at], at, stop)

    def _break(self, reason: str) -> None:
        """Keep nothing from now on. Caller holds `_keeping`."""
        if self.broken is None:
            self.broken = f"the snapshot broke: {reason}"
            log.warning("disk %s: %s", self.disk.name, self.broken)
            self._file.empty()

    # -- reading -------------------------------------------------------------------------------------------

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Read old data. Raise `StorageError` once the snapshot is broken or released."""
        buffer = in_bytes(buffer)
        check_range(offset, len(buffer), self.size)
        if not buffer:
            return
        with self._being_read():
            clusters = self.clusters.blocks_outward(offset, len(buffer))
            for state, start, stop in self._states.runs(clusters.start, clusters.stop):
                if state == UNTOUCHED:
                    self._read_untouched(buffer, offset, start, stop)
            self._require_wanted(clusters)  # looked at afterwards, as the states are
            is_from_file = False
            for state, start, stop in self._states.runs(clusters.start, clusters.stop):
                if state != UNTOUCHED:
                    self._read_kept(buffer, offset, start, stop, state)
                    is_from_file |= state >= FIRST_SLOT
            if is_from_file:
                self._require_kept()
        self._pass(offset, len(buffer))

    def _read_untouched(self, buffer: memoryview, offset: int, start: int, stop: int) -> None:
        part, at = self._part(buffer, offset, start, stop)
        self._device.pread_into(part, at)

    def _read_kept(self, buffer: memoryview, offset: int, start: int, stop: int, state: int) -> None:
        part, at = self._part(buffer, offset, start, stop)
        if state == ZERO:
            part[:] = bytes(len(part))
        else:  # short if it broke meanwhile: `_being_read` tells the reader at its end
            inside = at - (start << self.clusters.granularity_bits)
            self._file.fill(part, ((state - FIRST_SLOT) << self.clusters.granularity_bits) + inside)

    def _require_kept(self) -> None:
        """Break if the system lost old data, of which it tells only once: so nobody else may ask meanwhile."""
        with self._keeping:
            if self.broken is None:
                try:
                    self._file.require_kept()
                except OSError as error:
                    self._break(f"old data was lost after it was kept ({error})")

    def _part(self, buffer: memoryview, offset: int, start: int, stop: int) -> tuple[memoryview, int]:
        """Return the part of a buffer that clusters [start, stop) fill, and its offset on the disk."""
        begin, end = self._inside(offset, offset + len(buffer), start, stop)
        return buffer[begin - offset : end - offset], begin

    def _inside(self, begin: int, end: int, start: int, stop: int) -> tuple[int, int]:
        """Return the part of bytes [begin, end) that lies in clusters [start, stop); it may be empty."""
        offset, length = self.clusters.bytes_of(start, stop)
        first = max(offset, begin)
        return first, max(min(offset + length, end), first)

    def kept(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """Return (bytes, whether to read them again, here) of a range that the caller read from the image, gapless.

        The rest was old data when the caller read it. It is no longer kept if nothing is read twice (`read_once`).
        Raises as `pread_into` does; nothing is then known of what was read.
        """
        check_range(offset, length, self.size)
        clusters = self.clusters.blocks_outward(offset, length)
        found = []
        with self._being_read():
            self._require_wanted(clusters)
            for state, start, stop in self._states.runs(clusters.start, clusters.stop):
                begin, end = self._inside(offset, offset + length, start, stop)
                found.append((end - begin, state != UNTOUCHED))
        position = offset
        for size, is_kept in found:
            if not is_kept:
                self._pass(position, size)
            position += size
        return found

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        """Describe the range. The image's answer counts for clusters that are still untouched and wanted afterwards.
        All others are data, or zero where their state says so."""
        check_range(offset, length, self.size)
        return joined(self._allocation(offset, length))

    def _allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        step = LOOK_CLUSTERS << self.clusters.granularity_bits
        for position in range(offset - offset % step, offset + length, step):
            begin, end = max(position, offset), min(position + step, offset + length)
            with self._being_read():
                found = list(self._allocation_of(begin, end - begin))
            yield from found

    def _allocation_of(self, offset: int, length: int) -> Iterator[Allocation]:
        """Ask the image once, however much was touched: some file systems take long to find where data ends, and make
        writers wait."""
        of_image = list(self._device.allocation(offset, length))
        return overlaid(of_image, self._known_of(offset, length))

    def _known_of(self, offset: int, length: int) -> Iterator[tuple[int, tuple[bool, bool] | None]]:
        """Yield runs of bytes with what they are, whatever the image says; None where the image's answer counts."""
        clusters = self.clusters.blocks_outward(offset, length)
        for state, start, stop in self._states.runs(clusters.start, clusters.stop):
            begin, end = self._inside(offset, offset + length, start, stop)
            if state == UNTOUCHED:
                yield end - begin, None if self._are_wanted(range(start, stop)) else DATA
            else:
                yield end - begin, HOLE if state == ZERO else DATA

    # -- whose data is wanted ------------------------------------------------------------------------------

    def want_only(self, runs: Iterable[Run], geometry: Geometry) -> None:
        """Keep from now on only `runs` of blocks of `geometry`, ascending, each rounded outward to clusters.

        Call it once at most. Any other read is refused from then on.
        """
        wanted = self._bit_for_each()
        for start, stop in bits.regrain_outward(runs, geometry, self.clusters.granularity_bits):
            bits.set_range(wanted, start, stop)
        self._wanted = wanted

    def want_changes(self, *, since: str) -> None:
        """Keep only the clusters that a backup since checkpoint `since` reads; all, if these are unknown.

        Raises `NotFound` without such a checkpoint.
        """
        try:
            changed = self.changes(since=since)
        except NotFound:
            raise
        except LmdbitmapError:  # a later question of what changed gets this error, for its disk alone
            return
        geometry = changed.geometry
        clusters = Geometry(geometry.size, cluster_bits_for(geometry))
        last = (max(geometry.block_count - 1, 0), geometry.block_count)
        wanted = itertools.chain(changed.runs(), [last])
        self.want_only(bits.regrain_outward(wanted, geometry, clusters.granularity_bits), clusters)

    def read_once(self) -> None:
        """From now on, keep nothing that was read: it will not be read again. Call it once, before any read."""
        self._passed = self._bit_for_each()

    def _bit_for_each(self) -> BitView:
        return bits.bitmap_view(bits.anonymous_memory(ceil_div(self.clusters.block_count, 8)))

    def _pass(self, offset: int, length: int) -> None:
        """Stop keeping clusters that were read whole: their reader has the data."""
        if self._passed is not None:
            clusters = self.clusters.blocks_inward(offset, length)
            bits.set_range(self._passed, clusters.start, clusters.stop)

    def _require_wanted(self, clusters: range) -> None:
        if not self._are_wanted(clusters):
            raise InvalidArgument(
                f"clusters {clusters.start}..{clusters.stop} are not kept by this snapshot, or not any more",
                next_step="read only what it was made for",
            )

    def _are_wanted(self, clusters: range) -> bool:
        return list(self._wanted_runs(clusters.start, clusters.stop)) == [(clusters.start, clusters.stop)]

    # -- the end -------------------------------------------------------------------------------------------

    def lane(self) -> PlainLane:
        return PlainLane(self)

    def release(self) -> None:
        """Give everything back, after waiting for readers; later reads raise. Idempotent.

        Writers keep old data until the last reader is done. The caller does not wait for itself: an interrupted read
        may not have been counted out.
        """
        with self._lock:
            self._released = True
            self._reading.wait_for(lambda: not self._readers - {threading.get_ident()})
        self.before_release()
        self.before_release = lambda: None  # it leads back here: memory would wait for Python's collector
        with self._keeping:
            self._is_closed = True
            self._file.close()

    def close(self) -> None:
        self.release()

    def __enter__(self) -> Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @contextlib.contextmanager
    def _being_read(self) -> Iterator[None]:
        """Keep the file open in the block. Data read there is old data if the block ends without an error."""
        with self._lock:
            if self._released:
                raise self._refusal("the snapshot was released")
            self._readers.add(threading.get_ident())
        try:
            yield
            if self.broken is not None:
                raise self._refusal(self.broken)
            if self._is_closed:  # by this very thread, in the middle of its read, as by a signal's handler
                raise self._refusal("the snapshot was released")
        finally:
            with self._lock:
                self._readers.discard(threading.get_ident())
                self._reading.notify_all()

    def _refusal(self, problem: str) -> StorageError:
        return StorageError(
            f"snapshot of disk {self.disk.name!r}",
            OSError(problem),
            next_step="make another one, with more room for old data (serve --scratch-limit) if that was lacking",
        )


def broken_error(disk: Disk, reason: str) -> StorageError:
    """Return the error for a copy of a disk whose snapshot broke meanwhile."""
    return StorageError(
        f"disk {disk.name!r}",
        OSError(reason),
        next_step="make the backup again, with more room for old data (serve --scratch-limit) if that was lacking;"
        " the guest noticed nothing",
    )
