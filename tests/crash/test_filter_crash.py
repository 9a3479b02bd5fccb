"""A process that dies of SIGKILL at every step of its life with a disk; lives.py tells the lives.

What counts is the image itself: a block that differs from what it was at a checkpoint must be reported, by the
store at once and by the next owner, who needs no cleaning up and finds no new epoch. What is reported too much
lies in extents that were armed, or in the one request that was under way.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap import bits
from lmdbitmap.errors import NotFound, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import EXTENT_BLOCKS, MIN_GRANULARITY_BITS, REGION_BLOCKS
from lmdbitmap.storage import schema
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain, session
from lmdbitmap.tracker.changes import Changes, changes
from lmdbitmap.upkeep.check import check_store
from lmdbitmap.upkeep.findings import Gravity
from tests.crash.dying import Death, Deaths
from tests.crash.lives import (
    BEFORE,
    BLOCK,
    BLOCKS,
    IMAGES,
    MAX_ARMED,
    MOVED,
    OTHER,
    SHRUNK_BLOCKS,
    SIZE,
    prepare,
)
from tests.helpers.support import spawn
from tests.helpers.tracked import NAME, blocks_of, quick_folder, trust_of

LARGEST_REQUEST_BLOCKS = 151


def opened(death: Death) -> closing[Store]:
    return closing(Store.open(str(death.folder / "store")))


def changed_blocks(image: Path) -> set[int]:
    """Where the image differs from what it was at `start`."""
    content = image.read_bytes()
    pieces = (content[offset : offset + BLOCK] for offset in range(0, len(content), BLOCK))
    return {block for block, piece in enumerate(pieces) if piece != BEFORE[: len(piece)]}


def armed_blocks(store: Store, name: str) -> set[int]:
    """The blocks of every extent that the store has armed, in whatever period."""
    found: set[int] = set()
    with store.read() as reader:
        for checkpoint in reader.checkpoints(chain.find_disk(reader, name).uuid):
            for number, region in reader.regions(checkpoint.bitmap_id):
                for run in bits.runs(bits.expand_mask(region.armed)):
                    found.update(range(number * REGION_BLOCKS + run[0], number * REGION_BLOCKS + run[1]))
    return found


def checkpoint_names(store: Store, name: str) -> list[str]:
    with store.read() as reader:
        return [point.name for point in reader.checkpoints(chain.find_disk(reader, name).uuid)]


# --- what holds for all of them ---


@pytest.mark.parametrize("life", ["writing", "passing", "asking", "living_twice"])
def test_death_at_any_step_hides_no_change(life: str, deaths: Deaths) -> None:
    for death in deaths(life):
        with opened(death) as store:
            is_sound(store, death)


def is_sound(store: Store, death: Death, names: Sequence[str] = (NAME,), *, cut_at: int = BLOCKS) -> None:
    """Nothing is hidden, little is reported too much, the next owner goes on, and nothing is left to clean up.

    What was about to be cut off, from block `cut_at` on, may be reported whole.
    """
    for name in names:
        is_whole(store, name, death, cut_at)
    assert {finding.gravity for finding in check_store(store)} <= {Gravity.NOTE}, death
    assert list(death.folder.rglob("*.partial")) == [], death


def is_whole(store: Store, name: str, death: Death, cut_at: int = BLOCKS) -> None:
    image = death.folder / IMAGES[name]
    changed, armed = changed_blocks(image), armed_blocks(store, name)
    assert len(armed) <= MAX_ARMED * EXTENT_BLOCKS, death
    before = changes(store, name, since="start")
    assert trust_of(before) is not Trust.UNTRUSTED, (death, before.standing)
    assert {block for block in changed if block < before.geometry.block_count} <= blocks_of(before), death
    with Filter.attach(store, name, background=False) as disk:
        assert disk.disk.epoch_number == 1, death
        assert disk.size == image.stat().st_size, death
        after = blocks_of(disk.changes(since="start"))
        assert changed <= after, death
        too_much = {block for block in after - changed - armed if block < cut_at}
        assert len(too_much) <= LARGEST_REQUEST_BLOCKS, death
        goes_on(disk, death)


def goes_on(disk: Filter, death: Death) -> None:
    disk.checkpoint("afterwards")
    disk.pwrite(b"afterwards", 77 * BLOCK)
    answer: Changes = disk.changes(since="afterwards")
    assert (blocks_of(answer), trust_of(answer)) == ({77}, Trust.EXACT), death


# --- what each of them costs ---


def test_death_while_attaching_costs_nothing(deaths: Deaths) -> None:
    fates = {Trust.EXACT: 0, Trust.SUPERSET: 0}
    for death in deaths("attaching"):
        with opened(death) as store:
            answer = changes(store, NAME, since="start")
            assert blocks_of(answer) == {5}, death
            fates[trust_of(answer)] += 1
            is_sound(store, death)
    assert min(fates.values()) >= 1


def test_death_while_arming_costs_one_extent(deaths: Deaths) -> None:
    """Nothing before the commit; after it one extent, whether the data came to the image or not (law 1)."""
    extent = set(range(256, 320))
    seen = []
    for death in deaths("arming"):
        with opened(death) as store:
            reported = blocks_of(changes(store, NAME, since="start"))
            changed = changed_blocks(death.folder / "disk.raw")
            assert reported in (set(), extent), death
            assert changed in (set(), {300}), death
            assert changed or "written" not in death.told, death
            seen.append((len(reported), len(changed)))
            is_sound(store, death)
    assert set(seen) == {(0, 0), (64, 0), (64, 1)}


@pytest.mark.parametrize(
    ("life", "names"), [("checkpointing", [NAME]), ("checkpointing_two", [NAME, OTHER])], ids=["one", "two"]
)
def test_a_checkpoint_is_on_all_disks_or_on_none(life: str, names: list[str], deaths: Deaths) -> None:
    fates = {True: 0, False: 0}
    for death in deaths(life):
        with opened(death) as store:
            taken = ["both" in checkpoint_names(store, name) for name in names]
            assert len(set(taken)) == 1, death
            assert taken[0] or "both" not in death.told, death
            fates[taken[0]] += 1
            if taken[0]:
                counts_from_the_checkpoint(store, death)
            is_sound(store, death, names)
    assert min(fates.values()) >= 1


def counts_from_the_checkpoint(store: Store, death: Death) -> None:
    """The image tells which of both blocks that are written after it were."""
    content = (death.folder / "disk.raw").read_bytes()
    later = {block for block in (10, 2000) if content[block * BLOCK :].startswith(b"later")}
    reported = blocks_of(changes(store, NAME, since="both"))
    assert later <= reported <= armed_blocks(store, NAME) | {10, 2000}, death


def test_a_snapshot_dies_with_its_owner_and_leaves_its_checkpoint(deaths: Deaths) -> None:
    fates = {True: 0, False: 0}
    for death in deaths("holding"):
        with opened(death) as store:
            is_there = "held" in checkpoint_names(store, NAME)
            assert is_there or "held" not in death.told, death
            fates[is_there] += 1
            if b"over old data" in (death.folder / IMAGES[NAME]).read_bytes():
                assert 5 in blocks_of(changes(store, NAME, since="held")), death
            is_sound(store, death)
            with Filter.attach(store, NAME, background=False) as disk:
                assert disk.snapshots == (), death
        assert list((death.folder / "scratch").iterdir()) == [], death
    assert min(fates.values()) >= 1


def test_what_is_forgotten_is_merged_or_still_there(deaths: Deaths) -> None:
    states = [["epoch-1", "start", "monday", "tuesday", "wednesday"]]
    for gone in ("tuesday", "wednesday", "epoch-1"):
        states.append([name for name in states[-1] if name != gone])
    seen = []
    for death in deaths("forgetting"):
        with opened(death) as store:
            found = checkpoint_names(store, NAME)
            assert found in states, death
            assert set(death.told).isdisjoint(found), death
            seen.append(states.index(found))
            assert {20, 21, 22} <= blocks_of(changes(store, NAME, since="monday")), death
            is_sound(store, death)
    assert set(seen) == set(range(4))


@pytest.mark.parametrize("life", ["growing", "shrinking"])
def test_a_resize_is_done_or_not(life: str, deaths: Deaths) -> None:
    sizes = set()
    for death in deaths(life):
        image_size = (death.folder / "disk.raw").stat().st_size
        assert not death.told or image_size == int(death.told[0]), death
        sizes.add(image_size)
        with opened(death) as store:
            with Filter.attach(store, NAME, background=False) as disk:
                new = set(range(BLOCKS, disk.disk.geometry.block_count))
                assert new <= blocks_of(disk.changes(since="start")), death
            is_sound(store, death, cut_at=SHRUNK_BLOCKS if life == "shrinking" else BLOCKS)
    assert len(sizes) == 2


def test_what_was_marked_stays_marked(deaths: Deaths) -> None:
    marked = {1, 70, 4999}
    for death in deaths("marking"):
        with opened(death) as store:
            answer = changes(store, NAME, since="start")
            assert {int(word) for word in death.told if word.isdigit()} <= blocks_of(answer), death
            assert blocks_of(answer) <= marked | armed_blocks(store, NAME), death
            if "detached" in death.told:
                assert (blocks_of(answer), trust_of(answer)) == (marked, Trust.EXACT), death
            is_sound(store, death)


def test_a_detach_is_clean_or_a_crash(deaths: Deaths) -> None:
    fates = {Trust.EXACT: 0, Trust.SUPERSET: 0}
    for death in deaths("detaching"):
        with opened(death) as store:
            answer = changes(store, NAME, since="start")
            fates[trust_of(answer)] += 1
            if trust_of(answer) is Trust.EXACT:
                assert blocks_of(answer) == changed_blocks(death.folder / "disk.raw"), death
            else:
                assert not death.told, death
            is_sound(store, death)
    assert min(fates.values()) >= 1


# --- disks that come, go, and are vouched for ---


def test_a_disk_is_added_whole_or_not_at_all(deaths: Deaths) -> None:
    """Everything of it is dirty, so a death costs nothing; adding it again says whether it is there. The file of
    an owner that never was may be left, which is a note of `check` and in nobody's way."""
    fates = {True: 0, False: 0}
    for death in deaths("adding"):
        for name, place in (("third", "store"), ("first", "new store")):
            with closing(Store.create(str(death.folder / place))) as store:
                is_there = is_tracked(store, name)
                fates[is_there] += 1
                assert is_there or name not in death.told, death
                if not is_there:
                    image = str(death.folder / f"{name}.raw")
                    session.add(store, name, image, granularity_bits=MIN_GRANULARITY_BITS)
                assert blocks_of(changes(store, name)) == set(range(BLOCKS)), death
                with Filter.attach(store, name, background=False) as disk:
                    goes_on(disk, death)
                assert {finding.gravity for finding in check_store(store)} <= {Gravity.NOTE}, death
        assert list(death.folder.rglob("*.partial")) == list(death.folder.rglob("lmdb.new-*")) == [], death
    assert min(fates.values()) >= 5


