"""Backups as a stream in the format of `rbd export-diff` (rbd_diff.py): for a pipe, another host, or Ceph.

The receiver counts from checkpoints. A stream leads from one checkpoint, or from nothing, to one that is taken for it,
and that stays. The order follows from it:

    get at the disk (access.py)         own it, or reach its owner; if continuity is not proven, a new epoch begins
    refuse what cannot be counted from  before anything is made
    note its name, synced               in the store (holds.py): others may merge away a dead run's checkpoint
    take the checkpoint                 the point in time that the receiver will hold
    stream what changed up to it        dirty and zero is sent as zeroes, never left out
    see that nobody wrote the image     the copy is of one point in time
    drop the note, synced               from now on a receiver may count from the checkpoint
    the end record                      only now can the receiver take it for whole
    sync it, if it goes into a file     law 3: who is told that it is whole counts from its checkpoint from now on

A failure until then takes the checkpoint back, and a death there leaves it to the next stream or backup of
that disk: the receiver has no whole stream, and the next one counts from the end of the last one that was received. A
name that the caller gave could be another checkpoint's, so such a run is known by its checkpoint's uuid, noted right
after it was taken. Nothing that a receiver may still count from is ever forgotten here: the operator of both ends
forgets old checkpoints (law 3 is theirs to keep).
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from uuid import uuid4

from lmdbitmap import bits
from lmdbitmap.access.access import Access, AccessTerms, access, open_to_read, reading
from lmdbitmap.access.routes import FREEZE_LIMIT_S, OWNER_LIMIT_S, PointInTime, Quiesced
from lmdbitmap.backups import consumers
from lmdbitmap.bits import Run
from lmdbitmap.copying.pieces import Pieces
from lmdbitmap.errors import LmdbitmapError, StorageError, os_errors_at
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import BlockDevice, Buffer
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.notes.holds import HoldFile, UnderWay
from lmdbitmap.qcow2.layout import cluster_bits_for
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store
from lmdbitmap.streams.rbd_diff import Encoder, Head
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.changes import Changes, changes_since
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.session import OpenDevice
from lmdbitmap.work.patience import Patience
from lmdbitmap.work.progress import Progress, Report

log = logging.getLogger(__name__)

_PLACE = "the stream"
_SMALL_BYTES = 64 << 10
"""Bytes collected before they are written: a fragmented disk has millions of records of zeroes."""


class ByteOutput(Protocol):
    """An unbuffered binary file, a pipe or a socket's file."""

    def write(self, data: Buffer, /) -> int | None: ...


class Streamed(NamedTuple):
    """Bytes of the disk that the stream names, how many of them are zeroes, and bytes of the stream."""

    bytes_changed: int
    bytes_zero: int
    bytes_streamed: int


@dataclass(frozen=True, slots=True)
class StreamResult:
    """A complete stream. `since` is None for a full one; `checkpoint` is the one it leads to."""

    disk: str
    since: str | None
    checkpoint: str
    size: int
    trust: Trust
    streamed: Streamed
    seconds: float


# --- any point in time of any device ---


def write_stream(
    out: ByteOutput,
    device: BlockDevice,
    head: Head,
    geometry: Geometry,
    changed: Changes | None,
    *,
    progress: Progress | None = None,
    before_end: Callable[[], None] = lambda: None,
) -> Streamed:
    """Write a whole stream of what changed on a disk, or of all of it; `device` is the disk at the stream's end.

    If `before_end` raises, the stream has no end record, so that it is not taken for whole. Raises `OSError` as the
    device does, `StorageError` if the stream cannot be written.
    """
    assert head.size == geometry.size
    blocks = Geometry(geometry.size, cluster_bits_for(geometry))
    pieces, writer = Pieces(device, blocks), _StreamWriter(_Out(out), Encoder(head))
    report = Report(progress, geometry.size if changed is None else changed.summary.dirty_bytes)
    with contextlib.closing(pieces.of_all(_runs(blocks, changed))) as found:
        for offset, length, data in found:
            if data is None:
                writer.zeroes(offset, length)
            else:
                writer.data(offset, data)
            report.advance(length)
    return writer.end(before_end)


