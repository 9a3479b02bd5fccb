"""What a store promises: transactions that last, one environment for all, and a clear no to what is none."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import UUID, uuid4

import lmdb
import pytest

from lmdbitmap.errors import Busy, FormatError, LmdbitmapError, NotFound, StorageError
from lmdbitmap.storage import environment, lmdb_errors, lmdb_opening, lmdb_tree, presence, schema, tally
from lmdbitmap.storage.schema import Bitmap, Checkpoint, Disk, StoreHeader
from lmdbitmap.storage.tally import GROUP_REGIONS, Tally
from lmdbitmap.store import Reader, Store, Writer
from lmdbitmap.system import file_systems
from tests.helpers.support import PATIENCE_SECONDS, open_files, run, spawn

MIB = 1 << 20
SMALL_MAP_BYTES = 64 << 10
MDB_MAP_RESIZED = -30785
RECORD = bytes(range(256)) * 2


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def opened(path: str) -> Iterator[Store]:
    with Store.create(path) as opened:
        yield opened


@pytest.fixture
def small_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that a hundred records fill, and that grows in small steps."""
    monkeypatch.setattr(lmdb_opening, "MAP_BYTES", SMALL_MAP_BYTES)
    monkeypatch.setattr(lmdb_opening, "MIN_MAP_BYTES", SMALL_MAP_BYTES)


def a_bitmap(number: int, name: str | None = None) -> Bitmap:
    return Bitmap(number, uuid4(), 64 * MIB, 12, name)


def a_disk(name: str) -> Disk:
    return Disk(
        uuid=uuid4(), name=name, image=f"/{name}.raw", size=MIB, granularity_bits=12, epoch=uuid4(),
        epoch_number=1, epoch_reason="", durability=schema.WRITE_AHEAD, policy=schema.STRICT, created_ns=0,
        next_sequence=1,
    )  # fmt: skip


def a_checkpoint(disk: Disk, sequence: int) -> Checkpoint:
    return Checkpoint(disk.uuid, sequence, f"c{sequence}", uuid4(), 0, disk.epoch, sequence)


def fill(writer: Writer, bitmap_id: int, start: int, stop: int) -> None:
    for region in range(start, stop):
        writer.put_region(bitmap_id, region, 0, RECORD)


def numbers(reader: Reader, bitmap_id: int, start: int = 0, stop: int = 2**63) -> list[int]:
    return [number for number, _ in reader.regions(bitmap_id, start, stop)]


# --- what is in it ---


def test_store_is_there_after_it_was_closed(path: str) -> None:
    with Store.create(path) as first:
        uuid = first.uuid
        first.update(lambda writer: writer.put_bitmap(a_bitmap(1, "kept")))
    with Store.open(path) as second, second.read() as reader:
        assert second.uuid == uuid
        assert [bitmap.name for bitmap in reader.bitmaps()] == ["kept"]


def test_creating_what_is_there_opens_it(path: str, opened: Store) -> None:
    with Store.create(path) as again:
        assert again.uuid == opened.uuid


def test_files_are_for_their_owner_only(path: str, opened: Store) -> None:
    modes = {
        name: os.stat(os.path.join(path, name)).st_mode & 0o777
        for name in ("", "lmdb", "owners", "control", "syncs", "holds")
    }
    assert set(modes.values()) == {0o700}
    for name in os.listdir(os.path.join(path, "lmdb")):
        assert os.stat(os.path.join(path, "lmdb", name)).st_mode & 0o777 == 0o600


def test_no_program_that_is_executed_gets_the_file(path: str, opened: Store) -> None:
    there, found = os.stat(opened.data_path), 0
    for name in os.listdir("/proc/self/fd"):
        try:
            is_of_it = os.path.samestat(os.fstat(int(name)), there)
        except OSError:  # the listing's own
            continue
        if is_of_it:
            found += 1
            assert not os.get_inheritable(int(name))
    assert found


def test_regions_are_told_apart_by_bitmap_and_number(opened: Store) -> None:
    def put(writer: Writer) -> None:
        for bitmap_id in (1, 2, 256):
            for region in (0, 5, 255, 256, 2**40):
                writer.put_region(bitmap_id, region, bitmap_id, RECORD)

    opened.update(put)
    with opened.read() as reader:
        assert numbers(reader, 2) == [0, 5, 255, 256, 2**40]
        assert numbers(reader, 2, 5, 256) == [5, 255]
        assert numbers(reader, 2, 6, 6) == numbers(reader, 3) == []
        assert reader.region(256, 5) == schema.Region(256, RECORD)
        assert reader.region(2, 6) is None
        assert [reader.next_region(2, start) for start in (0, 1, 257, 2**40 + 1)] == [0, 5, 2**40, None]
        begins = [reader.next_group(2, start) for start in (0, 1023, 1024, 2**40 + 1023, 2**40 + 1024)]
        assert begins == [0, 0, 2**40, 2**40, None]
    opened.update(lambda writer: writer.delete_regions(2, 255))
    with opened.read() as reader:
        assert (numbers(reader, 2), len(numbers(reader, 1)), len(numbers(reader, 256))) == ([0, 5], 5, 5)
    for region in (5, 6):
        opened.update(functools.partial(Writer.delete_region, bitmap_id=1, region=region))
    with opened.read() as reader:
        assert (numbers(reader, 1), len(numbers(reader, 256))) == ([0, 255, 256, 2**40], 5)


def test_descriptions_come_back_in_order(opened: Store) -> None:
    disks = [a_disk(name) for name in ("b", "c", "a")]
    points = [a_checkpoint(disks[0], sequence) for sequence in (300, 2, 1)]

    def put(writer: Writer) -> None:
        for disk in disks:
            writer.put_disk(disk)
        for point in points:
            writer.put_checkpoint(point)
        writer.put_bitmap(a_bitmap(1))
        writer.put_bitmap(a_bitmap(2, "named"))

    opened.update(put)
    with opened.read() as reader:
        assert [disk.name for disk in reader.disks()] == ["a", "b", "c"]
        assert reader.disk(disks[1].uuid) == disks[1]
        assert reader.disk(UUID(int=5)) is None
        assert reader.checkpoints(disks[0].uuid) == points[::-1]
        assert reader.checkpoints(disks[1].uuid) == []
        assert [bitmap.id for bitmap in reader.bitmaps()] == [2]
        with pytest.raises(FormatError):
            reader.bitmap(3)


