"""A process killed in the middle of an export, an import or a served bitmap file: old or new, and never torn."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap import bitmap_file, export
from tests import naive_flat
from tests.support import run
from tests.tracked import NAME, TrackedDisk, quick_folder

BLOCKS = 5000
SIZE = BLOCKS * 4096
OLD, NEW = {1, 4999}, {2, 4998}

DYING = """
import os, signal, sys

fatal_step, step = int(sys.argv[1]), 0

def note(name):
    global step
    step += 1
    print(name, flush=True)
    if step == fatal_step:
        os.kill(os.getpid(), signal.SIGKILL)

def followed_by_death(owner, name):
    call = getattr(owner, name)
    def wrapper(*arguments, **options):
        answer = call(*arguments, **options)
        note(name)
        return answer
    setattr(owner, name, wrapper)
"""

EXPORT = """
from lmdbitmap import export, files, flatfile
from lmdbitmap.changes import changes
from lmdbitmap.store import Store

store = Store.open(sys.argv[2])
asked = changes(store, "sda")
for name in ("seal", "put", "__init__"):
    followed_by_death(flatfile.NewFlatFile, name)
for name in ("fsync", "rename"):
    followed_by_death(os, name)
export.export_changes(asked, sys.argv[3])
note("done")
"""

IMPORT = """
from lmdbitmap import export, filter, flatfile
from lmdbitmap.store import Store, Writer

store = Store.open(sys.argv[2])
followed_by_death(flatfile.FlatFile, "prove")
for name in ("new_bitmap_id", "put_region", "put_bitmap"):
    followed_by_death(Writer, name)
followed_by_death(Store, "update")
followed_by_death(filter.Filter, "mark_regions")
export.import_file(store, sys.argv[3], "copy", into="sda")
note("done")
"""

SERVE = """
from lmdbitmap import bitmap_file, export, flatfile
from lmdbitmap.filter import Filter
from lmdbitmap.store import Store

store = Store.open(sys.argv[2])
for name in ("prove", "clear_clean"):
    followed_by_death(flatfile.FlatFile, name)
for name in ("__init__", "seal"):
    followed_by_death(flatfile.NewFlatFile, name)
for name in ("pwrite", "fsync", "rename"):
    followed_by_death(os, name)
followed_by_death(Filter, "mark_regions")
disk = Filter.attach(store, "sda", background=False)
bitmap_file.begin(disk, sys.argv[3])
note("began")
disk.pwrite(b"x", 7 * 4096)
note("wrote")
disk.detach()
note("done")
"""


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: these tests commit often."""
    with quick_folder() as folder:
        yield folder


def died_after(step: int, script: str, disk: TrackedDisk, path: Path) -> list[str]:
    """What a process got done that runs `script` and is killed after its nth step."""
    done = run(sys.executable, "-c", DYING + script, str(step), disk.store.path, path, check=False)
    steps = done.stdout.split()
    assert done.stderr == ""
    assert done.returncode == (0 if "done" in steps and len(steps) < step else -signal.SIGKILL)
    return steps


def every_death(
    folder: Path, script: str, prepare: Callable[[TrackedDisk, Path], None]
) -> Iterator[tuple[TrackedDisk, Path, list[str]]]:
    """For each step of the script a disk and a path of its own, after a process died there, and the steps it did."""
    for step in itertools.count(1):
        place = folder / str(step)
        place.mkdir()
        with closing(TrackedDisk(place, SIZE).clean()) as disk:
            path = place / "x.dbm"
            prepare(disk, path)
            steps = died_after(step, script, disk, path)
            yield disk, path, steps
        if "done" in steps and len(steps) < step:
            return


def write(disk: TrackedDisk, blocks: set[int]) -> None:
    with disk.attach() as attached:
        for block in blocks:
            attached.pwrite(b"x", block * 4096)


def bitmap_names(disk: TrackedDisk) -> list[str | None]:
    with disk.store.read() as reader:
        return [bitmap.name for bitmap in reader.bitmaps()]


@pytest.mark.parametrize("exists", [True, False], ids=["replaced", "new"])
def test_killed_export_leaves_the_old_file_or_the_new_one(tmp_path: Path, exists: bool) -> None:
    old = naive_flat.write(OLD, SIZE, 12)
    outcomes: list[str] = []

    def prepare(disk: TrackedDisk, path: Path) -> None:
        write(disk, NEW)
        if exists:
            path.write_bytes(old)

    for disk, path, steps in every_death(tmp_path, EXPORT, prepare):
        if "rename" in steps:
            assert export.inspect_file(path).problems == []
            assert naive_flat.dirty_blocks(path.read_bytes()) == NEW
        else:
            assert (path.read_bytes() if path.exists() else None) == (old if exists else None)
        outcomes.append(steps[-1])
        export.export_changes(disk.changes(), path)  # what the dead left is in nobody's way
        assert naive_flat.dirty_blocks(path.read_bytes()) == NEW
        assert sorted(name for name in os.listdir(path.parent) if ".dbm" in name) == ["x.dbm"]
    assert outcomes == ["__init__", "put", "seal", "fsync", "rename", "fsync", "done", "done"]


def test_killed_import_keeps_all_of_the_bitmap_or_nothing(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def prepare(disk: TrackedDisk, path: Path) -> None:
        path.write_bytes(naive_flat.write(NEW, SIZE, 12))

    for disk, path, steps in every_death(tmp_path, IMPORT, prepare):
        is_kept = "update" in steps
        assert bitmap_names(disk) == (["copy"] if is_kept else [])
        assert disk.stored_dirt() in ([NEW] if "mark_regions" in steps else [set(), NEW])
        outcomes.append(steps[-1])
        if is_kept:
            with disk.attach() as attached:
                export.merge_into(attached, "copy")
        else:
            export.import_file(disk.store, path, "copy", into=NAME)
        assert disk.stored_dirt() == NEW
    assert outcomes.count("put_region") == 4  # two kept, two marked
    assert outcomes[:5] == ["prove", "new_bitmap_id", "put_region", "put_region", "put_bitmap"]
    assert outcomes[-2:] == ["done", "done"]


def test_killed_serve_leaves_a_file_that_is_true_or_not_clean(tmp_path: Path) -> None:
    outcomes: list[str] = []

    def prepare(disk: TrackedDisk, path: Path) -> None:
        write(disk, OLD)
        export.export_changes(disk.changes(), path)

    for disk, path, steps in every_death(tmp_path, SERVE, prepare):
        found = export.inspect_file(path)
        was_written = "began" in steps
        is_true = naive_flat.dirty_blocks(path.read_bytes()) >= (OLD | {7} if was_written else OLD)
        assert found.header.clean <= is_true
        if "clear_clean" in steps:
            assert found.header.clean == ("rename" in steps)
        outcomes.append(steps[-1])
        check_next_attach(disk, path, found.header.clean)
    milestones = ("prove", "mark_regions", "clear_clean", "began", "wrote", "seal", "rename", "done")
    assert [step for step in outcomes if step in milestones] == [*milestones, "done"]
    assert outcomes[outcomes.index("clear_clean") - 1] == "fsync"


def check_next_attach(disk: TrackedDisk, path: Path, was_clean: bool) -> None:
    """A dead serve blocks nobody, and what was not clean is answered with everything."""
    before = disk.stored_dirt()
    with disk.attach() as attached:
        reason = bitmap_file.begin(attached, path)
    assert (reason is None) == was_clean
    after = naive_flat.dirty_blocks(path.read_bytes())
    assert after >= before
    assert (after == set(range(BLOCKS))) == (not was_clean)
    assert export.inspect_file(path).problems == []
