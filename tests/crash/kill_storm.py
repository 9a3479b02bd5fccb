"""A server under load, killed with SIGKILL again and again, and what must be true after each death.

    serve ── load, and checkpoints, forgets and marks asked of the owner ── SIGKILL ── look ── serve …

One disk and one store live through the whole storm; nobody ever cleans up. The loads are stamped_load.py's,
which knows every request, and fio's, which nobody knows but the image. After each death:

- an answered write is in the image, and no sector holds what was not written there (stamped_load.py);
- what changed since a checkpoint is dirty since it, whether it was seen in the image or was answered;
- what was answered before a checkpoint was asked for is dirty up to it: it is in no later period only;
- a checkpoint that was answered is there, one that was not is there or is not, and none has lost its bits;
- what is dirty and was never written to has grown by no more than the extents that were armed;
- the epoch is the first one, and the answer can be believed: no kill costs a full backup.

Now and then the server ends cleanly, a backup is made (or killed, and made then), or a checkpoint is forgotten.
In the end every backup is restored, and is what the image was.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from lmdbitmap.backups.backup import backup
from lmdbitmap.errors import Busy, LmdbitmapError, OwnerGone
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import EXTENT_BLOCKS
from lmdbitmap.nbd import control_client
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.repository.manifest_file import MANIFEST
from lmdbitmap.restoring.restore import restore
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.changes import changes
from lmdbitmap.upkeep.check import check_store
from lmdbitmap.upkeep.findings import Gravity
from tests.crash.stamped_load import SECTOR, Load, stamps_of
from tests.helpers.support import PATIENCE_SECONDS, Child, spawn
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, quick_folder, trust_of

KILLS = 1000
SIZE = 64 << 20
BLOCK = 4096
MAX_ARMED = 16
ARMED_BLOCKS = MAX_ARMED * EXTENT_BLOCKS
"""The bound on what one death may add to the dirt: what was armed. 4 MiB of the 64 MiB."""
FIO_DEPTH = 8
FIO_LONGEST = 64 << 10
MAX_POINTS = 5


@dataclass
class Point:
    """A checkpoint that is asked about after every death, in blocks."""

    name: str
    changed: set[int] = field(default_factory=set)
    """These must be dirty since it."""
    touched: set[int] = field(default_factory=set)
    """No others were written to since."""
    loose: set[int] = field(default_factory=set)
    """Dirty, though untouched, when we looked last."""


@dataclass
class Asked:
    """What the owner was asked for under load: `checkpoint` or `forget`, and between which requests."""

    operation: str
    name: str
    answered_before: frozenset[int]
    last_sent: int | None = None
    """When it was answered; None if it never was."""


class Storm:
    """The disk in the storm, what it must hold, and the figures."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.chosen = random.Random(seed)
        self.tracked = TrackedDisk(folder, SIZE).clean("start")
        self.control_path = self.tracked.store.control_path(self.tracked.disk().uuid)
        self.tracked.close()
        self.store_path, self.repository = self.tracked.store.path, folder / "backups"
        self.socket_path = str(folder / "nbd.sock")
        self.points = [Point("start")]
        self.image = self.tracked.image.read_bytes()
        self.stamps = stamps_of(self.image)
        self.next_stamp, self.next_name = 1, 1
        self.kills = self.clean_ends = self.requests = self.fio_blocks = self.checkpoints = 0
        self.restart_s: list[float] = []
        self.over_report: list[int] = []
        """Blocks that each death added to what is dirty without having been touched."""
        self.backups: dict[str, str] = {}
        """The image's digest at every backup, by the backup's id."""

    def command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "lmdbitmap", "--store", self.store_path, *map(str, words)]

    @contextlib.contextmanager
    def serving(self) -> Iterator[Child]:
        """A server that is ready; how long it took counts as a restart."""
        started = time.monotonic()
        with self.starting() as server:
            server.wait_for_line("^ready$")
            self.restart_s.append(time.monotonic() - started)
            yield server

    def starting(self) -> contextlib.AbstractContextManager[Child]:
        return spawn(*self.command("serve", NAME, "--socket", self.socket_path, "--max-armed", MAX_ARMED))

    def kill(self, child: Child) -> None:
        child.process.kill()
        code = child.wait()
        assert code == -signal.SIGKILL, f"it ended by itself, with {code}: {child.stderr}"
        self.kills += 1

    # -- lives of the server -------------------------------------------------------------------------------

    def die_under_load(self) -> None:
        asked: list[Asked] = []
        with self.serving() as server:
            load = self.load()
            deeds = random.Random(self.chosen.randrange(1 << 30))
            asker = threading.Thread(target=self.ask, args=(load, asked, deeds), daemon=True)
            load.await_answers(self.chosen.randrange(200))
            if self.chosen.random() < 0.6:
                asker.start()
                load.await_answers(len(load.answered) + self.chosen.randrange(60))
            self.kill(server)
            load.finish()
            if asker.ident is not None:
                asker.join(PATIENCE_SECONDS)
                assert not asker.is_alive(), "a caller of the control socket waits for the dead"
        self.look_after(load, asked)

    def die_under_fio(self) -> None:
        with self.serving() as server, self.fio() as fio:
            for _ in range(self.chosen.randint(1, 30)):
                self.await_change(fio)
            self.kill(server)
        before = self.image
        self.look()
        self.fio_blocks += len(differing_blocks(before, self.image))

    def die_while_starting(self) -> None:
        with self.starting() as server:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(self.chosen.uniform(0, 1.1 * statistics.median(self.restart_s)))
            self.kill(server)
        self.look()

    def end_cleanly(self) -> None:
        with self.serving() as server:
            load = self.load()
            load.await_answers(self.chosen.randrange(100))
            load.finish()
            server.process.terminate()
            assert server.wait() == 0, server.stderr
        self.clean_ends += 1
        self.look_after(load, [])

    def load(self) -> Load:
        seed = self.chosen.randrange(1 << 30)
        return Load(self.socket_path, NAME, SIZE // SECTOR, seed, self.next_stamp).start()

    @contextlib.contextmanager
    def fio(self) -> Iterator[subprocess.Popen[bytes]]:
        """Writes of many sizes, trims and flushes. Its client spins when its server is gone: it is killed too."""
        words = [
            "fio", "--thread", "--ioengine=nbd", f"--uri=nbd+unix:///{NAME}?socket={self.socket_path}",
            f"--size={SIZE}", f"--iodepth={FIO_DEPTH}", "--fsync=32", f"--randseed={self.chosen.randrange(1 << 30)}",
            "--norandommap", "--time_based", "--runtime=60",
            "--name=writes", "--rw=randwrite", f"--bssplit=512/20:4k/50:16k/20:{FIO_LONGEST}/10", "--blockalign=512",
            "--name=trims", "--rw=randtrimwrite", "--bs=4k",
        ]  # fmt: skip
        with (self.tracked.folder / "fio.log").open("wb") as said:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            yield process
        finally:
            process.kill()
            process.wait(PATIENCE_SECONDS)

    def await_change(self, fio: subprocess.Popen[bytes]) -> None:
        """Return once the image was written again; the owner is asked how it does meanwhile."""
        before, deadline = self.tracked.image.stat().st_mtime_ns, time.monotonic() + PATIENCE_SECONDS
        while self.tracked.image.stat().st_mtime_ns == before:
            assert control_client.call(self.control_path, "info")["disks"][0]["trust"] != "untrusted"
            assert fio.poll() is None, (self.tracked.folder / "fio.log").read_text()
            assert time.monotonic() < deadline, "fio does not write"

    def ask(self, load: Load, asked: list[Asked], deeds: random.Random) -> None:
        """Ask the owner for one thing after another until it is gone."""
        with contextlib.suppress(Busy, OwnerGone, ConnectionError):  # it went away
            for _ in range(4):
                operation, name = self.something_to_ask(deeds, asked)
                asked.append(Asked(operation, name, load.answered_by_now()))
                if operation == "checkpoint":
                    control_client.call(self.control_path, operation, disks=[NAME], name=name)
                else:
                    control_client.call(self.control_path, operation, disk=NAME, checkpoint=name)
                asked[-1].last_sent = load.last_stamp

    def something_to_ask(self, deeds: random.Random, asked: list[Asked]) -> tuple[str, str]:
        mine = [deed.name for deed in asked if deed.operation == "checkpoint"]
        known = [point.name for point in self.points if point.name.startswith("c")] + mine
        there = sorted(set(known) - {deed.name for deed in asked if deed.operation == "forget"})
        if there and (deeds.random() < 0.3 or len(self.points) + len(mine) > MAX_POINTS):
            return "forget", deeds.choice(there)
        self.next_name += 1
        return "checkpoint", f"c{self.next_name}"

    # -- what must be true after it ------------------------------------------------------------------------

    def look_after(self, load: Load, asked: list[Asked]) -> None:
        """Judge a life of which every request is known."""
        image = self.tracked.image.read_bytes()
        stamps = stamps_of(image)
        load.check_content(self.stamps, stamps)
        changed = differing_blocks(self.image, image) | load.changed_blocks(stamps, BLOCK)
        new_points = [self.new_point(load, deed, stamps) for deed in asked if deed.operation == "checkpoint"]
        self.check_closed_periods(load, asked)
        for point in self.points:
            point.changed |= changed
            point.touched |= load.blocks_of(load.sent, BLOCK)
        self.points += new_points
        self.drop_forgotten(asked)
        self.requests += len(load.answered)
        self.next_stamp = max(self.next_stamp, load.last_stamp + 1)
        self.image, self.stamps = image, stamps
        self.check_points()

    def new_point(self, load: Load, deed: Asked, stamps: list[int]) -> Point:
        """What is known since a checkpoint that may have been taken anywhere between question and answer."""
        since = load.last_stamp if deed.last_sent is None else deed.last_sent
        self.checkpoints += deed.last_sent is not None
        return Point(
            deed.name,
            changed=load.changed_blocks(stamps, BLOCK, since),
            touched=load.blocks_of(load.sent.keys() - deed.answered_before, BLOCK),
        )

    def check_closed_periods(self, load: Load, asked: list[Asked]) -> None:
        """What was answered before a checkpoint was asked for is dirty up to it, since any older one."""
        with closing(Store.open(self.store_path)) as store:
            names = checkpoint_names(store)
            for deed in asked:
                if deed.operation == "checkpoint" and deed.name in names:
                    written = load.blocks_of(deed.answered_before, BLOCK)
                    for point in self.points:
                        if point.name in names:
                            dirty = blocks_of(changes(store, NAME, since=point.name, until=deed.name))
                            assert point.changed | written <= dirty, (
                                f"lost between {point.name} and {deed.name}"
                            )

    def drop_forgotten(self, asked: list[Asked]) -> None:
        """An answered checkpoint is there and an answered forget is done; what was not answered may be either."""
        with closing(Store.open(self.store_path)) as store:
            names = checkpoint_names(store)
        doubtful = {deed.name for deed in asked if deed.last_sent is None or deed.operation == "forget"}
        gone = {deed.name for deed in asked if deed.operation == "forget" and deed.last_sent is not None}
        for point in self.points:
            assert point.name in names or point.name in doubtful, f"checkpoint {point.name} is gone"
            assert point.name not in names or point.name not in gone, (
                f"checkpoint {point.name} is still there"
            )
        self.points = [point for point in self.points if point.name in names]

    def look(self) -> None:
        """Judge a life of which only the image tells."""
        image = self.tracked.image.read_bytes()
        changed = differing_blocks(self.image, image)
        for point in self.points:
            point.changed |= changed
            point.touched |= changed
        self.image, self.stamps = image, stamps_of(image)
        self.check_points(slack=2 * FIO_DEPTH * (FIO_LONGEST // BLOCK + 1))

    def check_points(self, slack: int = 0) -> None:
        """`slack` is blocks of requests that were under way and are known to nobody."""
        most = 0
        with closing(Store.open(self.store_path)) as store:
            with store.read() as reader:
                assert chain.find_disk(reader, NAME).epoch_number == 1, "a new epoch began"
            for point in self.points:
                answer = changes(store, NAME, since=point.name)
                assert trust_of(answer) is not Trust.UNTRUSTED, answer.standing.reason
                dirty = blocks_of(answer)
                lost = point.changed - dirty
                assert not lost, f"changed since {point.name}, and reported clean: blocks {sorted(lost)[:9]}"
                loose = dirty - point.touched
                new = len(loose - point.loose)
                assert new <= ARMED_BLOCKS + slack, f"{new} blocks since {point.name} are dirty for nothing"
                point.loose, most = loose, max(most, new)
        self.over_report.append(most)

    # -- between lives -------------------------------------------------------------------------------------

    def back_up(self) -> None:
        kind = self.chosen.choice([BackupType.INCREMENTAL] * 4 + [BackupType.DIFFERENTIAL])
        first = not self.backups
        if self.chosen.random() < 0.5:
            self.kill_a_backup(kind)
        with closing(Store.open(self.store_path)) as store:
            [made] = backup(store, [NAME], self.repository, kind=kind)
        assert made.entry.type_actual is (BackupType.FULL if first and made.entry.sequence == 1 else kind)
        self.note_backups()
        self.points = [point for point in self.points if not point.name.startswith("backup-")]
        self.points.append(Point(made.entry.checkpoint.name))
        self.over_report_is_known()

    def kill_a_backup(self, kind: BackupType) -> None:
        with spawn(*self.command("backup", NAME, self.repository, f"--{kind.value}")) as child:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(self.chosen.uniform(0, 2 * statistics.median(self.restart_s)))
            child.process.kill()
            code = child.wait()  # it may have been done a moment before
            assert code in (0, -signal.SIGKILL), f"it failed, with {code}: {child.stderr}"
            self.kills += code != 0
        if (self.repository / NAME / MANIFEST).exists():
            self.note_backups()

    def note_backups(self) -> None:
        """Backups whose digest we do not know were made of the image as it is now."""
        manifest = BackupFolder(self.repository, NAME).manifest()
        assert manifest is not None
        for entry in manifest.backups:
            self.backups.setdefault(entry.id, hashlib.sha256(self.image).hexdigest())

    def over_report_is_known(self) -> None:
        self.check_points()
        self.over_report.pop()  # no death

    def forget_at_rest(self) -> None:
        there = [point for point in self.points if point.name.startswith("c")]
        if there:
            point = self.chosen.choice(there)
            with closing(Store.open(self.store_path)) as store, Filter.attach(store, NAME) as disk:
                disk.forget(point.name)
            self.points.remove(point)
            self.over_report_is_known()

    # -- the end -------------------------------------------------------------------------------------------

    def end(self) -> None:
        """The last backup is the image; so is every earlier one of what it was made of; the store is sound."""
        self.back_up()
        with closing(Store.open(self.store_path)) as store:
            assert {finding.gravity for finding in check_store(store)} <= {Gravity.NOTE}
        restored = self.tracked.folder / "restored.raw"
        for backup_id, digest in self.backups.items():
            restore(self.repository, NAME, restored, at=backup_id)
            content = restored.read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest, (
                f"backup {backup_id} is not what the image was"
            )
            restored.unlink()
        assert content == self.image == self.tracked.image.read_bytes()

    def told(self) -> str:
        restarts, over = sorted(self.restart_s), sorted(blocks * BLOCK // 1024 for blocks in self.over_report)
        return (
            f"{self.kills} kills, {self.clean_ends} clean ends, {self.requests} answered requests,"
            f" {self.fio_blocks} blocks by fio, {self.checkpoints} checkpoints under load,"
            f" {len(self.backups)} backups; restart median {statistics.median(restarts):.2f} s,"
            f" p99 {restarts[len(restarts) * 99 // 100]:.2f} s, max {restarts[-1]:.2f} s;"
            f" over-report of a death median {statistics.median(over):.0f} KiB, max {over[-1]} KiB,"
            f" bound {ARMED_BLOCKS * BLOCK // 1024} KiB"
        )


def differing_blocks(before: bytes, after: bytes, stride: int = 1 << 20) -> set[int]:
    assert len(before) == len(after)
    found = set()
    for start in range(0, len(after), stride):
        if before[start : start + stride] != after[start : start + stride]:
            for offset in range(start, start + stride, BLOCK):
                if before[offset : offset + BLOCK] != after[offset : offset + BLOCK]:
                    found.add(offset // BLOCK)
    return found


def checkpoint_names(store: Store) -> list[str]:
    with store.read() as reader:
        return [point.name for point in reader.checkpoints(chain.find_disk(reader, NAME).uuid)]


def storm(kills: int, seed: int) -> Storm:
    """All of it, in a folder of its own."""
    with quick_folder() as folder:
        raging = Storm(folder, seed)
        raging.die_under_load()
        raging.back_up()
        lives: list[Callable[[], None]] = [
            raging.die_under_load, raging.die_under_fio, raging.die_while_starting, raging.end_cleanly,
            raging.back_up, raging.forget_at_rest,
        ]  # fmt: skip
        for life in lives[1:]:
            life()
        while raging.kills < kills:
            raging.chosen.choices(lives, (40, 4, 4, 2, 2, 2))[0]()
        raging.end()
        return raging


def torture(seed: int, scale: float) -> str:
    try:
        raging = storm(max(10, round(KILLS * scale)), seed)
    except LmdbitmapError as error:
        raise AssertionError(f"seed {seed}: {error}") from error
    return raging.told()