def _runs(blocks: Geometry, changed: Changes | None) -> Iterator[Run]:
    """Return the runs to send, ascending, in the blocks by which data and zeroes are told apart."""
    if changed is None:
        return iter([(0, blocks.block_count)])
    return bits.regrain_outward(changed.runs(), changed.geometry, blocks.granularity_bits)


class _StreamWriter:
    def __init__(self, out: _Out, encoder: Encoder) -> None:
        self._out = out
        self._encoder = encoder
        self._zeroes = (0, 0)
        """A range (start, stop) of zeroes that is not written yet: the next one may continue it."""
        self._bytes_changed = 0
        self._bytes_zero = 0
        self._out.put(encoder.head())

    def zeroes(self, offset: int, length: int) -> None:
        start, stop = self._zeroes
        if stop != offset:
            self._put_zeroes()
            start = offset
        self._zeroes = (start, offset + length)
        self._bytes_zero += length
        self._bytes_changed += length

    def data(self, offset: int, data: Buffer) -> None:
        self._put_zeroes()
        for part in self._encoder.data(offset, data):
            self._out.put(part)
        self._bytes_changed += len(data)

    def _put_zeroes(self) -> None:
        start, stop = self._zeroes
        self._zeroes = (stop, stop)
        for part in self._encoder.zeroes(start, stop - start) if start < stop else ():
            self._out.put(part)

    def end(self, before_end: Callable[[], None]) -> Streamed:
        self._put_zeroes()
        before_end()
        self._out.put(self._encoder.end())
        self._out.finish()
        return Streamed(self._bytes_changed, self._bytes_zero, self._out.bytes_put)


class _Out:
    """Writes everything it is given, small parts together."""

    def __init__(self, file: ByteOutput) -> None:
        self._file = file
        self._small = bytearray()
        self.bytes_put = 0

    def put(self, part: Buffer) -> None:
        self.bytes_put += len(part)
        if len(self._small) + len(part) <= _SMALL_BYTES:
            self._small += part
            return
        self.flush()
        self._write(part)

    def flush(self) -> None:
        self._write(self._small)
        self._small = bytearray()

    def finish(self) -> None:
        """Write the rest, also what a file with a buffer kept there, as one in Python has if nobody says otherwise.

        A regular file is durable then: of what it could not take, NFS and quotas tell no earlier.
        """
        self.flush()
        fd = self._descriptor()
        with os_errors_at(_PLACE):
            if (flush := getattr(self._file, "flush", None)) is not None:
                flush()
            if fd is not None and stat.S_ISREG(os.fstat(fd).st_mode):
                os.fsync(fd)

    def _descriptor(self) -> int | None:
        try:
            return int(self._file.fileno())  # type: ignore[attr-defined]
        except (AttributeError, io.UnsupportedOperation):
            return None

    def _write(self, part: Buffer) -> None:
        rest = memoryview(part)
        with os_errors_at(_PLACE):
            try:
                while rest:
                    rest = rest[self._written(rest) :]
            except BrokenPipeError as gone:
                raise StorageError(
                    _PLACE,
                    gone,
                    next_step="see what its reader says, and stream again: nothing was lost by it",
                ) from gone

    def _written(self, part: memoryview) -> int:
        count = self._file.write(part)
        if count is None:
            unready = OSError(errno.EAGAIN, "it does not block")
            raise StorageError(_PLACE, unready, next_step="give a file or a pipe without O_NONBLOCK")
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        return count


# --- a tracked disk ---


