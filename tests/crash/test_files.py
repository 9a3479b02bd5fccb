"""A process killed in the middle of atomic_files.py leaves the old file or the new one, and no lock."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmdbitmap.errors import Busy
from lmdbitmap.images.device import FileDevice
from lmdbitmap.system import atomic_files, file_locks
from tests.conftest import RawImage
from tests.helpers.support import PATIENCE_SECONDS, spawn

OLD, NEW = b"old" * 1000, b"new" * 2000

REPLACE_AND_DIE = """
import fcntl, os, signal, sys
from lmdbitmap.system import file_locks, files, atomic_files

path, fatal_step = sys.argv[1], int(sys.argv[2])
step = 0

def followed_by_death(module, name):
    call = getattr(module, name)
    def wrapper(*arguments):
        global step
        answer = call(*arguments)
        step += 1
        print(name, flush=True)
        if step == fatal_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    setattr(module, name, wrapper)

for name in ("open", "fchmod", "fsync", "rename"):
    followed_by_death(os, name)
followed_by_death(fcntl, "flock")
atomic_files.replace(path, sys.stdin.buffer.read())
"""

STEPS = ["open", "flock", "fchmod", "fsync", "rename", "open", "fsync"]


def killed_after(step: int, path: Path) -> tuple[int, list[str]]:
    """The exit code of a process that replaces `path` and dies after its nth system call, and its calls."""
    done = subprocess.run(
        [sys.executable, "-c", REPLACE_AND_DIE, os.fspath(path), str(step)],
        input=NEW,
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.stderr == b""
    return done.returncode, done.stdout.decode().split()


def test_file_is_synced_before_its_rename_and_the_folder_after(tmp_path: Path) -> None:
    assert killed_after(0, tmp_path / "file") == (0, STEPS)


@pytest.mark.parametrize("exists", [True, False], ids=["replaced", "new"])
def test_process_killed_after_any_step_leaves_old_or_new(tmp_path: Path, exists: bool) -> None:
    survived = 0
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        folder.mkdir()
        if exists:
            (folder / "file").write_bytes(OLD)
        code, calls = killed_after(step, folder / "file")
        assert code == (-signal.SIGKILL if step <= len(STEPS) else 0)
        leftovers = atomic_files.remove_leftovers(folder)
        if "rename" in calls:
            assert (leftovers, (folder / "file").read_bytes()) == ([], NEW)
        else:
            survived += 1
            assert len(leftovers) == 1
            assert [path.read_bytes() for path in folder.iterdir()] == ([OLD] if exists else [])
        if code == 0:
            break
    assert (survived, step) == (STEPS.index("rename"), len(STEPS) + 1)


WRITE_HALF_AND_WAIT = """
import sys, threading
from lmdbitmap.system import file_locks, files, atomic_files

with atomic_files.replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    threading.Event().wait()
"""


def test_leftover_is_kept_while_its_writer_lives_and_removed_when_it_is_dead(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with spawn(sys.executable, "-c", WRITE_HALF_AND_WAIT, tmp_path / "file") as child:
        child.wait_for_line("writing")
        assert atomic_files.remove_leftovers(tmp_path) == []
        child.process.kill()
        child.wait()
    assert len(atomic_files.remove_leftovers(tmp_path)) == 1
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", OLD)]


LOCK_AND_WAIT = """
import sys, threading
from lmdbitmap.images import device
from lmdbitmap.system import file_locks, files, atomic_files

held = {"lock_file": file_locks.lock_file, "image": device.FileDevice.open}[sys.argv[1]](sys.argv[2])
print("holding", flush=True)
threading.Event().wait()
"""


def test_lock_file_is_free_when_its_holder_is_dead(tmp_path: Path) -> None:
    with spawn(sys.executable, "-c", LOCK_AND_WAIT, "lock_file", tmp_path / "lock") as child:
        child.wait_for_line("holding")
        with pytest.raises(Busy):
            file_locks.lock_file(tmp_path / "lock")
        child.process.kill()
        child.wait()
    file_locks.lock_file(tmp_path / "lock").close()


def test_image_is_free_when_its_holder_is_dead(raw_image: RawImage) -> None:
    path = raw_image(4096)
    with spawn(sys.executable, "-c", LOCK_AND_WAIT, "image", path) as child:
        child.wait_for_line("holding")
        with pytest.raises(Busy):
            FileDevice.open(path)
        child.process.kill()
        child.wait()
    FileDevice.open(path).close()


def test_lock_does_not_outlive_us_in_a_program_that_we_started(tmp_path: Path, raw_image: RawImage) -> None:
    path = raw_image(4096)
    with file_locks.lock_file(tmp_path / "lock"), FileDevice.open(path):
        heir = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    with heir:  # its standard input closes here, and so it ends
        FileDevice.open(path).close()
        file_locks.lock_file(tmp_path / "lock").close()
