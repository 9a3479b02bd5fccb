"""What LMDB meets outside of a laboratory: forks, second openings, readers that died, maps that cannot grow, other
users, containers, and programs that read its files. docs/store.md has the table: what one sees, and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import lmdb
import pytest

from lmdbitmap.errors import Busy, StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.storage import environment, lmdb_errors, lmdb_opening, schema
from lmdbitmap.store import Store, Writer
from lmdbitmap.upkeep.check import check_store
from tests.crash.full_disk import can_mount
from tests.helpers.support import PATIENCE_SECONDS, run, spawn
from tests.helpers.tracked import NAME, TrackedDisk, blocks_of, trust_of

BLOCK = 4096
BLOCKS = 300
MIB = 1 << 20

as_root = pytest.mark.skipif(os.geteuid() != 0 or not can_mount(), reason="only root can mount")


@pytest.fixture
def tracked(tmp_path: Path) -> Iterator[TrackedDisk]:
    with closing(TrackedDisk(tmp_path, BLOCKS * BLOCK).clean()) as tracked:
        yield tracked


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(str(tmp_path / "store")) as opened:
        yield opened


def fill(writer: Writer, start: int, stop: int, bitmap_id: int = 1) -> None:
    for region in range(start, stop):
        writer.put_region(bitmap_id, region, 0, bytes(512))


def count(store: Store, bitmap_id: int = 1) -> int:
    with store.read() as reader:
        return sum(1 for _ in reader.regions(bitmap_id))


# --- fork ---


def in_a_fork(work: str, before: str = "") -> str:
    """What a process says that runs `before`, forks, runs `work` in the child, and says what was refused there.

    Such a process has to be a fresh one: pytest's own has threads, and children that end as tests do.
    """
    indented = "\n".join(f"        {line}" for line in work.splitlines())
    return f"""
import os, sys, threading, warnings
warnings.simplefilter("ignore")
from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.filter import Filter
from lmdbitmap.store import Store
store = Store.open(sys.argv[1])
{before}
child = os.fork()
if child == 0:
    try:
{indented}
    except LmdbitmapError as error:
        print(type(error).__name__, error, flush=True)
    sys.exit()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


ATTACHED = f"disk = Filter.attach(store, {NAME!r}); disk.pwrite(b'parent', 0); lane = disk.lane()"
WRITES = ["disk.pwrite(b'child', 0)", "lane.pwrite(b'child', 0)", "lane.write_many([(0, memoryview(b'child'))])",
          "disk.lane().pwrite(b'child', 0)", "lane.discard(0, 4096)", "disk.mark(0, 1)"]  # fmt: skip


def test_fork_has_nothing_to_write_with(tracked: TrackedDisk) -> None:
    """Settled blocks too, and through lanes that were there before: nobody would know what the child wrote."""
    take_free_numbers = (
        "taken = [os.open(os.devnull, os.O_RDWR) for _ in range(9)]\n"  # a closed image's among them
    )
    attempts = take_free_numbers + "".join(
        f"try:\n    {write}\nexcept LmdbitmapError as error:\n    print(error, flush=True)\n"
        for write in WRITES
    )
    tracked.store.close()
    script = in_a_fork(attempts, ATTACHED) + "disk.pwrite(b'after', 8 * 4096)\ndisk.detach()\n"
    said = run(sys.executable, "-c", script, tracked.store.path).stdout.splitlines()
    assert len(said) == len(WRITES)
    assert all("attach it in the process that writes" in line for line in said)
    assert tracked.image.read_bytes()[:6] == b"parent"
    tracked.store = Store.open(tracked.store.path)
    assert blocks_of(tracked.changes("start")) == {0, 8}
    assert trust_of(tracked.changes("start")) is Trust.EXACT


ELSE = ["disk.changes()", "disk.checkpoint('c')", "disk.forget('start')", "disk.persist()", "store.read().__enter__()",
        "store.update(lambda writer: None)"]  # fmt: skip


@pytest.mark.parametrize("work", ELSE)
def test_everything_else_is_refused_in_a_fork_as_well(tracked: TrackedDisk, work: str) -> None:
    tracked.store.close()
    script = in_a_fork(work, ATTACHED) + "disk.detach()\n"
    said = run(sys.executable, "-c", script, tracked.store.path).stdout
    assert said.startswith("StorageError")
    assert said.count("\n") == 1


