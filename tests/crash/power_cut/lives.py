"""Lives to cut the power in: `python -m tests.crash.power_cut.lives FOLDER LIFE,LIFE,… [FLAW]`.

A life is what one process does with a store and a disk or two; stage.py lets it tell its milestones. Those in which
disks are copied are in copying_lives.py. A flaw
(flaws.py) is a mistake that the product does not make, made on purpose.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from lmdbitmap import export, filter
from lmdbitmap.errors import StorageError
from lmdbitmap.flat_file import bitmap_file
from lmdbitmap.storage import schema
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from lmdbitmap.tracker.changes import changes
from tests.crash.power_cut import copying_lives
from tests.crash.power_cut.flaws import FLAWS, replaced
from tests.crash.power_cut.stage import (
    BLOCK,
    FLAT_FILE,
    A,
    B,
    Guest,
    Stage,
    checkpoint,
    reboot,
    sync,
    tell,
    tell_mtime,
    telling,
)
from tests.helpers.late_beats import let_beats_be_late

Life: TypeAlias = Callable[[Stage], None]


def writing(stage: Stage) -> None:
    stage.prepare(A)
    stage.attach(A).live_a_little()


def passing(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    guest.live_a_little()
    for number in range(4):
        guest.disk.background_pass()
        guest.write(8 + number)
        guest.write(2300 + 70 * number)
        guest.disk.beat()
    guest.flush()
    guest.disk.background_pass()


def asking(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    for number in range(4):
        guest.write(8 + number)
        guest.disk.changes(since="start")
        guest.disk.mark(1000 * BLOCK, 10)
        guest.write(9 + number)


def checkpointing(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    guest.live_a_little()
    for number, name in enumerate(("monday", "tuesday", "wednesday")):
        guest.checkpoint(name)
        guest.write(5)
        guest.write(6 + number)
        guest.write(1000 * number, 20)
    guest.detach()


def checkpointing_two(stage: Stage) -> None:
    stage.prepare(A, B)
    guests = stage.attach(A), stage.attach(B)
    for name in ("monday", "tuesday"):
        for guest in guests:
            guest.write(5)
            guest.write(4400, 5)
        checkpoint(guests, name)
    guests[0].write(77)
    guests[0].detach()
    guests[1].write(78)


def forgetting(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    for number, name in enumerate(("monday", "tuesday", "wednesday", "thursday")):
        guest.write(20 + number)
        guest.checkpoint(name)
    guest.write(30)
    guest.forget("tuesday")
    guest.write(31)
    guest.forget("thursday")  # the newest
    guest.write(32)
    guest.forget("epoch-1")
    guest.forget("start")
    guest.write(33)


def growing(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    guest.write(4999)
    guest.resize(6000 * BLOCK + 1)
    guest.write(6000, length=1)
    guest.checkpoint("grown")
    guest.write(5999, shift=-3)
    guest.resize(9000 * BLOCK)
    guest.write(8999)


def shrinking(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    guest.live_a_little()
    guest.checkpoint("large")
    guest.resize(1000 * BLOCK + 1)
    guest.write(999)
    guest.checkpoint("small")
    guest.resize(3500 * BLOCK)
    guest.write(3096)
    guest.resize(400 * BLOCK)
    guest.detach()


def coming_and_going(stage: Stage) -> None:
    """Sessions that end well, one without a write among them."""
    stage.prepare(A)
    for number in range(3):
        guest = stage.attach(A)
        if number != 1:
            guest.write(40 + number)
            guest.write(4100 + number)
        guest.detach()
    stage.attach(A)


def killed_before(stage: Stage) -> None:
    """Attached again after a death, so that extents of a dead owner are armed in the store."""
    stage.prepare(A)
    guest = stage.attach(A)
    guest.live_a_little()
    guest.abandon()
    guest = stage.attach(A, max_armed=2)
    for block in (5, 8, 301, 302, 4000):
        guest.write(block)
        guest.disk.background_pass()
    guest.checkpoint("after")
    guest.write(303)
    guest.abandon()
    stage.attach(A).write(304)


def deferred(stage: Stage) -> None:
    stage.prepare(A, durability=schema.DEFERRED)
    guest = stage.attach(A)
    guest.live_a_little()
    guest.checkpoint("monday")
    guest.write(5)
    guest.detach()
    guest = stage.attach(A)
    guest.write(6)
    guest.detach()


def losing_track(stage: Stage) -> None:
    """Policy guest-first: the store refuses, the guest goes on, and a new epoch begins."""
    stage.prepare(A)
    guest = stage.attach(A)
    guest.write(5)
    for number in range(2):
        with refusing_commits():
            for block in (600, 601, 4600):
                guest.write(block + number)
        guest.disk.beat()
        guest.write(700 + number)
        guest.disk.background_pass()
        guest.write(800 + number)
        guest.checkpoint(f"regained-{number}")
    guest.write(602)


def losing_track_for_good(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    with refusing_commits():
        guest.write(600)
        guest.write(4601)
        with contextlib.suppress(StorageError):
            guest.disk.detach()
    stage.attach(A).write(602)


def strict(stage: Stage) -> None:
    stage.prepare(A, policy=schema.STRICT)
    guest = stage.attach(A)
    with refusing_commits():
        for block in (600, 4600):
            with contextlib.suppress(StorageError):
                guest.write(block)
                raise AssertionError("a write that cannot be tracked must fail")
    guest.write(601)
    guest.checkpoint("monday")
    guest.write(600)


def with_a_flat_file(stage: Stage) -> None:
    """`serve --bitmap-file`."""
    stage.prepare(A)
    path = stage.folder / FLAT_FILE
    for number in range(3):
        guest = stage.attach(A)
        with telling("flat file taken in", disk=A):
            assert bitmap_file.begin(guest.disk, path) is None
        guest.write(50 + number)
        guest.write(3000 + number, 10)
        guest.detach()


def exporting(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    for number in range(3):
        guest.write(50 + number)
        with telling("export", disk=A, path=FLAT_FILE, since="start"):
            export.export_changes(guest.disk.changes(since="start"), stage.folder / FLAT_FILE)
        guest.write(60 + number)


def importing(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    guest.write(50, 3)
    path = stage.folder / FLAT_FILE
    export.export_changes(guest.disk.changes(since="start"), path)
    guest.checkpoint("exported")
    guest.detach()
    for name in ("alone", "alone-too"):
        with telling("import", bitmap=name, path=FLAT_FILE):
            export.import_file(stage.store, path, name)
    with telling("import", bitmap="merged", path=FLAT_FILE, into=A, since="exported"):
        export.import_file(stage.store, path, "merged", into=A)
    guest = stage.attach(A)
    guest.write(70)
    guest.detach()


def adding(stage: Stage) -> None:
    """From nothing: the power may fail before there is a store."""
    for name in (A, B):
        stage.make_image(name)
    tell("born")
    stage.create_store()
    stage.add(A)
    guest = stage.attach(A)
    guest.write(5)
    guest.checkpoint("first")
    guest.write(6)
    stage.add(B)
    guest.detach()
    with telling("remove", disk=B):
        session.remove(stage.store, B)


def adopting(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    guest.write(5)
    guest.abandon()
    image = stage.image(A)
    os.utime(image)  # somebody touched it, and a person says that this was all
    tell_mtime(A, image)
    sync(image)
    with telling("adopt", disk=A):
        session.adopt(stage.store, A)
    guest = stage.attach(A)
    guest.write(6)
    guest.detach()


def reconciling(stage: Stage) -> None:
    """As a backup does first: the disk is held, and nobody writes."""
    stage.prepare(A)
    guest = stage.attach(A)
    guest.live_a_little()
    guest.abandon()
    with session.owning(stage.store, A) as held:
        session.reconcile(stage.store, held)
    guest = stage.attach(A)
    guest.write(5)
    guest.detach()


def cut_before(stage: Stage) -> None:
    """The power failed once already: what was not flushed is gone from the image, and what was dirty stays so."""
    stage.prepare(A)
    guest = stage.attach(A)
    guest.live_a_little()
    guest.checkpoint("flushed")
    lost = (5, 600, 601, 4600)
    with stage.image(A).open("rb", buffering=0) as image:
        before = {block: os.pread(image.fileno(), BLOCK, block * BLOCK) for block in lost}
    mtime_ns = stage.image(A).stat().st_mtime_ns
    for block in lost:
        guest.write(block)
    guest.abandon()
    with stage.image(A).open("r+b", buffering=0) as image:
        for block, content in before.items():
            os.pwrite(image.fileno(), content, block * BLOCK)
    os.utime(stage.image(A), ns=(mtime_ns, mtime_ns))
    tell_mtime(A, stage.image(A))
    sync(stage.image(A))
    reboot()
    guest = stage.attach(A)
    for block in (600, 1200):
        guest.write(block)
        guest.disk.background_pass()
    guest.checkpoint("after")
    guest.write(601)
    guest.detach()


def churning(stage: Stage) -> None:
    """A disk of 40 regions and a store whose pages were all used before."""
    stage.prepare(A, blocks=40 * 4096)
    guest = stage.attach(A, max_armed=8)
    for number in range(30):
        guest.write((number * 7 % 40) * 4096 + number)
        guest.write((number * 11 % 40) * 4096 + 100 + number)
        if number % 5 == 4:
            guest.disk.background_pass()
            guest.checkpoint(f"c{number}")
        if number % 10 == 9:
            guest.forget(f"c{number - 5}")
    guest.detach()


def threaded(stage: Stage) -> None:
    """Several lanes, beats and passes of their own threads, and checkpoints in the middle of it."""
    stage.prepare(A)
    filter.chores.interval_s = 0.005
    guest = stage.attach(A, background=True)
    enough = threading.Event()
    writers = [threading.Thread(target=_write_on, args=(guest, number, enough)) for number in range(3)]
    for writer in writers:
        writer.start()
    for number in range(4):
        threading.Event().wait(0.02)
        guest.checkpoint(f"c{number}")
    enough.set()
    for writer in writers:
        writer.join()
    guest.detach()


def _write_on(guest: Guest, number: int, enough: threading.Event) -> None:
    """Each writer has blocks of its own, so that the order of what the kernel is told is the order of the data."""
    for turn in range(30):
        guest.write(number * 1500 + turn * 31 % 1400)
        if enough.wait(0.002):
            return


def changes_of_a_closed_period(stage: Stage) -> None:
    stage.prepare(A)
    guest = stage.attach(A)
    for number in range(3):
        guest.write(100 * number, 5)
        guest.checkpoint(f"c{number}")
        changes(stage.store, A, since="start", until=f"c{number}").summary  # noqa: B018
    guest.write(7)


@contextmanager
def refusing_commits() -> Iterator[None]:
    def refuse(store: Store, change: object) -> None:
        raise StorageError("store", OSError(errno.EIO, os.strerror(errno.EIO)), next_step="wait")

    with replaced(Store, "update", refuse):
        yield


LIVES: dict[str, Life] = {
    life.__name__: life
    for life in (
        writing, passing, asking, checkpointing, checkpointing_two, forgetting, growing, shrinking,
        coming_and_going, killed_before, deferred, losing_track, losing_track_for_good, strict, with_a_flat_file,
        exporting, importing, adding, adopting, reconciling, cut_before, churning, threaded,
        changes_of_a_closed_period,
        copying_lives.backing_up, copying_lives.backing_up_live, copying_lives.rescanning, copying_lives.pruning,
        copying_lives.copying, copying_lives.syncing, copying_lives.restoring, copying_lives.going_back,
    )
}  # fmt: skip


def main(folder: str, lives: str, flaw: str = "") -> None:
    let_beats_be_late()
    if flaw:
        FLAWS[flaw]()
    for life in lives.split(","):
        stage = Stage(Path(folder, life))
        stage.folder.mkdir()
        tell("life", name=life)
        LIVES[life](stage)
        tell("lived", name=life)
    os._exit(0)  # whoever is still attached has no last words


if __name__ == "__main__":
    main(*sys.argv[1:])
