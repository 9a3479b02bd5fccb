"""What comes before a backup's checkpoint: the folders of its disks, what a killed run left there, and what to make.

A folder stays locked from before its disk is owned until after. So a run that waits for a folder holds no disk, and a
run that has a disk does not wait for a folder. Folders are locked in the order of their names, so two waiting runs do
not wait for each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from uuid import uuid4

from lmdbitmap.access.access import Access
from lmdbitmap.backups import folder_owner
from lmdbitmap.backups.folder_owner import Permission
from lmdbitmap.backups.image import DiskBackup
from lmdbitmap.backups.leftovers import undo_unfinished
from lmdbitmap.backups.plan import BackupPlan, digests_for, plan_for
from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.errors import FormatError, LmdbitmapError
from lmdbitmap.notes.holds import HoldFile
from lmdbitmap.notes.references import Reason
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupType, Manifest, NewerManifest
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.changes import changes
from lmdbitmap.work.failures import Failures
from lmdbitmap.work.patience import Patience

log = logging.getLogger(__name__)

UNREADABLE = Reason(
    "manifest-unreadable", "the manifest is missing or damaged: older images stay, and a new chain begins"
)


class WantedBackup(NamedTuple):
    """What a backup was asked to be, for each of its disks."""

    repository_path: str | os.PathLike[str]
    kind: BackupType
    algorithm: DigestAlgorithm | None
    only_that: bool
    permission: Permission


class LockedFolder(NamedTuple):
    """A disk's backup folder, and everything that is held for the disk; the folder's lock comes first."""

    folder: BackupFolder
    locks: contextlib.ExitStack


class Preparation:
    """Makes jobs of disks. One that cannot take part is left out, and what was held for it is released."""

    def __init__(self, store: Store, wanted: WantedBackup, patience: Patience, failures: Failures) -> None:
        self._store = store
        self._wanted = wanted
        self._patience = patience
        self._failures = failures

    def locked_folders(self, names: Sequence[str], locks: contextlib.ExitStack) -> dict[str, LockedFolder]:
        """Lock the folder of each disk that can take part, until `locks` are released."""
        places = {}
        for name in sorted(names):
            with self._failures.of(name):
                disk = chain.disk_called(self._store, name)
                folder = BackupFolder(self._wanted.repository_path, name)
                place = LockedFolder(folder, locks.enter_context(contextlib.ExitStack()))
                folder_owner.require_meant(self._store, disk, folder, self._wanted.permission)
                place.locks.enter_context(folder.locked(self._patience))
                places[name] = place
        return places

    def jobs(self, route: Access, places: Mapping[str, LockedFolder]) -> list[DiskBackup]:
        """Return the jobs of all disks that can take part."""
        jobs = []
        for disk in list(route.disks):
            with self._failures.of(disk.name):
                jobs.append(self._job(route, disk, places[disk.name]))
            if disk.name in self._failures:
                route.leave_out(disk)
        for name, place in places.items():
            if name in self._failures:
                place.locks.close()
        if self._wanted.only_that:
            for job in jobs:
                job.require_as_asked()
        return self._within_scratch(route, jobs)

    def _within_scratch(self, route: Access, jobs: list[DiskBackup]) -> list[DiskBackup]:
        """Compare nothing after a crash if guests could overwrite more meanwhile than there is room for.

        A run that compares has old data of all its disks kept to its end. An increment must not fail for that.
        """
        if route.holds_alone or not any(job.plan.sifts for job in jobs):
            return jobs
        if sum(map(self._may_change, jobs)) <= route.room_for_old_data():
            return jobs
        return [dataclasses.replace(job, plan=job.plan._replace(sifts=False)) for job in jobs]

    def _may_change(self, job: DiskBackup) -> int:
        """Return about how many bytes of the disk are read: what of these a guest overwrites is kept."""
        if job.plan.since is not None:
            with contextlib.suppress(LmdbitmapError):
                return changes(self._store, job.disk.name, since=job.plan.since.name).summary.dirty_bytes
        return job.disk.size

    def _job(self, route: Access, disk: Disk, place: LockedFolder) -> DiskBackup:
        wanted, folder = self._wanted, place.folder
        found, unreadable = _manifest_of(folder, wanted.kind)
        manifest = folder_owner.owned(found, disk, folder, wanted.permission)
        leftovers = undo_unfinished(route, disk, folder) if unreadable is None else []
        folder.require_room(manifest)
        manifest = dataclasses.replace(manifest, holder=manifest.holder or uuid4())
        hold = self._locked_hold(disk, manifest, place)
        if unreadable is None:
            ended = None if hold.hold is None else hold.hold.ended
            plan = plan_for(self._store, disk, folder, manifest, wanted.kind, ended)
        else:
            plan = BackupPlan(wanted.kind, reason=unreadable)
        digests, sequence = digests_for(plan, manifest, wanted.algorithm), folder.next_sequence(manifest)
        return DiskBackup(
            route,
            disk,
            folder,
            manifest,
            wanted.kind,
            plan,
            digests,
            sequence,
            leftovers,
            hold,
            wanted.only_that,
        )

    def _locked_hold(self, disk: Disk, manifest: Manifest, place: LockedFolder) -> HoldFile:
        """Another run may have it while it merges away what nobody holds; of a disk that is ours alone none does."""
        assert manifest.holder is not None
        hold = HoldFile(self._store.path, disk.uuid, manifest.holder)
        return place.locks.enter_context(hold.locked(self._patience))


def _manifest_of(folder: BackupFolder, kind: BackupType) -> tuple[Manifest | None, Reason | None]:
    """Return the manifest, or the reason if it cannot be read: with a full backup asked for, a new chain begins."""
    try:
        return folder.manifest(), None
    except NewerManifest:
        raise
    except FormatError as error:
        if kind is not BackupType.FULL:
            raise
        log.error("%s; images stay as they are, and a new chain begins", error.problem)
        return None, UNREADABLE
