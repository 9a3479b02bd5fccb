"""The folder of one disk: its lock, its manifest, its images, and what is under way."""

from __future__ import annotations

import dataclasses
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from lmdbitmap.errors import Busy, FormatError, InvalidArgument, LmdbitmapError, NotFound
from lmdbitmap.repository import manifest
from lmdbitmap.repository.backup_files import image_name
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupType, Manifest
from lmdbitmap.repository.unfinished import UNFINISHED, Unfinished
from lmdbitmap.system import file_locks, files
from tests.helpers.support import PATIENCE_SECONDS
from tests.unit.test_manifest import CHAIN, DISK, entry


@pytest.fixture
def folder(tmp_path: Path) -> BackupFolder:
    """It was there before."""
    made = BackupFolder(tmp_path / "backups", "sda")
    os.makedirs(made.path)
    return made


def put(folder: BackupFolder, name: str, content: bytes = b"") -> Path:
    path = Path(folder.path_of(name))
    path.write_bytes(content)
    return path


# --- the folder ---


def test_folders_are_made_for_their_owner_only(tmp_path: Path) -> None:
    folder = BackupFolder(tmp_path / "far" / "away", "sda")
    with folder.locked():
        made = [tmp_path / "far", tmp_path / "far" / "away", tmp_path / "far" / "away" / "sda"]
        assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3
        assert [path.name for path in made[-1].iterdir()] == ["lock"]
        assert (made[-1] / "lock").stat().st_mode & 0o777 == 0o600


def test_naming_a_folder_makes_nothing(tmp_path: Path) -> None:
    BackupFolder(tmp_path / "backups", "sda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../sda", "a/b", "/etc", ".hidden", "a\0b", "a\nb", "x" * 201]
)
def test_a_name_that_would_leave_the_repository_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument):
        BackupFolder(tmp_path, name)


@pytest.mark.parametrize("taken", ["backups", "backups/sda"])
def test_a_file_where_a_folder_should_be_is_refused(tmp_path: Path, taken: str) -> None:
    path = tmp_path / taken
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    with (
        pytest.raises(InvalidArgument, match="is not a folder; name a folder"),
        BackupFolder(tmp_path / "backups", "sda").locked(),
    ):
        pass
    assert path.read_bytes() == b"mine"


def test_the_second_backup_into_a_folder_is_busy(folder: BackupFolder) -> None:
    with folder.locked(), pytest.raises(Busy), BackupFolder(folder.repository_path, "sda").locked():
        pass
    with folder.locked(), BackupFolder(folder.repository_path, "sdb").locked():
        pass


def test_folders_into_which_nothing_came_are_taken_back(tmp_path: Path) -> None:
    with BackupFolder(tmp_path / "far" / "away", "sda").locked():
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_are_taken_back_from_whoever_fails(tmp_path: Path) -> None:
    (tmp_path / "backups").mkdir()
    with pytest.raises(KeyboardInterrupt), BackupFolder(tmp_path / "backups", "sda").locked():
        raise KeyboardInterrupt
    assert list(tmp_path.glob("**/*")) == [tmp_path / "backups"]


def test_a_folder_that_somebody_else_made_stays(folder: BackupFolder) -> None:
    with folder.locked():
        pass
    assert os.listdir(folder.path) == ["lock"]


def test_a_folder_into_which_something_came_stays_with_its_lock(tmp_path: Path) -> None:
    folder = BackupFolder(tmp_path / "backups", "sda")
    with folder.locked():
        put(folder, "something")
    assert sorted(os.listdir(folder.path)) == ["lock", "something"]


def test_the_last_one_takes_back_what_the_first_one_made(tmp_path: Path) -> None:
    """The repository is one run's, and the disk's folder in it another's."""
    first, second = ExitStack(), BackupFolder(tmp_path / "backups", "sda")
    first.enter_context(BackupFolder(tmp_path / "backups", "sdb").locked())
    with second.locked():
        pass
    assert os.listdir(tmp_path / "backups") == ["sdb"]
    first.close()
    assert list(tmp_path.iterdir()) == []


