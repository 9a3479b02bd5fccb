"""A store of a user for whom root works now and then: the user reads, and goes on with, whatever root left there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.support import make_raw_image

ROOT = Path(__file__).resolve().parents[2]
USER, GROUP = 65534, 65533
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="whose file it is only root can choose: run as root"
)

_AS_USER = f"""
import encodings.ascii, encodings.idna, importlib.metadata, os, sys
# By descriptor, as the user may not be let in where they are.
folders = [path for path in ({str(ROOT)!r}, *sys.path) if os.path.isdir(path)]
sys.path[:] = ["/proc/self/fd/%d" % os.open(folder, os.O_PATH) for folder in folders]
import lmdbitmap.cli.main
os.setgroups([])
os.setresgid({GROUP}, {GROUP}, {GROUP})
os.setresuid({USER}, {USER}, {USER})
lmdbitmap.cli.main.main()
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of the user's, with an image; pytest's own are root's alone."""
    folder = Path(tempfile.mkdtemp())
    make_raw_image(folder / "sda.raw", 1 << 20)
    for path in (folder, folder / "sda.raw"):
        os.chown(path, USER, GROUP)
    yield folder
    shutil.rmtree(folder)


def said(place: Path, command: list[str], words: tuple[object, ...]) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--store", str(place / "store"), *map(str, words)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def by_user(place: Path, *words: object) -> str:
    return said(place, ["-c", _AS_USER], words)


def by_root(place: Path, *words: object) -> str:
    return said(place, ["-m", "lmdbitmap"], words)


def owners(store: Path) -> set[tuple[int, int]]:
    every = [store, *store.rglob("*")]
    assert len(every) > 10
    return {(path.lstat().st_uid, path.lstat().st_gid) for path in every}


def test_whatever_root_makes_in_a_store_belongs_to_whom_the_store_does(place: Path) -> None:
    by_user(place, "add", "sda", place / "sda.raw")
    by_root(place, "backup", "sda", place / "backups")
    by_root(place, "sync", "sda", place / "copy.raw")
    by_root(place, "holds", "sda", "--lapse", "30")
    assert owners(place / "store") == {(USER, GROUP)}
    assert "WARNING" not in by_user(place, "info", "sda")
    by_user(place, "checkpoint", "sda", "monday")
    by_user(place, "holds", "sda")


def test_a_store_that_root_makes_in_somebodys_folder_stays_roots(place: Path) -> None:
    """Nobody has it yet, and a path that is typed wrong gives nothing away."""
    by_root(place, "add", "sda", place / "sda.raw")
    assert {uid for uid, _ in owners(place / "store")} == {0}


def test_a_disk_that_root_adds_to_a_store_is_its_owners(place: Path) -> None:
    make_raw_image(place / "sdb.raw", 1 << 20)
    by_user(place, "add", "sda", place / "sda.raw")
    by_root(place, "add", "sdb", place / "sdb.raw")
    assert owners(place / "store") == {(USER, GROUP)}


def test_a_store_that_root_heals_is_its_owners(place: Path) -> None:
    by_user(place, "add", "sda", place / "sda.raw")
    shutil.rmtree(place / "store" / "lmdb")
    for name in ("holds", "syncs"):
        (place / "store" / name).rmdir()
    by_root(place, "ls")
    assert owners(place / "store") == {(USER, GROUP)}
    by_user(place, "checkpoint", "sda", "monday")


def test_notes_that_an_older_version_left_to_root_are_unreadable_and_hinder_nobody(place: Path) -> None:
    by_user(place, "add", "sda", place / "sda.raw")
    by_root(place, "backup", "sda", place / "backups")
    by_root(place, "sync", "sda", place / "copy.raw")
    left = [path for name in ("syncs", "holds") for path in (place / "store" / name).iterdir()]
    assert len(left) >= 3
    for path in left:
        os.chown(path, 0, 0)
    told = by_user(place, "info", "sda")
    assert "Permission denied; the checkpoints that it named stay" in told
    assert "Permission denied; the target will be compared" in told
    assert "checkpoint monday made" in by_user(place, "checkpoint", "sda", "monday")
    assert '"monday"' in by_user(place, "info", "sda", "--json")


def test_what_needs_no_store_is_done_for_a_user_who_may_not_read_it(place: Path) -> None:
    """LMDBITMAP_STORE may be set for all users of a host."""
    by_user(place, "add", "sda", place / "sda.raw")
    by_user(place, "backup", "sda", place / "backups")
    by_user(place, "export", "sda", place / "sda.dbm")
    os.chown(place / "store", 0, 0)
    assert "1 image sound" in by_user(place, "verify", place / "backups")
    assert "sda" in by_user(place, "ls", place / "backups")
    assert "exact" in by_user(place, "inspect", place / "sda.dbm")
    with pytest.raises(
        AssertionError, match=r"store .*: Permission denied; choose a folder that this user can write"
    ):
        by_user(place, "ls")