def test_end_of_a_fork_ends_nothing_of_its_parent(tracked: TrackedDisk) -> None:
    """It leaves the blocks of its parent as programs do, and may close what it inherited."""
    tracked.store.close()
    before = f"{ATTACHED}\nreader = store.read(); view = reader.__enter__()"
    work = "disk.detach(); disk.close(); store.close(); print('closed', flush=True)"
    after = """
print(len(view.disks()), store.views())
reader.__exit__(None, None, None)
disk.pwrite(b'x', 8192)
disk.detach()
"""
    said = run(sys.executable, "-c", in_a_fork(work, before) + after, tracked.store.path).stdout
    assert said.splitlines()[0] == "closed"
    assert said.splitlines()[1].startswith("1 [(")  # the view still has its place in the table of readers
    tracked.store = Store.open(tracked.store.path)
    assert blocks_of(tracked.changes("start")) == {0, 2}


SERVED = f"""
{ATTACHED}
import socket
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.nbd.control_client import short_path
from lmdbitmap.nbd.server.server import Server
server = Server({{{NAME!r}: disk}})
server.listen_unix(f"{{store.path}}/nbd.sock")
control = ControlServer({{{NAME!r}: disk}}, server=server)
server.start()
control.start()
paths = [f"{{store.path}}/nbd.sock", store.control_path(disk.disk.uuid)]
guest = NbdDevice.open(server.uris[0])
"""
"""A served disk; its sockets are at `paths`."""


def test_end_of_a_fork_ends_no_server_of_its_parent(tracked: TrackedDisk) -> None:
    tracked.store.close()
    work = "print(server.stop(), control.stop(), flush=True)"
    after = """
guest.pwrite(b"x", 8192)
print(*map(os.path.exists, paths))
guest.close()
print(server.stop(), control.stop())
disk.detach()
"""
    said = run(sys.executable, "-c", in_a_fork(work, SERVED) + after, tracked.store.path).stdout
    assert said.split() == ["True"] * 6
    tracked.store = Store.open(tracked.store.path)
    assert blocks_of(tracked.changes("start")) == {0, 2}


def test_room_for_old_data_is_given_back_although_a_fork_lives(tracked: TrackedDisk) -> None:
    tracked.store.close()
    script = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
from lmdbitmap import Filter, Scratch, Store
store = Store.open(sys.argv[1])
{ATTACHED}
snapshot = disk.snapshot("held", Scratch(store.path))
disk.pwrite(b"x", 0)
(end, goes_on), (ready, is_ready) = os.pipe(), os.pipe()
child = os.fork()
if not child:
    os.close(goes_on)
    os.write(is_ready, b"x")
    os.read(end, 1)
    os._exit(0)
os.read(ready, 1)
assert snapshot.kept_bytes > 0
assert snapshot.pread(6, 0) == b"parent"
snapshot.release()
folder = f"/proc/{{child}}/fd"
print(sum(os.readlink(f"{{folder}}/{{fd}}").endswith("(deleted)") for fd in os.listdir(folder)))
os.close(goes_on)
os.waitpid(child, 0)
disk.detach()
"""
    told = run(sys.executable, "-c", script, tracked.store.path).stdout
    assert told.split() == ["0"]
    tracked.store = Store.open(tracked.store.path)


def test_clients_hear_the_end_although_a_fork_lives(tracked: TrackedDisk) -> None:
    """A guest connects again only once its connection has ended."""
    tracked.store.close()
    script = f"""
import os, sys, warnings
warnings.simplefilter("ignore")
from lmdbitmap import Filter, Store
store = Store.open(sys.argv[1])
{SERVED}
clients = [socket.socket(socket.AF_UNIX) for _ in paths]
for client, path in zip(clients, paths):
    client.settimeout({PATIENCE_SECONDS})
    with short_path(path) as address:
        client.connect(address)
    client.recv(1)
end, goes_on = os.pipe()
child = os.fork()
if not child:
    os.close(goes_on)
    os.read(end, 1)
    os._exit(0)
guest.close()
print(server.stop(), control.stop())
for client in clients:
    while client.recv(1000):
        pass
