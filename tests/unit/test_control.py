"""The control socket: what an owner does for others, whom it listens to, and what a bad caller costs."""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest

from lmdbitmap import export
from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    OwnerGone,
    StorageError,
)
from lmdbitmap.filter import Filter
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd import control_wire as wire
from lmdbitmap.nbd.control import control
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import chain, session
from tests.helpers import naive_flat
from tests.helpers.listening import lack_memory_to_listen
from tests.helpers.support import PATIENCE_SECONDS, make_raw_image, open_files, run, spawn
from tests.helpers.tracked import blocks_of, quick_folder

SIZE = 100 * 4096
NAMES = ("sda", "sdb")
T = TypeVar("T")


class House:
    """Two disks of one store, attached here, and a control server for them."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.stack = ExitStack()
        self.store = self.stack.enter_context(Store.create(str(folder / "store")))
        self.filters: dict[str, Filter] = {}
        for name in NAMES:
            image = make_raw_image(folder / f"{name}.raw", SIZE)
            session.add(self.store, name, str(image), granularity_bits=12)
            attached = Filter.attach(self.store, name, background=False)
            self.filters[name] = self.stack.enter_context(attached)
            attached.checkpoint("start")
        self.server = self.stack.enter_context(ControlServer(self.filters, **options))

    def path(self, name: str = "sda") -> str:
        return self.store.control_path(self.filters[name].disk.uuid)

    def call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        return control_client.call(self.path(), operation, **arguments)

    def stored_blocks(self, name: str) -> set[int]:
        return blocks_of(self.filters[name].changes())

    def checkpoints(self, name: str) -> list[str]:
        with self.store.read() as reader:
            chain_of = reader.checkpoints(chain.find_disk(reader, name).uuid)
        return [checkpoint.name for checkpoint in chain_of][1:]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: these tests commit often."""
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path)
    with house.stack:
        yield house


@contextmanager
def connected(path: str) -> Iterator[socket.socket]:
    """A caller of our own making, past the hello."""
    with socket.socket(socket.AF_UNIX) as sock, control_client.short_path(path) as address:
        sock.settimeout(PATIENCE_SECONDS)
        sock.connect(address)
        assert b'"protocol"' in sock.recv(65536)
        yield sock


def line_from(sock: socket.socket) -> dict[str, Any]:
    with sock.makefile("rb") as file:
        message: dict[str, Any] = json.loads(file.readline())
        return message


# --- what can be asked ---


def test_hello_says_who_owns_what(house: House) -> None:
    for name in NAMES:
        client = control_client.reach(house.path(name))
        assert client is not None
        with client:
            assert (client.pid, client.disks) == (os.getpid(), list(NAMES))


def test_mark_is_durable_when_it_is_answered(house: House) -> None:
    assert house.call("mark", disk="sdb", offset=4096, length=4097) == {}
    assert house.stored_blocks("sdb") == {1, 2}
    assert house.stored_blocks("sda") == set()


def test_persist_writes_down_what_only_memory_knows(house: House) -> None:
    house.filters["sda"].pwrite(b"x", 0)
    assert house.filters["sda"].armed_count == 1
    house.call("persist", disk="sda")
    assert house.filters["sda"].armed_count == 0


def test_checkpoint_is_made_on_all_disks_at_once(house: House) -> None:
    house.filters["sda"].pwrite(b"x", 0)
    answer = house.call("checkpoint", disks=["sda", "sdb"], name="monday")
    assert [made["disk"] for made in answer["checkpoints"]] == ["sda", "sdb"]
    assert len({made["time_ns"] for made in answer["checkpoints"]}) == 1
    assert house.checkpoints("sda") == house.checkpoints("sdb") == ["start", "monday"]
    assert house.stored_blocks("sda") == set()


