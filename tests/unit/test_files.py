from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmdbitmap.errors import Busy, FormatError, InvalidArgument, LmdbitmapError, NotFound, StorageError
from lmdbitmap.system import atomic_files, file_locks, file_systems, files, linux
from lmdbitmap.system.file_names import new_unfinished
from tests.helpers.support import open_files, run

KIB = 1024


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- replacing ---


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_new_file_has_the_content_and_exactly_the_mode_asked_for(tmp_path: Path, mode: int) -> None:
    atomic_files.replace(tmp_path / "file", b"content", mode)
    assert (tmp_path / "file").read_bytes() == b"content"
    assert mode_of(tmp_path / "file") == mode
    assert names_in(tmp_path) == ["file"]


def test_replacement_is_private_if_nothing_else_is_said(tmp_path: Path) -> None:
    atomic_files.replace(tmp_path / "file", b"content")
    assert mode_of(tmp_path / "file") == 0o600


def test_old_file_is_replaced_and_never_written_to(tmp_path: Path) -> None:
    path, old = tmp_path / "file", tmp_path / "second name of the old file"
    path.write_bytes(b"old content")
    old.hardlink_to(path)
    atomic_files.replace(path, b"new")
    assert (path.read_bytes(), old.read_bytes()) == (b"new", b"old content")


def test_until_the_end_the_new_content_is_private_and_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_files.replacing(path, 0o644) as file:
        file.write(b"new")
        file.flush()
        unfinished = Path(file.name)
        assert path.read_bytes() == b"old"
        assert unfinished.parent == tmp_path
        assert re.fullmatch(r"file\.[0-9a-f]{16}\.partial", unfinished.name)
        assert (unfinished.read_bytes(), mode_of(unfinished)) == (b"new", 0o600)
    assert path.read_bytes() == b"new"
    assert names_in(tmp_path) == ["file"]


def test_replacement_can_be_read_and_sought_and_written_by_descriptor(tmp_path: Path) -> None:
    with atomic_files.replacing(tmp_path / "file") as file:
        file.write(b"0123456789")
        file.seek(2)
        assert file.read(3) == b"234"
        file.seek(0)
        file.write(b"x")
        file.flush()
        os.pwrite(file.fileno(), b"y", 9)
    assert (tmp_path / "file").read_bytes() == b"x12345678y"


def write_half_and_raise(path: Path, error: type[BaseException]) -> None:
    with atomic_files.replacing(path) as file:
        file.write(b"half of the")
        raise error


@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_failure_of_the_writer_leaves_the_old_file_alone(
    tmp_path: Path, old: bytes | None, error: type[BaseException]
) -> None:
    path = tmp_path / "file"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises(error) as failed:
        write_half_and_raise(path, error)
    assert failed.type is error
    assert names_in(tmp_path) == ([] if old is None else ["file"])
    assert old is None or path.read_bytes() == old


@pytest.mark.parametrize("call", ["fchmod", "fsync", "rename"])
def test_failure_of_a_step_is_our_error_and_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match="file: Input/output error; look at the kernel log"):
        atomic_files.replace(path, b"new")
    assert (names_in(tmp_path), path.read_bytes()) == (["file"], b"old")


def test_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "file"
    link.symlink_to(target)
    for content in (b"made through the link", b"and replaced"):
        atomic_files.replace(link, content)
        assert (link.is_symlink(), target.read_bytes()) == (True, content)
    assert names_in(tmp_path / "folder") == ["file"]


def test_a_link_in_a_folder_of_somebody_else_is_not_followed(tmp_path: Path) -> None:
    """Root writes there for its owner, who may lead it anywhere."""
    (tmp_path / "target").write_bytes(b"root's")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(InvalidArgument, match="link is not a regular file"):
        atomic_files.replace(tmp_path / "link", b"new", like_folder=True)
    with pytest.raises(InvalidArgument, match="link is not a regular file"):
        atomic_files.replace(tmp_path / "link", b"new", follow=False)
    assert (tmp_path / "target").read_bytes() == b"root's"


def make_null_device_link(path: Path) -> None:
    path.symlink_to("/dev/null")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, make_null_device_link])
def test_only_regular_files_are_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "special")
    with pytest.raises(InvalidArgument, match="not a regular file"):
        atomic_files.replace(tmp_path / "special", b"content")
    assert names_in(tmp_path) == ["special"]
    assert not stat.S_ISREG((tmp_path / "special").stat().st_mode)


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("missing/file", NotFound, "there is no folder .*/missing; make it"),
        ("a file/file", NotFound, "there is no folder .*/a file; make it"),
        ("x" * 300, StorageError, "x" * 300),
    ],
)
def test_place_that_cannot_be_written_is_named(
    tmp_path: Path, name: str, error: type[LmdbitmapError], said: str
) -> None:
    (tmp_path / "a file").write_bytes(b"")
    with pytest.raises(error, match=said):
        atomic_files.replace(tmp_path / name, b"content")
    assert names_in(tmp_path) == ["a file"]


