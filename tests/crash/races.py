"""The melee (melee.py) in its kinds, and the end of a session beside writers; the long run of all of them.

checkpoints   everything at once, in both durability modes; nothing may be dirty for nothing
resizes       the disk grows and shrinks under writers who aim past its end
failures      commits fail by lot: no guest notices, and new epochs begin
detach        a write either was done and is dirty, or was refused and is not there
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial

from lmdbitmap.errors import LmdbitmapError, StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.storage import schema
from lmdbitmap.tracker.lane import FilterLane
from tests.crash.melee import BLOCK, BLOCKS, GEOMETRY, MAX_ARMED, Melee, Watcher, frantic, melee
from tests.crash.tapped import TappedDevice, Troupe
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, quick_folder, trust_of


def race_checkpoints(seed: int, checkpoints: int, durability: str = schema.WRITE_AHEAD) -> Counter[str]:
    """Everything at once, but for resizes and failures."""
    with melee(seed, durability) as fighting:
        fighting.play_writers()
        fighting.play_others()
        fighting.troupe.play(partial(fighting.import_into, fighting.dice()), pause_s=0.02)
        fighting.troupe.play(fighting.copy_to_mirror, pause_s=0.005)
        fighting.take_checkpoints(checkpoints)
        fighting.end()
        fighting.judge()
        fighting.judge_exactly()
        fighting.judge_mirror()
        return fighting.figures()


def race_resizes(seed: int, checkpoints: int) -> Counter[str]:
    """sda grows and shrinks under its writers, who aim past its end too."""
    with melee(seed) as fighting:
        fighting.reach = GEOMETRY.size * 3 // 2
        fighting.play_writers()
        fighting.play_others()
        fighting.troupe.play(partial(fighting.resize, fighting.dice()), pause_s=0.005)
        fighting.take_checkpoints(checkpoints)
        fighting.end()
        fighting.judge()
        assert fighting.sda.size == fighting.tracked.image.stat().st_size
        return fighting.figures()


def race_failures(seed: int, checkpoints: int) -> Counter[str]:
    """Commits fail now and then: the guests go on, and new epochs begin under them."""
    with melee(seed) as fighting:
        fail_at_times(fighting)
        fighting.failing = 0.1
        fighting.play_writers()
        fighting.play_others()
        fighting.take_checkpoints(checkpoints)
        fighting.troupe.await_until(lambda: fighting.sda.disk.epoch_number > 1)
        fighting.end()
        fighting.judge()
        return fighting.figures() + Counter({"epoch began": fighting.sda.disk.epoch_number})


def fail_at_times(fighting: Melee) -> None:
    store, chosen = fighting.tracked.store, fighting.dice()
    update = store.update

    def update_or_fail(change: Callable[..., object]) -> object:
        if chosen.random() < fighting.failing:
            fighting.done["commit failed"] += 1
            raise StorageError("a store", OSError(errno.EIO, "by lot"), next_step="try again")
        return update(change)

    store.update = update_or_fail  # type: ignore[method-assign, assignment]


# --- the end of a session ---


class Writer:
    """Writes to blocks that are its own, each time with other data, until it is refused."""

    def __init__(self, lane: FilterLane, blocks: range, seed: int) -> None:
        self.written: dict[int, bytes] = {}
        self.refused: tuple[int, bytes] | None = None
        self._lane, self._blocks, self._chosen = lane, blocks, random.Random(seed)

    def write(self) -> None:
        if self.refused is not None:
            return
        block, data = self._chosen.choice(self._blocks), self._chosen.randbytes(16) * (BLOCK // 16)
        try:
            if self._chosen.random() < 0.5:
                self._lane.pwrite(data, block * BLOCK)
            else:
                assert self._lane.write_many([(block * BLOCK, memoryview(data))]) == {}
            self.written[block] = data
        except StorageError as refusal:
            if refusal.errno != errno.ESHUTDOWN:
                raise
            self.refused = (block, data)


def race_detach(seed: int, rounds: int) -> Counter[str]:
    """Detach beside writers, passes and questions: what was written is dirty, what was refused is not there."""
    done: Counter[str] = Counter()
    with frantic(), quick_folder() as folder, closing(TrackedDisk(folder, GEOMETRY.size).clean()) as tracked:
        for number in range(rounds):
            done += detach_beside_writers(tracked, random.Random(seed + number), f"r{number}")
    return done


def detach_beside_writers(tracked: TrackedDisk, chosen: random.Random, checkpoint: str) -> Counter[str]:
    disk = Filter.attach(tracked.store, NAME, open_device=TappedDevice.open, max_armed=MAX_ARMED)
    disk.checkpoint(checkpoint)
    watcher, troupe = Watcher(tracked, lambda: 0), Troupe()
    watcher.watch(disk)
    writers = [
        Writer(disk.lane(), range(first, BLOCKS - 1, 4), chosen.randrange(1 << 30)) for first in range(4)
    ]
    for writer in writers:
        troupe.play(writer.write, pause_s=1e-4)
    for act in (disk.background_pass, disk.persist, disk.standing, lambda: disk.changes(since=checkpoint)):
        troupe.play(partial(until_detached, act), pause_s=1e-3)
    enough = chosen.randrange(10, 200)
    troupe.await_until(lambda: len(watcher.landings) >= enough)
    disk.detach()
    watcher.closed = True
    troupe.await_until(lambda: all(writer.refused for writer in writers))
    troupe.end()
    judge_detached(tracked, watcher, writers, checkpoint)
    return Counter(
        landings=len(watcher.landings), refused=sum(writer.refused is not None for writer in writers)
    )


def until_detached(act: Callable[[], object]) -> None:
    try:
        act()
    except StorageError as refusal:
        if refusal.errno != errno.ESHUTDOWN:
            raise


def judge_detached(tracked: TrackedDisk, watcher: Watcher, writers: list[Writer], checkpoint: str) -> None:
    assert not watcher.breaches, watcher.breaches[0]
    answer = tracked.changes(since=checkpoint)
    assert trust_of(answer) is Trust.EXACT
    assert blocks_of(answer) == {block for landing in watcher.landings for block in landing.blocks}
    image = tracked.image.read_bytes()
    for writer in writers:
        for block, data in writer.written.items():
            assert image[block * BLOCK : (block + 1) * BLOCK] == data, "a write that was done is gone"
        assert writer.refused is not None
        block, data = writer.refused
        assert image[block * BLOCK : (block + 1) * BLOCK] != data, "a write that was refused is there"


# --- the long run ---

ROUNDS = 10
CHECKPOINTS = 80


def torture(seed: int, scale: float) -> str:
    done: Counter[str] = Counter()
    for number in range(max(1, round(ROUNDS * scale))):
        try:
            for durability in schema.DURABILITIES:
                done += race_checkpoints(seed + number, CHECKPOINTS, durability)
            done += race_resizes(seed + number, CHECKPOINTS)
            done += race_failures(seed + number, CHECKPOINTS)
            done += race_detach(seed + number, rounds=10)
        except LmdbitmapError as error:
            raise AssertionError(f"seed {seed + number}: {error}") from error
    return ", ".join(f"{count} {deed}" for deed, count in done.most_common())