def test_a_repository_into_which_another_disk_came_stays(tmp_path: Path) -> None:
    with BackupFolder(tmp_path / "backups", "sda").locked():
        put(BackupFolder(tmp_path, "backups"), "sdb")
    assert os.listdir(tmp_path / "backups") == ["sdb"]


@pytest.mark.parametrize("moment", ["folder made", "lock opened"])
def test_whoever_comes_while_a_folder_is_taken_back_has_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Its lock keeps others out, and is not that of a file which has no name any more."""
    first = ExitStack()
    first.enter_context(BackupFolder(tmp_path / "backups", "sda").locked())
    owner, name = (files, "make_folders") if moment == "folder made" else (file_locks, "_open_or_make")
    call = getattr(owner, name)

    def and_then_the_first_ends(path: str) -> object:
        answer = call(path)
        first.close()
        return answer

    monkeypatch.setattr(owner, name, and_then_the_first_ends)
    second = BackupFolder(tmp_path / "backups", "sda")
    with second.locked():
        assert os.listdir(second.path) == ["lock"]
        with pytest.raises(Busy), BackupFolder(tmp_path / "backups", "sda").locked():
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_not_tried_for_ever() -> None:
    with pytest.raises(NotFound), BackupFolder("/proc/backups", "sda").locked():
        pass


def test_whoever_is_refused_takes_nothing_from_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was the one who made the folder."""
    holder, call = ExitStack(), files.make_folders

    def and_then_another_is_quicker(path: str) -> list[str]:
        made = call(path)
        monkeypatch.setattr(files, "make_folders", call)
        holder.enter_context(BackupFolder(tmp_path / "backups", "sda").locked())
        return made

    monkeypatch.setattr(files, "make_folders", and_then_another_is_quicker)
    folder = BackupFolder(tmp_path / "backups", "sda")
    with pytest.raises(Busy), folder.locked():
        pass
    assert os.listdir(folder.path) == ["lock"]
    with pytest.raises(Busy), folder.locked():
        pass
    holder.close()


@pytest.mark.in_memory
def test_those_who_come_and_go_at_once_never_hold_a_folder_together(tmp_path: Path) -> None:
    rounds, alone, start = 100, tmp_path / "alone", threading.Barrier(2, timeout=PATIENCE_SECONDS)

    def come_and_go() -> int:
        held = 0
        while held < rounds:
            start.wait()
            for _ in range(3):
                with suppress(Busy), BackupFolder(tmp_path / f"{held}" / "backups", "sda").locked():
                    os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
                    alone.unlink()
            held += 1
        return held

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(come_and_go) for _ in range(2)]
        assert [one.result() for one in both] == [rounds, rounds]
    assert {path.name for path in tmp_path.glob("**/*") if path.is_file()} <= {"lock"}


def test_locking_removes_what_killed_runs_did_not_finish_and_nothing_else(folder: BackupFolder) -> None:
    put(folder, "000001-full.qcow2.0123456789abcdef.partial")
    put(folder, "manifest.json.0123456789abcdef.partial")
    kept = {put(folder, name).name for name in ("000002-incremental.qcow2", "notes.txt", "partial")}
    with folder.locked():
        assert set(os.listdir(folder.path)) == kept | {"lock"}


# --- the manifest ---


def test_a_folder_without_backups_has_no_manifest(folder: BackupFolder) -> None:
    assert folder.manifest() is None


def test_the_manifest_is_what_was_put_there_last(folder: BackupFolder) -> None:
    folder.replace_manifest(Manifest(DISK))
    folder.replace_manifest(CHAIN)
    assert folder.manifest() == CHAIN
    assert Path(folder.path_of("manifest.json")).stat().st_mode & 0o777 == 0o600


