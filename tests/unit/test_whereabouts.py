"""An image that is removed or replaced under the process that has it open: it is told, once, while there is time."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from unittest import mock

import pytest

from lmdbitmap.images.whereabouts import Whereabouts, why_lost
from tests.helpers.support import PATIENCE_SECONDS
from tests.helpers.tracked import NAME, TrackedDisk

SIZE = 1 << 20


def removed(image: Path) -> None:
    image.unlink()


def moved(image: Path) -> None:
    image.rename(image.with_name("elsewhere"))


def without_its_folder(image: Path) -> None:
    image.parent.rename(image.parent.with_name("other"))
    image.parent.write_text("a file where the folder was")


def replaced(image: Path) -> None:
    (image.parent / "new").write_bytes(bytes(SIZE))
    os.replace(image.parent / "new", image)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "disk.raw"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (removed, "was removed"),
        (moved, "was removed"),
        (without_its_folder, "was removed"),
        (replaced, "another file"),
    ],
)
def test_what_becomes_of_a_name_is_told(image: Path, happens: object, said: str) -> None:
    with image.open("r+b") as file:
        assert why_lost(str(image), file.fileno()) is None
        assert callable(happens)
        happens(image)
        assert said in str(why_lost(str(image), file.fileno()))


def test_other_names_of_an_image_are_as_good(image: Path) -> None:
    hard, soft = image.with_name("hard"), image.with_name("soft")
    os.link(image, hard)
    soft.symlink_to(image)
    with image.open("r+b") as file:
        assert [why_lost(str(name), file.fileno()) for name in (hard, soft)] == [None, None]


def test_an_image_that_nobody_may_look_at_is_not_called_lost(image: Path) -> None:
    """Nor one whose server is away: nothing is known of it."""
    with image.open("r+b") as file:
        loop = image.with_name("loop")
        loop.symlink_to(loop)
        assert why_lost(str(loop), file.fileno()) is None
    assert Whereabouts(NAME, "nbd://somewhere/else", None).look() is None


def test_an_image_that_another_host_removed_is_lost(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name leads to a new file, and the old one's handle is stale."""
    with image.open("r+b") as file:
        number = file.fileno()

        def stale(fd: int) -> os.stat_result:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        with monkeypatch.context() as patched:
            patched.setattr("lmdbitmap.images.whereabouts.os.fstat", stale)
            lost = why_lost(str(image), number)
        assert "that one is gone" in str(lost)


def test_it_is_logged_once_and_once_more_when_it_is_back(
    image: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with image.open("r+b") as file:
        whereabouts = Whereabouts(NAME, str(image), file.fileno())
        away = image.with_name("away")
        with caplog.at_level(logging.WARNING):
            for name in (image, away, away, image, image):
                Path(away if away.exists() else image).rename(name)
                whereabouts.look()
    gone, back = (record.getMessage() for record in caplog.records)
    assert (
        "was removed, or moved away; do not stop the process that serves it before you have a backup" in gone
    )
    assert gone.startswith(f"disk {NAME}: ")
    assert back == f"disk {NAME}: its image is in its place again"


def test_a_file_system_that_does_not_answer_keeps_one_thread_and_no_other(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each `info` of any disk of the process would stay, until the control socket took no more callers."""
    answers = threading.Event()

    def hangs(name: str, fd: int) -> None:
        answers.wait(PATIENCE_SECONDS)

    with image.open("r+b") as file:
        whereabouts = Whereabouts(NAME, str(image), file.fileno())
        away = image.rename(image.with_name("away"))
        known = whereabouts.look()
        monkeypatch.setattr("lmdbitmap.images.whereabouts.why_lost", hangs)
        looking = threading.Thread(target=whereabouts.look)
        looking.start()
        assert "was removed" in str(known)
        assert [whereabouts.look() for _ in range(3)] == [known] * 3
        assert looking.is_alive()
        away.rename(image)
        answers.set()
        looking.join()
        assert whereabouts.look() is None


def test_who_is_interrupted_just_when_it_looks_keeps_nobody_waiting(image: Path) -> None:
    with image.open("r+b") as file:
        whereabouts = Whereabouts(NAME, str(image), file.fileno())
        looking = whereabouts._looking

        def interrupted(timeout: float) -> bool:
            looking.acquire()
            raise KeyboardInterrupt

        whereabouts._looking = mock.Mock(acquire=interrupted, release=looking.release)
        with pytest.raises(KeyboardInterrupt):
            whereabouts.look()
        whereabouts._looking = looking
        ending = threading.Thread(target=whereabouts.end, daemon=True)
        ending.start()
        ending.join(PATIENCE_SECONDS)
        assert not ending.is_alive()


def test_an_attached_disk_looks_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with TrackedDisk(tmp_path, SIZE).attach() as disk:
        (tmp_path / "disk.raw").unlink()
        with caplog.at_level(logging.WARNING):
            disk.background_pass()
        assert "was removed" in caplog.text
        lost = [disk.image_lost]
    lost.append(disk.image_lost)
    assert (lost[0] is None, lost[1]) == (False, None), "there is nothing to tell of what is not open"
