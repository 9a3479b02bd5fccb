"""A process that dies of SIGKILL at every step of its life with a disk; dying.py tells the lives.

What counts is the image itself: a block that differs from what it was at a checkpoint must be reported, by the
store at once and by the next owner, who needs no cleaning up and finds no new epoch.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap import schema
from lmdbitmap.changes import Changes, changes
from lmdbitmap.check import Gravity, check_store
from lmdbitmap.errors import Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.store import Store
from tests.crash.dying import BEFORE, BLOCK, BLOCKS, LIVES, OTHER, prepare
from tests.support import run, spawn
from tests.tracked import NAME, blocks_of, quick_folder, trust_of

FEWEST_DEATHS = 7
"""Of any life: the test would be worth nothing if it died too seldom."""
MAX_ARMED_BLOCKS = 3 * 64
IMAGES = {NAME: "disk.raw", OTHER: "other.raw"}


@pytest.fixture
def graves() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


def deaths(life: str, durability: str, graves: Path) -> list[tuple[Path, str]]:
    """Every (folder, step) at which the life ended too early."""
    told = run(
        sys.executable, "-m", "tests.crash.dying", life, durability, graves, timeout=60
    ).stdout.splitlines()
    assert told[-1] == "lived"
    found = [line.split(" ", 1) for line in told[:-1]]
    assert len(found) >= FEWEST_DEATHS
    assert {step.split()[-1] for _, step in found} >= {"transaction", "pwrite"}
    return [(graves / number, step) for number, step in found]


def changed_blocks(image: Path) -> set[int]:
    """Where the image differs from what it was at `start`."""
    content = image.read_bytes()
    pieces = (content[offset : offset + BLOCK] for offset in range(0, len(content), BLOCK))
    return {block for block, piece in enumerate(pieces) if piece != BEFORE[: len(piece)]}


@pytest.mark.parametrize("life", list(LIVES))
def test_death_at_any_step_hides_no_change(life: str, graves: Path) -> None:
    for folder, step in deaths(life, schema.WRITE_AHEAD, graves):
        with closing(Store.open(str(folder / "store"))) as store:
            for name, image in IMAGES.items():
                is_whole(store, name, folder / image, f"died {step}, {folder.name}")
            assert {finding.gravity for finding in check_store(store)} <= {Gravity.NOTE}, step
            if life == "checkpointing_two":
                taken = ["both" in checkpoint_names(store, name) for name in IMAGES]
                assert taken in ([True, True], [False, False]), step


def is_whole(store: Store, name: str, image: Path, step: str) -> None:
    changed = changed_blocks(image)
    before = changes(store, name, since="start")
    assert trust_of(before) is not Trust.UNTRUSTED, (step, before.standing)
    on_disk = {block for block in changed if block < before.geometry.block_count}
    assert on_disk <= blocks_of(before), step
    with Filter.attach(store, name, background=False) as disk:
        assert disk.disk.epoch_number == 1, step
        assert disk.size == image.stat().st_size, step
        after = disk.changes(since="start")
        assert changed <= blocks_of(after), step
        if disk.size == BLOCKS * BLOCK:  # what is new is dirty as a whole
            assert len(blocks_of(after)) <= len(changed) + 400 + 2 * MAX_ARMED_BLOCKS, step
        disk.checkpoint("afterwards")
        disk.pwrite(b"afterwards", 77 * BLOCK)
        answer: Changes = disk.changes(since="afterwards")
        assert (blocks_of(answer), trust_of(answer)) == ({77}, Trust.EXACT), step


def checkpoint_names(store: Store, name: str) -> list[str]:
    with store.read() as reader:
        (disk,) = (disk for disk in reader.disks() if disk.name == name)
        return [checkpoint.name for checkpoint in reader.checkpoints(disk.uuid)]


@pytest.mark.parametrize("life", ["writing", "detaching"])
def test_deferred_death_is_a_new_epoch_or_was_none(life: str, graves: Path) -> None:
    """From the attach's commit to the detach's nothing is known; before and after, everything."""
    fates = {Trust.EXACT: 0, Trust.UNTRUSTED: 0}
    for folder, step in deaths(life, schema.DEFERRED, graves):
        with closing(Store.open(str(folder / "store"))) as store:
            answer = changes(store, NAME, since="start")
            fates[trust_of(answer)] += 1
            assert changed_blocks(folder / "disk.raw") <= blocks_of(answer), step
            with Filter.attach(store, NAME, background=False) as disk:
                if trust_of(answer) is Trust.UNTRUSTED:
                    assert disk.disk.epoch_number == 2, step
                    with pytest.raises(Untrusted):
                        disk.changes(since="start")
                assert changed_blocks(folder / "disk.raw") <= blocks_of(disk.changes()), step
    assert fates[Trust.EXACT] >= 1
    assert fates[Trust.UNTRUSTED] >= 5


HAMMER = """
import random, sys, threading
from lmdbitmap import filter
from lmdbitmap.store import Store
filter.PASS_INTERVAL_S = 0.003
disk = filter.Filter.attach(Store.open(sys.argv[1]), "sda", max_armed=20)
def write(seed):
    chosen, lane = random.Random(seed), disk.lane()
    while True:
        start = chosen.randrange(5000 * 512 - 20000)
        lane.pwrite(bytes([seed % 250 + 1]) * chosen.choice([1, 512, 20000]), start)
        lane.write_many([(chosen.randrange(5000 * 512 - 9), memoryview(b"scattered")) for _ in range(5)])
def checkpoint():
    for number in range(10**6):
        threading.Event().wait(0.01)
        disk.checkpoint(f"{sys.argv[2]}-{number}")
        if number == int(sys.argv[3]):
            print("enough", flush=True)
for work, *arguments in ((write, 1), (write, 2), (checkpoint,)):
    threading.Thread(target=work, args=arguments, daemon=True).start()
threading.Event().wait()
"""


def test_killed_again_and_again_in_the_middle_of_everything(graves: Path) -> None:
    """Two writers, a checkpointer, beats and passes, and a SIGKILL whenever it comes."""
    tracked = prepare(graves / "1", schema.WRITE_AHEAD)
    tracked.close()
    store = graves / "1" / "store"
    for round_number in range(6):
        with spawn(sys.executable, "-c", HAMMER, store, str(round_number), str(3 * round_number)) as child:
            child.wait_for_line("enough")
            child.process.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        with closing(Store.open(str(store))) as opened:
            changed = changed_blocks(tracked.image)
            answer = changes(opened, NAME, since="start")
            assert trust_of(answer) is Trust.SUPERSET
            assert changed <= blocks_of(answer)
            assert len(changed) > 10
    with closing(Store.open(str(store))) as opened:
        with Filter.attach(opened, NAME, background=False) as disk:
            assert disk.disk.epoch_number == 1
            assert changed_blocks(tracked.image) <= blocks_of(disk.changes(since="start"))
        assert {finding.gravity for finding in check_store(opened)} <= {Gravity.NOTE}