@pytest.mark.parametrize(
    ("disks", "refusal"),
    [
        (["sda", "sdc"], Busy),
        (["sda", "sda"], InvalidArgument),
        ([], InvalidArgument),
        (["sda", 5], Busy),
        ([["sda"]], Busy),
    ],
)
def test_checkpoint_is_refused_for_disks_that_are_not_all_here(
    house: House, disks: list[Any], refusal: type[LmdbitmapError]
) -> None:
    with pytest.raises(refusal):
        house.call("checkpoint", disks=disks, name="monday")
    assert house.checkpoints("sda") == ["start"]


def test_checkpoint_that_one_disk_refuses_is_made_on_none(house: House) -> None:
    house.filters["sdb"].checkpoint("monday")
    with pytest.raises(AlreadyExists, match="monday"):
        house.call("checkpoint", disks=["sda", "sdb"], name="monday")
    assert house.checkpoints("sda") == ["start"]


def test_forget_merges_into_the_checkpoint_before(house: House) -> None:
    house.filters["sda"].checkpoint("monday")
    house.filters["sda"].pwrite(b"x", 0)
    house.call("forget", disk="sda", checkpoint="monday")
    assert house.checkpoints("sda") == ["start"]
    assert house.stored_blocks("sda") == {0}


def test_resize_answers_the_new_size(house: House) -> None:
    assert house.call("resize", disk="sda", size=SIZE + 4096) == {"size": SIZE + 4096}
    assert house.stored_blocks("sda") == {100}


def test_merge_takes_a_bitmap_of_the_store_into_the_open_period(house: House, tmp_path: Path) -> None:
    path = tmp_path / "x.dbm"
    path.write_bytes(naive_flat.write({3, 99}, SIZE, 12))
    export.import_file(house.store, path, "copy")
    house.call("merge", disk="sda", bitmap="copy")
    assert house.stored_blocks("sda") == {3, 99}


def test_an_import_into_a_served_disk_goes_through_its_owner(house: House, tmp_path: Path) -> None:
    path = tmp_path / "x.dbm"
    path.write_bytes(naive_flat.write({3, 99}, SIZE, 12))
    export.import_file(house.store, path, "copy", into="sdb")
    assert house.stored_blocks("sdb") == {3, 99}
    path.write_bytes(naive_flat.write({4}, SIZE, 12))
    with pytest.raises(AlreadyExists):
        export.import_file(house.store, path, "copy", into="sdb")
    assert house.stored_blocks("sdb") == {3, 99}


def test_info_describes_every_disk(house: House) -> None:
    house.filters["sda"].pwrite(b"x", 0)
    sda, sdb = house.call("info")["disks"]
    assert (sda["name"], sda["size"], sda["granularity"], sda["armed"]) == ("sda", SIZE, 4096, 1)
    assert (sda["trust"], sda["recording_since"], sdb["armed"]) == ("exact", "start", 0)
    assert sda["session"] == str(house.filters["sda"].disk.session)
    with house.store.read() as reader:
        newest = chain.current_checkpoint(reader, house.filters["sda"].disk)
    assert sda["recording_since_ns"] == newest.time_ns
    assert "served" not in sda  # nobody watches


def test_info_describes_each_of_some_disks_once(house: House) -> None:
    some = house.call("info", disks=["sdb", "sdb", "sdx", 5, ["sda"]])["disks"]
    assert [disk["name"] for disk in some] == ["sdb"]
    assert house.call("info", disks=[]) == {"disks": []}


def test_one_connection_serves_many_requests(house: House) -> None:
    client = control_client.reach(house.path())
    assert client is not None
    with client:
        for block in range(3):
            client.call("mark", disk="sda", offset=block * 4096, length=1)
        with pytest.raises(NotFound):
            client.call("mark", disk="sdz", offset=0, length=1)
        client.call("persist", disk="sda")
    assert house.stored_blocks("sda") == {0, 1, 2}


# --- refusals, in their own words ---