print("heard", os.waitpid(child, os.WNOHANG)[0])
os.close(goes_on)
os.waitpid(child, 0)
disk.detach()
"""
    told = run(sys.executable, "-c", script, tracked.store.path).stdout
    assert told.split() == ["True", "True", "heard", "0"]
    tracked.store = Store.open(tracked.store.path)


def test_view_that_a_fork_inherits_says_nothing(tracked: TrackedDisk) -> None:
    """It would go on to read pages that its parent gives back."""
    tracked.store.close()
    before = "reader = store.read(); view = reader.__enter__()"
    said = run(sys.executable, "-c", in_a_fork("view.disks()", before), tracked.store.path).stdout
    assert said.startswith("StorageError")


def test_fork_may_open_the_store_anew_unless_it_was_inside_a_view(store: Store) -> None:
    opens = "print(Store.open(sys.argv[1]).update(lambda writer: writer.new_bitmap_id()), flush=True)"
    for before in ("with store.read() as view:\n    view.disks()", "store.update(lambda writer: None)"):
        said = run(sys.executable, "-c", in_a_fork(opens, before), store.path).stdout
        assert said.strip().isdigit()
    inside = in_a_fork(opens, "reader = store.read(); view = reader.__enter__()")
    said = run(sys.executable, "-c", inside + "print(len(store.views()))", store.path).stdout
    assert said.startswith("Busy")
    assert "only where no view of the store is open" in said
    assert said.endswith("\n1\n")


def test_fork_commits_nothing_that_its_parent_began(store: Store) -> None:
    """In the thread that forks, inside a change; and in another one that is in the middle of it."""
    forking = f"""
import os, sys, threading, warnings
warnings.simplefilter("ignore")
from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.store import Store
store = Store.open(sys.argv[1])
def change(writer):
    writer.put_region(1, 0, 0, bytes(512))
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        raise ZeroDivisionError
try:
    store.update(change)
except LmdbitmapError as error:
    os._exit(7)
except ZeroDivisionError:
    pass
entered, leave = threading.Event(), threading.Event()
def other(writer):
    writer.put_region(1, 1, 0, bytes(512))
    entered.set()
    leave.wait({PATIENCE_SECONDS})
thread = threading.Thread(target=store.update, args=(other,))
thread.start()
entered.wait({PATIENCE_SECONDS})
child = os.fork()
if child == 0:
    sys.exit()
os.waitpid(child, 0)
with store.read() as reader:
    print(len(list(reader.regions(1))))
leave.set()
thread.join()
with store.read() as reader:
    print(len(list(reader.regions(1))))
"""
    assert run(sys.executable, "-c", forking, store.path).stdout.split() == ["0", "1"]


def test_disk_is_free_when_its_owner_died_although_a_fork_lives(tracked: TrackedDisk) -> None:
    tracked.store.close()
    script = f"""
import os, signal, sys, time
from lmdbitmap.filter import Filter
from lmdbitmap.store import Store
store = Store.open(sys.argv[1])
disk = Filter.attach(store, {NAME!r})
if os.fork():
    os.kill(os.getpid(), signal.SIGKILL)
print("alone", os.getpid(), flush=True)
time.sleep({PATIENCE_SECONDS})
"""
    with spawn(sys.executable, "-c", script, tracked.store.path) as child:
        fork = int(child.wait_for_line(r"alone (\d+)").group(1))
        try:
            child.process.wait(PATIENCE_SECONDS)
            with Store.open(tracked.store.path) as opened, Filter.attach(opened, NAME) as disk:
                disk.pwrite(b"x", 0)
        finally:
            os.kill(fork, 9)
    tracked.store = Store.open(tracked.store.path)


def test_disk_and_repository_are_free_after_a_backup_although_a_fork_lives(tracked: TrackedDisk) -> None:
    """Another thread of an agent may start a worker at any moment of a backup."""
    tracked.store.close()
    script = f"""
import os, sys
from lmdbitmap import Filter, Store, back_up
store = Store.open(sys.argv[1])
forks, (end, goes_on) = [], os.pipe()
def fork_once(done, total):
    if not forks:
        forks.append(os.fork())
        if not forks[0]:
            os.close(goes_on)
            os.read(end, 1)
            os._exit(0)
back_up(store, [{NAME!r}], sys.argv[2], progress=fork_once)
with Filter.attach(store, {NAME!r}) as disk:
    disk.pwrite(b"x", 0)
