"""The routes to disks, one for each kind of current owner.

A job takes one route for all of its disks (access.py), and each route takes one point in time of all of them:

    AtRest             no process has them: we own them meanwhile, so nobody writes, and the image is the point in time
    Attached           a filter of this process has them: it holds a snapshot for us
    ServedElsewhere    another process has them: its control socket is asked for a snapshot, which we read from the
                       image and over NBD (through_owner.py)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, TypeAlias
from uuid import UUID

from lmdbitmap.access import owners
from lmdbitmap.access.direct import DirectDevice
from lmdbitmap.access.through_owner import HeldThere, open_held
from lmdbitmap.errors import Busy, InvalidArgument, LmdbitmapError, OwnerGone
from lmdbitmap.filter import Filter, take_snapshot
from lmdbitmap.geometry import MAX_SIZE
from lmdbitmap.interfaces import BlockDevice
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import chain, session
from lmdbitmap.tracker.scratch import DEFAULT_LIMIT_BYTES, Scratch
from lmdbitmap.tracker.session import OpenDevice, OwnedDisk
from lmdbitmap.tracker.snapshot import Snapshot, broken_error
from lmdbitmap.work.failures import Failures

LAST_WORD_S = 10.0
"""Seconds an owner may take to release what was not read to its end: a user who gave up, as by Ctrl-C, wants to go."""

OWNER_LIMIT_S: Final = 60.0
"""Seconds an owner may send nothing of what a reader asked for. If the disk's image is remote and away, its requests
fail in half of that.
"""

FREEZE_LIMIT_S: Final = 60.0
"""Seconds an owner may take for a point in time. A guest may be frozen meanwhile, so other answers may take longer."""


Quiesced: TypeAlias = Callable[[], AbstractContextManager[object]]
"""Called for the block in which a point in time is taken, and a guest may be frozen."""


class PointInTime(NamedTuple):
    """A disk at a checkpoint. `device` reads as the disk was then, until the access to it ends."""

    disk: Disk
    checkpoint: Checkpoint
    device: BlockDevice


@contextlib.contextmanager
def _told_of(disk: Disk) -> Iterator[None]:
    """Re-raise `OwnerGone` with this disk's name. Everything that the owner held is lost with it."""
    try:
        yield
    except OwnerGone as gone:
        raise OwnerGone(
            f"disk {disk.name!r}: the process that served it ended while its disk was read",
            next_step="serve the disk again, and do this again",
        ) from gone


@contextlib.contextmanager
def _taken_back_on_failure(route: AtRest | _ThroughOwner, made: Sequence[UUID]) -> Iterator[None]:
    """Forget the checkpoints `made` if the block fails, as by a signal while the guest is thawed: nobody is told of
    them. If that fails too, they stay."""
    try:
        yield
    except BaseException:
        if made:
            route.end_reading()
            with contextlib.suppress(LmdbitmapError):
                for disk in route.disks:
                    route.forget(disk, lambda member: member.uuid in made)
        raise