def test_a_damaged_manifest_is_refused_with_its_path_and_stays(folder: BackupFolder) -> None:
    path = put(folder, "manifest.json", manifest.encode(CHAIN)[:-40])
    before = path.read_bytes()
    with pytest.raises(FormatError) as refused:
        folder.manifest()
    assert refused.value.place.startswith(f"{path}: manifest")
    assert refused.value.next_step.startswith("restore the manifest from a copy of the repository, or")
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", ["folder", "fifo", "link to nothing", "too long"])
def test_what_cannot_be_a_manifest_is_refused(folder: BackupFolder, make: str) -> None:
    path = Path(folder.path_of("manifest.json"))
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "link to nothing":
        path.symlink_to("elsewhere")
    else:
        path.touch()
        os.truncate(path, manifest.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(LmdbitmapError) as refused:
        folder.manifest()
    assert str(path) in str(refused.value)


def test_images_without_their_manifest_are_not_taken_for_an_empty_folder(folder: BackupFolder) -> None:
    put(folder, "000007-incremental.qcow2")
    with pytest.raises(FormatError, match=r"expected manifest\.json beside the images, found none"):
        folder.manifest()


def test_the_image_that_a_first_backup_is_making_is_no_lost_backup(folder: BackupFolder) -> None:
    folder.note_unfinished([WORK])
    put(folder, WORK.file)
    assert folder.manifest() is None
    put(folder, OTHER.file)
    with pytest.raises(FormatError):
        folder.manifest()


def test_a_first_backup_that_ends_meanwhile_has_its_manifest(
    folder: BackupFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader holds no lock: it may look for the manifest right before it is there, and for the note after."""
    folder.note_unfinished([WORK])
    put(folder, WORK.file)
    looks: list[str] = []

    def lists(path: str) -> list[str]:
        if not looks:
            looks.append(path)
            folder.replace_manifest(CHAIN)
            folder.drop_note()
        return list_folder(path)

    list_folder = os.listdir
    with monkeypatch.context() as patched:
        patched.setattr(os, "listdir", lists)
        assert folder.manifest() == CHAIN
    assert looks


@pytest.mark.parametrize("note", ["garbage", None], ids=["garbage", "a folder"])
def test_a_reader_changes_nothing_where_manifest_and_note_are_lost(
    folder: BackupFolder, note: str | None
) -> None:
    put(folder, WORK.file)
    if note is None:
        os.mkdir(folder.path_of(UNFINISHED))
    else:
        put(folder, UNFINISHED, note.encode())
    before = sorted(os.listdir(folder.path))
    with pytest.raises(FormatError, match="found none"):
        folder.manifest()
    assert sorted(os.listdir(folder.path)) == before


# --- images ---


def test_the_next_number_is_above_every_backup_and_every_unknown_image(folder: BackupFolder) -> None:
    none, some = Manifest(DISK), Manifest(DISK, (entry(4), entry(9)))
    assert folder.next_sequence(none) == 1
    assert folder.next_sequence(some) == 10
    assert folder.next_sequence(dataclasses.replace(some, last_sequence=10)) == 11
    put(folder, "000012-differential.qcow2")
    assert folder.next_sequence(some) == 13
    put(folder, "99-full.qcow2.bak")
    assert folder.next_sequence(none) == 13


def test_a_number_that_no_image_can_have_is_refused_before_one_is_made(folder: BackupFolder) -> None:
    """A manifest can say anything. An image of that number would be one of a stranger to the next run."""
    last = Manifest(DISK, (entry(4),), last_sequence=10**15 - 2)
    name = image_name(folder.next_sequence(last), BackupType.INCREMENTAL)
    assert folder.next_sequence(Manifest(DISK, (entry(10**15 - 2, file=name),))) == 10**15 - 1
    for number in (10**15 - 1, 2**63 - 1):
        with pytest.raises(
            FormatError, match=f"expected numbers of backups below {10**15 - 1}, found {number}"
        ):
            folder.next_sequence(dataclasses.replace(last, last_sequence=number))
    put(folder, name)
    with pytest.raises(FormatError, match="use another repository"):
        folder.next_sequence(Manifest(DISK))


def test_whole_images_pass(folder: BackupFolder) -> None:
    entries = [entry(0, bytes_stored=3), entry(1, 0, bytes_stored=5)]
    put(folder, entries[0].file, b"abc")
    put(folder, entries[1].file, b"defgh")
    folder.check_images(entries)


def test_a_missing_image_is_not_found(folder: BackupFolder) -> None:
    with pytest.raises(NotFound, match=r"0000\.qcow2 does not exist"):
        folder.check_images([entry(0)])


@pytest.mark.parametrize("length", [0, 2, 4])
def test_an_image_of_another_length_is_refused(folder: BackupFolder, length: int) -> None:
    put(folder, entry(0).file, b"x" * length)
    with pytest.raises(FormatError, match=f"expected a regular file of 3 bytes, found {length} bytes"):
        folder.check_images([entry(0, bytes_stored=3)])


def test_a_link_in_place_of_an_image_is_refused(folder: BackupFolder) -> None:
    elsewhere = put(folder, "elsewhere", b"abc")
    Path(folder.path_of(entry(0).file)).symlink_to(elsewhere)
    with pytest.raises(FormatError, match="found something else"):
        folder.check_images([entry(0, bytes_stored=3)])


# --- what is unfinished ---

WORK = Unfinished("backup-20250101T120000Z-0a1b2c", "000007-incremental.qcow2")
OTHER = Unfinished("backup-20250102T120000Z-0a1b2c", "000008-full.qcow2")


def test_without_a_note_nothing_is_unfinished(folder: BackupFolder) -> None:
    assert folder.unfinished() == []
    folder.drop_note()


def test_images_that_no_manifest_knows_are_removed_if_the_note_names_them(folder: BackupFolder) -> None:
    folder.replace_manifest(CHAIN)
    image, stranger = put(folder, WORK.file), put(folder, "000006-incremental.qcow2")
    digests = [put(folder, f"{file.name}.01234567.digests") for file in (image, stranger)]
    folder.note_unfinished([WORK, OTHER])
    assert folder.unfinished() == [WORK, OTHER]
    assert (image.exists(), stranger.exists()) == (False, True)
    assert [path.exists() for path in digests] == [False, True]
    assert folder.unfinished() == [WORK, OTHER]  # until the note is dropped
    folder.drop_note()
    assert folder.unfinished() == []


def test_an_image_that_came_into_the_manifest_is_finished(folder: BackupFolder) -> None:
    image = put(folder, WORK.file, b"whole")
    folder.replace_manifest(Manifest(DISK, (entry(0), entry(7, 0, file=WORK.file))))
    folder.note_unfinished([OTHER, WORK])
    assert folder.unfinished() == [OTHER]
    assert image.read_bytes() == b"whole"


def test_a_note_beside_a_damaged_manifest_removes_nothing(folder: BackupFolder) -> None:
    image = put(folder, WORK.file, b"whole")
    put(folder, "manifest.json", b"{")
    folder.note_unfinished([WORK])
    with pytest.raises(FormatError):
        folder.unfinished()
    assert image.exists()


@pytest.mark.parametrize(
    "note",
    [
        "\n",
        f"{WORK.checkpoint}\n",
        f"{WORK.checkpoint} {WORK.file}",
        f"{WORK.checkpoint}  {WORK.file}\n",
        f"{WORK.checkpoint} ../sdb/{WORK.file}\n",
        f"{WORK.checkpoint} manifest.json\n",
        f"{WORK.checkpoint} {WORK.file}\nmore\n",
        f"monday {WORK.file}\n",
        "\x00" * 65537,
    ],
)
def test_a_note_that_says_something_else_is_put_aside(folder: BackupFolder, note: str) -> None:
    path = put(folder, "unfinished", note.encode())
    assert folder.unfinished() == []
    [kept] = path.parent.glob("unfinished.damaged-*")
    assert kept.read_bytes() == note.encode()
    assert not path.exists()


def test_a_folder_in_the_place_of_the_note_is_put_aside(folder: BackupFolder) -> None:
    path = Path(folder.path_of("unfinished"))
    path.mkdir()
    assert folder.unfinished() == []
    assert [kept.is_dir() for kept in path.parent.glob("unfinished.damaged-*")] == [True]
    folder.note_unfinished([WORK])
    assert folder.unfinished() == [WORK]