print(back_up(store, [{NAME!r}], sys.argv[2])[0].entry.type_actual.value)
print(os.waitpid(forks[0], os.WNOHANG)[0])
os.close(goes_on)
os.waitpid(forks[0], 0)
"""
    told = run(sys.executable, "-c", script, tracked.store.path, str(tracked.folder / "backups")).stdout
    assert told.split() == ["incremental", "0"]
    tracked.store = Store.open(tracked.store.path)


def _double(number: int) -> int:
    return 2 * number


def test_multiprocessing_by_fork_does_not_disturb_its_parent(tracked: TrackedDisk) -> None:
    with tracked.attach() as disk:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for block in range(20):
                disk.pwrite(b"x", block * BLOCK)
                assert pool.map(_double, [block]) == [2 * block]
        disk.checkpoint("after")
    assert blocks_of(tracked.changes("start", "after")) == set(range(20))


# --- opened twice ---


def test_store_under_several_names_is_one_environment(store: Store, tmp_path: Path) -> None:
    linked = tmp_path / "linked" / "lmdb"
    linked.mkdir(parents=True)
    for name in ("data.mdb", "lock.mdb"):
        os.link(os.path.join(store.path, "lmdb", name), linked / name)
    with Store.open(str(tmp_path / "linked")) as second:
        second.update(lambda writer: fill(writer, 0, 3))
    assert count(store) == 3


@as_root
def test_store_under_a_bind_mount_is_one_environment(store: Store, tmp_path: Path) -> None:
    with bind_mount(store.path, tmp_path / "mounted"), Store.open(str(tmp_path / "mounted")) as second:
        second.update(lambda writer: fill(writer, 0, 3))
    assert count(store) == 3


def test_environment_that_another_library_of_this_process_has_open_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    Store.create(path).close()
    with lmdb.open(os.path.join(path, "lmdb"), max_dbs=16) as theirs:
        with pytest.raises(Busy) as refused:
            Store.open(path)
        assert "outside of lmdbitmap" in str(refused.value)
        with theirs.begin() as view:
            other = f"import sys; from lmdbitmap.store import Store; Store.open({path!r})"
            run(sys.executable, "-c", other)
            assert view.stat()["entries"] == len(environment.DATABASES)
        assert len(theirs.readers().splitlines()) > 1, "its locks were dropped, and its place taken away"
    Store.open(path).close()


# --- readers that died, and readers that live too long ---

DIE_READING = """
import os, signal, sys
from lmdbitmap.store import Store
with Store.open(sys.argv[1]).read():
    print("reading", flush=True)
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


