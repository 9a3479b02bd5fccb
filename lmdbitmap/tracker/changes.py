"""The changes since a checkpoint: the read side of a chain, streamed in slices, and how far it can be believed.

A question is answered from the store alone, slice by slice. Each slice is one short read transaction that looks the
chain up anew by the uuids of its ends. So a slow reader never pins an old view of the store. A checkpoint in between
that is merged away meanwhile changes nothing (its bits are in its neighbour). A recording bitmap only gains bits; a
write during the read may or may not be in the answer.

For a disk without an owner, continuity is judged first, as an attach would judge it: an image that was written outside
the filter is never described as clean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from lmdbitmap import bits
from lmdbitmap.bits import Run
from lmdbitmap.errors import Busy, InvalidArgument, LmdbitmapError, NotFound, StorageError, Untrusted
from lmdbitmap.extents import Extent, Trust, with_zeroes
from lmdbitmap.geometry import REGION_BLOCKS, Geometry, ceil_div
from lmdbitmap.images.image import is_far
from lmdbitmap.interfaces import BlockDevice, ImageIdentity
from lmdbitmap.storage import owner, owner_file, schema
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Reader, Store
from lmdbitmap.tracker import chain, continuity, session
from lmdbitmap.tracker.continuity import Judge
from lmdbitmap.tracker.slices import Slice, full_slices, slices_of


class Standing(NamedTuple):
    """How far an answer can be trusted, and why not further."""

    trust: Trust
    reason: str | None = None

    def and_also(self, other: Standing) -> Standing:
        return self if self.trust.worse(other.trust) is self.trust else other


EXACT = Standing(Trust.EXACT)
MOVED = "the store is not where it was when it was opened: it was moved, and a copy put there"


class Summary(NamedTuple):
    """What all of an answer comes to. `standing` is to be believed: it counts what the records say of themselves."""

    dirty_blocks: int
    dirty_bytes: int
    standing: Standing


@dataclass(frozen=True)
class Changes:
    """What changed on `disk` from `since` to `until`, or to now if that is None. Each call reads afresh."""

    store: Store
    disk: Disk
    since: Checkpoint
    until: Checkpoint | None
    standing: Standing
    """The trust before all records are read, which may lower it; see `standing_if`."""
    _summaries: list[Summary] = field(default_factory=list, init=False, repr=False, compare=False)
    """The summary, once it was asked for."""

    @property
    def geometry(self) -> Geometry:
        return self.disk.geometry

    @property
    def all_dirty(self) -> bool:
        """Return whether every block counts as dirty, whatever the records say, as after a new epoch began."""
        if self.standing.trust is Trust.UNTRUSTED:
            return True
        with self.store.read() as reader:
            members = self._members(reader)
            return any(member.epoch != self.since.epoch for member in members) or any(
                reader.bitmap(member.bitmap_id).all_dirty for member in members
            )

    def slices(self, start: int = 0, stop: int | None = None) -> Iterator[Slice]:
        """Yield the slices with dirt, ascending; bits past the end are clear.

        Only regions [start, stop), if given. A slice may be longer than these; regions that no slice has are clean.
        Raises as `extents` does.
        """
        stop = self.geometry.region_count if stop is None else min(stop, self.geometry.region_count)
        if self.all_dirty:
            return full_slices(self.geometry, start, stop)
        return slices_of(self.store, self.geometry, self._bitmaps_with_records, start, stop)

    def _bitmaps_with_records(self, reader: Reader) -> list[int]:
        """Return the bitmaps to read. Raise `Busy` if one was made all dirty meanwhile, as mending.py does with damaged
        ones: its records are gone, and would read as clean.
        """
        numbers = self._bitmap_ids(reader)
        if any(reader.bitmap(number).all_dirty for number in numbers):
            raise Busy(
                f"a damaged bitmap of disk {self.disk.name!r} was mended just now", next_step="ask again"
            )
        return numbers

    def _bitmap_ids(self, reader: Reader) -> list[int]:
        """Return the bitmaps of the requested periods, as the chain is now. Raise `Untrusted` if the epoch changed."""
        members = self._members(reader)
        if any(member.epoch != self.since.epoch for member in members):
            raise Untrusted(
                f"tracking of disk {self.disk.name!r} began again while its changes were read",
                next_step="make a full backup",
            )
        return [member.bitmap_id for member in members]

    def _members(self, reader: Reader) -> list[Checkpoint]:
        """Return the checkpoints that begin the requested periods. Raise `Busy` if the disk shrank: past its new end
        their bits are gone, and would read as clean.
        """
        disk = reader.disk(self.disk.uuid)
        if disk is not None and disk.size < self.disk.size:
            raise Busy(f"disk {self.disk.name!r} was made smaller just now", next_step="ask again")
        chain_now = reader.checkpoints(self.disk.uuid)
        by_uuid = {checkpoint.uuid: position for position, checkpoint in enumerate(chain_now)}
        stop = None if self.until is None else by_uuid.get(self.until.uuid)
        start = by_uuid.get(self.since.uuid)
        if start is None or (self.until is not None and stop is None):
            raise _forgotten_error(self.disk)
        return chain_now[start:stop]

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """Yield the dirty blocks of [start, stop), or all, as runs, ascending and merged, in constant memory."""
        stop = self.geometry.block_count if stop is None else stop
        return bits.joined_runs(self._runs(start, stop))

    def _runs(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the runs, cut where slices end."""
        for part in self.slices(start // REGION_BLOCKS, ceil_div(stop, REGION_BLOCKS)):
            yield from part.runs(start, stop)

    def extents(self, device: BlockDevice | None = None) -> Iterator[Extent]:
        """Yield the dirty byte ranges, clipped to the disk; with the image, also which of them read as zeroes.

        Raises `Untrusted`, also midway, if a checkpoint was forgotten or tracking began again meanwhile, and `Busy` if
        the disk was made smaller or a damaged bitmap was mended.
        """
        dirty = self._dirty_extents()
        return dirty if device is None else with_zeroes(dirty, _zeroes(device))

    def _dirty_extents(self) -> Iterator[Extent]:
        """Compute as `Geometry.bytes_of` does, without a call for each: a busy disk has millions."""
        shift, size = self.geometry.granularity_bits, self.geometry.size
        for start, stop in self.runs():
            offset = start << shift
            yield Extent(offset, min(stop << shift, size) - offset, True, False)

    @property
    def summary(self) -> Summary:
        """How much is dirty, and how far that can be trusted after every record was read; computed once.

        Not a `cached_property`: up to Python 3.11 all disks would wait for one whose store does not answer.
        """
        if not self._summaries:
            self._summaries.append(self._summarized())
        return self._summaries[0]

    def _summarized(self) -> Summary:
        blocks, loose, tail_dirty = 0, False, False
        last = self.geometry.block_count - 1
        for part in self.slices():
            blocks += bits.count_ones(part.dirty)
            loose = loose or part.loose
            tail_dirty = tail_dirty or part.is_dirty(last)
        return Summary(
            blocks, self.geometry.bytes_in(blocks, with_last=tail_dirty), self.standing_if(loose=loose)
        )

    def standing_if(self, *, loose: bool) -> Standing:
        """Return how far the slices can be trusted after all were read; `loose` says whether one of them was."""
        active = Standing(Trust.SUPERSET, "some of it was being written, or its record is damaged")
        return self.standing.and_also(active) if loose else self.standing


class _ClosedPeriod(Changes):
    """Return what changed from `since` to the next checkpoint, `until`, without reading the chain, which may be long.

    While both checkpoints exist the period is closed; the disk's epoch and size must be unchanged.
    """

    def _members(self, reader: Reader) -> list[Checkpoint]:
        assert self.until is not None
        disk = reader.disk(self.disk.uuid)
        if disk is None or (disk.epoch, disk.size) != (self.since.epoch, self.disk.size):
            raise Busy(f"disk {self.disk.name!r} was changed just now", next_step="ask again")
        for member in (self.since, self.until):
            if reader.checkpoint(self.disk.uuid, member.sequence) != member:
                raise _forgotten_error(self.disk)
        return [self.since]


def dirty_bytes_of_period(store: Store, disk: Disk, begun: Checkpoint, ended: Checkpoint) -> int:
    """Return the bytes changed between adjacent checkpoints, for a caller that asks this for a whole chain.

    Raises `Untrusted` or `Busy` if the chain or the disk has changed meanwhile.
    """
    return _ClosedPeriod(store, disk, begun, ended, EXACT).summary.dirty_bytes


def _forgotten_error(disk: Disk) -> Untrusted:
    return Untrusted(
        f"a checkpoint of disk {disk.name!r} was forgotten while its changes were read",
        next_step="ask again, from a checkpoint that is still there",
    )


def changes_since(store: Store, name: str, since: Checkpoint, until: str) -> Changes:
    """Return `changes` since that very checkpoint. A newer one of the same name would lack earlier changes."""
    answer = changes(store, name, since=since.name, until=until)
    if answer.since.uuid != since.uuid:
        raise Busy(
            f"checkpoint {since.name!r} of disk {name!r} was forgotten just now, and another has its name",
            next_step="try again",
        )
    return answer


def changes(
    store: Store, name: str, *, since: str | None = None, until: str | None = None, persisted: bool = False
) -> Changes:
    """Return what changed on the disk called `name` from checkpoint `since` (the newest by default) to `until`.

    Bits that are only in an owner's memory are not seen. `Filter.changes` writes them first; the owner of a disk in
    another process can be asked to (`ask_changes`), and `persisted` says that it did. Otherwise the answer is a
    superset (write-ahead) or untrusted (deferred).

    Raises `NotFound` for a missing disk or checkpoint, `InvalidArgument` if `until` is not after `since`, `Untrusted`
    for a checkpoint of an older epoch.
    """
    while True:
        answer = _ask(store, name, since, until, persisted)
        now = chain.disk_called(store, name)
        if (now.epoch, now.session) == (answer.disk.epoch, answer.disk.session):
            return answer  # else the disk was attached or detached meanwhile


def _ask(store: Store, name: str, since: str | None, until: str | None, persisted: bool) -> Changes:
    with store.read() as reader:
        disk = chain.find_disk(reader, name)
        first = (
            chain.current_checkpoint(reader, disk)
            if since is None
            else chain.find_checkpoint(reader, disk, since)
        )
        last = None if until is None else chain.find_checkpoint(reader, disk, until)
        chain.require_same_epoch(disk, first)
    if last is not None and last.sequence <= first.sequence:
        raise InvalidArgument(
            f"checkpoint {last.name!r} is not after {first.name!r}",
            next_step="count from an earlier one (--since), or to a later one (--until)",
        )
    whole = Changes(store, disk, first, last, EXACT)
    standing = _bitmaps_standing(whole).and_also(
        EXACT if last else open_period_standing(store, disk, persisted)
    )
    return Changes(store, disk, first, last, standing)


def _bitmaps_standing(asked: Changes) -> Standing:
    with asked.store.read() as reader:
        bitmaps = [reader.bitmap(number) for number in asked._bitmap_ids(reader)]
    for bitmap in bitmaps:
        if bitmap.all_dirty or bitmap.superset:
            return Standing(Trust.SUPERSET, bitmap.all_dirty or bitmap.superset)
    return EXACT


def unknown_error(asked: Changes) -> Untrusted:
    """Return the error for a caller that must know what changed. If the image cannot be read, it advises no backup."""
    step = "make a full backup"
    try:
        session.look_at(asked.store, asked.disk)
    except (NotFound, StorageError) as unread:
        step = unread.next_step
    except LmdbitmapError:  # the reason reports it
        pass
    return Untrusted(
        f"what changed on disk {asked.disk.name!r} is not known: {asked.standing.reason}", next_step=step
    )


def open_period_standing(store: Store, disk: Disk, persisted: bool = False) -> Standing:
    """Return how far the store's bits of the recording period hold for the image as it is now.

    An owner that persisted into this very store has vouched for the image. A lock alone does not vouch.
    """
    path = store.owner_path(disk.uuid)
    distrust = owner_file.distrust(path)
    if distrust is not None:
        return Standing(Trust.UNTRUSTED, distrust.reason)
    is_owned = owner.is_owned(path)
    if is_owned and persisted and _is_recorded_in(store, path):
        return EXACT
    if is_owned and disk.durability == schema.DEFERRED and disk.session is not None:
        return Standing(
            Trust.UNTRUSTED, "it is attached in deferred mode: its owner's memory knows what is dirty"
        )
    return _judged_standing(store, disk, continuity.judge_held if is_owned else continuity.judge)


def _is_recorded_in(store: Store, owner_path: str) -> bool:
    """Whether the owner writes to this store, and not to one in whose place a copy was put while it had that open."""
    beat = owner_file.last_beat(owner_path)
    return beat is None or session.present(store).store.is_of_the_file_of(beat.store)


def _judged_standing(store: Store, disk: Disk, judge: Judge) -> Standing:
    """Judge the image by the last sign of life, which is read first: a living owner goes on with both meanwhile.

    A block device is not flushed first: that could take the news of an error from its next owner. The kernel flushed it
    when its last writer closed it.
    """
    beat = owner_file.last_beat(store.owner_path(disk.uuid))
    try:
        image = _identity(store, disk, judge)
    except LmdbitmapError as error:
        return Standing(Trust.UNTRUSTED, f"its image cannot be looked at ({error.problem})")
    verdict = judge(disk, image, beat, session.present(store))
    if verdict.broken is not None:
        return Standing(Trust.UNTRUSTED, verdict.broken)
    if not store.is_in_place():  # looked at last: the owner's file that was read may be another store's
        return Standing(Trust.UNTRUSTED, MOVED)
    return Standing(Trust.SUPERSET, verdict.superset) if verdict.superset else EXACT


def _identity(store: Store, disk: Disk, judge: Judge) -> ImageIdentity:
    """Return the image's identity now. A remote image of an owned disk is not opened: its owner judged it when the
    session began, it says nothing new since then, and not every server takes a second client."""
    if is_far(disk.image) and judge is continuity.judge_held and disk.session and disk.identity:
        return disk.identity
    return session.look_at(store, disk)


def _zeroes(device: BlockDevice) -> Iterator[tuple[int, int]]:
    """Yield the (offset, length) ranges of an image that are known to read as zeroes."""
    offset = 0
    for allocation in device.allocation(0, device.size):
        if allocation.zero:
            yield offset, allocation.length
        offset += allocation.length