def test_bitmap_numbers_are_never_given_twice(opened: Store) -> None:
    given = [opened.update(lambda writer: writer.new_bitmap_id()) for _ in range(3)]
    opened.update(lambda writer: writer.delete_bitmap(given[-1]))
    assert given == [1, 2, 3]
    assert opened.update(lambda writer: writer.new_bitmap_id()) == 4


# --- transactions ---


def test_change_that_raises_changes_nothing(opened: Store) -> None:
    def put_and_fail(writer: Writer) -> None:
        writer.put_bitmap(a_bitmap(1, "lost"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opened.update(put_and_fail)
    with opened.read() as reader:
        assert reader.bitmaps() == []
    assert opened.update(lambda writer: 7) == 7


def test_reader_keeps_its_view(opened: Store) -> None:
    with opened.read() as before:
        opened.update(lambda writer: writer.put_bitmap(a_bitmap(1, "new")))
        assert before.bitmaps() == []
        with opened.read() as after:
            assert len(after.bitmaps()) == 1


def test_change_is_seen_by_another_process_and_survives_the_death_of_ours(path: str) -> None:
    put_and_die = f"""
import os, signal, uuid
from lmdbitmap.store import Store
from lmdbitmap.storage.schema import Bitmap
store = Store.create({path!r})
store.update(lambda writer: writer.put_bitmap(Bitmap(1, uuid.uuid4(), 512, 9, "durable")))
os.kill(os.getpid(), signal.SIGKILL)
"""
    run(sys.executable, "-c", put_and_die, check=False)
    with Store.open(path) as opened, opened.read() as reader:
        assert [bitmap.name for bitmap in reader.bitmaps()] == ["durable"]


def test_commits_are_synced_and_the_map_is_not_written_through(opened: Store) -> None:
    """No test pulls the plug, so the settings that a power cut would ask for are looked at."""
    durable = {"sync": True, "metasync": True, "writemap": False, "map_async": False, "lock": True}
    assert durable.items() <= opened._environment._lmdb.flags().items()


def test_format_is_not_for_the_environment_to_choose(path: str) -> None:
    create = f"""
from lmdbitmap.store import Store
print(Store.create({path!r})._environment._lmdb.lib_version())
"""
    said = run(sys.executable, "-c", create, env={"LMDB_DEFAULT_LIB_VERSION": "1"}).stdout
    assert said.startswith("(0, 9,")


# --- a map that fills up ---


def test_map_grows_and_the_change_runs_again(path: str, small_map: None) -> None:
    runs: list[int] = []

    def put(writer: Writer) -> int:
        runs.append(1)
        fill(writer, 1, 0, 8000)
        return len(runs)

    with Store.create(path) as opened:
        assert opened.update(put) == len(runs) > 1
        with opened.read() as reader:
            assert numbers(reader, 1) == list(range(8000))


def test_map_grows_while_others_read(path: str, small_map: None) -> None:
    """LMDB wants no transaction open while the map is replaced; none of the readers may notice."""
    done = threading.Event()
    problems: list[Exception] = []
    looks = threading.Semaphore(0)

    def look(opened: Store) -> None:
        while not done.wait(0.001):
            try:
                with opened.read() as reader:
                    found = numbers(reader, 1)
                assert found == list(range(len(found)))
                looks.release()
            except Exception as problem:
                problems.append(problem)
                return

    with Store.create(path) as opened:
        threads = [threading.Thread(target=look, args=(opened,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for start in range(0, 600, 30):
            opened.update(functools.partial(fill, bitmap_id=1, start=start, stop=start + 30))
            if not looks.acquire(timeout=PATIENCE_SECONDS):  # a fast store grows before anybody looks
                break
        done.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        assert problems == []
        with opened.read() as reader:
            assert numbers(reader, 1) == list(range(600))


WRITE_RECORDS = """
import sys
from lmdbitmap.storage import lmdb_opening
from lmdbitmap.store import Store
lmdb_opening.MAP_BYTES = lmdb_opening.MIN_MAP_BYTES = 64 << 10
opened = Store.create(sys.argv[1])
number, count = int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
for start in range(0, count, 50):
    def put(writer):
        for region in range(start, start + 50):
            writer.put_region(number, region, 0, bytes(512))
    opened.update(put)
opened.close()
print("done", flush=True)
"""


def test_two_processes_share_a_store_and_its_growth(path: str, small_map: None) -> None:
    with Store.create(path) as opened:
        command = (sys.executable, "-c", WRITE_RECORDS, path)
        with spawn(*command, "1", "3000") as one, spawn(*command, "2", "3000") as two:
            for child in (one, two):
                child.wait_for_line("ready")
            for start in range(0, 2000, 100):
                opened.update(functools.partial(fill, bitmap_id=3, start=start, stop=start + 100))
            for child in (one, two):
                child.wait_for_line("done")
        with opened.read() as reader:
            assert [len(numbers(reader, bitmap_id)) for bitmap_id in (1, 2, 3)] == [3000, 3000, 2000]


def test_growth_of_another_process_does_not_disturb_readers_of_ours(path: str, small_map: None) -> None:
    """A reader in one thread; the next transaction, in another, finds the map too small for the file."""
    with Store.create(path) as opened:
        opened.update(lambda writer: fill(writer, 3, 0, 100))
        with opened.read() as reader:
            run(sys.executable, "-c", WRITE_RECORDS, path, "1", "4000")
            other = threading.Thread(target=opened.update, args=(lambda writer: fill(writer, 3, 100, 200),))
            other.start()
            other.join(0.05)
            assert numbers(reader, 3) == list(range(100))
        other.join(PATIENCE_SECONDS)
        with opened.read() as reader:
            assert numbers(reader, 3) == list(range(200))
            assert len(numbers(reader, 1)) == 4000


def test_file_that_grows_while_it_is_opened_is_opened_again(
    path: str, small_map: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, between the look at its size and LMDB's own."""
    with Store.create(path) as opened:
        opened.update(lambda writer: fill(writer, 1, 0, 1000))
    really_open, real_size, sizes = lmdb.open, os.path.getsize, []

    def grown_meanwhile(place: bytes, **settings: Any) -> lmdb.Environment:
        sizes.append(settings["map_size"])
        if len(sizes) == 1:
            grown = lmdb.MapResizedError("by intent")
            grown.code = MDB_MAP_RESIZED  # type: ignore[misc]  # as the real one has it
            raise grown
        return really_open(place, **settings)

    monkeypatch.setattr(lmdb, "open", grown_meanwhile)
    monkeypatch.setattr(os.path, "getsize", lambda file: real_size(file) if sizes else 0)
    with Store.open(path) as opened, opened.read() as reader:
        assert len(numbers(reader, 1)) == 1000
    assert len(sizes) == 2
    assert sizes[1] > sizes[0] == SMALL_MAP_BYTES


def test_less_address_space_is_asked_for_where_there_is_less(path: str) -> None:
    limited = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
from lmdbitmap.store import Store
print(Store.create({path!r})._environment._lmdb.info()["map_size"])
"""
    assert 1 << 30 <= int(run(sys.executable, "-c", limited).stdout) < 8 << 30


# --- interruptions ---


class CtrlC:
    """Comes at the given step: where a function of ours begins or ends, or one in C has ended, as signals do."""

    def __init__(self, step: int) -> None:
        self.steps_left = step

    def __call__(self, frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "return", "c_return") and "weakref" not in frame.f_code.co_filename:
            self.steps_left -= 1
            if self.steps_left == 0:
                raise KeyboardInterrupt  # which ends the profiling, too

    def come_in(self, act: Callable[[], object]) -> bool:
        """Whether it came."""
        gc.disable()  # it would come to the finalizer of an earlier test's garbage, which keeps it to itself
        with contextlib.suppress(KeyboardInterrupt):
            sys.setprofile(self)
            try:
                act()
            finally:
                sys.setprofile(None)
                gc.enable()
        return self.steps_left <= 0


def look(opened: Store) -> None:
    with opened.read() as reader:
        reader.transaction  # noqa: B018


@pytest.mark.parametrize("act", [look, lambda opened: opened.update(lambda writer: fill(writer, 1, 0, 1))])
def test_store_that_was_interrupted_anywhere_is_no_less_open_for_others(
    opened: Store, act: Callable[[Store], object]
) -> None:
    """Else the map could not grow any more, or nobody but the interrupted thread could look at the store."""
    step, was_all_of_it = 1, False

    def have_it_alone() -> None:
        with opened._environment._exclusively():
            opened.update(lambda writer: fill(writer, 1, step, step + 1))

    while not was_all_of_it:
        was_all_of_it = not CtrlC(step).come_in(lambda: act(opened))
        other = threading.Thread(target=have_it_alone, daemon=True)
        other.start()
        other.join(PATIENCE_SECONDS)
        assert not other.is_alive(), f"interrupted at step {step}"
        step += 1
    assert step > 50


@pytest.mark.parametrize(("last_steps", "call"), [("HighWater", 1), ("file_of", 2)])
def test_opening_that_was_interrupted_at_its_end_leaves_nothing_open(
    path: str, monkeypatch: pytest.MonkeyPatch, last_steps: str, call: int
) -> None:
    """What is left open would keep this process out of the store for as long as it lives."""
    Store.create(path).close()
    before = len(open_files())
    step, calls = getattr(environment, last_steps), iter(range(1, 9))

    def interrupted(*arguments: object) -> object:
        if next(calls) == call:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(environment, last_steps, interrupted)
    with pytest.raises(KeyboardInterrupt):
        Store.open(path)
    assert len(open_files()) == before
    Store.open(path).close()


# --- one environment per process ---


def test_opened_twice_in_one_process_it_is_one_environment(path: str, opened: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(path)
    with Store.open(path) as second, Store.open(str(tmp_path / "link")) as third:
        assert second._environment is third._environment is opened._environment
        second.close()
        second.close()
        third.update(lambda writer: writer.put_bitmap(a_bitmap(1, "seen")))
    with opened.read() as reader:
        assert len(reader.bitmaps()) == 1


def test_a_store_may_have_any_name_that_a_folder_may_have(tmp_path: Path) -> None:
    """LMDB's binding takes text for UTF-8."""
    place = os.fsdecode(os.fsencode(tmp_path) + b"/st\xf6re")
    Store.create(place).close()
    with Store.open(place) as opened:
        assert opened.path == place


def test_closed_store_refuses(path: str) -> None:
    closed = Store.create(path)
    closed.close()
    calls: list[Callable[[], object]] = [
        lambda: closed.update(lambda writer: None),
        lambda: closed.read().__enter__(),
    ]
    for call in calls:
        with pytest.raises(StorageError) as refused:
            call()
        assert refused.value.errno == errno.EBADF
    with Store.open(path), pytest.raises(StorageError):
        closed.update(lambda writer: None)


def test_store_that_is_closed_at_this_moment_cannot_be_kept_open(path: str, opened: Store) -> None:
    """It would be let go of twice then, and with it the environment of whoever else has opened it."""
    other = Store.open(path)
    using = other._using

    class CloseFirst:
        def __enter__(self) -> None:
            other._using = using
            other.close()
            using.acquire()

        def __exit__(self, *_: object) -> None:
            using.release()

    other._using = CloseFirst()  # type: ignore[assignment]
    with pytest.raises(StorageError, match="it is closed"):
        other.keep_open()
    other.close()
    with opened.read() as reader:
        assert reader.disks() == []


def test_opened_by_many_threads_at_once_it_is_one_environment(path: str) -> None:
    start = threading.Barrier(8)
    found: list[Store] = []

    def open_it() -> None:
        start.wait(PATIENCE_SECONDS)
        found.append(Store.create(path))

    threads = [threading.Thread(target=open_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert len(found) == 8
    [shared] = {opened._environment for opened in found}
    assert shared in environment.open_ones.by_file.values()
    for opened in found:
        opened.close()
    assert shared not in environment.open_ones.by_file.values()  # others of this process may be open


def test_handle_from_before_a_fork_is_dead_and_a_new_one_works(path: str) -> None:
    fork = f"""
import os, warnings
warnings.simplefilter("ignore")
from lmdbitmap.errors import StorageError
from lmdbitmap.store import Store
store = Store.create({path!r})
child = os.fork()
if child == 0:
    try:
        store.update(lambda writer: None)
    except StorageError:
        fresh = Store.open({path!r})
        fresh.update(lambda writer: writer.new_bitmap_id())
        store.close()
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print(store.update(lambda writer: writer.new_bitmap_id()))
"""
    assert run(sys.executable, "-c", fork).stdout == "2\n"


def test_readers_that_died_do_not_hold_their_places(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_opening, "MAX_READERS", 3)
    die_reading = f"""
import os, signal
from lmdbitmap.store import Store
with Store.open({path!r}).read():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with Store.create(path) as opened:
        for _ in range(4):
            assert run(sys.executable, "-c", die_reading, check=False).returncode == -9
        with opened.read() as reader, opened.read():
            assert reader.disks() == []


# --- making one ---


def test_many_processes_that_make_it_at_once_make_one(path: str) -> None:
    make = f"""
import sys
print("ready", flush=True)
sys.stdin.readline()
from lmdbitmap.store import Store
store = Store.create({path!r})
print(store.uuid, flush=True)
"""
    children = [spawn(sys.executable, "-c", make.replace("sys.stdin.readline()", "")) for _ in range(4)]
    with children[0] as a, children[1] as b, children[2] as c, children[3] as d:
        said = {child.wait_for_line(r"^[0-9a-f-]{36}$").group() for child in (a, b, c, d)}
    assert len(said) == 1
    with Store.open(path) as opened:
        assert said == {str(opened.uuid)}


DIE_WHILE_MAKING = """
import os, shutil, signal, sys
import lmdb
from lmdbitmap import store
from lmdbitmap.system import files
name, nth = sys.argv[2], int(sys.argv[3])
place = {"rmtree": shutil, "put_header": store.Writer}.get(name, os)
real, calls = getattr(place, name), [0]
def dying(*args, **kwargs):
    calls[0] += 1
    if calls[0] == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(place, name, dying)
store.Store.create(sys.argv[1])
print("lived")
"""


@pytest.mark.parametrize(
    ("call", "count"), [("mkdir", 4), ("rename", 3), ("fsync", 6), ("put_header", 1), ("rmtree", 1)]
)
def test_making_that_was_killed_is_made_anew_without_cleaning_up(path: str, call: str, count: int) -> None:
    deaths = 0
    for nth in range(1, count + 1):
        folder = f"{path}-{nth}"
        died = run(sys.executable, "-c", DIE_WHILE_MAKING, folder, call, str(nth), check=False)
        assert died.returncode == -9, f"{call} {nth} was never called: {died.stdout}{died.stderr}"
        deaths += 1
        with Store.create(folder) as opened:
            opened.update(lambda writer: writer.put_bitmap(a_bitmap(1)))
    assert deaths == count


def test_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(FormatError) as refused:
        Store.create(str(tmp_path))
    assert "thesis.txt" in str(refused.value)
    assert os.listdir(tmp_path) == ["thesis.txt"]


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LmdbitmapError):
        Store.create(str(tmp_path / "file"))
    with pytest.raises(NotFound):
        Store.open(str(tmp_path / "file"))


@pytest.mark.parametrize("kind", ["nfs", "fuse", "9p"])
def test_network_file_system_is_refused(path: str, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(file_systems, "filesystem_kind", lambda path: kind)
    with pytest.raises(StorageError) as refused:
        Store.create(path)
    assert refused.value.errno == errno.ENOTSUP
    assert kind in str(refused.value)
    monkeypatch.undo()
    Store.create(path).close()


# --- what is no store ---


@pytest.mark.parametrize("there", ["nothing", "a folder", "an empty environment folder"])
def test_what_is_not_there_is_not_found_and_not_made(tmp_path: Path, there: str) -> None:
    folder = tmp_path / "store"
    if there != "nothing":
        (folder / "lmdb" if "environment" in there else folder).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NotFound):
        Store.open(str(folder))
    assert sorted(tmp_path.rglob("*")) == before


def test_environment_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with lmdb.open(str(tmp_path / "store" / "lmdb"), max_dbs=4) as theirs, theirs.begin(write=True) as txn:
        txn.put(b"key", b"value")
    with pytest.raises(FormatError):
        Store.open(str(tmp_path / "store"))


def tamper(path: str, database: str, key: bytes, value: bytes | None) -> None:
    """As damage might, so that everything else is as it was."""
    with lmdb.open(os.path.join(path, "lmdb"), max_dbs=16, create=False) as environment:
        found = environment.open_db(database.encode(), create=False)
        tallies = environment.open_db(b"tallies", create=False)
        with environment.begin(write=True) as txn:
            assert txn.delete(key, db=found) if value is None else txn.put(key, value, db=found)
            stamp = tally.encode(tally.STAMP_KEY, Tally(txn.id()))
            txn.put(tally.STAMP_KEY, stamp, db=tallies)


HEADER = schema.encode(StoreHeader(schema.STORE_MAGIC, UUID(int=1)))
PACKED = HEADER[:-4]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (schema.seal(PACKED.replace(b"\xa6schema\x01", b"\xa6schema\x02")), "schema 1"),
        (schema.seal(PACKED.replace(b"lmdbitmap", b"something")), "lmdbitmap store"),
        (schema.seal(PACKED[:-1]), "map"),
        (schema.seal(b""), "map"),
    ],
)
def test_header_that_somebody_wrote_and_is_not_ours_is_refused(path: str, value: bytes, said: str) -> None:
    Store.create(path).close()
    assert value != HEADER
    tamper(path, "meta", b"store", value)
    for _ in range(2):  # a refused environment is closed again, so the second answer is the same
        with pytest.raises(FormatError) as refused:
            Store.open(path)
        assert said in str(refused.value)


@pytest.mark.parametrize("value", [HEADER[:-1], b"", b"\xff" * 40, None])
def test_damaged_header_has_the_store_made_anew(path: str, value: bytes | None) -> None:
    Store.create(path).close()
    tamper(path, "meta", b"store", value)
    is_made_anew(path, "header")


def is_made_anew(path: str, said: str, caplog: pytest.LogCaptureFixture | None = None) -> None:
    """At the first opening, and kept is what was damaged."""
    damaged = Path(path, "lmdb", "data.mdb").read_bytes()
    for _ in range(2):
        with Store.open(path) as opened, opened.read() as reader:
            assert reader.disks() == []
    [kept] = Path(path).glob("lmdb.damaged-*")
    assert (kept / "data.mdb").read_bytes() == damaged
    assert caplog is None or said in caplog.text


def lose(opened: Store, database: str, key: bytes, value: bytes | None = None) -> None:
    """As damage might while the store is open; None is no record at all."""

    def tamper_with(writer: Writer) -> None:
        found = writer._databases[database]
        assert writer._txn.delete(key, db=found) if value is None else writer._txn.put(key, value, db=found)
        writer.new_bitmap_id()

    opened.update(tamper_with)


def test_damaged_description_is_one_error(path: str, opened: Store) -> None:
    disk = a_disk("sda")
    opened.update(lambda writer: writer.put_disk(disk))
    lose(opened, "disks", disk.uuid.bytes, schema.encode(disk)[:-3])
    with opened.read() as reader:
        with pytest.raises(FormatError) as refused:
            reader.disks()
        assert path in str(refused.value)


def test_damaged_region_is_all_dirty_and_logged(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with Store.create(path) as opened:
        opened.update(lambda writer: fill(writer, 1, 0, 3))
    key = schema.region_key(1, 1)
    tamper(path, "regions", key, b"\0" * 100 + schema.encode_region(key, 0, RECORD)[100:])
    with Store.open(path) as opened, opened.read() as reader:
        assert [region.damaged for _, region in reader.regions(1)] == [False, True, False]
        assert reader.region(1, 1) == schema.Region(0, schema.ALL_DIRTY_BITS, damaged=True)
    assert "region 1 of bitmap 1 is damaged" in caplog.text


# --- what is lost ---

BLOCKS_OF_THREE_GROUPS = 3 * GROUP_REGIONS * 4096
DIRTY = schema.Region(0, schema.ALL_DIRTY_BITS, damaged=True)


@pytest.fixture
def three_groups(path: str) -> str:
    """Bitmap 1, with a few records at the beginning of each of its three groups."""
    with Store.create(path) as opened:
        opened.update(lambda writer: writer.put_bitmap(Bitmap(1, uuid4(), BLOCKS_OF_THREE_GROUPS << 9, 9)))
        for group in range(3):
            start = group * GROUP_REGIONS
            opened.update(functools.partial(fill, bitmap_id=1, start=start, stop=start + 3))
    return path


def middle_key(number: int) -> bytes:
    return schema.region_key(1, GROUP_REGIONS + number)


STALE = schema.encode_region(middle_key(1), 0, schema.ALL_CLEAN_BITS)
TALLY_KEY = tally.region_group_key(schema.bitmap_key(1), 1)
LOSSES: dict[str, list[tuple[str, bytes, bytes | None]]] = {
    "one record": [("regions", middle_key(1), None)],
    "all records of a group": [("regions", middle_key(number), None) for number in range(3)],
    "the newest version of a record": [("regions", middle_key(1), STALE)],
    "the place of a record": [("regions", middle_key(1), None), ("regions", middle_key(7), STALE)],
    "the tally": [("tallies", TALLY_KEY, None)],
    "bytes of the tally": [("tallies", TALLY_KEY, b"\0" * 20)],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_group_that_lost_something_is_dirty_and_the_others_are_what_they_were(
    three_groups: str, loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    for change in LOSSES[loss]:
        tamper(three_groups, *change)
    with Store.open(three_groups) as opened, opened.read() as reader:
        found = dict(reader.regions(1))
        assert {number for number, region in found.items() if region == DIRTY} == {
            *range(GROUP_REGIONS, 2 * GROUP_REGIONS)
        }
        assert len(found) == GROUP_REGIONS + 6
        assert numbers(reader, 1, GROUP_REGIONS + 100, GROUP_REGIONS + 102) == [
            GROUP_REGIONS + 100,
            GROUP_REGIONS + 101,
        ]
        assert reader.next_region(1, 3) == GROUP_REGIONS
    assert "of bitmap 1 were lost" in caplog.text


@pytest.mark.parametrize("loss", LOSSES)
def test_what_was_lost_stays_missed_whatever_is_written_later(three_groups: str, loss: str) -> None:
    for change in LOSSES[loss]:
        tamper(three_groups, *change)
    with Store.open(three_groups) as opened:
        for number in range(5):
            opened.update(
                functools.partial(fill, bitmap_id=1, start=GROUP_REGIONS, stop=GROUP_REGIONS + number)
            )
        with opened.read() as reader:
            assert reader.next_region(1, GROUP_REGIONS + 5) == GROUP_REGIONS + 5
        opened.update(lambda writer: writer.delete_regions(1, GROUP_REGIONS))
        with opened.read() as reader:
            assert numbers(reader, 1) == [0, 1, 2]
        opened.update(lambda writer: fill(writer, 1, GROUP_REGIONS, GROUP_REGIONS + 1))
        with opened.read() as reader:
            assert numbers(reader, 1) == [0, 1, 2, GROUP_REGIONS]


@pytest.mark.parametrize("length", [0, 7, 9, 30])
def test_key_of_another_length_is_a_loss_and_nothing_worse(three_groups: str, length: int) -> None:
    key = (schema.bitmap_key(1) + b"\xff" * 30)[: length + 8] if length else b"\0"
    tamper(three_groups, "regions", key, b"")
    with Store.open(three_groups) as opened, opened.read() as reader:
        found = numbers(reader, 1)
        assert set(found) >= {group * GROUP_REGIONS + number for group in range(3) for number in range(3)}
        assert reader.next_region(1, 2 * GROUP_REGIONS + 3) in (None, 2 * GROUP_REGIONS + 3)


def test_tallies_go_with_what_they_count(three_groups: str) -> None:
    with Store.open(three_groups) as opened:
        with opened.read() as reader:
            assert len(reader.tallies()) == len({"stamp", "meta", "bitmap"}) + 3
        opened.update(lambda writer: writer.delete_regions(1, GROUP_REGIONS + 1))
        with opened.read() as reader:
            assert len(reader.tallies()) == 5
        opened.update(lambda writer: writer.delete_bitmap(1))
        with opened.read() as reader:
            assert set(reader.tallies()) == {tally.STAMP_KEY, tally.group_key("meta", b"")}


def test_lost_description_is_an_error(opened: Store) -> None:
    disk = a_disk("sda")
    points = [a_checkpoint(disk, sequence) for sequence in (1, 2, 3)]

    def put(writer: Writer) -> None:
        writer.put_disk(disk)
        writer.put_bitmap(a_bitmap(1, "one"))
        for point in points:
            writer.put_checkpoint(point)

    opened.update(put)
    lose(opened, "disks", disk.uuid.bytes)
    lose(opened, "checkpoints", schema.checkpoint_key(disk.uuid, 2))
    lose(opened, "bitmaps", schema.bitmap_key(1))
    with opened.read() as reader:
        asks: list[Callable[[], object]] = [
            reader.disks, lambda: reader.disk(disk.uuid), lambda: reader.checkpoints(disk.uuid), reader.bitmaps,
            lambda: reader.bitmap(1),
        ]  # fmt: skip
        for ask in asks:
            with pytest.raises(FormatError) as refused:
                ask()
            assert "it is made anew then" in str(refused.value)


def test_a_disk_is_found_by_its_whole_name_alone(opened: Store) -> None:
    disks = [replace(a_disk(name), image="/images/sda") for name in ("sda2", "sdaa", "sda", "über")]

    def put_and_look(writer: Writer) -> list[Disk | None]:
        for disk in disks:
            writer.put_disk(disk)
        return [writer.disk_named(disk.name) for disk in disks]

    assert opened.update(put_and_look) == disks
    with opened.read() as reader:
        assert [reader.disk_named(disk.name) for disk in disks] == disks
        assert [reader.disk_named(name) for name in ("", "sd", "SDA", "/images/sda", "\udcff")] == [None] * 5


def test_a_disk_that_was_found_is_not_looked_for_among_all_again(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    disks = [a_disk(name) for name in ("sda", "sdb")]
    for one in disks:
        opened.update(functools.partial(Writer.put_disk, disk=one))
    with opened.read() as reader:
        assert [reader.disk_named(one.name) for one in disks] == disks
    with opened.read() as reader, monkeypatch.context() as scans:
        scans.setattr(Reader, "_items", None)
        assert [reader.disk_named(one.name) for one in disks] == disks


def test_a_disk_that_was_found_is_believed_for_its_name_and_not_for_its_place(opened: Store) -> None:
    disk, other = a_disk("sda"), a_disk("sda")
    opened.update(lambda writer: writer.put_disk(disk))
    with opened.read() as reader:
        assert reader.disk_named("sda") == disk
    renamed = replace(disk, name="sdb")
    opened.update(lambda writer: writer.put_disk(renamed))
    with opened.read() as reader:
        assert reader.disk_named("sda") is None
    opened.update(lambda writer: writer.put_disk(other))
    with opened.read() as reader:
        assert [reader.disk_named(name) for name in ("sda", "sdb")] == [other, renamed]
    lose(opened, "disks", other.uuid.bytes)
    with opened.read() as reader, pytest.raises(FormatError):
        reader.disk_named("sda")


def test_a_disk_is_found_beside_a_damaged_one_and_none_is_said_to_be_missing(opened: Store) -> None:
    disk, other = a_disk("sda"), a_disk("sdb")
    for one in (disk, other):
        opened.update(functools.partial(Writer.put_disk, disk=one))
    lose(opened, "disks", other.uuid.bytes)
    with opened.read() as reader:
        assert reader.disk_named("sda") == disk
        for name in ("sdb", "sdc"):
            with pytest.raises(FormatError):
                reader.disk_named(name)


def test_older_description_in_the_place_of_the_newest_is_an_error(opened: Store) -> None:
    disk = a_disk("sda")
    opened.update(lambda writer: writer.put_disk(disk))
    opened.update(lambda writer: writer.put_disk(replace(disk, session=uuid4())))
    lose(opened, "disks", disk.uuid.bytes, schema.encode(disk))
    with opened.read() as reader:
        asks: list[Callable[[], object]] = [reader.disks, lambda: reader.disk_named("sda")]
        for ask in asks:
            with pytest.raises(FormatError):
                ask()


DISK = replace(a_disk("sda"), uuid=UUID(int=1))
"""With a uuid that does not change: it is in the names of tests."""
CHECKPOINT = a_checkpoint(DISK, 1)
BITMAP = Bitmap(1, uuid4(), DISK.size, 12)


@pytest.mark.parametrize(
    ("database", "key", "value"),
    [
        ("disks", DISK.uuid.bytes, None),
        ("disks", DISK.uuid.bytes, schema.encode(DISK)[:-3]),
        ("disks", DISK.uuid.bytes, schema.encode(replace(DISK, name="sdb"))),
        ("disks", bytes(16), schema.encode(DISK)),
        ("checkpoints", schema.checkpoint_key(DISK.uuid, 1), None),
        ("checkpoints", schema.checkpoint_key(DISK.uuid, 2), schema.encode(CHECKPOINT)),
        ("bitmaps", schema.bitmap_key(1), None),
        ("bitmaps", schema.bitmap_key(1), schema.encode(replace(BITMAP, size=512))),
        ("meta", b"next bitmap id", bytes(8)),
        ("tallies", tally.group_key("disks", DISK.uuid.bytes), bytes(20)),
        ("tallies", tally.group_key("bitmaps", schema.bitmap_key(7)), tally.encode(b"b7", Tally(1, 1))),
    ],
)  # fmt: skip
def test_store_that_lost_a_description_is_made_anew(
    path: str, database: str, key: bytes, value: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    with Store.create(path) as opened:

        def put(writer: Writer) -> None:
            writer.new_bitmap_id()
            writer.put_disk(DISK)
            writer.put_checkpoint(CHECKPOINT)
            writer.put_bitmap(BITMAP)

        opened.update(put)
    tamper(path, database, key, value)
    is_made_anew(path, "made anew", caplog)


def test_description_of_a_newer_schema_is_left_alone(path: str) -> None:
    newer = schema.seal(schema.encode(BITMAP)[:-4].replace(b"\xa6schema\x01", b"\xa6schema\x07"))
    with Store.create(path) as opened:
        opened.update(lambda writer: writer._put("bitmaps", schema.bitmap_key(1), newer))
    for _ in range(2):
        with Store.open(path) as opened, opened.read() as reader, pytest.raises(FormatError) as refused:
            reader.bitmaps()
        assert "use the version that wrote this store" in str(refused.value)
    assert list(Path(path).glob("lmdb.damaged-*")) == []


def test_view_whose_stamp_is_another_transactions_has_the_store_made_anew(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a page brings older databases back under a newer meta page."""
    Store.create(path).close()
    tamper(path, "tallies", tally.STAMP_KEY, tally.encode(tally.STAMP_KEY, Tally(1)))
    with (
        lmdb.open(os.path.join(path, "lmdb"), max_dbs=16, create=False) as theirs,
        theirs.begin(write=True) as txn,
    ):
        txn.put(b"not ours", b"x", db=theirs.open_db(b"meta", txn=txn, create=False))
    is_made_anew(path, "stamp", caplog)


def test_store_that_went_back_by_a_transaction_is_all_dirty(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the newest meta page is damaged, which makes LMDB take the one before."""
    with Store.create(path) as opened:
        for number in (1, 2):
            opened.update(functools.partial(Writer.put_bitmap, bitmap=a_bitmap(number, f"b{number}")))
        shutil.copytree(os.path.join(path, "lmdb"), path + "-before")
        opened.update(lambda writer: fill(writer, 1, 0, 1))
    shutil.rmtree(os.path.join(path, "lmdb"))
    os.rename(path + "-before", os.path.join(path, "lmdb"))
    for _ in range(2):
        with Store.open(path) as opened, opened.read() as reader:
            reasons = [str(bitmap.all_dirty) for bitmap in reader.bitmaps()]
            assert ["newest changes were lost" in reason for reason in reasons] == [True, True]
    assert caplog.text.count("newest changes were lost") == 1


@pytest.mark.parametrize("note", [None, b"", b"\xff" * 36])
def test_note_of_the_newest_transaction_is_evidence_and_may_be_missing(path: str, note: bytes | None) -> None:
    with Store.create(path) as opened:
        opened.update(lambda writer: writer.put_bitmap(a_bitmap(1, "known")))
    newest = Path(path, "newest")
    newest.unlink()
    if note is not None:
        newest.write_bytes(note)
    with Store.open(path) as opened, opened.read() as reader:
        assert reader.bitmaps()[0].all_dirty is None


@pytest.mark.parametrize("kept", [0, 1, 4096, 8192, 16384, 0.5, -4096])
def test_file_that_was_cut_has_the_store_made_anew(path: str, kept: float) -> None:
    """Its missing pages are mapped memory without a file behind it: to touch them is SIGBUS."""
    with Store.create(path) as opened:
        opened.update(lambda writer: fill(writer, 1, 0, 500))
    data = os.path.join(path, "lmdb", "data.mdb")
    size = os.path.getsize(data)
    os.truncate(data, int(size * kept) if isinstance(kept, float) else int(kept) % size)
    use_it = f"""
from lmdbitmap.store import Store
store = Store.open({path!r})
with store.read() as reader:
    print(len(list(reader.regions(1))))
store.update(lambda writer: [writer.put_region(1, region, 0, bytes(512)) for region in range(600)])
"""
    assert run(sys.executable, "-c", use_it).stdout == "0\n"
    assert len(list(Path(path).glob("lmdb.damaged-*"))) == 1


def test_meta_page_that_speaks_of_far_more_pages_than_there_are_has_the_store_made_anew(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Filled up it would be a file of gigabytes."""
    Store.create(path).close()
    data = os.path.join(path, "lmdb", "data.mdb")
    size = os.path.getsize(data)
    with open(data, "r+b") as file:
        for page in (0, 1):
            file.seek(page * 4096 + 138)  # bits 16 to 23 of the number of the last page
            file.write(b"\x04")
    is_made_anew(path, f"one of {size}", caplog)


def with_a_long_list_of_free_pages(path: str) -> None:
    """Of so many that the list has pages of its own."""
    with Store.create(path) as opened:
        opened.update(lambda writer: fill(writer, 1, 0, 4000))
        opened.update(lambda writer: fill(writer, 2, 0, 50))
        opened.update(lambda writer: writer.delete_regions(1))
        opened.update(lambda writer: fill(writer, 2, 3, 4))
    assert lmdb_tree.structural_problems(data_of(path)) == []


def data_of(path: str) -> str:
    return os.path.join(path, "lmdb", "data.mdb")


def overwrite(path: str, offset: int, content: bytes) -> None:
    with open(data_of(path), "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize(
    ("place", "content", "said"),
    [
        (0, (9).to_bytes(8, "little"), "stores mp_pgno 9"),
        (10, (2).to_bytes(2, "little"), "not a pure overflow page"),
        (12, (300).to_bytes(4, "little"), "mp_pages 300"),
        (12, (1).to_bytes(4, "little"), "mp_pages 1"),
    ],
    ids=["number", "kind", "too many", "too few"],
)
def test_damaged_list_of_free_pages_has_the_store_made_anew(
    path: str, place: int, content: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """LMDB would give pages that are in use to the next writer, or refuse every change for ever."""
    with_a_long_list_of_free_pages(path)
    data = Path(data_of(path)).read_bytes()
    [page] = [page for page in range(2, len(data) // 4096) if data[4096 * page + 10] == 4]
    overwrite(path, 4096 * page + place, content)
    is_made_anew(path, said, caplog)


def test_record_that_points_to_pages_that_are_not_there_has_the_store_made_anew(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One bit, and LMDB takes the record's bytes for the number of a page: it refuses to read any further."""
    with Store.create(path) as opened:
        opened.update(lambda writer: writer.put_region(1, 1, 1 << 60, RECORD))
    key = schema.region_key(1, 1)
    overwrite(path, Path(data_of(path)).read_bytes().rindex(key) - 4, b"\x01")
    is_made_anew(path, "out of range", caplog)


@pytest.mark.parametrize("flag", [2, 4, 8], ids=["reversed keys", "several values", "numbers"])
def test_database_that_has_a_flag_has_the_store_made_anew(
    path: str, flag: int, caplog: pytest.LogCaptureFixture
) -> None:
    """LMDB would compare keys in another way, or refuse every record for its length."""
    Store.create(path).close()
    overwrite(path, Path(data_of(path)).read_bytes().rindex(b"regions") + 7 + 4, bytes([flag]))
    is_made_anew(path, "a database regions without flags", caplog)


def test_database_of_databases_that_has_a_flag_has_the_store_made_anew(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Store.create(path) as opened, opened.read() as reader:
        newest = 4096 * (reader.transaction % 2)
    overwrite(path, newest + 92, b"\x04")
    is_made_anew(path, "MDB_NOTFOUND", caplog)


def test_database_that_is_called_a_plain_record_has_the_store_made_anew(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    Store.create(path).close()
    overwrite(path, Path(data_of(path)).read_bytes().rindex(b"regions") - 4, b"\0")
    is_made_anew(path, "MDB_INCOMPATIBLE", caplog)


def test_value_that_has_more_pages_than_it_fills_is_sound() -> None:
    """As LMDB leaves it in the list of free pages, and counts it, where a shorter one took a longer one's place."""
    long = "freeDB DB: overflow page 9 header mp_pages 3 != OVPAGES(4100)=2"
    longer = "freeDB DB: overflow page 20 header mp_pages 7 != OVPAGES(9000)=3"
    total = "freeDB DB: walked 5 overflow pages, record says 10"
    assert lmdb_tree.without_long_values([long, total, longer, "else"]) == ["else"]
    assert lmdb_tree.without_long_values([long, "else"]) == [long, "else"]
    assert lmdb_tree.without_long_values([total]) == [total]


# --- refusals of the system ---


def test_want_of_descriptors_is_one_error(path: str) -> None:
    Store.create(path).close()
    poor = f"""
import os, resource
import lmdb.verify
from lmdbitmap.errors import StorageError
from lmdbitmap.store import Store
used = len(os.listdir("/proc/self/fd")) - 1
for room in range(6):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, 4096))
    try:
        Store.open({path!r}).close()
        print("opened")
    except StorageError as error:
        print("raise the limit" in error.next_step or error)
"""
    said = run(sys.executable, "-c", poor).stdout.splitlines()
    assert len(said) == 6
    assert said[0] == "True"
    assert said[-1] == "opened"


def test_store_that_could_not_be_opened_anew_is_opened_anew_once_more(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Ctrl-C comes just then."""
    shared = opened._environment
    opened.update(lambda writer: fill(writer, 1, 0, 1))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shared, "_is_spent", lambda: True)
        patched.setattr(shared, "_open_databases", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shared._open_anew()
    opened.update(lambda writer: fill(writer, 1, 1, 2))
    with opened.read() as reader:
        assert numbers(reader, 1) == [0, 1]


def test_store_that_another_took_the_place_of_is_not_gone_on_with(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where an older copy was put back, or the store made anew by another program, while LMDB gave ours up: a disk
    that is attached would go on in it as in the one that it remembers."""
    with Store.create(path) as opened:
        opened.update(lambda writer: fill(writer, 1, 0, 1))
        run("cp", "-a", os.path.join(path, "lmdb"), os.path.join(path, "lmdb.saved"))
        opened.update(lambda writer: fill(writer, 1, 1, 2))
        os.rename(os.path.join(path, "lmdb"), os.path.join(path, "lmdb.ours"))
        os.rename(os.path.join(path, "lmdb.saved"), os.path.join(path, "lmdb"))
        with monkeypatch.context() as patched:
            patched.setattr(opened._environment, "_is_spent", lambda: True)
            with pytest.raises(StorageError, match="another one took its place"):
                opened._environment._open_anew()
        with pytest.raises(StorageError, match="another one took its place") as refused:
            opened.update(lambda writer: fill(writer, 1, 2, 3))
        assert refused.value.errno == errno.ESTALE
    with Store.open(path) as opened, opened.read() as reader:
        assert numbers(reader, 1) == [0]


def test_store_that_went_back_while_lmdb_gave_it_up_is_not_gone_on_with(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store.create(path) as opened:
        opened.update(lambda writer: fill(writer, 1, 0, 1))
        opened._environment.highwater.set(1000)
        monkeypatch.setattr(opened._environment, "_is_spent", lambda: True)
        with pytest.raises(StorageError, match=r"it went back from transaction 1000 to \d"):
            opened._environment._open_anew()
        with pytest.raises(StorageError, match="it went back"):
            opened.update(lambda writer: fill(writer, 1, 1, 2))


def lmdb_error(kind: type[lmdb.Error], code: int) -> lmdb.Error:
    """As LMDB raises it: with a number of the system's or of its own."""
    error = kind("what LMDB says")
    vars(error)["code"] = code
    return error


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (lmdb_error(lmdb.LockError, errno.EAGAIN), Busy, None),
        (lmdb_error(lmdb.Error, errno.EAGAIN), Busy, None),
        (lmdb_error(lmdb.ReadersFullError, -30790), Busy, None),
        (lmdb_error(lmdb.CorruptedError, -30796), FormatError, None),
        (lmdb_error(lmdb.PanicError, -30795), StorageError, errno.EIO),
        (lmdb_error(lmdb.InvalidError, -30793), FormatError, None),
        (lmdb_error(lmdb.VersionMismatchError, -30794), FormatError, None),
        (lmdb_error(lmdb.ReadonlyError, errno.EACCES), StorageError, errno.EACCES),
        (lmdb_error(lmdb.Error, errno.EROFS), StorageError, errno.EROFS),
        (lmdb_error(lmdb.DiskError, errno.ENOSPC), StorageError, errno.ENOSPC),
        (lmdb_error(lmdb.BadTxnError, -30782), StorageError, errno.EIO),
        (lmdb_error(lmdb.Error, errno.EIO), StorageError, errno.EIO),
    ],
)
def test_refusal_of_lmdb_is_an_error_of_ours(
    opened: Store, error: lmdb.Error, kind: type[LmdbitmapError], code: int | None
) -> None:
    with pytest.raises(kind) as refused, lmdb_errors.translated(opened.path):
        raise error
    assert code is None or getattr(refused.value, "errno", None) == code
    assert refused.value.__cause__ is error


def test_refusal_that_the_binding_hides_in_an_error_of_python_is_one_of_ours(opened: Store) -> None:
    """As `Cursor.delete` does on a damaged page."""
    hidden = SystemError("returned a result with an exception set")
    hidden.__cause__ = lmdb_error(lmdb.CorruptedError, -30796)
    with pytest.raises(FormatError), lmdb_errors.translated(opened.path):
        raise hidden
    with pytest.raises(SystemError), lmdb_errors.translated(opened.path):
        raise SystemError("something else")


def test_damage_that_the_binding_hides_is_looked_for_all_the_same(opened: Store) -> None:
    hidden = SystemError("returned a result with an exception set")
    hidden.__cause__ = lmdb_error(lmdb.BadTxnError, -30782)
    with pytest.raises(StorageError, match="is examined then"), opened.read():
        raise hidden
    assert Path(opened.path, presence.USERS).read_bytes() == bytes([presence.SICK])


def test_short_write_on_a_full_disk_is_called_a_full_disk(
    opened: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_systems, "free_bytes", lambda path: 0)
    with pytest.raises(StorageError) as refused, lmdb_errors.translated(opened.path):
        raise lmdb_error(lmdb.Error, errno.EIO)
    assert refused.value.errno == errno.ENOSPC


def test_folder_that_cannot_be_read_or_written_is_a_sentence(path: str) -> None:
    """As another user, since root may do everything."""
    Store.create(path).close()
    as_nobody = f"""
import os
from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.store import Store
os.setresuid(65534, 65534, 65534)
for attempt in (lambda: Store.open({path!r}), lambda: Store.create({path + "/inside"!r})):
    try:
        attempt()
    except LmdbitmapError as error:
        print(type(error).__name__, error)
"""
    if os.geteuid() != 0:
        os.chmod(path, 0)
        as_nobody = as_nobody.replace("os.setresuid(65534, 65534, 65534)", "")
    lines = run(sys.executable, "-c", as_nobody).stdout.splitlines()
    os.chmod(path, 0o700)
    assert len(lines) == 2
    assert all("; " in line for line in lines)


def test_change_may_list_what_it_has_just_made_or_deleted(opened: Store) -> None:
    def change(writer: Writer) -> list[list[str | None]]:
        seen = []
        for name in ("a", "b", "c"):
            writer.put_bitmap(a_bitmap(writer.new_bitmap_id(), name))
            seen.append([found.name for found in writer.bitmaps()])
        writer.delete_bitmap(writer.bitmaps()[0].id)
        return [*seen, [found.name for found in writer.bitmaps()]]

    assert opened.update(change) == [["a"], ["a", "b"], ["a", "b", "c"], ["b", "c"]]
    with opened.read() as reader:
        assert [found.name for found in reader.bitmaps()] == ["b", "c"]
