"""A prune killed at any step: every backup that the manifest names reads as it did; whoever comes next goes on."""

from __future__ import annotations

import filecmp
import os
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.backups.backup import backup
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.repository import known_backups
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.verify import verify
from lmdbitmap.restoring.restore import restore
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from tests.crash.dying import Death, Deaths
from tests.helpers.backed_up import ALWAYS_THERE, INCREMENTAL
from tests.helpers.support import requires, run
from tests.helpers.tracked import NAME

STAY = {"pruning": "3 4", "thinning": "2 3 5", "merging": "1 3"}


@pytest.mark.timeout(240)
@requires("qemu-img")
@pytest.mark.parametrize("life", ["pruning", "thinning", "merging"])
def test_a_prune_killed_at_any_step_takes_nothing_from_what_stays(life: str, deaths: Deaths) -> None:
    stay, seen = STAY[life], set()
    for death in deaths(life):
        entries = named_backups_are_whole(death)
        ids = [entry.id for entry in entries]
        seen.add(" ".join(ids))
        assert set(stay.split()) <= set(ids), death
        assert not death.told or ids == stay.split(), death
        goes_on(death, stay.split())
    assert len(seen) >= 2
    assert stay in seen


def named_backups_are_whole(death: Death) -> tuple[BackupEntry, ...]:
    """Without a lock, as a reader of a read-only repository would look: by us, and by QEMU, which follows the names
    in the images' headers."""
    folder = BackupFolder(death.folder / "backups", NAME)
    before = sorted(os.listdir(folder.path))
    entries = known_backups(folder).backups
    for entry in entries:
        restored, truth = death.folder / "restored.raw", death.folder / f"{entry.id}.raw"
        restore(folder.repository_path, NAME, restored, at=entry.id)
        assert filecmp.cmp(restored, truth, shallow=False), (death, entry.id)
        restored.unlink()
        run("qemu-img", "compare", "-q", "-F", "raw", folder.path_of(entry.file), truth)
    assert verify(folder.repository_path).is_sound, death
    assert sorted(os.listdir(folder.path)) == before, "looking changes nothing"
    return entries


def goes_on(death: Death, stay: list[str]) -> None:
    """Whoever comes next, here a backup or the same prune, finishes or undoes it, and leaves nothing of it."""
    is_backup_next = int(death.folder.name) % 2 == 0
    if is_backup_next:
        makes_an_increment(death)
    [result] = prune(death.folder / "backups", keep=Retention(last=len(stay) + is_backup_next))
    kept = [entry.id for entry in result.kept]
    assert kept[-1] == str(int(stay[-1]) + is_backup_next), death
    leaves_nothing(death)
    if not is_backup_next:
        makes_an_increment(death)
    leaves_nothing(death)


def makes_an_increment(death: Death) -> None:
    with closing(Store.open(str(death.folder / "store"))) as store:
        [made] = backup(store, [NAME], death.folder / "backups")
        assert (made.entry.type_actual, made.entry.reason) == (INCREMENTAL, None), death
        restore(death.folder / "backups", NAME, death.folder / "out.raw")
        assert filecmp.cmp(death.folder / "out.raw", death.folder / "disk.raw", shallow=False), death
        (death.folder / "out.raw").unlink()
        with store.read() as reader:
            held = {point.name for point in reader.checkpoints(chain.find_disk(reader, NAME).uuid)}
    names = {
        entry.checkpoint.name for entry in known_backups(BackupFolder(death.folder / "backups", NAME)).backups
    }
    assert {name for name in held if name.startswith("backup-")} <= names, (
        death,
        "checkpoints of backups that went",
    )


def leaves_nothing(death: Death, place: str = "backups") -> None:
    folder = BackupFolder(death.folder / place, NAME)
    entries = known_backups(folder).backups
    files = {file for entry in entries for file in (entry.file, entry.chunks and entry.chunks.file)}
    assert {path.name for path in Path(folder.path).iterdir()} == files | ALWAYS_THERE, death
    assert verify(folder.repository_path).is_sound, death
