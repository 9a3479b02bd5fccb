"""The power is cut in the middle of lives; power_cut/ says how. Here a small sample, and whether the laboratory works.

What the sample proves depends on the disk's model being right, so that is compared with a naive one, with the file
system itself, and with mistakes made on purpose, each of which has to be noticed.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.crash.power_cut.disk_states import (
    SECTOR,
    History,
    Instant,
    all_landed,
    but,
    nothing_landed,
    only,
    scattered,
    torn,
)
from tests.crash.power_cut.lives import LIVES
from tests.crash.power_cut.recording import Naming, Node, Operation, Recording, Resize, Sync, Write, record
from tests.crash.power_cut.strace import NEVER, Blind
from tests.crash.power_cut.torture import EXPLAINED, Outcome, run_trial, unexplained
from tests.helpers.support import requires
from tests.helpers.tracked import quick_folder

SEED = "1"
STATES_PER_LIFE = 10
GROUPS = 4
"""Of lives, each a process: no single test waits for all of them."""
NOTICED_WITHIN = 2000
"""States that it may take to notice a flaw."""
NOTICED_IN = [
    ("commit_after_write", "writing"),
    ("store_not_synced", "passing"),
    ("meta_not_synced", "passing"),
    ("image_not_flushed", "checkpointing"),
    ("image_not_flushed", "backing_up_live"),
    ("distrust_not_synced", "losing_track"),
    ("files_not_synced", "backing_up"),
    ("copies_not_synced", "pruning"),
    ("copies_not_synced", "copying"),
    ("copies_not_synced", "syncing"),
    ("copy_noted_first", "syncing"),
    ("restored_without_sync", "going_back"),
]

pytestmark = [requires("strace", "5.3"), pytest.mark.timeout(240)]


# --- the sample, and the flaws ---


@pytest.fixture(scope="module", params=range(GROUPS))
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """Of one group; all tests about it come one after the other."""
    return run_trial(SEED, STATES_PER_LIFE, list(LIVES)[request.param :: GROUPS])


def test_no_power_cut_of_the_sample_loses_anything(outcome: Outcome) -> None:
    assert outcome.failure is None, outcome.failure
    assert len(outcome.tallies) >= len(LIVES) // GROUPS
    for tally in outcome.tallies:
        assert tally.cases == STATES_PER_LIFE, tally
        assert tally.states >= STATES_PER_LIFE // 2, tally
        assert tally.trust, tally
        if tally.life not in EXPLAINED:  # of those few states are trusted, and the sample may have none
            assert tally.clean_blocks > 0, f"everything dirty is no answer: {tally}"


def test_a_power_cut_costs_no_full_backup_without_need(outcome: Outcome) -> None:
    assert len(outcome.tallies) >= len(LIVES) // GROUPS
    assert unexplained(outcome.tallies) == []


@pytest.mark.parametrize(("flaw", "life"), NOTICED_IN)
def test_the_laboratory_notices(flaw: str, life: str) -> None:
    failure = run_trial(SEED, NOTICED_WITHIN, [life], flaw).failure
    assert failure is not None
    assert f"life {life!r}" in failure
    assert "on the disk:" in failure


# --- the recorder ---


def recorded(program: str, root: Path) -> Recording:
    folder = root / "root"
    folder.mkdir()
    return record([sys.executable, "-S", "-E", "-c", program, str(folder)], folder)


MANY_CALLS = """
import os, sys
root = sys.argv[1] + "/"
os.mkdir(root + "folder")
with open(root + "folder/a", "w+b") as file:
    file.write(b"a" * 5000)
    file.seek(100)
    file.write(b"b" * 10)
    file.flush()
    file.seek(4000)
    file.read(50)
    file.write(b"c" * 3000)
    file.flush()
    os.fsync(file.fileno())
    file.truncate(6000)
fd = os.open(root + "folder/a", os.O_RDWR | os.O_DSYNC)
again = os.dup(fd)
os.pwrite(again, b"d" * 600, 5900)
os.close(fd)
os.pwritev(again, [b"e" * 10, b"f" * 1000], 1000)
os.writev(again, [b"g", b"h" * 9])
os.write(again, b"i" * 3)
os.rename(root + "folder/a", root + "folder/b")
os.pwrite(again, b"j", 9)
os.mkdir(root + "other")
os.rename(root + "folder/b", root + "other/c")
os.close(os.open("gone", os.O_CREAT, dir_fd=os.open(root, os.O_RDONLY)))
os.unlink(root + "gone")
os.truncate(root + "other/c", 6400)
os.rmdir(root + "folder")
"""


def test_the_recorder_sees_what_the_file_system_sees() -> None:
    with quick_folder() as root:
        recording = recorded(MANY_CALLS, root)
        state = Instant(History(recording), NEVER - 1).state(all_landed)
        assert state.folders == ["other"]
        assert list(state.files) == ["other/c"]
        assert state.files["other/c"].data() == (root / "root/other/c").read_bytes()


THREADS = """
import os, sys, threading
fd = os.open(sys.argv[1] + "/file", os.O_RDWR | os.O_CREAT)
def write(number):
    for turn in range(100):
        os.pwrite(fd, bytes([number]) * 512, (turn * 4 + number) * 512)
        os.fdatasync(fd)
threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_the_recorder_follows_threads() -> None:
    with quick_folder() as root:
        recording = recorded(THREADS, root)
        state = Instant(History(recording), NEVER - 1).state(nothing_landed)
        assert sum(isinstance(operation, Write) for operation in recording.operations) == 400
        assert len({operation.thread for operation in recording.operations}) >= 4
        assert state.files == {}  # nobody synced the folder
        state = Instant(History(recording), NEVER - 1).state(only(0))
        assert state.files["file"].data() == (root / "root/file").read_bytes()


@pytest.mark.parametrize(
    "program",
    [
        "import mmap; fd = os.open('f', os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 4096); mmap.mmap(fd, 4096)",
        "open('f', 'wb').write(b'x'); os.copy_file_range(os.open('f', 0), os.open('g', 65), 1)",
        "open('f', 'wb').write(b'x'); os.sendfile(os.open('g', 65), os.open('f', 0), 0, 1)",
        "open('f', 'wb'); os.link('f', 'g')",
        "os.symlink('f', 'g')",
        "os.fork()",
        "os.write(os.open('f', os.O_RDWR | os.O_CREAT | os.O_APPEND), b'x')",
        "os.posix_fallocate(os.open('f', os.O_RDWR | os.O_CREAT), 0, 10)",
    ],
)
def test_the_recorder_is_never_blind_without_saying_so(program: str) -> None:
    with quick_folder() as root, pytest.raises(Blind):
        recorded(f"import os, sys; os.chdir(sys.argv[1]); {program}", root)


# --- the disk's model ---

FOLDER, FILE = Node(0, is_folder=True), Node(1, is_folder=False)


def told(*steps: tuple[object, ...]) -> list[Operation]:
    """Operations one after another: ("write", offset, data), ("synced write", …), ("resize", size), ("sync",)."""
    made: list[Operation] = [Naming(0, 1, 0, ((FOLDER, "file", FILE),)), Sync(2, 3, 0, FOLDER, True)]
    for number, (kind, *facts) in enumerate(steps, 2):
        begin, end = 2 * number, 2 * number + 1
        match kind, *facts:
            case ("write" | "synced write", int(offset), bytes(data)):
                made.append(Write(begin, end, 0, FILE, offset, data, kind == "synced write"))
            case "resize", int(size):
                made.append(Resize(begin, end, 0, FILE, size))
            case "sync", *_:
                made.append(Sync(begin, end, 0, FILE, False))
            case "sync folder", *_:
                made.append(Sync(begin, end, 0, FOLDER, True))
            case _:
                raise AssertionError(kind)
    return made


def history(operations: list[Operation]) -> History:
    return History(Recording("", FOLDER, operations, []))


