"""A process killed in the middle of an export, an import, a served bitmap file or two bitmaps that are combined: old
or new, and never torn."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from lmdbitmap import export
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.flat_file import bitmap_file
from lmdbitmap.flat_file.inspection import inspect_file
from lmdbitmap.format import NO_UUID
from lmdbitmap.store import Store
from lmdbitmap.tracker import standalone
from lmdbitmap.tracker.changes import changes
from lmdbitmap.tracker.standalone import Operation
from tests.crash.dying import Death, Deaths
from tests.crash.lives import BLOCK, BLOCKS, GRANULARITY_BITS, NEW, OLD, SIZE
from tests.helpers import naive_flat
from tests.helpers.tracked import NAME, blocks_of, trust_of


def opened(death: Death) -> closing[Store]:
    return closing(Store.open(str(death.folder / "store")))


def blocks_in(path: Path) -> set[int]:
    return naive_flat.dirty_blocks(path.read_bytes())


def names_of_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.dbm*"))


@pytest.mark.parametrize("life", ["exporting", "exporting_anew"])
def test_killed_export_leaves_the_old_file_or_the_new_one(life: str, deaths: Deaths) -> None:
    old = naive_flat.write(OLD, SIZE, GRANULARITY_BITS) if life == "exporting" else None
    fates = {True: 0, False: 0}
    for death in deaths(life):
        path = death.folder / "x.dbm"
        is_new = (path.read_bytes() if path.exists() else None) != old
        fates[is_new] += 1
        if is_new:
            assert (inspect_file(path).problems, blocks_in(path)) == ([], NEW), death
        else:
            assert not death.told, death
        with opened(death) as store:
            export.export_changes(changes(store, NAME), path)  # what the dead left is in nobody's way
        assert (names_of_files(death.folder), blocks_in(path)) == (["x.dbm"], NEW), death
    assert min(fates.values()) >= 1


def test_killed_import_keeps_all_of_the_bitmap_or_nothing(deaths: Deaths) -> None:
    """And marks all of the disk's blocks or none; doing it again does what is missing."""
    fates = set()
    for death in deaths("importing"):
        with opened(death) as store:
            kept, marked = bitmap_names(store), blocks_of(changes(store, NAME))
            assert kept in ([], ["copy"]), death
            assert marked in (set(), NEW), death
            assert (kept, marked) == (["copy"], NEW) or not death.told, death
            fates.add((len(kept), len(marked)))
            export.import_file(store, death.folder / "x.dbm", "copy", into=NAME)
            assert (bitmap_names(store), blocks_of(changes(store, NAME))) == (["copy"], NEW), death
            export.export_bitmap(store, "copy", death.folder / "y.dbm")
        assert blocks_in(death.folder / "y.dbm") == NEW, death
    assert fates == {(0, 0), (1, 0), (1, 2)}


def test_killed_combination_is_all_of_the_answer_or_as_if_never_asked_for(deaths: Deaths) -> None:
    """A bitmap that was combined has another uuid: who is in doubt need not do it twice."""
    fates = set()
    for death in deaths("combining"):
        with opened(death) as store:
            found = kept(store)
            is_combined, is_kept = uuid_of(store, "old") != NO_UUID, "both" in found
            assert found["old"] == (OLD | NEW if is_combined else OLD), death
            assert found["new"] == found.get("both", NEW) == NEW, death
            assert ("combined" in death.told, "kept" in death.told) <= (is_combined, is_kept), death
            fates.add((is_combined, is_kept))
            if not is_combined:
                standalone.combine(store, "old", Operation.XOR, ["new"])
            if not is_kept:
                standalone.combine(store, "old", Operation.AND, ["new"], into="both")
            assert kept(store) == {"old": OLD | NEW, "new": NEW, "both": NEW}, death
    assert fates == {(False, False), (True, False), (True, True)}


def kept(store: Store) -> dict[str | None, set[int]]:
    """The blocks of every stand-alone bitmap."""
    with store.read() as reader:
        bitmaps = reader.bitmaps()
    return {
        bitmap.name: {block for run in standalone.runs(store, bitmap) for block in range(*run)}
        for bitmap in bitmaps
    }


def uuid_of(store: Store, name: str) -> UUID:
    with store.read() as reader:
        return standalone.find(reader, name).uuid


def bitmap_names(store: Store) -> list[str | None]:
    with store.read() as reader:
        return [bitmap.name for bitmap in reader.bitmaps()]


def test_killed_serve_leaves_a_file_that_is_true_or_not_clean(deaths: Deaths) -> None:
    """What it costs: nothing until CLEAN is cleared, which is before the first write; then a new epoch."""
    fates = {"still true": 0, "not clean": 0, "true again": 0}
    for death in deaths("serving_beside_a_file"):
        path = death.folder / "x.dbm"
        is_clean = inspect_file(path).header.clean
        is_ended = is_clean and 7 in blocks_in(path)
        if is_clean:
            assert blocks_in(path) == (OLD | {7} if is_ended else OLD), death
            assert is_ended or not (death.told or was_written(death, 7)), death
        else:
            assert "detached" not in death.told, death
        fates["true again" if is_ended else "still true" if is_clean else "not clean"] += 1
        is_served_again(death, was_clean=is_clean)
    assert min(fates.values()) >= 1


def was_written(death: Death, block: int) -> bool:
    return (death.folder / "disk.raw").read_bytes()[block * BLOCK :].startswith(b"x")


def is_served_again(death: Death, *, was_clean: bool) -> None:
    """A dead serve blocks nobody, and what was not clean is answered with everything. Its dirt is in the store."""
    path = death.folder / "x.dbm"
    with opened(death) as store:
        before = changes(store, NAME)
        assert trust_of(before) is not Trust.UNTRUSTED, death
        known = blocks_of(before)
        assert was_clean or known >= OLD, death
        with Filter.attach(store, NAME, background=False) as attached:
            reason = bitmap_file.begin(attached, path)
            assert (reason is None, attached.disk.epoch_number) == (was_clean, 1 if was_clean else 2), death
    assert (names_of_files(death.folder), inspect_file(path).problems) == (["x.dbm"], []), death
    assert blocks_in(path) == (known | OLD if was_clean else set(range(BLOCKS))), death
