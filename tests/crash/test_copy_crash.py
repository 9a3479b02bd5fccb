"""A copy of a repository killed at any step has nothing but whole backups; the next copy completes it."""

from __future__ import annotations

import dataclasses
import filecmp
from pathlib import Path

import pytest

from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import encode
from lmdbitmap.repository.repository import known_backups
from lmdbitmap.repository.transfer import copy_backups
from lmdbitmap.repository.verify import verify
from lmdbitmap.restoring.restore import restore
from tests.crash.dying import Death, Deaths
from tests.crash.test_prune_crash import leaves_nothing
from tests.helpers.tracked import NAME


@pytest.mark.parametrize("life", ["copying", "copying_first"])
def test_a_killed_copy_holds_a_beginning_of_the_chain(life: str, deaths: Deaths) -> None:
    seen = set()
    for death in deaths(life):
        count = whole_backups(death)
        seen.add(count)
        wanted = known_backups(BackupFolder(death.folder / "backups", NAME)).backups
        assert count == len(wanted) or not death.told, death
        [result] = copy_backups(death.folder / "backups", death.folder / "copy")
        assert (result.already_there, len(result.copied)) == (count, len(wanted) - count), death
        assert contents(death, "copy") == contents(death, "backups"), death
    assert seen == ({1, 2, 3} if life == "copying" else {0, 1, 2})


def test_a_copy_that_was_killed_after_a_prune_keeps_all_that_was_there(deaths: Deaths) -> None:
    seen = set()
    for death in deaths("copying_what_was_pruned"):
        ids = backups_read_as_they_did(death)
        seen.add(ids)
        assert ids == "12345" or not death.told, death
        copy_backups(death.folder / "backups", death.folder / "copy")
        assert backups_read_as_they_did(death) == "12345", death
        leaves_nothing(death, "copy")
    assert seen == {"123", "1234", "12345"}


def backups_read_as_they_did(death: Death) -> str:
    """The ids of all that the copy names, read without a lock, as a person would who needs them now."""
    folder = BackupFolder(death.folder / "copy", NAME)
    entries, restored = known_backups(folder).backups, death.folder / "restored.raw"
    for entry in entries:
        restore(folder.repository_path, NAME, restored, at=entry.id)
        assert filecmp.cmp(restored, death.folder / f"{entry.id}.raw", shallow=False), (death, entry.id)
        restored.unlink()
    assert verify(folder.repository_path).is_sound, death
    return "".join(entry.id for entry in entries)


def whole_backups(death: Death) -> int:
    """How many backups the copy has: all that it names are sound, and they are the source's first ones.

    One that has none is not called sound.
    """
    copy = BackupFolder(death.folder / "copy", NAME)
    found = copy.manifest() if (death.folder / "copy" / NAME).exists() else None
    if found is None:
        return 0
    source = known_backups(BackupFolder(death.folder / "backups", NAME))
    assert found.backups == source.backups[: len(found.backups)], death
    assert verify(copy.repository_path).is_sound == bool(found.backups), death
    return len(found.backups)


def contents(death: Death, name: str) -> dict[str, bytes]:
    """To the byte, but for who holds the checkpoints: a copy is a holder of its own."""
    folder = BackupFolder(death.folder / name, NAME)
    manifest = encode(dataclasses.replace(known_backups(folder), holder=None))
    found = {path.name: path.read_bytes() for path in Path(folder.path).iterdir()}
    return {**found, "manifest.json": manifest, "manifest.json.copy": manifest}