def test_reader_that_died_does_not_make_the_file_grow_for_ever(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.update(lambda writer: fill(writer, 0, 200))
    run(sys.executable, "-c", DIE_READING, store.path, "SIGKILL", check=False)
    monkeypatch.setattr(environment, "HOUSEKEEPING_S", 0.0)
    sizes = []
    for _ in range(60):
        store.update(lambda writer: fill(writer, 0, 200))
        sizes.append(os.path.getsize(os.path.join(store.path, "lmdb", "data.mdb")))
    assert len(set(sizes[10:])) == 1


def test_check_names_a_view_that_lives_too_long(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmdbitmap.upkeep.check._OLD_VIEW_TRANSACTIONS", 5)
    with spawn(sys.executable, "-c", DIE_READING, store.path, "SIGSTOP") as child:
        child.wait_for_line("reading")
        for number in range(7):
            store.update(functools.partial(fill, start=number, stop=number + 1))
        findings = [found for found in check_store(store) if "transactions ago" in found.problem]
        child.process.kill()
    assert [found.place for found in findings] == [f"process {child.pid}"]
    assert "7 transactions ago" in findings[0].problem


# --- a map that cannot grow ---

LIMITED = """
import resource, sys
from lmdbitmap.storage import lmdb_opening
lmdb_opening.MAP_BYTES = lmdb_opening.MIN_MAP_BYTES = 64 << 10
from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.store import Store
def fill(writer, count):
    for region in range(count):
        writer.put_region(1, region, 0, bytes(512))
def try_to_fill(store):
    try:
        store.update(lambda writer: fill(writer, 20000))
        print("filled", flush=True)
    except LmdbitmapError as error:
        print(error, flush=True)
"""


def test_map_that_cannot_grow_is_one_error_and_the_store_goes_on(tmp_path: Path) -> None:
    script = f"""{LIMITED}
store = Store.create(sys.argv[1])
store.update(lambda writer: fill(writer, 10))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for _ in range(2):
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), resource.RLIM_INFINITY))
    try_to_fill(store)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with store.read() as reader:  # what the map took of that room may be missing to Python
        print(len(list(reader.regions(1))), flush=True)
try_to_fill(store)
"""
    said = run(sys.executable, "-c", script, tmp_path / "store").stdout.splitlines()
    assert [line.isdigit() for line in said] == [False, True, False, True, False]
    for refusal in (said[0], said[2]):
        assert "Cannot allocate memory" in refusal
        assert "ulimit -v" in refusal
    assert (said[1], said[3], said[4]) == ("10", "10", "filled")


def test_change_inside_a_view_that_needs_a_larger_map_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_opening, "MAP_BYTES", 64 << 10)
    monkeypatch.setattr(lmdb_opening, "MIN_MAP_BYTES", 64 << 10)
    with Store.create(str(tmp_path / "store")) as opened:
        with opened.read(), pytest.raises(StorageError) as refused:
            opened.update(lambda writer: fill(writer, 0, 1000))
        assert refused.value.errno == errno.EDEADLK
        assert "leave the view, and change the store then" in str(refused.value)
        opened.update(lambda writer: fill(writer, 0, 1000))
        assert count(opened) == 1000


def test_change_inside_a_change_is_one_error(store: Store) -> None:
    with pytest.raises(StorageError):
        store.update(lambda writer: store.update(lambda inner: fill(inner, 0, 1)))
    store.update(lambda writer: fill(writer, 0, 1))
    assert count(store) == 1


# --- another user, another mount ---

VERBS = ("ls", f"info {NAME}", f"changes {NAME}", "check")


def lmdbitmap_as(user: int, store: str, verb: str, warm_up: str = "") -> subprocess.CompletedProcess[str]:
    """The command line as another user, in a process that has imported what he may not even read."""
    script = f"""
import contextlib, io, os, sys
from lmdbitmap.cli.main import run
with contextlib.redirect_stdout(io.StringIO()):
    assert run(["--store", {warm_up or store!r}, *{verb.split()}]) == 0
os.setresuid({user}, {user}, {user})
sys.exit(run(["--store", {store!r}, *{verb.split()}]))
"""
    return run(sys.executable, "-c", script, check=False)


@as_root
@pytest.mark.parametrize("verb", VERBS)
def test_user_who_may_not_write_the_store_is_told_so(tracked: TrackedDisk, verb: str) -> None:
    for folder, _, names in os.walk(tracked.folder):
        os.chmod(folder, 0o755)
        for name in names:
            os.chmod(os.path.join(folder, name), 0o644)
    for parent in (*tracked.folder.parents,):
        if parent.stat().st_mode & 0o001 == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    refused = lmdbitmap_as(65534, tracked.store.path, verb)
    assert refused.returncode == 1, refused.stdout
    assert "Permission denied" in refused.stderr
    assert refused.stderr.count("\n") == 1


@as_root
@pytest.mark.parametrize("verb", VERBS)
def test_user_who_may_not_even_look_is_told_so(tracked: TrackedDisk, verb: str) -> None:
    refused = lmdbitmap_as(65534, tracked.store.path, verb)
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr


@as_root
@pytest.mark.parametrize("verb", VERBS)
def test_store_on_a_read_only_mount_is_refused(tracked: TrackedDisk, tmp_path: Path, verb: str) -> None:
    with bind_mount(tracked.store.path, tmp_path / "mounted", read_only=True):
        refused = lmdbitmap_as(0, str(tmp_path / "mounted"), verb, warm_up=tracked.store.path)
    assert refused.returncode == 1
    assert "Read-only file system" in refused.stderr
    assert "remount it for writing" in refused.stderr


@contextlib.contextmanager
def bind_mount(source: str, target: Path, *, read_only: bool = False) -> Iterator[None]:
    target.mkdir()
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)


# --- containers ---


@as_root
def test_process_of_the_same_number_in_another_container_is_busy_and_says_why(store: Store) -> None:
    path = store.path
    store.close()
    hold = f"""
import os, signal, time
from lmdbitmap.store import Store
Store.open({path!r})
print("holding as", os.getpid(), flush=True)
time.sleep({PATIENCE_SECONDS})
"""
    ask = f"""
import os
from lmdbitmap.errors import Busy
from lmdbitmap.store import Store
try:
    Store.open({path!r})
except Busy as error:
    print(os.getpid(), error)
"""
    contained = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    with spawn(*contained, sys.executable, "-c", hold) as child:
        child.wait_for_line("holding as 1")
        said = run(*contained, sys.executable, "-c", ask).stdout
        child.process.kill()
    assert said.startswith("1 ")
    assert "in another container" in said
    Store.open(path).close()