def test_relative_name_is_replaced_where_we_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    atomic_files.replace("file", b"content")
    assert names_in(tmp_path) == ["file"]


# --- leftovers ---


def leave_behind(folder: Path, name: str) -> str:
    """What a killed process leaves: a temporary file that nobody has open."""
    left = leftover_name(name)
    (folder / left).write_bytes(b"half")
    return left


def leftover_name(name: str) -> str:
    return new_unfinished(name)


def test_leftovers_of_the_dead_are_removed_and_nothing_else(tmp_path: Path) -> None:
    mine, longer, other = (leave_behind(tmp_path, name) for name in ("disk", "disk.raw", "other"))
    strangers = ["disk", "disk.raw.partial", "disk.notes.partial", "disk.0123456789ABCDEF.partial"]
    for name in strangers:
        (tmp_path / name).write_bytes(b"not ours")
    strangers += [folder := leftover_name("disk"), link := leftover_name("disk")]
    (tmp_path / folder).mkdir()
    (tmp_path / link).symlink_to(tmp_path / "other")
    assert atomic_files.remove_leftovers(tmp_path, "disk") == [mine]
    assert atomic_files.remove_leftovers(tmp_path) == sorted([longer, other])
    assert names_in(tmp_path) == sorted(strangers)


def test_who_replaces_a_file_removes_what_the_dead_left_of_it(tmp_path: Path) -> None:
    leave_behind(tmp_path, "file")
    leave_behind(tmp_path, "file")
    other = leave_behind(tmp_path, "other")
    with atomic_files.replacing(tmp_path / "file") as alive:
        atomic_files.replace(tmp_path / "file", b"content")
        assert names_in(tmp_path) == sorted(["file", Path(alive.name).name, other])
    assert names_in(tmp_path) == ["file", other]