def stream_backup(
    store: Store,
    name: str,
    out: ByteOutput,
    *,
    since: str | None = None,
    checkpoint: str | None = None,
    version: int = 1,
    attached: Mapping[str, Filter] | None = None,
    scratch: Scratch | None = None,
    quiesced: Quiesced = contextlib.nullcontext,
    freeze_limit_s: float = FREEZE_LIMIT_S,
    progress: Progress | None = None,
    open_device: OpenDevice = open_to_read,
    owner_limit_s: float = OWNER_LIMIT_S,
    lock_wait_s: float = 0.0,
) -> StreamResult:
    """Stream the disk called `name` as it is now: what changed since the checkpoint `since`, or all of it.

    A checkpoint is taken, called `checkpoint`, or a name that the result gives. It stays, for the next stream to count
    from. A disk that is served, here (`attached`) or by another process, is held as it was, and its guest goes on, as
    for `backup`, with the same `owner_limit_s`. The run waits up to `lock_wait_s` for a program that has the disk or
    its image for itself. Raises `Untrusted` if what changed since is not known, `NotFound` without such a disk, image
    or checkpoint, `AlreadyExists` for a checkpoint of that name, `Busy` if another program holds the disk or image.
    """
    terms = AccessTerms(open_device, attached, scratch, owner_limit_s, freeze_limit_s, Patience(lock_wait_s))
    with access(store, [name], terms) as route:
        started = time.monotonic()
        [disk] = route.disks
        consumers.merge_unheld(store, route, disk)
        head = Head(version, disk.size, since, checkpoint or Maker.STREAM.new_name(time.time_ns()))
        counted_from = _require_countable(store, disk, head)
        with HoldFile(store.path, disk.uuid, uuid4()).locked() as note:
            run = _Run(store, route, note, head, out, progress, counted_from, names_itself=checkpoint is None)
            streamed, trust, point = _stream_noted(run, quiesced)
    size, seconds = point.disk.size, time.monotonic() - started
    return StreamResult(name, since, point.checkpoint.name, size, trust, streamed, seconds)


class _Run(NamedTuple):
    """A stream under way, and the note by which others know it."""

    store: Store
    route: Access
    note: HoldFile
    head: Head
    out: ByteOutput
    progress: Progress | None
    counted_from: Checkpoint | None
    names_itself: bool
    """Whether we made up the checkpoint's name, so that no other checkpoint has it."""


def _stream_noted(run: _Run, quiesced: Quiesced) -> tuple[Streamed, Trust, PointInTime]:
    """Take the checkpoint and stream it, noted.

    A name that the caller gave may be another checkpoint's: it is not noted before there is a uuid to go with it.
    """
    name, time_ns = str(run.head.to_name), time.time_ns()
    try:
        run.note.begin(None, (), UnderWay(name if run.names_itself else ""), time_ns)
        [point] = run.route.take_point(name, [run.counted_from], quiesced, once=True)
        try:
            if not run.names_itself:
                run.note.begin(None, (), UnderWay(name, point.checkpoint.uuid), time_ns)
            streamed, trust = _stream_point(run, point)
        except BaseException:
            _take_back(run.route, point)
            raise
    finally:
        _let_go(run)
    return streamed, trust, point


def _let_go(run: _Run) -> None:
    """Settle the stream's note. A failed stream's checkpoint, if not taken back, is left to the next stream or backup.

    The note stays if an owner that we gave up on may still make the checkpoint.
    """
    try:
        [disk] = run.route.disks
        run.route.forget(disk, lambda member: False)
        with run.store.read() as reader:
            members = reader.checkpoints(disk.uuid)
        run.note.settle(members)
    except LmdbitmapError as error:
        log.warning("the note of this stream stays: %s", error)


def _stream_point(run: _Run, point: PointInTime) -> tuple[Streamed, Trust]:
    disk, changed = point.disk, None
    if run.counted_from is not None:
        changed = changes_since(run.store, disk.name, run.counted_from, point.checkpoint.name)

    def before_end() -> None:
        run.route.prove(point)
        run.note.remove()

    with reading(run.route, point):
        streamed = write_stream(
            run.out, point.device, run.head._replace(size=disk.size), disk.geometry, changed,
            progress=run.progress, before_end=before_end,
        )  # fmt: skip
    return streamed, Trust.EXACT if changed is None else changed.summary.standing.trust


def _require_countable(store: Store, disk: Disk, head: Head) -> Checkpoint | None:
    """Refuse what can be known before a checkpoint is taken. Return the checkpoint that is counted from."""
    Encoder(head)
    if head.from_name is None:
        return None
    with store.read() as reader:
        counted_from = chain.find_checkpoint(reader, disk, head.from_name)
    chain.require_same_epoch(disk, counted_from)
    return counted_from


def _take_back(route: Access, point: PointInTime) -> None:
    """Forget the checkpoint: its stream has no end, so no receiver can count from it."""
    route.end_reading()
    try:
        route.forget(point.disk, lambda member: member.uuid == point.checkpoint.uuid)
    except LmdbitmapError as error:
        log.warning(
            "disk %s: checkpoint %s of no use stays: %s", point.disk.name, point.checkpoint.name, error
        )