def naive_states(operations: list[Operation], moment: int, landed: set[int]) -> bytes:
    """The file by brute force: a copy of all of it after each operation."""
    copies, content = [], b""
    for operation in operations:
        if isinstance(operation, Write):
            content = content.ljust(operation.offset, b"\0")
            rest = content[operation.offset + len(operation.data) :]
            content = content[: operation.offset] + operation.data + rest
        elif isinstance(operation, Resize):
            content = content[: operation.size].ljust(operation.size, b"\0")
        copies.append(content)

    def is_there(index: int) -> bool:
        operation = operations[index]
        durable = isinstance(operation, Write) and operation.synced and operation.end <= moment
        later = operations[index + 1 :]
        return (
            index in landed
            or durable
            or any(isinstance(s, Sync) and s.end <= moment for s in later if s[3] is FILE)
        )

    def changed(index: int, sector: int) -> bool:
        operation = operations[index]
        if isinstance(operation, Write):
            return (
                operation.offset // SECTOR <= sector <= (operation.offset + len(operation.data) - 1) // SECTOR
            )
        before = copies[index - 1] if index else b""
        return (
            isinstance(operation, Resize)
            and len(before) > operation.size
            and (sector + 1) * SECTOR > operation.size
        )

    def newest(is_one: object) -> int | None:
        begun = [i for i, op in enumerate(operations) if op.begin <= moment and is_there(i)]
        return max((i for i in begun if is_one(i)), default=None)  # type: ignore[operator]

    sized = newest(
        lambda i: len(copies[i]) != len(copies[i - 1] if i else b"") or isinstance(operations[i], Resize)
    )
    size = 0 if sized is None else len(copies[sized])
    result = b""
    for sector in range(-(-size // SECTOR)):
        index = newest(lambda i, sector=sector: changed(i, sector))
        whole = b"" if index is None else copies[index][sector * SECTOR : (sector + 1) * SECTOR]
        result += whole.ljust(SECTOR, b"\0")
    return result[:size]


OFFSETS = st.integers(0, 4 * SECTOR)
STEPS = st.one_of(
    st.tuples(st.sampled_from(["write", "synced write"]), OFFSETS, st.integers(1, 3 * SECTOR)),
    st.tuples(st.just("resize"), OFFSETS),
    st.tuples(st.just("sync")),
    st.tuples(st.just("sync folder")),
)


@given(st.lists(STEPS, max_size=12), st.integers(0, 40), st.sets(st.integers(0, 14)))
def test_a_state_is_what_a_naive_model_says(
    steps: list[tuple[object, ...]], moment: int, landed: set[int]
) -> None:
    stamped = [
        (kind, facts[0], bytes([number + 1]) * facts[1]) if len(facts) == 2 else (kind, *facts)  # type: ignore[operator]
        for number, (kind, *facts) in enumerate(steps)
    ]
    operations = told(*stamped)
    moment = max(moment, 3)
    state = Instant(history(operations), moment).state(lambda index, place: index in landed)
    assert state.files["file"].data() == naive_states(operations, moment, landed)


def test_what_was_synced_is_there_and_the_rest_may_be() -> None:
    operations = told(
        ("write", 0, b"a" * 1024), ("sync",), ("write", 0, b"b" * 1024), ("write", 512, b"c" * 512)
    )
    instant = Instant(history(operations), 11)
    assert instant.loose == [4, 5]
    states = {
        instant.state(choice).files["file"].data()[::512]
        for choice in (nothing_landed, all_landed, but(4), but(5), only(4), only(5))
    }
    assert states == {b"aa", b"bc", b"ac", b"bb"}
    random_ones = {instant.state(torn(str(n), 0.5)).files["file"].data()[::512] for n in range(50)}
    assert random_ones == {b"aa", b"ab", b"ac", b"ba", b"bb", b"bc"}


def test_a_sync_covers_what_had_returned_before_it_began() -> None:
    operations: list[Operation] = [
        Naming(0, 1, 0, ((FOLDER, "file", FILE),)),
        Sync(2, 3, 0, FOLDER, True),
        Write(4, 8, 1, FILE, 0, b"slow", False),
        Sync(6, 9, 2, FILE, False),
        Sync(10, NEVER, 2, FILE, False),
    ]
    assert Instant(history(operations), 20).loose == [2]
    operations[-1] = Sync(10, 12, 2, FILE, False)
    assert Instant(history(operations), 11).loose == [2]
    assert Instant(history(operations), 12).loose == []


def test_a_rename_is_there_or_not() -> None:
    new = Node(2, is_folder=False)
    operations = told(("write", 0, b"old"), ("sync",))
    operations += [
        Naming(20, 21, 0, ((FOLDER, "new", new),)),
        Write(22, 23, 0, new, 0, b"new", False),
        Sync(24, 25, 0, new, True),
        Naming(26, 27, 0, ((FOLDER, "new", None), (FOLDER, "file", new))),
        Sync(28, 29, 0, FOLDER, True),
    ]
    before, after = Instant(history(operations), 28), Instant(history(operations), 29)
    found = {
        tuple(
            sorted((name, file.data()) for name, file in before.state(scattered(str(n), 0.5)).files.items())
        )
        for n in range(50)
    }
    old, renamed = ("file", b"old"), (("file", b"new"),)
    assert found == {(old,), (old, ("new", b"new")), renamed}
    assert after.state(nothing_landed).files["file"].data() == b"new"


def test_the_same_seed_tears_in_the_same_way() -> None:
    operations = told(*(("write", n * 512, b"x" * 1024) for n in range(20)))
    instant = Instant(history(operations), 60)
    seeds = [str(random.Random(n).random()) for n in range(20)]
    digests = [[instant.state(torn(seed, 0.5)).digest for seed in seeds] for _ in range(2)]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == len(seeds)
