"""The routes to disks, one for each answer to who has them now. A job takes one for all of its disks (access.py), and
each route takes one moment of all of them:

    AtRest             nobody has them: we own them meanwhile, so nobody writes, and the image is the point in time
    Attached           a filter of this process has them: a snapshot, which the filter holds for us
    ServedElsewhere    another process has them: its control socket is asked for a snapshot, which we read from the
                       image and over NBD (through_owner.py)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple
from uuid import UUID

from lmdbitmap.access import owners
from lmdbitmap.access.direct import DirectDevice
from lmdbitmap.access.through_owner import HeldThere, open_held
from lmdbitmap.errors import Busy, InvalidArgument, LmdbitmapError, OwnerGone
from lmdbitmap.filter import Filter, take_snapshot
from lmdbitmap.interfaces import BlockDevice
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import chain, session
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.session import OpenDevice, OwnedDisk
from lmdbitmap.tracker.snapshot import Snapshot, broken_error
from lmdbitmap.work.failures import Failures

LAST_WORD_S = 10.0
"""How long an owner may take to release what was not read to its end: whoever gave up, as by Ctrl-C, wants to go."""

OWNER_LIMIT_S: Final = 60.0
"""How long an owner through which a disk is read may send nothing of what it was asked for. A far image that is away
fails its requests in half of that."""

FREEZE_LIMIT_S: Final = 60.0
"""A guest may be frozen until the owner has answered: it is not kept so for as long as other answers may take."""


class PointInTime(NamedTuple):
    """A disk at a checkpoint: `device` reads as it was then, until the access to it ends."""

    disk: Disk
    checkpoint: Checkpoint
    device: BlockDevice


@contextlib.contextmanager
def _told_of(disk: Disk) -> Iterator[None]:
    """Of whose owner went away in the block: all that it held is gone with it."""
    try:
        yield
    except OwnerGone as gone:
        raise OwnerGone(
            f"disk {disk.name!r}: the process that served it ended while its disk was read",
            next_step="serve the disk again, and do this again",
        ) from gone


class AtRest:
    """Disks that nobody had: we own them, but begin no session, so that not even one in deferred mode loses what it
    knew.

    They are taken in the order of their names: see waiting.py."""

    holds_alone = True
    may_be_behind = False

    def __init__(
        self, store: Store, names: Sequence[str], open_device: OpenDevice, apart: Failures | None = None
    ) -> None:
        self._store = store
        self._names = list(names)
        self._held: dict[UUID, OwnedDisk] = {}
        self._disks: dict[UUID, Disk] = {}
        self._locks: dict[UUID, contextlib.ExitStack] = {}
        try:
            for name in sorted(names):
                with (apart or Failures(at_once=True)).of(name):
                    self._own(name, open_device)
        except BaseException:
            self.close()
            raise

    def _own(self, name: str, open_device: OpenDevice) -> None:
        with contextlib.ExitStack() as lock:
            held = lock.enter_context(session.owning(self._store, name, open_device))
            disk = session.reconcile(self._store, held)
            self._held[disk.uuid], self._disks[disk.uuid] = held, disk
            self._locks[disk.uuid] = lock.pop_all()

    @property
    def disks(self) -> Sequence[Disk]:
        return sorted(self._disks.values(), key=lambda disk: self._names.index(disk.name))

    def take_point(
        self, name: str, since: Sequence[Checkpoint | None], *, once: bool = False
    ) -> list[PointInTime]:
        time_ns = time.time_ns()
        checkpoints = self._store.update(
            lambda writer: [chain.add_checkpoint(writer, disk, name, time_ns)[1] for disk in self.disks]
        )
        devices = [self._held[disk.uuid].device for disk in self.disks]
        return list(map(PointInTime, self.disks, checkpoints, devices))

    def leave_out(self, disk: Disk) -> None:
        """Others can have it from now on."""
        del self._disks[disk.uuid], self._held[disk.uuid]
        self._locks.pop(disk.uuid).close()

    def prove(self, point: PointInTime) -> None:
        session.require_untouched(self._held[point.disk.uuid], point.disk)

    def let_go(self, point: PointInTime) -> None:
        """Nothing is held but the disk itself."""

    def end_reading(self) -> None:
        """Nothing is held but the disks themselves."""

    def forget(self, disk: Disk, is_unneeded: Callable[[Checkpoint], bool]) -> list[str]:
        """In one transaction."""

        def change(writer: Writer) -> list[str]:
            stay = []
            for member in writer.checkpoints(disk.uuid):
                if not is_unneeded(member):
                    continue
                if member.epoch == disk.epoch and len(chain.epoch_chain(writer, disk)) == 1:
                    stay.append(member.name)
                else:
                    chain.forget(writer, disk, member.name)
            return stay

        return self._store.update(change)

    def close(self) -> None:
        with contextlib.ExitStack() as all_of_them:
            for lock in self._locks.values():
                all_of_them.push(lock)


class _ThroughOwner:
    """What goes the same way through any owner, a filter here or another process."""

    holds_alone = False
    may_be_behind = False
    _store: Store
    _uuids: list[UUID]

    @property
    def disks(self) -> Sequence[Disk]:
        with self._store.read() as reader:
            return [session.existing(reader, uuid) for uuid in self._uuids]

    def leave_out(self, disk: Disk) -> None:
        self._uuids.remove(disk.uuid)

    def forget(self, disk: Disk, is_unneeded: Callable[[Checkpoint], bool]) -> list[str]:
        with self._store.read() as reader:
            unneeded = [member.name for member in reader.checkpoints(disk.uuid) if is_unneeded(member)]
        return [name for name in unneeded if not self._forgets(disk, name)]

    def _forgets(self, disk: Disk, name: str) -> bool:
        """Whether that checkpoint is gone; not if it is the only one that records, or somebody still reads of it."""
        try:
            self._forget(disk, name)
        except InvalidArgument:
            return False
        except Busy:
            self._require_answer()
            return False
        return True

    def _require_answer(self) -> None:
        """Raise `Busy` where the one who was asked said nothing."""

    def _forget(self, disk: Disk, name: str) -> None:
        raise NotImplementedError  # pragma: no cover


class Attached(_ThroughOwner):
    def __init__(self, filters: Sequence[Filter], scratch: Scratch) -> None:
        self._filters = {attached.disk.uuid: attached for attached in filters}
        self._uuids = list(self._filters)
        self._store = filters[0].store
        self._scratch = scratch
        self._snapshots: list[Snapshot] = []

    def take_point(
        self, name: str, since: Sequence[Checkpoint | None], *, once: bool = False
    ) -> list[PointInTime]:
        filters = [self._filters[uuid] for uuid in self._uuids]
        self._snapshots = take_snapshot(filters, name, self._scratch)
        for snapshot, checkpoint in zip(self._snapshots, since, strict=True):
            if checkpoint is not None:
                snapshot.want_changes(since=checkpoint.name)
            if once:
                snapshot.read_once()
        return [PointInTime(snapshot.disk, snapshot.checkpoint, snapshot) for snapshot in self._snapshots]

    def prove(self, point: PointInTime) -> None:
        assert isinstance(point.device, Snapshot)
        point.device.release()
        if point.device.broken is not None:
            raise broken_error(point.disk, point.device.broken)

    def let_go(self, point: PointInTime) -> None:
        assert isinstance(point.device, Snapshot)
        point.device.release()

    def end_reading(self) -> None:
        for snapshot in self._snapshots:
            snapshot.release()

    def _forget(self, disk: Disk, name: str) -> None:
        self._filters[disk.uuid].forget(name)

    def close(self) -> None:
        self.end_reading()


class ServedElsewhere(_ThroughOwner):
    """Disks of another process. What is held there for us is released when we hang up, or die.

    Points are taken there one after the other: when ours is, those that were asked for earlier are there.
    """

    may_be_behind = True

    def __init__(
        self,
        store: Store,
        names: Sequence[str],
        owner_limit_s: float = OWNER_LIMIT_S,
        freeze_limit_s: float = FREEZE_LIMIT_S,
    ) -> None:
        self._store = store
        self._limit_s = owner_limit_s
        self._freeze_limit_s = freeze_limit_s
        disks = [chain.disk_called(store, name) for name in names]
        self._uuids = [disk.uuid for disk in disks]
        self._client = owners.owner_of(store, disks[0])
        self._devices: list[NbdDevice | DirectDevice] = []
        self._held: list[HeldThere] = []
        """What is not released yet."""

    def take_point(
        self, name: str, since: Sequence[Checkpoint | None], *, once: bool = False
    ) -> list[PointInTime]:
        counted_from = ["" if checkpoint is None else checkpoint.name for checkpoint in since]
        disks = self.disks
        told = self._client.call(
            "snapshot", disks=[disk.name for disk in disks], name=name, since=counted_from, bound=True, once=once,
            timeout_s=self._freeze_limit_s,
        )  # fmt: skip
        self.may_be_behind = False
        for disk, held in zip(disks, told["snapshots"], strict=True):
            checkpoint = self._found(disk, name, held["uuid"])
            self._held.append(HeldThere(disk, checkpoint, str(held["export"]), held.get("direct")))
        self._devices = open_held(self._client, self._held, self._limit_s)
        return [
            PointInTime(held.disk, held.checkpoint, device)
            for held, device in zip(self._held, self._devices, strict=True)
        ]

    def _found(self, disk: Disk, name: str, uuid: str) -> Checkpoint:
        """The checkpoint of this name, if it is still the one that was made."""
        with self._store.read() as reader:
            found = chain.find_checkpoint(reader, disk, name)
        if str(found.uuid) != uuid:
            raise Busy(
                f"checkpoint {name!r} of disk {disk.name!r} was forgotten, and another one has its name",
                next_step="see who does that, and try again",
            )
        return found

    def prove(self, point: PointInTime) -> None:
        """The process that took the snapshot has held it all the time: it is the one that answers."""
        held = next(held for held in self._held if held.checkpoint == point.checkpoint)
        self._held.remove(held)
        with _told_of(held.disk):
            told = self._client.call("release", timeout_s=self._limit_s, **held.named)
        if told["broken"] is not None:
            raise broken_error(point.disk, str(told["broken"]))
        if not held.takes_uuid:  # a name is nobody else's as long as its checkpoint is there
            self._found(point.disk, point.checkpoint.name, str(point.checkpoint.uuid))

    def let_go(self, point: PointInTime) -> None:
        self._release([held for held in self._held if held.checkpoint == point.checkpoint])

    def end_reading(self) -> None:
        self._release(list(self._held))

    def _release(self, unread: Sequence[HeldThere]) -> None:
        for held in unread:
            self._held.remove(held)
            with contextlib.suppress(LmdbitmapError):  # the owner does it when we hang up
                last_word_s = min(LAST_WORD_S, self._limit_s)
                self._client.call("release", timeout_s=last_word_s, **held.named)

    def forget(self, disk: Disk, is_unneeded: Callable[[Checkpoint], bool]) -> list[str]:
        """Raises `Busy` where a checkpoint may be made still, by a request that we gave up."""
        self._require_answer()
        return super().forget(disk, is_unneeded)

    def _forget(self, disk: Disk, name: str) -> None:
        self._client.call("forget", disk=disk.name, checkpoint=name)

    def _require_answer(self) -> None:
        self._client.require_in_step()

    def close(self) -> None:
        for device in self._devices:
            device.close()
        self._client.close()