# --- a program that reads the store's files ---


def test_lmdb_alone_gives_a_view_away_when_its_lock_file_is_read(tmp_path: Path) -> None:
    """What the tests below defend against, so that they do not defend against nothing."""
    second = f"import lmdb; lmdb.open({str(tmp_path)!r}, lock=True).begin(write=True).commit()"
    with lmdb.open(str(tmp_path)) as environment, environment.begin():
        run(sys.executable, "-c", second)
        assert "no active" not in environment.readers()
        (tmp_path / "lock.mdb").read_bytes()
        run(sys.executable, "-c", second)
        assert "no active" in environment.readers()


HASH_AND_STAY = """
import pathlib, sys, time
from lmdbitmap.storage import environment
environment.LOCK_LOOK_S = 0.0
from lmdbitmap.store import Store
store = Store.open(sys.argv[1])
with store.read() as view:
    for file in pathlib.Path(sys.argv[1], "lmdb").iterdir():
        file.read_bytes()
    print("read", flush=True)
    sys.stdin.readline()
    print(store.views(), flush=True)
store.keep_house()
print("mended", flush=True)
sys.stdin.readline()
"""


def test_store_whose_user_lost_lmdbs_locks_is_not_opened_until_they_are_mended(store: Store) -> None:
    path = store.path
    store.close()
    command = [sys.executable, "-c", HASH_AND_STAY, path]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "read\n"
        with pytest.raises(Busy) as refused:
            Store.open(path)
        assert f"process {child.pid}" in str(refused.value)
        assert "restart that program" in str(refused.value)
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == f"[({child.pid}, 0)]\n"
        assert child.stdout.readline() == "mended\n"
        with Store.open(path) as opened:
            opened.update(lambda writer: fill(writer, 0, 1))
        child.stdin.close()
        assert "closed lmdb/lock.mdb" in child.stderr.read()


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "LOCK_LOOK_S", 0.0)


@pytest.mark.usefixtures("looks_at_once")
def test_write_mends_lost_locks_and_says_so(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    for round_number in range(2):
        Path(store.path, "lmdb", "lock.mdb").read_bytes()
        store.update(lambda writer: fill(writer, 0, 1))
        store.update(lambda writer: fill(writer, 0, 1))
        assert caplog.text.count("closed lmdb/lock.mdb") == round_number + 1


@pytest.mark.usefixtures("looks_at_once")
def test_background_pass_of_an_idle_disk_mends_lost_locks(
    tracked: TrackedDisk, caplog: pytest.LogCaptureFixture
) -> None:
    with tracked.attach() as disk:
        Path(tracked.store.path, "lmdb", "lock.mdb").read_bytes()
        disk.background_pass()
        assert "closed lmdb/lock.mdb" in caplog.text


STAY = """
import sys, time
from lmdbitmap.store import Store
with Store.open(sys.argv[1]):
    print("open", flush=True)
    time.sleep(600)
"""


def test_store_whose_lock_file_was_removed_is_opened_once_its_users_are_gone(store: Store) -> None:
    """A second lock file would let two processes write at once, and one would lose what it had committed."""
    path = store.path
    store.close()
    with spawn(sys.executable, "-c", STAY, path) as child:
        child.wait_for_line("open")
        Path(path, "lmdb", "lock.mdb").unlink()
        with pytest.raises(Busy) as refused:
            Store.open(path)
        assert f"process {child.pid}" in str(refused.value)
        assert "lock.mdb was removed" in str(refused.value)
        assert not Path(path, "lmdb", "lock.mdb").exists()
    with Store.open(path) as opened:
        opened.update(lambda writer: fill(writer, 0, 1))


# --- what LMDB says no to ---


def test_transaction_that_is_too_large_is_told_as_that() -> None:
    error = lmdb.TxnFullError("what LMDB says")
    vars(error)["code"] = -30788
    refused = lmdb_errors.our_error("store", error)
    assert isinstance(refused, StorageError)
    assert "change less at once" in str(refused)


def test_keys_and_records_are_short_enough_for_either_engine() -> None:
    """511 bytes is what LMDB 0.9 takes for a key; a record longer than half a page would want pages of its own."""
    longest = [schema.region_key(2**64 - 1, 2**64 - 1), schema.bitmap_key(2**64 - 1)]
    assert max(map(len, longest)) <= 511
    assert schema.REGION_RECORD_BYTES < 2000