class AtRest:
    """Disks that no process had: we own them, but begin no session, so even a disk in deferred mode loses no record.

    They are owned in the order of their names: see waiting.py.
    """

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
        self,
        name: str,
        since: Sequence[Checkpoint | None],
        quiesced: Quiesced = contextlib.nullcontext,
        *,
        once: bool = False,
    ) -> list[PointInTime]:
        made: list[UUID] = []
        with _taken_back_on_failure(self, made), quiesced():
            time_ns = time.time_ns()
            checkpoints = self._store.update(
                lambda writer: [chain.add_checkpoint(writer, disk, name, time_ns)[1] for disk in self.disks]
            )
            made += [checkpoint.uuid for checkpoint in checkpoints]
        devices = [self._held[disk.uuid].device for disk in self.disks]
        return list(map(PointInTime, self.disks, checkpoints, devices))

    def room_for_old_data(self) -> int:
        return MAX_SIZE  # nothing has to be kept

    def leave_out(self, disk: Disk) -> None:
        """Leave the disk out. Other processes can have it from now on."""
        del self._disks[disk.uuid], self._held[disk.uuid]
        self._locks.pop(disk.uuid).close()

    def prove(self, point: PointInTime) -> None:
        session.require_untouched(self._held[point.disk.uuid], point.disk)

    def let_go(self, point: PointInTime) -> None:
        """Do nothing: only the disk itself is held."""

    def end_reading(self) -> None:
        """Do nothing: only the disks themselves are held."""

    def forget(self, disk: Disk, is_unneeded: Callable[[Checkpoint], bool]) -> list[str]:
        """Forget in one transaction."""

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
    """What is the same for any owner, a filter here or another process."""

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
        """Forget that checkpoint. Return False if it is the only one that records, or if it is still being read."""
        try:
            self._forget(disk, name)
        except InvalidArgument:
            return False
        except Busy:
            self._require_answer()
            return False
        return True

    def _require_answer(self) -> None:
        """Raise `Busy` if the owner gave no answer."""

    def end_reading(self) -> None:
        raise NotImplementedError  # pragma: no cover

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
        self,
        name: str,
        since: Sequence[Checkpoint | None],
        quiesced: Quiesced = contextlib.nullcontext,
        *,
        once: bool = False,
    ) -> list[PointInTime]:
        filters = [self._filters[uuid] for uuid in self._uuids]
        made: list[UUID] = []
        with _taken_back_on_failure(self, made):
            with quiesced():
                self._snapshots = take_snapshot(filters, name, self._scratch)
                made += [snapshot.checkpoint.uuid for snapshot in self._snapshots]
            for snapshot, checkpoint in zip(self._snapshots, since, strict=True):
                if checkpoint is not None:
                    snapshot.want_changes(since=checkpoint.name)
                if once:
                    snapshot.read_once()
        return [PointInTime(snapshot.disk, snapshot.checkpoint, snapshot) for snapshot in self._snapshots]

    def room_for_old_data(self) -> int:
        return self._scratch.room()

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
    """Disks that another process serves. What it holds for us is released when we disconnect, or die.

    It takes points one after the other: when ours exists, those requested earlier exist too.
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
        """Snapshots that are not released yet."""

    def take_point(
        self,
        name: str,
        since: Sequence[Checkpoint | None],
        quiesced: Quiesced = contextlib.nullcontext,
        *,
        once: bool = False,
    ) -> list[PointInTime]:
        counted_from = ["" if checkpoint is None else checkpoint.name for checkpoint in since]
        made: list[UUID] = []
        with _taken_back_on_failure(self, made):
            with quiesced():
                made += self._hold(self.disks, name, counted_from, once=once)
            self._devices = open_held(self._client, self._held, self._limit_s)
        return [
            PointInTime(held.disk, held.checkpoint, device)
            for held, device in zip(self._held, self._devices, strict=True)
        ]

    def _hold(self, disks: Sequence[Disk], name: str, since: Sequence[str], *, once: bool) -> list[UUID]:
        """Have the owner hold the disks. Return the uuids of their checkpoints."""
        self._client.renew(self._freeze_limit_s)
        told = self._client.call(
            "snapshot", disks=[disk.name for disk in disks], name=name, since=since, bound=True, once=once,
            timeout_s=self._freeze_limit_s,
        )  # fmt: skip
        self.may_be_behind = False
        for disk, held in zip(disks, told["snapshots"], strict=True):
            checkpoint = self._found(disk, name, held["uuid"])
            self._held.append(HeldThere(disk, checkpoint, str(held["export"]), held.get("direct")))
        return [held.checkpoint.uuid for held in self._held]

    def room_for_old_data(self) -> int:
        self._client.renew()
        try:
            return int(self._client.call("room", timeout_s=self._limit_s)["bytes"])
        except InvalidArgument:  # an older owner
            return DEFAULT_LIMIT_BYTES

    def _found(self, disk: Disk, name: str, uuid: str) -> Checkpoint:
        """Return the checkpoint of this name. Raise `Busy` if it is not the one that was made."""
        with self._store.read() as reader:
            found = chain.find_checkpoint(reader, disk, name)
        if str(found.uuid) != uuid:
            raise Busy(
                f"checkpoint {name!r} of disk {disk.name!r} was forgotten, and another one has its name",
                next_step="see who does that, and try again",
            )
        return found

    def prove(self, point: PointInTime) -> None:
        """Prove the point. The process that answers is the one that took the snapshot and has held it all the time."""
        held = next(held for held in self._held if held.checkpoint == point.checkpoint)
        self._held.remove(held)
        with _told_of(held.disk):
            told = self._client.call("release", timeout_s=self._limit_s, **held.named)
        if told["broken"] is not None:
            raise broken_error(point.disk, str(told["broken"]))
        if not held.takes_uuid:  # no other checkpoint gets the name while this one exists
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
        """Forget checkpoints. Raise `Busy` if one may still be made by a request that we gave up."""
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