def is_tracked(store: Store, name: str) -> bool:
    with store.read() as reader:
        try:
            chain.find_disk(reader, name)
        except NotFound:
            return False
    return True


def test_an_image_is_vouched_for_or_not(deaths: Deaths) -> None:
    fates = {Trust.SUPERSET: 0, Trust.UNTRUSTED: 0}
    for death in deaths("adopting"):
        with opened(death) as store:
            trust = trust_of(changes(store, NAME, since="start"))
            fates[trust] += 1
            assert trust is Trust.SUPERSET or not death.told, death
            assert session.adopt(store, NAME).size == SIZE + 100 * BLOCK, death
            is_whole(store, NAME, death)
    assert min(fates.values()) >= 1


def test_a_disk_is_where_it_was_or_where_its_image_is_now(deaths: Deaths) -> None:
    fates = {True: 0, False: 0}
    for death in deaths("relocating"):
        with opened(death) as store:
            with store.read() as reader:
                image = chain.find_disk(reader, NAME).image
            has_moved = image == str(death.folder / MOVED)
            fates[has_moved] += 1
            assert has_moved or not death.told, death
            os.rename(death.folder / MOVED, death.folder / IMAGES[NAME])
            session.relocate(store, NAME, str(death.folder / IMAGES[NAME]))
            assert blocks_of(changes(store, NAME, since="start")) == {5}, death
            is_whole(store, NAME, death)
    assert min(fates.values()) >= 1


