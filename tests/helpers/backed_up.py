"""A tracked disk with repositories to back it up to, and children that die in the middle of a backup."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from lmdbitmap.backups.backup import backup
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupEntry, BackupType, Manifest
from lmdbitmap.restoring.restore import restore
from tests.helpers.support import PATIENCE_SECONDS
from tests.helpers.tracked import NAME, TrackedDisk

FULL, INCREMENTAL, DIFFERENTIAL, RESCAN = BackupType
ALWAYS_THERE = {"lock", "manifest.json", "manifest.json.copy"}
"""In the folder of a disk that has backups."""


class Repositories:
    """Folders in one, by name, each with backups of the disk; the disk itself need not be there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def backup_folder(self, to: str = "backups") -> BackupFolder:
        return BackupFolder(self.folder / to, NAME)

    def manifest(self, to: str = "backups") -> Manifest:
        found = self.backup_folder(to).manifest()
        assert found is not None
        return found


@dataclass
class BackedUpDisk(TrackedDisk, Repositories):
    """Its repositories are beside the image."""

    def write(self, data: bytes, offset: int) -> None:
        with self.attach() as attached:
            attached.pwrite(data, offset)

    def zero(self, offset: int, length: int) -> None:
        with self.attach() as attached:
            attached.write_zeroes(offset, length)

    def resize(self, size: int) -> None:
        with self.attach() as attached:
            attached.resize(size)

    def content(self) -> bytes:
        return self.image.read_bytes()

    def backup(
        self, kind: BackupType = INCREMENTAL, to: str = "backups", compression: str | None = None,
        digest: str | None = None, take_over: bool = False, new_repository: bool = False,
    ) -> BackupEntry:  # fmt: skip
        [result] = backup(
            self.store, [NAME], self.folder / to, kind=kind, compression=compression, digest=digest,
            take_over=take_over, new_repository=new_repository,
        )  # fmt: skip
        assert result.entry == self.manifest(to).backups[-1]
        return result.entry

    def restored(self, at: str | None = None, to: str = "backups") -> bytes:
        out = self.folder / "restored.raw"
        restore(self.folder / to, NAME, out, at=at)
        try:
            return out.read_bytes()
        finally:
            out.unlink()

    def files(self, to: str = "backups") -> list[str]:
        """What is in the disk's folder, without what is always there and the digests that the manifest names."""
        folder = self.backup_folder(to)
        if not os.path.isdir(folder.path):
            return []
        found = folder.manifest()
        digests = {entry.chunks.file for entry in found.backups if entry.chunks} if found else set()
        there = set(os.listdir(folder.path))
        assert digests <= there
        return sorted(there - digests - ALWAYS_THERE)

    def backup_checkpoints(self) -> list[str]:
        """The checkpoints that backups hold, or left behind."""
        return [name for name in self.checkpoints() if Maker.BACKUP.named(name)]

    def backup_and_die(self, step: int, kind: BackupType = INCREMENTAL, to: str = "backups") -> list[str]:
        """Have a child make a backup and die after its nth step; answers its steps. It outlives the last one."""
        done = subprocess.run(
            [sys.executable, "-c", _BACKUP_AND_DIE, self.store.path, self.folder / to, kind.value, str(step)],
            capture_output=True,
            timeout=PATIENCE_SECONDS,
        )
        steps = done.stdout.decode().split("\n")[:-1]
        assert (done.stderr, done.returncode) == (b"", -9 if len(steps) == step else 0)
        return steps


_BACKUP_AND_DIE = f"""
import os, signal, sys, threading
from lmdbitmap import store
from lmdbitmap.backups import backup
from lmdbitmap.copying import carriers
from lmdbitmap.notes import holds
from lmdbitmap.repository import backup_folder
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.tracker import session
from lmdbitmap.work import gang

store_path, repository_path, kind, fatal_step = sys.argv[1:]
steps = 0

def followed_by_death(owner, name, shown):
    call = getattr(owner, name)
    def wrapper(*arguments, **options):
        global steps
        answer = call(*arguments, **options)
        if threading.current_thread() is threading.main_thread():
            steps += 1
            os.write(1, (shown + "\\n").encode())
            if steps == int(fatal_step):
                os.kill(os.getpid(), signal.SIGKILL)
        return answer
    setattr(owner, name, wrapper)

with store.Store.open(store_path) as opened:
    followed_by_death(session, "reconcile", "judged")
    followed_by_death(store.Store, "update", "committed")
    followed_by_death(os, "mkdir", "folder made")
    followed_by_death(os, "fsync", "synced")
    followed_by_death(os, "rename", "renamed")
    followed_by_death(os, "unlink", "removed")
    followed_by_death(gang.Gang, "_do_next", "data written")
    followed_by_death(carriers.Carriers, "finish", "image written")
    followed_by_death(backup_folder.BackupFolder, "note_unfinished", "noted")
    followed_by_death(holds.HoldFile, "replace", "held")
    followed_by_death(backup_folder.BackupFolder, "replace_manifest", "manifest replaced")
    backup.backup(opened, [{NAME!r}], repository_path, kind=BackupType(kind))
"""