FORKING = """
import os, signal, sys
from lmdbitmap.nbd import control_client
client = control_client.reach(sys.argv[1])
told, tell = os.pipe()
child = os.fork()
if child == 0:
    os.close(tell)
    os.read(told, 1)
    os._exit(0)
client.close()
print("closed", flush=True)
signal.pause()
"""


def test_a_forked_child_keeps_no_caller_at_its_owner(tmp_path: Path) -> None:
    """What is bound to the caller, as the snapshots of a backup, would be held for as long as the child lives."""
    house = House(tmp_path, patience_s=2 * PATIENCE_SECONDS)
    with house.stack, spawn(sys.executable, "-c", FORKING, house.path()) as parent:
        parent.wait_for_line("closed")
        await_room(house)


def test_errors_of_the_owner_are_raised_by_the_caller(house: House) -> None:
    with pytest.raises(NotFound) as missing:
        house.call("forget", disk="sda", checkpoint="friday")
    with pytest.raises(NotFound) as missing_here:
        house.filters["sda"].forget("friday")
    assert str(missing.value) == str(missing_here.value)
    with pytest.raises(InvalidArgument, match="not on a disk"):
        house.call("mark", disk="sda", offset=SIZE, length=1)


@pytest.mark.parametrize(
    ("operation", "arguments", "refusal"),
    [
        ("stop", {}, InvalidArgument),
        ("__class__", {}, InvalidArgument),
        ("mark", {"disk": "sda", "offset": 0}, FormatError),
        ("mark", {"disk": "sda", "offset": 0, "length": 1, "more": 1}, FormatError),
        ("mark", {"disk": "sda", "offset": "0", "length": 1}, FormatError),
        ("mark", {"disk": "sda", "offset": True, "length": 1}, FormatError),
        ("mark", {"disk": "sda", "offset": 0.0, "length": 1}, FormatError),
        ("mark", {"disk": "sda", "offset": 10**4000, "length": 1}, FormatError),
        ("mark", {"disk": "sda", "offset": -1, "length": 1}, InvalidArgument),
        ("mark", {"disk": "sdz", "offset": 0, "length": 1}, NotFound),
        ("checkpoint", {"disks": "sda", "name": "monday"}, FormatError),
        ("checkpoint", {"disks": ["sda"], "name": "\ud800"}, InvalidArgument),
        ("checkpoint", {"disks": ["sda"], "name": ""}, InvalidArgument),
        ("resize", {"disk": "sda", "size": -1}, InvalidArgument),
        ("resize", {"disk": "sda", "size": 2**64 - 1}, InvalidArgument),
        ("merge", {"disk": "sda", "bitmap": "nobody"}, NotFound),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    house: House, operation: str, arguments: dict[str, Any], refusal: type[LmdbitmapError]
) -> None:
    with pytest.raises(refusal):
        house.call(operation, **arguments)
    assert house.checkpoints("sda") == ["start"]
    assert house.stored_blocks("sda") == set()
    assert house.filters["sda"].size == SIZE


# --- who listens, and where ---


def test_nobody_listens_where_no_owner_is(tmp_path: Path) -> None:
    assert control_client.reach(str(tmp_path / "nothing")) is None
    assert control_client.reach(str(tmp_path / "no folder" / "nothing")) is None
    with pytest.raises(Busy, match="no process answers"):
        control_client.call(str(tmp_path / "nothing"), "info")


def test_socket_of_a_dead_owner_is_nobody_and_is_replaced(tmp_path: Path) -> None:
    house = House(tmp_path)
    with house.stack:
        path = house.path()
        house.server.stop()
        with socket.socket(socket.AF_UNIX) as dead, control_client.short_path(path) as address:
            dead.bind(address)
        assert stat.S_ISSOCK(os.lstat(path).st_mode)
        assert control_client.reach(path) is None
        with ControlServer(house.filters):
            assert house.call("info")["disks"]


def test_only_our_user_gets_in(house: House) -> None:
    assert stat.S_IMODE(os.stat(os.path.dirname(house.path())).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(house.path()).st_mode) == 0o600
    control.require_user(os.geteuid())
    control.require_user(0)
    with pytest.raises(StorageError, match=r"of user .*; run the command as that user, or as root"):
        control.require_user(os.geteuid() + 1)


CALL_AS_NOBODY = """
import os, socket, sys
os.chdir(sys.argv[1])
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[2])
    print(sock.recv(65536).decode())
"""


def test_a_stranger_is_turned_away_even_where_the_doors_are_open(house: House) -> None:
    """Only root can send a stranger; anybody else sees here that their own credentials are read."""
    folder, name = os.path.split(house.path())
    if os.geteuid() == 0:
        os.chmod(folder, 0o755)
        os.chmod(house.path(), 0o666)
        answer = run(sys.executable, "-c", CALL_AS_NOBODY, folder, name).stdout
        assert json.loads(answer)["error"]["errno"] == errno.EPERM
    with connected(house.path()) as sock:
        assert sock.fileno() >= 0


def test_a_path_that_is_too_long_for_a_socket_is_none_too_long(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    house = House(deep)
    with house.stack:
        assert len(house.path()) > 107
        assert house.call("mark", disk="sda", offset=0, length=1) == {}
    assert control_client.reach(house.path()) is None


def test_a_server_that_cannot_listen_leaves_nothing_behind(tmp_path: Path) -> None:
    house = House(tmp_path)
    with house.stack:
        house.server.stop()
        os.mkdir(house.path("sdb"))
        with pytest.raises(StorageError):
            ControlServer(house.filters).start()
        assert not os.path.lexists(house.path("sda"))


def test_a_server_that_finds_no_thread_leaves_nothing_behind(house: House) -> None:
    house.server.stop()
    server = ControlServer(house.filters)
    usual = threading.stack_size(1 << 62)  # for which no address space has room
    try:
        with pytest.raises(StorageError, match="control sockets: can't start new thread; have fewer threads"):
            server.start()
    finally:
        threading.stack_size(usual)
    assert not os.path.lexists(house.path("sda"))
    assert server.stop()


# --- bad callers cost themselves ---


def test_a_stuck_caller_does_not_keep_others_waiting(house: House) -> None:
    with connected(house.path()) as stuck:
        stuck.sendall(b'{"operation": "mark", ')
        assert house.call("mark", disk="sda", offset=0, length=1) == {}
    assert house.stored_blocks("sda") == {0}


def test_a_slow_caller_is_dropped(tmp_path: Path) -> None:
    house = House(tmp_path, patience_s=0.5)
    with house.stack, connected(house.path()) as slow:
        slow.sendall(b"{")
        assert slow.recv(100) == b""


def test_a_caller_that_trickles_is_dropped_too(tmp_path: Path) -> None:
    """Long before its line is too long."""
    house = House(tmp_path, patience_s=0.05)
    with house.stack, connected(house.path()) as slow, pytest.raises((BrokenPipeError, ConnectionResetError)):
        trickle(slow)


def trickle(sock: socket.socket) -> None:
    for _ in range(wire.MAX_LINE_BYTES):
        sock.send(b" ")


def test_a_line_that_comes_too_late_is_not_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"late\n")
        with pytest.raises(TimeoutError):
            control_client.receive_line(ours, wire.LineBuffer("here"), time.monotonic())


def test_a_line_without_an_end_is_not_listened_to_forever(house: House) -> None:
    with connected(house.path()) as sock:
        sent = 0
        try:
            while sent < 3 * wire.MAX_LINE_BYTES:
                sent += sock.send(b"x" * 65536)
        except OSError:
            assert sent < 3 * wire.MAX_LINE_BYTES
        assert line_from(sock)["error"]["class"] == "FormatError"


@pytest.mark.parametrize(
    "noise",
    [b"\n", b"[]\n", b"5\n", b"{\n", b"\xff\xfe\n", b"[" * 200000 + b"\n", b'{"a":1' + b"1" * 9999 + b"}\n"],
)
def test_what_is_no_request_costs_the_connection_only(house: House, noise: bytes) -> None:
    with connected(house.path()) as sock:
        sock.sendall(noise)
        assert line_from(sock)["error"]["class"] == "FormatError"
        assert sock.recv(100) == b""
    assert house.call("info")["disks"]


def test_a_caller_that_leaves_without_its_answer_is_no_loss(house: House) -> None:
    with connected(house.path()) as sock:
        sock.sendall(wire.encode({"operation": "persist", "arguments": {"disk": "sda"}}))
    assert house.call("info")["disks"]


def test_too_many_callers_are_told_so(tmp_path: Path) -> None:
    house = House(tmp_path, max_callers=2)
    with house.stack:
        with connected(house.path()), connected(house.path()), pytest.raises(Busy, match="too many"):
            house.call("info")
        await_room(house)
        assert house.call("info")["disks"]


def test_owner_that_takes_no_caller_in_is_not_another_program_to_be_stopped(tmp_path: Path) -> None:
    """As one that was stopped by SIGSTOP, with guests that it will serve again."""
    path = str(tmp_path / "control")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(path)
        listener.listen(0)
        waiting.connect(path)
        with pytest.raises(Busy, match=r"too many callers wait at .*; try again"):
            control_client.reach(path)


def test_caller_for_whom_there_is_no_thread_costs_the_others_nothing(house: House) -> None:
    usual = threading.stack_size(1 << 62)  # for which no address space has room
    try:
        with pytest.raises(Busy, match="try again"):
            house.call("info")
    finally:
        threading.stack_size(usual)
    assert house.call("info")["disks"]


def test_caller_for_whom_there_is_no_memory_is_the_only_one_who_is_not_heard(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(server: ControlServer, sock: socket.socket) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(control, "_Caller", no_memory)
        with pytest.raises(Busy, match="the owner is going away"):
            house.call("info")
    assert house.call("info")["disks"]


def test_a_lack_of_memory_to_listen_keeps_nobody_out_for_good(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert house.call("info")["disks"]
    lacks = lack_memory_to_listen(monkeypatch)
    assert house.call("info")["disks"], "it listened before there was none"
    assert house.call("info")["disks"]
    assert lacks == [0]


def test_caller_for_whom_there_is_no_memory_keeps_no_place(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even if there is none to tell of it: after sixteen of them nobody would be heard any more."""

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(control._Caller, "start", no_memory)
        patch.setattr(control, "_log", mock.Mock(warning=mock.Mock(side_effect=[MemoryError, None])))
        with pytest.raises(Busy, match="the owner is going away"):
            house.call("info")
    assert not house.server._callers


def await_room(house: House) -> None:
    """Its callers have hung up; the threads that served them end by themselves."""
    for caller in list(house.server._callers):
        caller.join(PATIENCE_SECONDS)
    assert not house.server._callers


# --- the end ---


def test_stop_ends_idle_callers_and_removes_the_sockets(house: House) -> None:
    with connected(house.path()) as idle:
        assert house.server.stop()
        assert idle.recv(100) == b""
    assert [os.path.lexists(house.path(name)) for name in NAMES] == [False, False]
    assert house.server.stop()


def test_stop_does_not_wait_for_a_caller_that_does_not_read(tmp_path: Path) -> None:
    house = House(tmp_path, patience_s=1000)
    with house.stack, connected(house.path()) as deaf:
        deaf.setblocking(False)
        asking = wire.encode({"operation": "info", "arguments": {}})
        with pytest.raises(BlockingIOError):
            ask_until_nothing_goes_in(deaf, asking)
        assert house.server.stop()


def ask_until_nothing_goes_in(sock: socket.socket, asking: bytes) -> None:
    """Its answers fill one buffer, and then its questions the other: `select` says when that is so for good."""
    for _ in range(1 << 20):
        _, writable, _ = select.select([], [sock], [], 0.2)
        if not writable:
            raise BlockingIOError
        sock.send(asking * 100)


def test_stop_waits_for_what_is_being_done_and_it_is_answered(house: House) -> None:
    reached, release = threading.Event(), threading.Event()
    update = house.store.update

    def held_up(change: Callable[[Writer], T]) -> T:
        reached.set()
        assert release.wait(PATIENCE_SECONDS)
        return update(change)

    house.store.update = held_up  # type: ignore[method-assign]
    stopping = threading.Thread(target=house.server.stop)
    with connected(house.path()) as asking, connected(house.path()) as idle:
        arguments = {"disks": ["sda"], "name": "monday"}
        asking.sendall(wire.encode({"operation": "checkpoint", "arguments": arguments}))
        assert reached.wait(PATIENCE_SECONDS)
        stopping.start()
        assert idle.recv(100) == b""  # the stop is under way
        release.set()
        assert line_from(asking)["answer"]["checkpoints"][0]["disk"] == "sda"
    stopping.join(PATIENCE_SECONDS)
    assert not stopping.is_alive()
    assert house.checkpoints("sda") == ["start", "monday"]


def test_stop_leaves_the_socket_of_a_later_owner(house: House) -> None:
    path = house.path()
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as later, control_client.short_path(path) as address:
        later.bind(address)
        house.server.stop()
        assert os.path.lexists(path)


# --- bad owners ---


@contextmanager
def an_owner_that_says(path: str, words: bytes, *, hangs_up: bool = True) -> Iterator[None]:
    """Accepts one caller, says these words, and hangs up once the caller has said something, or left."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()

        def speak() -> None:
            sock, _ = listening.accept()
            with sock:
                sock.sendall(words)
                while sock.recv(65536) and not hangs_up:
                    pass

        thread = threading.Thread(target=speak)
        thread.start()
        yield
        thread.join(PATIENCE_SECONDS)


HELLO = wire.encode({"protocol": 1, "version": "1", "pid": 1, "disks": []})


@pytest.mark.parametrize(
    ("words", "refusal", "said"),
    [
        (b"220 mail\n", FormatError, "JSON"),
        (b"[]\n", FormatError, "JSON object"),
        (b"{}\n", FormatError, "protocol"),
        (wire.encode({"protocol": 2, "version": "2", "pid": 1, "disks": []}), FormatError, "protocol 1"),
        (wire.encode({"error": {"class": "Busy", "problem": "no", "next_step": "go"}}), Busy, "no; go"),
        (
            wire.encode({"error": {"class": "New", "problem": "no", "next_step": "go"}}),
            LmdbitmapError,
            "no; go",
        ),
        (wire.encode({"error": {"class": "Busy"}}), FormatError, "problem"),
        (wire.encode({"error": 5}), FormatError, "error"),
        (HELLO + b"{}\n", FormatError, "answer"),
        (HELLO + b'{"answer": 5}\n', FormatError, "answer"),
        (HELLO, OwnerGone, "went away"),
    ],
)
def test_an_owner_that_talks_nonsense_is_an_error_of_ours(
    tmp_path: Path, words: bytes, refusal: type[LmdbitmapError], said: str
) -> None:
    path = str(tmp_path / "socket")
    with an_owner_that_says(path, words), pytest.raises(refusal, match=said):
        control_client.call(path, "info")


def test_an_owner_that_says_nothing_is_not_waited_for_without_end(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with an_owner_that_says(path, HELLO, hangs_up=False), pytest.raises(Busy, match="did not answer"):
        control_client.call(path, "info", timeout_s=0.01)


@contextmanager
def a_pair() -> Iterator[tuple[control_client.Client, socket.socket]]:
    """A caller past the hello, and the owner's end."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(HELLO)
        with control_client.Client(ours, "here") as client:
            yield client, theirs


def test_answer_that_comes_too_late_is_not_taken_for_that_of_the_next_call() -> None:
    with a_pair() as (client, owner):
        with pytest.raises(Busy, match="did not answer"):
            client.call("snapshot", timeout_s=0.01)
        owner.sendall(b'{"answer": {}}\n')
        for again in (partial(client.call, "forget"), client.connection):
            with pytest.raises(Busy, match="has not answered an earlier request"):
                again()


def test_owner_that_hangs_is_not_taken_for_one_that_went_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may do what it was asked for yet, and others can wait for it."""
    monkeypatch.setattr(control_client, "CONNECT_S", 0.01)
    with a_pair() as (client, _):
        with pytest.raises(Busy, match="did not answer"):
            client.connection()
        with pytest.raises(Busy, match="has not answered an earlier request"):
            client.require_in_step()


def test_owner_that_ends_before_it_greets_was_asked_for_nothing() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(Busy, match="going away; try again"):
        control_client.Client(ours, "here")


def test_owner_that_hung_up_owes_no_answer() -> None:
    """What it did is in the store."""
    with a_pair() as (client, owner):
        owner.close()
        for _ in range(2):
            with pytest.raises(OwnerGone, match="went away"):
                client.call("snapshot")
            client.require_in_step()


def test_error_of_the_owner_is_an_answer() -> None:
    with a_pair() as (client, owner):
        owner.sendall(wire.encode({"error": {"class": "Busy", "problem": "no", "next_step": "go"}}))
        with pytest.raises(Busy, match="no; go"):
            client.call("persist")
        owner.sendall(b'{"answer": {}}\n')
        assert client.call("persist") == {}


def test_owner_that_answers_something_else_is_an_error_of_ours() -> None:
    with a_pair() as (client, owner):
        for operation in ("info", "snapshot", "release"):
            owner.sendall(b'{"answer": {"more": 1}}\n')
            with pytest.raises(FormatError, match=r"here: expected answer\..*use the same version"):
                client.call(operation, disks=["sda"])


def hand_over(owner: socket.socket, words: bytes, fds: Sequence[int]) -> None:
    socket.send_fds(owner, [words], fds) if fds else owner.sendall(words)
    owner.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    ("words", "sockets", "files", "refusal", "said"),
    [
        (b'{"answer": {}}\n', 0, 0, FormatError, "one socket.*found 0"),
        (b'{"answer": {}}\n', 0, 1, FormatError, "found a descriptor of something else"),
        (b'{"answer": {}}', 1, 0, OwnerGone, "went away"),
        (b'{"answer": 5}\n', 1, 0, FormatError, "answer"),
        (
            wire.encode({"error": {"class": "Busy", "problem": "no", "next_step": "go"}}),
            1,
            0,
            Busy,
            "no; go",
        ),
    ],
)
def test_what_is_no_connection_is_an_error_and_leaves_no_descriptor(
    words: bytes, sockets: int, files: int, refusal: type[LmdbitmapError], said: str
) -> None:
    with a_pair() as (client, owner), socket.socket() as spare, open(os.devnull, "rb") as file:
        before = open_files()
        hand_over(owner, words, [spare.fileno()] * sockets + [file.fileno()] * files)
        with pytest.raises(refusal, match=said):
            client.connection()
        assert os.listdir("/proc/self/fd") == before


def test_of_several_connections_one_is_taken_and_none_is_left_over() -> None:
    with a_pair() as (client, owner), socket.socket() as spare:
        before = open_files()
        hand_over(owner, b'{"answer": {}}\n', [spare.fileno()] * 3)
        with client.connection() as taken:
            assert not taken.get_inheritable()
        assert os.listdir("/proc/self/fd") == before


def test_descriptor_for_which_this_process_has_no_room_is_no_fault_of_the_owner() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with a_pair() as (client, owner), socket.socket() as spare:
        hand_over(owner, b'{"answer": {}}\n', [spare.fileno()])
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(StorageError, match=r"Too many open files; raise the limit on open files"):
                client.connection()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