def test_a_disk_is_removed_or_as_it_was(deaths: Deaths) -> None:
    """The file of its owner may be left, which is a note of `check` and in nobody's way."""
    fates = {True: 0, False: 0}
    for death in deaths("removing"):
        with opened(death) as store:
            is_there = is_tracked(store, NAME)
            fates[is_there] += 1
            assert not (is_there and death.told), death
            if is_there:
                assert blocks_of(changes(store, NAME, since="start")) == {5}, death
                session.remove(store, NAME)
            session.add(store, NAME, str(death.folder / "disk.raw"), granularity_bits=12)
            assert check_store(store) == [], death
    assert min(fates.values()) >= 1


# --- deferred mode ---


@pytest.mark.parametrize("life", ["writing", "detaching"])
def test_deferred_death_is_a_new_epoch_or_was_none(life: str, deaths: Deaths) -> None:
    """From the attach's commit to the detach's nothing is known; before and after, everything."""
    fates = {Trust.EXACT: 0, Trust.UNTRUSTED: 0}
    for death in deaths(life, schema.DEFERRED):
        with opened(death) as store:
            answer = changes(store, NAME, since="start")
            fates[trust_of(answer)] += 1
            changed = changed_blocks(death.folder / "disk.raw")
            assert changed <= blocks_of(answer), death
            with Filter.attach(store, NAME, background=False) as disk:
                if trust_of(answer) is Trust.UNTRUSTED:
                    assert disk.disk.epoch_number == 2, death
                    with pytest.raises(Untrusted):
                        disk.changes(since="start")
                assert changed <= blocks_of(disk.changes()), death
    assert fates[Trust.EXACT] >= 1
    assert fates[Trust.UNTRUSTED] >= 3


