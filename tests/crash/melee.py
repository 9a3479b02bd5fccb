"""Everything that may happen to a disk at once, and what must be true of it however the threads are woven.

A `Melee` is two disks of one store, and threads that do as they like with them while checkpoints are taken:

    sda   an image with somebody who looks on (tapped.py): each change of data is noted as a `Landing`, with the
          number of the last checkpoint that was told before it and after it
    sdb   a plain descriptor, as guests have it: a consumer takes checkpoints of its own and copies what each
          period names to a mirror, as a backup does

What is held to be true:

- law 1: at each landing a fresh view of the store calls its blocks dirty, in the period that records, or the
  owner has durably taken back his word for it;
- law 2: a landing that was seen between checkpoint v and the telling of w is dirty in one of the periods v to
  w + 1, or in what these were merged into, never in none and never in an earlier one only;
- what was asked or exported holds every landing that was done before the question;
- no block is dirty where nothing landed, and nothing was marked;
- the mirror is the image, once nobody writes any more.

Threads are switched as often as the interpreter can, which makes rare orders common.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import sys
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from lmdbitmap import bits, export
from lmdbitmap.errors import Busy, InvalidArgument, NotFound, StorageError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter, take_checkpoint
from lmdbitmap.flat_file.flatfile import FlatFile
from lmdbitmap.geometry import EXTENT_BLOCKS, REGION_BLOCKS, Geometry
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.storage import owner_file, schema
from lmdbitmap.tracker import chain, session, standalone
from lmdbitmap.tracker.changes import Changes
from lmdbitmap.tracker.lane import FilterLane
from tests.crash.tapped import TappedDevice, Troupe
from tests.helpers import naive_flat, nbd_raw
from tests.helpers.nbd_raw import RawClient
from tests.helpers.support import make_raw_image
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, quick_folder, trust_of

OTHER = "sdb"
BLOCK_BITS = 12
BLOCK = 1 << BLOCK_BITS
BLOCKS = 9000
"""Three regions, the last one in part."""
GEOMETRY = Geometry(BLOCKS * BLOCK - 100, BLOCK_BITS)
MAX_ARMED = 7
CHECKPOINT_PAUSE_S = 0.01
SWITCH_S = 1e-6
DAWDLING = 0.03
"""How many of the landings wait a while between their mark and their data, so that others may overtake them."""
DAWDLE_S = 0.003
LEAST_LANDINGS = 100
"""In a melee, however slow the machine is."""
HOT_BLOCKS = 12
"""Of each of three extents, in which the writers meet for a while."""


class Landing(NamedTuple):
    """A change of data, and the last checkpoint that was told before it began and after it was done."""

    start: int
    stop: int
    told_before: int
    told_after: int

    @property
    def blocks(self) -> range:
        return range(self.start, self.stop)


class Watcher:
    """Looks on at every landing on the tapped disk."""

    def __init__(self, tracked: TrackedDisk, told: Callable[[], int], seed: int = 0) -> None:
        self.landings: list[Landing] = []
        self.breaches: list[str] = []
        self.closed = False
        self._tracked = tracked
        self._told = told
        self._mine = threading.local()
        self._chosen = random.Random(seed)
        self._owner_path = tracked.store.owner_path(tracked.disk().uuid)
        self.is_write_ahead = tracked.durability == schema.WRITE_AHEAD

    def watch(self, disk: Filter) -> None:
        device = disk.device
        assert isinstance(device, TappedDevice)
        device.before_change, device.after_change = self._before, self._after
        self._device = device

    def _before(self, offset: int, length: int) -> None:
        if self._chosen.random() < DAWDLING:
            time.sleep(DAWDLE_S)
        self._told_at_start().append(self._told())
        if offset + length > self._device.size:
            self.breaches.append(f"bytes {offset}..{offset + length} were written past the end")
        if self.closed:
            self.breaches.append(f"bytes {offset}..{offset + length} were written after the end")
        if self.is_write_ahead and not self._would_be_found(self._blocks(offset, length)):
            self.breaches.append(
                f"bytes {offset}..{offset + length} were written before their dirt was durable"
            )

    def _after(self, offset: int, length: int) -> None:
        blocks = self._blocks(offset, length)
        self.landings.append(Landing(blocks.start, blocks.stop, self._told_at_start().pop(), self._told()))

    def _told_at_start(self) -> list[int]:
        """One number for each change that the thread is in; a device may do one by way of another."""
        if not hasattr(self._mine, "told"):
            self._mine.told = []
        told: list[int] = self._mine.told
        return told

    def _blocks(self, offset: int, length: int) -> range:
        return range(offset >> BLOCK_BITS, ((offset + length - 1) >> BLOCK_BITS) + 1)

    def _would_be_found(self, blocks: range) -> bool:
        """If everybody died now: the blocks are dirty, or the owner took his word back."""
        return self._is_dirty_in_store(blocks) or owner_file.distrust(self._owner_path) is not None

    def _is_dirty_in_store(self, blocks: range) -> bool:
        with self._tracked.store.read() as reader:
            recording = chain.current_checkpoint(reader, chain.find_disk(reader, NAME)).bitmap_id
            if reader.bitmap(recording).all_dirty is not None:
                return True
            known: dict[int, bytearray] = {}
            for block in blocks:
                number, bit = divmod(block, REGION_BLOCKS)
                if number not in known:
                    region = reader.region(recording, number)
                    record = (region.armed, region.bits) if region else (0, schema.ALL_CLEAN_BITS)
                    known[number] = bytearray(bits.dirty_bits(*record))
                if not known[number][bit >> 3] >> (bit & 7) & 1:
                    return False
        return True


class Melee:
    """Two attached disks, served, and the threads' acts. `play` some, take checkpoints, then `end` and judge."""

    def __init__(self, folder: Path, seed: int, durability: str = schema.WRITE_AHEAD) -> None:
        self.folder, self._seeds = folder, random.Random(seed)
        self.tracked = TrackedDisk(folder, GEOMETRY.size, BLOCK_BITS, durability)
        other = make_raw_image(folder / "other.raw", GEOMETRY.size)
        session.add(self.tracked.store, OTHER, str(other), granularity_bits=BLOCK_BITS, durability=durability)
        self.sda = Filter.attach(
            self.tracked.store, NAME, open_device=TappedDevice.open, max_armed=MAX_ARMED, background=False
        )
        self.sdb = Filter.attach(self.tracked.store, OTHER, max_armed=50, background=False)
        self.disks = [self.sda, self.sdb]
        self.told = 0
        take_checkpoint(self.disks, "c0")
        self.watcher = Watcher(self.tracked, lambda: self.told, seed)
        self.watcher.watch(self.sda)
        self.troupe = Troupe()
        self.done: Counter[str] = Counter()
        """How often everything was done that may be refused when another was faster."""
        self.marked: list[Landing] = []
        """What was marked on sda without any data: by hand, and by imports."""
        self.reach = GEOMETRY.size
        self.failing = 0.0
        """How likely a commit fails."""
        self.mirror = bytearray(other.read_bytes())
        self.mirrored = 0
        self._server = Server({NAME: self.sda, OTHER: self.sdb})
        self._server.listen_unix(str(folder / "nbd.sock"))
        self._server.start()
        self._control = ControlServer({NAME: self.sda, OTHER: self.sdb})
        self._control.start()
        self.control_path = self.tracked.store.control_path(self.sda.disk.uuid)

    def dice(self) -> random.Random:
        return random.Random(self._seeds.randrange(1 << 30))

    # -- checkpoints ---------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        taken = False
        while not taken:
            with self.faster("checkpoint"):
                take_checkpoint(self.disks, f"c{self.told + 1}")
                taken = True
        self.told += 1

    def take_checkpoints(self, count: int) -> None:
        """One every 10 ms, unless somebody fails; something lands between them."""
        for _ in range(count):
            landed = len(self.watcher.landings)
            self.troupe.await_until(lambda landed=landed: len(self.watcher.landings) > landed)  # type: ignore[misc]
            if self.troupe.ending.wait(CHECKPOINT_PAUSE_S):
                break
            self.checkpoint()
        self.troupe.await_until(lambda: len(self.watcher.landings) > LEAST_LANDINGS)

    def end(self) -> None:
        """Everybody goes home; the last period is closed."""
        self.troupe.end()
        self.failing = 0
        assert self._server.stop()
        assert self._control.stop()
        self.checkpoint()

    def close(self) -> None:
        self.troupe.ending.set()
        for disk in self.disks:
            disk.detach()
        self.tracked.close()

    # -- acts ----------------------------------------------------------------------------------------------

    def play_writers(self) -> None:
        for disk in self.disks:
            for _ in range(2):
                self.troupe.play(partial(self.write_through, disk.lane(), self.dice()))
        for name in (NAME, OTHER):
            self.troupe.play(partial(self.write_over_nbd, name, self.dice()))

    def write_through(self, lane: FilterLane, chosen: random.Random) -> None:
        offset, length = self.place(chosen)
        data = chosen.randbytes(1) * length
        kind = chosen.choices(("write", "batch", "zeroes", "discard"), (4, 4, 1, 1))[0]
        try:
            if kind == "write":
                lane.pwrite(data, offset)
            elif kind == "batch":
                second, view = self.place(chosen)[0] // BLOCK * BLOCK, memoryview(data)
                failed = lane.write_many([(offset, view), (second, view[:1])])
                assert set(failed.values()) <= {errno.ENOSPC}
            elif kind == "zeroes":
                lane.write_zeroes(offset, length)
            else:
                lane.discard(offset, length)
        except InvalidArgument:  # past the end, where that moves
            self.done["refused"] += 1
        self.done[kind] += 1

    def write_over_nbd(self, name: str, chosen: random.Random) -> None:
        """One connection, and a few batches over it."""
        with RawClient.connect(str(self.folder / "nbd.sock")) as client:
            client.go(name, structured=False)
            for _ in range(20):
                if self.troupe.ending.is_set():
                    break
                places = [self.place(chosen) for _ in range(chosen.randint(1, 8))]
                client.send(
                    b"".join(nbd_raw.write(at, chosen.randbytes(1) * length) for at, length in places)
                )
                for _ in places:
                    assert client.reply().error in (0, errno.ENOSPC)
                trimmed = client.do(nbd_raw.TRIM, *self.place(chosen)).error
                assert trimmed in (0, errno.EINVAL)
                self.done["over NBD"] += len(places) + 1

    def place(self, chosen: random.Random) -> tuple[int, int]:
        length = chosen.choice([1, 100, BLOCK, BLOCK + 1, 70 * BLOCK if chosen.random() < 0.2 else 2])
        if chosen.random() < 0.5:
            return self.hot_place(chosen), min(length, BLOCK)
        return chosen.randrange(self.reach - length), length

    def hot_place(self, chosen: random.Random) -> int:
        """In the few blocks in which all writers meet for the time of some checkpoints."""
        first = (self.told // 3 * 997) % (BLOCKS // 2)
        return (first + chosen.randrange(3) * EXTENT_BLOCKS + chosen.randrange(HOT_BLOCKS)) * BLOCK

    def play_others(self) -> None:
        """All that may happen to disks beside writes, on both of them."""
        for disk in self.disks:
            self.troupe.play(partial(self.pass_over, disk, self.dice()), pause_s=0.002)
        self.troupe.play(partial(self.ask, self.dice()), pause_s=0.003)
        self.troupe.play(partial(self.ask_by_control, self.dice()), pause_s=0.003)
        self.troupe.play(partial(self.forget, self.dice()), pause_s=0.01)
        self.troupe.play(partial(self.export_closed, self.dice()), pause_s=0.01)
        self.troupe.play(partial(self.export_open, self.dice()), pause_s=0.01)

    def pass_over(self, disk: Filter, chosen: random.Random) -> None:
        disk.beat()
        with self.faster("pass"):
            disk.background_pass()
            if chosen.random() < 0.2:
                disk.persist()

    def ask(self, chosen: random.Random) -> None:
        """The answer holds what landed before the question."""
        with self.faster("ask"):
            since = chosen.choice(self.numbers(self.sda))
            landed = self.landed_since(since)
            answer = self.sda.changes(since=f"c{since}")
            self.require(landed, blocks_of(answer), f"asked since c{since}")

    def landed_since(self, since: int) -> set[int]:
        """What landed for certain in the periods from checkpoint `since` on, up to now."""
        return {block for one in self.watcher.landings[:] if one.told_before >= since for block in one.blocks}

    def require(self, landed: set[int], dirty: set[int], what: str) -> None:
        """Blocks past an end that moves are another matter."""
        lost = {block for block in landed - dirty if block < BLOCKS // 2 or self.reach == GEOMETRY.size}
        assert not lost, f"{what}: lost blocks {sorted(lost)[:9]}"

    def ask_by_control(self, chosen: random.Random) -> None:
        call = partial(control_client.call, self.control_path)
        if chosen.random() < 0.5:
            assert len(call("info")["disks"]) == 2
        elif self.reach == GEOMETRY.size:
            before, block = self.told, chosen.randrange(BLOCKS)
            call("mark", disk=NAME, offset=block * BLOCK, length=1)
            self.marked.append(Landing(block, block + 1, before, self.told))
        with self.faster("persist"):
            call("persist", disk=OTHER)

    def forget(self, chosen: random.Random) -> None:
        """Any checkpoint but the first, the newest among them."""
        disk = chosen.choice(self.disks)
        there = self.numbers(disk)[1:]
        if there:
            with self.faster("forget"):
                disk.forget(f"c{chosen.choice([there[-1], chosen.choice(there)])}")

    def export_closed(self, chosen: random.Random) -> None:
        """A closed period's file is CLEAN, is exact, and equals what the store says."""
        with self.faster("export"):
            first, last = sorted(chosen.choices(self.numbers(self.sdb), k=2))
            closed = self.sdb.changes(since=f"c{first}", until=f"c{last}")
            header = export.export_changes(closed, self.folder / "closed.dbm")
            assert header.trust is trust_of(closed)
            assert self.file_blocks("closed.dbm") == blocks_of(closed)

    def export_open(self, chosen: random.Random) -> None:
        """An open period's file holds what landed before the export began."""
        with self.faster("export"):
            since = chosen.choice(self.numbers(self.sda))
            landed = self.landed_since(since)
            export.export_changes(self.sda.changes(since=f"c{since}"), self.folder / "open.dbm")
            self.require(landed, self.file_blocks("open.dbm"), f"exported since c{since}")

    def file_blocks(self, name: str) -> set[int]:
        with FlatFile.open(self.folder / name) as file:
            file.prove()
        return naive_flat.dirty_blocks((self.folder / name).read_bytes())

    def import_into(self, chosen: random.Random) -> None:
        blocks, name = set(chosen.sample(range(BLOCKS), 20)), f"i{self.done['import']}"
        path = self.folder / "import.dbm"
        path.write_bytes(naive_flat.write(blocks, GEOMETRY.size, BLOCK_BITS))
        before = self.told
        export.import_file(self.tracked.store, path, name, into=NAME)
        self.marked += [Landing(block, block + 1, before, self.told) for block in blocks]
        self.tracked.store.update(lambda writer: standalone.remove(writer, name))
        self.done["import"] += 1

    def copy_to_mirror(self) -> None:
        """A consumer's incremental backup of sdb, to a folder that is always up to date."""
        self.sdb.checkpoint(f"m{self.mirrored + 1}")
        since = f"m{self.mirrored}" if self.mirrored else "c0"
        for offset, length, *_ in self.sdb.changes(since=since, until=f"m{self.mirrored + 1}").extents():
            self.mirror[offset : offset + length] = self.sdb.pread(length, offset)
        if self.mirrored:
            self.sdb.forget(since)
        self.mirrored += 1

    def resize(self, chosen: random.Random) -> None:
        """What is new is dirty since every checkpoint."""
        old = self.sda.size
        size = chosen.randrange(GEOMETRY.size // 2, self.reach)
        self.sda.resize(size)
        if size > old:
            grown = set(self.sda.disk.geometry.blocks_outward(old, size - old))
            assert grown <= blocks_of(self.sda.changes(since="c0")), "grown blocks are not dirty"
        self.done["resize"] += 1

    @contextlib.contextmanager
    def faster(self, deed: str) -> Iterator[None]:
        """Somebody may have forgotten a checkpoint meanwhile, or begun a new epoch, which has none at first.

        Or the disk was made smaller: what it lost is not called clean.
        """
        try:
            yield
            self.done[deed] += 1
        except (NotFound, InvalidArgument, Untrusted, IndexError):
            self.done["too late"] += 1
        except Busy:
            assert self.reach != GEOMETRY.size, "no disk was resized"
            self.done["too late"] += 1
        except StorageError:
            assert self.failing
            self.done["failed"] += 1

    # -- judgement -----------------------------------------------------------------------------------------

    def lost(self) -> list[Landing]:
        """Landings on sda that are dirty in none of the periods that they may count for."""
        numbers = self.numbers(self.sda)
        dirty = [blocks_of(self.period(first, last)) for first, last in pairwise(numbers)]
        found = []
        for landing in [*self.watcher.landings, *self.marked]:
            first = bisect_right(numbers, landing.told_before) - 1
            last = bisect_right(numbers, landing.told_after + 1) - 1
            expected = {block for block in landing.blocks if block < self.sda.disk.geometry.block_count}
            if first >= 0 and not expected <= set().union(*dirty[first : last + 1]):
                found.append(landing)
        return found

    def period(self, first: int, last: int) -> Changes:
        answer = self.sda.changes(since=f"c{first}", until=f"c{last}")
        assert trust_of(answer) is Trust.EXACT
        return answer

    def numbers(self, disk: Filter) -> list[int]:
        """The common checkpoints of this epoch that are not forgotten, oldest first."""
        with self.tracked.store.read() as reader:
            now = chain.find_disk(reader, disk.disk.name)
            names = [point.name for point in chain.epoch_chain(reader, now)]
        return [int(name[1:]) for name in names if name.startswith("c")]

    def judge(self) -> None:
        """After `end`."""
        assert not self.watcher.breaches, self.watcher.breaches[0]
        lost = self.lost()
        assert not lost, f"{len(lost)} of {len(self.watcher.landings)} landings are in no period: {lost[0]}"

    def judge_exactly(self) -> None:
        """Where neither the size changed nor the epoch, nothing is dirty for nothing."""
        dirty = blocks_of(self.sda.changes(since="c0"))
        touched = {block for one in [*self.watcher.landings, *self.marked] for block in one.blocks}
        assert dirty == touched, f"dirty for nothing: {sorted(dirty - touched)[:9]}"

    def judge_mirror(self) -> None:
        self.copy_to_mirror()
        assert bytes(self.mirror) == (self.folder / "other.raw").read_bytes(), "the mirror is not the image"

    def figures(self) -> Counter[str]:
        return self.done + Counter(
            landings=len(self.watcher.landings), checkpoints=self.told, mirrored=self.mirrored
        )


@contextlib.contextmanager
def frantic() -> Iterator[None]:
    """Threads are switched all the time, and nobody logs what is meant to happen."""
    interval, log = sys.getswitchinterval(), logging.getLogger("lmdbitmap")
    sys.setswitchinterval(SWITCH_S)
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        log.setLevel(level)


@contextlib.contextmanager
def melee(seed: int, durability: str = schema.WRITE_AHEAD) -> Iterator[Melee]:
    with frantic(), quick_folder() as folder, closing(Melee(folder, seed, durability)) as fighting:
        yield fighting