def test_a_file_is_replaced_in_a_folder_that_may_not_be_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: str) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    atomic_files.replace(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_unfinished_file_of_the_living_stays(tmp_path: Path) -> None:
    with atomic_files.replacing(tmp_path / "file") as file:
        file.write(b"content")
        assert atomic_files.remove_leftovers(tmp_path) == []
    assert (tmp_path / "file").read_bytes() == b"content"


def test_file_swept_away_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    swept: list[list[str]] = []

    def sweep_first(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        swept.append(atomic_files.remove_leftovers(tmp_path))
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    atomic_files.replace(tmp_path / "file", b"content")
    assert [len(names) for names in swept] == [1]
    assert (names_in(tmp_path), (tmp_path / "file").read_bytes()) == (["file"], b"content")


def test_without_locks_files_are_replaced_and_leftovers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    left = leave_behind(tmp_path, "a")
    monkeypatch.setattr(fcntl, "flock", refuse)
    atomic_files.replace(tmp_path / "file", b"content")
    assert atomic_files.remove_leftovers(tmp_path) == []
    assert names_in(tmp_path) == [left, "file"]


def test_leftovers_of_a_missing_folder_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        atomic_files.remove_leftovers(tmp_path / "missing")


# --- reading ---


@pytest.mark.parametrize("size", [0, 1, KIB - 1, KIB])
def test_file_within_the_limit_is_read_whole(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    assert files.read_bounded(tmp_path / "file", KIB) == b"x" * size


def test_a_limit_takes_no_memory(tmp_path: Path) -> None:
    """It may come from what a manifest says of another file."""
    (tmp_path / "file").write_bytes(b"x" * KIB)
    assert files.read_bounded(tmp_path / "file", 1 << 60) == b"x" * KIB


@pytest.mark.parametrize("size", [KIB + 1, 1 << 40])
def test_file_beyond_the_limit_is_refused_by_its_size(tmp_path: Path, size: int) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(size)
    with pytest.raises(FormatError, match=f"file: expected at most 1024 bytes, found {size} bytes"):
        files.read_bounded(tmp_path / "file", KIB)


@pytest.mark.parametrize("make", [os.mkfifo, make_null_device_link])
def test_what_is_no_file_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "special")
    with pytest.raises(FormatError, match="special: expected a regular file"):
        files.read_bounded(tmp_path / "special", KIB)


def test_folder_and_missing_file_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="name a file, not a folder"):
        files.read_bounded(tmp_path, KIB)
    with pytest.raises(NotFound):
        files.read_bounded(tmp_path / "missing", KIB)


# --- file systems ---


def test_file_system_number_is_what_stat_prints(tmp_path: Path) -> None:
    for path in ("/proc", "/", tmp_path):
        said = run("stat", "--file-system", "--format=%t", path).stdout
        assert linux.filesystem_number(os.fspath(path)) == int(said, 16)


def test_file_system_that_is_new_to_us_is_named_by_its_number() -> None:
    assert file_systems.filesystem_kind("/proc") == "unknown 0x9fa0"
    assert not file_systems.is_network_filesystem("unknown 0x9fa0")


def test_file_system_of_nothing_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        file_systems.filesystem_kind(tmp_path / "missing")


def test_every_network_file_system_is_one_that_we_can_see() -> None:
    assert set(file_systems.FILESYSTEM_KINDS.values()) > file_systems.NETWORK_FILESYSTEMS


@pytest.mark.parametrize(
    ("kind", "is_network"),
    [
        ("nfs", True),
        ("cifs", True),
        ("fuse", True),
        ("9p", True),
        ("ext4", False),
        ("tmpfs", False),
        ("overlay", False),
    ],
)
def test_network_file_systems_are_told_apart(kind: str, is_network: bool) -> None:
    assert file_systems.is_network_filesystem(kind) == is_network


def test_file_that_takes_the_place_of_a_removed_one_was_made_later(tmp_path: Path) -> None:
    """Its inode may be the same."""
    born = []
    for _ in range(2):
        (tmp_path / "file").write_bytes(b"")
        born.append(linux.born_ns(str(tmp_path / "file")))
        (tmp_path / "file").unlink()
        time.sleep(0.02)  # longer than a step of the clock
    assert born[0] < born[1] or born == [0, 0]
    assert linux.born_ns(str(tmp_path / "file")) == 0


def test_free_space_is_what_df_prints(tmp_path: Path) -> None:
    said = run("df", "--output=avail", "--block-size=1", tmp_path).stdout.split()[1]
    slack = 1 << 30  # others write to the same disk meanwhile
    assert abs(file_systems.free_bytes(tmp_path) - int(said)) < slack
    with pytest.raises(NotFound):
        file_systems.free_bytes(tmp_path / "missing")


def test_what_interrupts_right_behind_the_creation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_private = atomic_files._open_private

    def interrupted(name: str, flags: int) -> int:
        os.close(open_private(name, flags))
        assert len(names_in(tmp_path)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_files, "_open_private", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic_files.replace(tmp_path / "file", b"content")
    assert names_in(tmp_path) == []


# --- locks ---


def test_locked_file_is_busy_until_closed(tmp_path: Path) -> None:
    with file_locks.lock_file(tmp_path / "lock") as held:
        assert not os.get_inheritable(held.fd)
        with pytest.raises(Busy, match="lock is in use"):
            file_locks.lock_file(tmp_path / "lock")
    held.close()
    file_locks.lock_file(tmp_path / "lock").close()
    assert names_in(tmp_path) == ["lock"]


def test_locking_keeps_the_content_and_makes_new_files_private(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"content")
    file_locks.lock_file(tmp_path / "old").close()
    file_locks.lock_file(tmp_path / "new").close()
    assert (tmp_path / "old").read_bytes() == b"content"
    assert mode_of(tmp_path / "new") == 0o600


def test_lock_file_removed_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    removed = 0

    def remove_first(fd: int, operation: int) -> None:
        nonlocal removed
        if removed == 0:
            (tmp_path / "lock").unlink()
            removed += 1
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with file_locks.lock_file(tmp_path / "lock"), pytest.raises(Busy):
        file_locks.lock_file(tmp_path / "lock")
    assert removed == 1


def test_lock_is_not_taken_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError):
        file_locks.lock_file(tmp_path / "link")
    assert names_in(tmp_path) == ["link"]


def test_failed_lock_leaves_no_descriptor_open(tmp_path: Path) -> None:
    with file_locks.lock_file(tmp_path / "lock"):
        before = len(open_files())
        with pytest.raises(Busy):
            file_locks.lock_file(tmp_path / "lock")
        assert len(os.listdir("/proc/self/fd")) == before


def test_folders_are_made_with_those_above_for_their_owner_alone(tmp_path: Path) -> None:
    """Each is synced into the one above it, which strace shows in the power-cut laboratory."""
    wanted = tmp_path / "a" / "b" / "c"
    made = [wanted.parent.parent, wanted.parent, wanted]
    assert files.make_folders(wanted) == list(map(str, made))
    assert [mode_of(folder) for folder in made] == [0o700] * 3
    assert files.make_folders(wanted) == []
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="file is not a folder"):
        files.make_folders(tmp_path / "file" / "below")


def test_only_empty_folders_are_removed_and_from_below(tmp_path: Path) -> None:
    made = files.make_folders(tmp_path / "a" / "b" / "c")
    (tmp_path / "a" / "else").touch()
    files.remove_folders(made)
    assert sorted(tmp_path.glob("**/*")) == [tmp_path / "a", tmp_path / "a" / "else"]
    files.remove_folders(made)


def test_what_the_system_takes_in_parts_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pwrite, parts = tmp_path / "file", os.pwrite, list[int]()

    def write_a_part(fd: int, data: memoryview, offset: int) -> int:
        parts.append(pwrite(fd, data[:3], offset))
        return parts[-1]

    with path.open("wb") as file:
        monkeypatch.setattr(os, "pwrite", write_a_part)
        files.pwrite_whole(file.fileno(), b"12345678", 2)
    assert (path.read_bytes(), parts) == (b"\0\x0012345678", [3, 3, 2])