# --- and at moments that nobody chose ---
HAMMER = """
import random, sys, threading
from lmdbitmap import filter
from lmdbitmap.store import Store
filter.chores.interval_s = 0.003
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


@pytest.fixture
def quick_tmp_path() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


def test_killed_again_and_again_in_the_middle_of_everything(quick_tmp_path: Path) -> None:
    """Two writers, a checkpointer, beats and passes, and a SIGKILL whenever it comes."""
    tracked = prepare(quick_tmp_path / "1", schema.WRITE_AHEAD)
    tracked.close()
    place = tracked.store.path
    for round_number in range(6):
        with spawn(sys.executable, "-c", HAMMER, place, str(round_number), str(3 * round_number)) as child:
            child.wait_for_line("enough")
            child.process.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
        with closing(Store.open(place)) as store:
            changed = changed_blocks(tracked.image)
            answer = changes(store, NAME, since="start")
            assert trust_of(answer) is Trust.SUPERSET
            assert changed <= blocks_of(answer)
            assert len(changed) > 10
    with closing(Store.open(place)) as store:
        with Filter.attach(store, NAME, background=False) as disk:
            assert disk.disk.epoch_number == 1
            assert changed_blocks(tracked.image) <= blocks_of(disk.changes(since="start"))
        assert {finding.gravity for finding in check_store(store)} <= {Gravity.NOTE}
