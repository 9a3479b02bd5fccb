"""A sync killed at any step: the next one leaves the copy as the disk is, and no checkpoint behind."""

from __future__ import annotations

from contextlib import closing

from lmdbitmap.backups.backup import backup
from lmdbitmap.filter import Filter
from lmdbitmap.notes import sync_note
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.store import Store
from lmdbitmap.syncs.plan import SyncKind
from lmdbitmap.syncs.sync import SyncResult, sync
from tests.crash.dying import Death, Deaths
from tests.crash.test_stream_crash import checkpoints
from tests.helpers.tracked import NAME

LATE = b"written after the death"


def synced_again(death: Death, *, write: bool) -> SyncResult:
    """After another write, perhaps: what the dead run touched and what changed since make up the union."""
    with closing(Store.open(str(death.folder / "store"))) as store:
        if write:
            with Filter.attach(store, NAME, background=False) as disk:
                disk.pwrite(LATE, 0)
        result = sync(store, NAME, death.folder / "copy.raw")
        assert content(death, "copy.raw") == content(death, "disk.raw"), death
        ours = [name for name in checkpoints(store) if Maker.SYNC.named(name)]
        assert ours == [result.checkpoint], death
    return result


def content(death: Death, name: str) -> bytes:
    return (death.folder / name).read_bytes()


def test_a_first_sync_killed_at_any_step_is_made_whole_by_the_next(deaths: Deaths) -> None:
    kinds = set()
    for death in deaths("syncing_first"):
        is_whole = bool(death.told)
        result = synced_again(death, write=False)
        kinds.add(result.kind)
        assert result.kind is SyncKind.INCREMENTAL or not is_whole, death
    assert kinds == set(SyncKind)


def test_a_sync_killed_at_any_step_is_followed_by_one_of_the_union(deaths: Deaths) -> None:
    """Law 3: the checkpoint before is there until the copy is durable, so that no death costs a comparison."""
    changed = set()
    for death in deaths("syncing"):
        result = synced_again(death, write=True)
        assert result.kind is SyncKind.INCREMENTAL, death
        changed.add(result.bytes_changed)
    assert len(changed) == 2, "all that the dead run had to copy, or only what was written since"


def test_a_comparison_killed_at_any_step_is_followed_by_another(deaths: Deaths) -> None:
    kinds = set()
    for death in deaths("comparing"):
        result = synced_again(death, write=True)
        kinds.add(result.kind)
        assert result.kind is SyncKind.INCREMENTAL or not death.told, death
    assert kinds == {SyncKind.COMPARE, SyncKind.INCREMENTAL}


def test_what_a_killed_restore_wrote_onto_a_copy_is_not_taken_for_the_disk(deaths: Deaths) -> None:
    kinds = []
    for death in deaths("restoring_onto_a_copy"):
        kinds.append(synced_again(death, write=True).kind)
        assert kinds[-1] is SyncKind.COMPARE or not death.told, death
    assert set(kinds) == {SyncKind.INCREMENTAL, SyncKind.COMPARE}


def test_a_backup_merges_away_what_a_killed_sync_left_and_the_next_sync_is_right(deaths: Deaths) -> None:
    gone = 0
    for death in deaths("syncing"):
        with closing(Store.open(str(death.folder / "store"))) as store:
            before = {name for name in checkpoints(store) if Maker.SYNC.named(name)}
            backup(store, [NAME], death.folder / "backups")
            left = {name for name in checkpoints(store) if Maker.SYNC.named(name)}
            [(_, note)] = sync_note.notes(store.path)
            assert note.at is not None
            assert left == {note.at.name}, death
            gone += before != left
        assert synced_again(death, write=True).kind is SyncKind.INCREMENTAL, death
    assert gone >= 5
