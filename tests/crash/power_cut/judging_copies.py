"""Was anything lost of what was copied? Backups, and what became of them; second copies; restored files.

What was acknowledged is there, and is the disk as it was then. And whatever there is, the next backup, prune, copy and
sync make of it what the disk is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lmdbitmap.backups.backup import backup
from lmdbitmap.notes.references import Reason
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupEntry, BackupType
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.transfer import copy_backups
from lmdbitmap.repository.verify import verify
from lmdbitmap.restoring.restore import restore
from lmdbitmap.store import Store
from lmdbitmap.syncs.plan import SyncKind
from lmdbitmap.syncs.sync import sync
from tests.crash.power_cut.stage import COPY, REPOSITORY, RESTORED, SECOND_REPOSITORY
from tests.crash.power_cut.truth import Deed, Truth


class Copies:
    """What is under `root`, where a state of the disk at a moment was laid out."""

    def __init__(self, truth: Truth, root: Path, moment: int, ways: Counter[str]) -> None:
        self.truth = truth
        self.root = root
        self.moment = moment
        self.ways = ways
        """How things were done again is counted here."""
        self.disks = sorted({disk for deed in truth.of("backup") for disk in deed.disks})

    def are_right(self) -> None:
        """As they are found, before anybody does anything."""
        for disk in self.disks:
            self._backups_are_right(disk)
            self._second_repository_is_right(disk)
        self._restored_file_is_whole()
        self._image_went_back()
        self._synced_copy_is_whole()

    def go_on(self, store: Store) -> None:
        """Whatever was interrupted is done again, and more."""
        if self.disks:
            for made in backup(store, self.disks, self.root / REPOSITORY):
                self._count(made.entry.type_actual, made.entry.reason)
        if self.truth.of("prune"):
            prune(self.root / REPOSITORY, keep=Retention(last=2))
        if self.truth.of("copy"):
            copy_backups(self.root / REPOSITORY, self.root / SECOND_REPOSITORY)
        for disk in self.disks:
            self._all_is_there(REPOSITORY, disk)
            if self.truth.of("copy"):
                self._all_is_there(SECOND_REPOSITORY, disk)
        for deed in self.truth.of("sync")[:1]:
            done = sync(store, deed.disks[0], self.root / f"{COPY}.raw")
            self._count(done.kind, done.reason)
            self._is_synced(deed, (self.root / f"{deed.disks[0]}.raw").read_bytes())

    def _count(self, kind: BackupType | SyncKind, reason: Reason | None) -> None:
        self.ways[kind.value if reason is None else f"{kind.value}: {reason.code}"] += 1

    def _all_is_there(self, repository: str, disk: str) -> None:
        """The newest backup is of now, and the older ones are what they were."""
        *older, _ = self._entries(repository, disk)
        self._restore(repository, disk, older)
        self._restores_to(repository, disk, None, (self.root / f"{disk}.raw").read_bytes())

    # -- backups -----------------------------------------------------------------------------------------

    def _backups_are_right(self, disk: str) -> None:
        """What must be there is in the manifest, and all that is in it restores to what the image was."""
        entries = self._entries(REPOSITORY, disk)
        there = [entry.sequence for entry in entries]
        must, may = self._expected(disk)
        assert set(must) <= set(there) <= set(may), f"backups {there}, and not {must}, or some of {may}"
        self._restore(REPOSITORY, disk, entries)
        if entries:
            assert verify(self.root / REPOSITORY, disk).flaws == ()

    def _expected(self, disk: str) -> tuple[list[int], list[int]]:
        """The numbers of the backups that must be there, and of those that may: at most one thing is under way."""
        must: list[int] = []
        may: list[int] = []
        number = 0
        for deed in sorted([*self.truth.of("backup", disk), *self.truth.of("prune", disk)], key=_begun):
            if deed.begun > self.moment:
                break
            if "keep" in deed.told:
                must = must[-deed.told["keep"] :]
            else:
                number += 1
                may = [*may, number]
                must = may if deed.done <= self.moment else must
            if deed.done <= self.moment:
                may = must
        return must, may

    def _entries(self, repository: str, disk: str) -> Sequence[BackupEntry]:
        if not (self.root / repository / disk).is_dir():
            return ()
        manifest = BackupFolder(self.root / repository, disk).manifest()
        return () if manifest is None else manifest.backups

    def _restore(self, repository: str, disk: str, entries: Sequence[BackupEntry]) -> None:
        deeds = self.truth.of("backup", disk)
        for entry in entries:
            then = deeds[entry.sequence - 1].begun
            self._restores_to(repository, disk, entry.id, self.truth.seen(disk, then).data())

    def _restores_to(self, repository: str, disk: str, at: str | None, expected: bytes) -> None:
        out = self.root / "judged.raw"
        restore(self.root / repository, disk, out, at=at)
        restored = out.read_bytes()
        out.unlink()
        assert restored == expected, f"{repository}: backup {at} does not restore to what was backed up"

    def _second_repository_is_right(self, disk: str) -> None:
        copied = [deed for deed in self.truth.of("copy", disk) if deed.done <= self.moment]
        entries = self._entries(SECOND_REPOSITORY, disk)
        before = [d for d in self.truth.of("backup", disk) if copied and d.done <= copied[-1].begun]
        there = [entry.sequence for entry in entries]
        assert there == [*range(1, len(there) + 1)], f"backups {there} were copied"
        assert len(there) >= len(before), f"{len(there)} of {len(before)} backups that were copied are there"
        if entries:
            assert verify(self.root / SECOND_REPOSITORY, disk).flaws == ()
        self._restore(SECOND_REPOSITORY, disk, entries)

    # -- files -------------------------------------------------------------------------------------------

    def _restored_file_is_whole(self) -> None:
        for deed in self.truth.of("restore"):
            path = self.root / RESTORED
            assert path.exists() or deed.done > self.moment, "what was restored is gone"
            if path.exists():
                assert path.read_bytes() == self.truth.seen("sda", deed.begun).data(), "half restored"

    def _image_went_back(self) -> None:
        """To a backup, in place; nobody writes to it after that."""
        for deed in self.truth.of("go back"):
            if deed.done <= self.moment:
                [disk] = deed.disks
                then = self.truth.of("backup", disk)[int(deed.told["at"]) - 1].begun
                now = (self.root / f"{disk}.raw").read_bytes()
                assert now == self.truth.seen(disk, then).data(), f"disk {disk} is not what it went back to"

    def _synced_copy_is_whole(self) -> None:
        """As long as the next sync has not begun."""
        begun = [deed for deed in self.truth.of("sync") if deed.begun <= self.moment]
        if begun and begun[-1].done <= self.moment:
            self._is_synced(begun[-1], self.truth.seen(begun[-1].disks[0], begun[-1].begun).data())

    def _is_synced(self, deed: Deed, expected: bytes) -> None:
        copied = (self.root / f"{COPY}.raw").read_bytes()
        assert copied == expected, f"the copy is not what disk {deed.disks[0]} was"


def _begun(deed: Deed) -> int:
    return deed.begun
