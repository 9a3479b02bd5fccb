"""Who serves whom: quick connections share a thread, and none of them is held up by one that is not."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from lmdbitmap.bits import Run, bitmap_view
from lmdbitmap.geometry import REGION_BYTES, Geometry
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.plain import PlainDisk, PlainLane
from lmdbitmap.interfaces import BlockDevice, ServedDisk
from lmdbitmap.nbd.server import replies, rounds
from lmdbitmap.nbd.server.connection import Connection
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.server.trial import Trial
from lmdbitmap.tracker.lane import FilterLane, Gate
from tests.helpers.nbd_raw import DISC, FLUSH, READ, WRITE, WRITE_ZEROES, RawClient, request, write
from tests.helpers.support import PATIENCE_SECONDS, make_raw_image

KIB, MIB = 1 << 10, 1 << 20
SIZE = 16 * MIB
HELD = 8 * MIB
"""Requests at or behind this offset wait, where a stage says so."""
ENOUGH = 40
"""Requests after which a connection that was quick is in the rounds."""
COLD_READS = 20
"""Of which one at least is waited for."""


class Stage:
    """Holds what arrives at it, and knows how much does."""

    def __init__(self) -> None:
        self._arrivals = threading.Semaphore(0)
        self._open = threading.Event()

    def pass_through(self) -> None:
        self._arrivals.release()
        assert self._open.wait(PATIENCE_SECONDS)

    def await_arrivals(self, count: int) -> None:
        for _ in range(count):
            assert self._arrivals.acquire(timeout=PATIENCE_SECONDS)

    def open(self) -> None:
        self._open.set()


class StagedDisk(PlainDisk):
    """Writes behind `HELD` wait on the stage; so do reads behind the end of the file. Notes who does the writes."""

    size = 2 * SIZE

    def __init__(self, device: FileDevice, stage: Stage | None = None) -> None:
        super().__init__(device)
        self.stage = stage
        self.threads: list[int] = []

    def lane(self) -> PlainLane:
        return StagedLane(self, self._device)


class StagedLane(PlainLane):
    def __init__(self, disk: StagedDisk, device: BlockDevice) -> None:
        super().__init__(device)
        self._disk = disk

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        self._disk.threads.append(threading.get_ident())
        if self._disk.stage is not None and any(offset >= HELD for offset, _ in writes):
            self._disk.stage.pass_through()
        return super().write_many(writes)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        if self._disk.stage is not None and offset >= SIZE:
            self._disk.stage.pass_through()
        buffer[:] = bytes(len(buffer))


class MarkedDisk(StagedDisk):
    """Tracked, as far as its lanes go; what marks new dirt waits on the stage."""

    size = SIZE

    def __init__(self, device: FileDevice, stage: Stage) -> None:
        super().__init__(device)
        self.marking = stage
        self.settled = bitmap_view(bytearray(REGION_BYTES))
        self.gate = Gate(Geometry(SIZE, 16), self.settled)

    def lane(self) -> FilterLane:  # type: ignore[override]
        return FilterLane(self.gate, self._device, self.mark)

    def mark(self, runs: list[Run]) -> None:
        if any(start >= HELD >> 16 for start, _ in runs):
            self.marking.pass_through()
        for start, stop in runs:
            self.settled[start:stop] = 1


@pytest.fixture
def device(tmp_path: Path) -> Iterator[FileDevice]:
    with FileDevice.open(make_raw_image(tmp_path / "disk.raw", SIZE)) as device:
        yield device


class PageCache:
    """Stands in front of `os.preadv`: whether a read in haste finds its data in memory.

    Linux refuses some of what is there when memory is short: a page about to be reclaimed looks like one to read ahead.
    """

    def __init__(self) -> None:
        self._keeps_all = True
        self._preadv = os.preadv

    @contextlib.contextmanager
    def as_it_is(self) -> Iterator[None]:
        self._keeps_all = False
        yield
        self._keeps_all = True

    def preadv(self, fd: int, buffers: Sequence[bytearray | memoryview], offset: int, flags: int = 0) -> int:
        if self._keeps_all:
            flags &= ~os.RWF_NOWAIT
        return self._preadv(fd, buffers, offset, flags)


@pytest.fixture(autouse=True)
def page_cache(monkeypatch: pytest.MonkeyPatch) -> PageCache:
    cache = PageCache()
    monkeypatch.setattr(os, "preadv", cache.preadv)
    return cache


@pytest.fixture(params=["watched", "dozing"], autouse=True)
def watchfulness(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks after the driver dozes whenever the driver sleeps, or hardly ever."""
    monkeypatch.setattr(rounds, "_DOZE_AFTER_S", 0.0 if request.param == "dozing" else PATIENCE_SECONDS)
    monkeypatch.setattr(rounds, "_FIRST_LEAVE_S", 0.0)
    monkeypatch.setattr(rounds, "_LONGEST_LEAVE_S", 0.0)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes the rounds from a driver: on a busy machine a turn may be long in which nothing waits."""
    monkeypatch.setattr(rounds, "_PATIENCE_S", PATIENCE_SECONDS)


@contextlib.contextmanager
def clients_of(
    disk: ServedDisk, folder: Path, count: int, *, go_round: bool = True, grace_s: float = PATIENCE_SECONDS
) -> Iterator[list[RawClient]]:
    """So many clients of one server, all in its rounds."""
    path = str(folder / "nbd.sock")
    server = Server({"disk": disk}, grace_s=grace_s)
    server.listen_unix(path)
    server.start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        clients = [stack.enter_context(RawClient.connect(path)) for _ in range(count)]
        for client in clients:
            client.go("disk")
            if go_round:  # once it is counted: who is alone does not
                assert client.do(READ, 0, 1).error == 0
        for client in clients if go_round else []:
            be_quick(client)
        yield clients
    assert server.stop()


def be_quick(client: RawClient) -> None:
    for _ in range(ENOUGH):
        assert client.do(READ, 0, 1).error == 0


def works(client: RawClient, times: int = 3) -> None:
    for number in range(times):
        data = bytes([number + 1]) * 4096
        assert client.do(WRITE, 4096, 4096, data=data).error == 0
        assert client.do(READ, 4096, 4096).data == data


def threads_of(disk: StagedDisk, clients: Sequence[RawClient]) -> set[int]:
    """The threads that serve these clients now."""
    disk.threads.clear()
    for client in clients:
        assert client.do(WRITE, 0, 1, data=b"x").error == 0
    assert len(disk.threads) == len(clients)
    return set(disk.threads)


@pytest.mark.usefixtures("patience")
def test_quick_connections_share_a_thread(device: FileDevice, tmp_path: Path) -> None:
    disk = StagedDisk(device)
    with clients_of(disk, tmp_path, 4) as clients:
        assert len(threads_of(disk, clients)) == 1


def test_connections_that_have_done_little_have_their_own(device: FileDevice, tmp_path: Path) -> None:
    disk = StagedDisk(device)
    with clients_of(disk, tmp_path, 3, go_round=False) as clients:
        assert len(threads_of(disk, clients)) == 3


def test_driver_for_whom_there_is_no_memory_to_listen_drives_on(
    device: FileDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's answer takes 12 KiB, each time."""
    lacks = [0]
    look = rounds.Rounds._look

    def without_memory(these: rounds.Rounds) -> list[tuple[int, int]] | None:
        if lacks[0]:
            lacks[0] -= 1
            raise MemoryError
        return look(these)

    monkeypatch.setattr(rounds.Rounds, "_look", without_memory)
    with clients_of(StagedDisk(device), tmp_path, 3) as clients:
        lacks[0] = 3
        while lacks[0]:  # it looks now and then, and sleeps at once in between
            for client in clients:
                works(client)


def test_connection_for_which_the_rounds_have_no_room_is_served_alone(
    device: FileDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """As where the user has as many watches as fs.epoll.max_user_watches allows."""

        def register(self, fd: int, events: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def poll(self, timeout_s: float | None = None) -> list[tuple[int, int]]:
            raise AssertionError("nobody goes round")

    monkeypatch.setattr("lmdbitmap.nbd.server.rounds.select.epoll", Full)
    disk = StagedDisk(device)
    with clients_of(disk, tmp_path, 3) as clients:
        assert len(threads_of(disk, clients)) == 3


def test_disk_without_a_descriptor_is_never_served_in_the_rounds(device: FileDevice, tmp_path: Path) -> None:
    class FarDisk(StagedDisk):
        fd = None
        size = SIZE

        def lane(self) -> PlainLane:
            return FarLane(self, device)

    class FarLane(StagedLane):
        def pread_into(self, buffer: memoryview, offset: int) -> None:
            device.pread_into(buffer, offset)

    disk = FarDisk(device)
    with clients_of(disk, tmp_path, 3) as clients:
        assert len(threads_of(disk, clients)) == 3


def flush(client: RawClient) -> None:
    assert client.do(FLUSH).error == 0


def read_much(client: RawClient) -> None:
    assert client.do(READ, 0, 2 * MIB).error == 0


def write_much(client: RawClient) -> None:
    assert client.do(WRITE, 0, MIB, data=bytes(MIB)).error == 0


def zero(client: RawClient) -> None:
    assert client.do(WRITE_ZEROES, 0, MIB).error == 0


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("wait", [flush, read_much, write_much, zero])
def test_who_waits_leaves_the_rounds_and_comes_back(
    device: FileDevice, tmp_path: Path, wait: Callable[[RawClient], None]
) -> None:
    disk = StagedDisk(device)
    with clients_of(disk, tmp_path, 3) as clients:
        for client in clients:
            wait(client)
            assert len(threads_of(disk, clients)) == 2
            be_quick(client)
            assert len(threads_of(disk, clients)) == 1


@pytest.mark.usefixtures("patience")
def test_long_write_under_way_stays_out_of_the_rounds(device: FileDevice, tmp_path: Path) -> None:
    """However many batches its data comes in."""
    stage, piece = Stage(), bytes(64 * KIB)
    stage.open()
    disk = StagedDisk(device, stage)
    with clients_of(disk, tmp_path, 3) as clients:
        clients[0].send(write(HELD, piece * ENOUGH, cookie=7)[: -len(piece) * ENOUGH])
        for _ in range(ENOUGH - 1):
            clients[0].send(piece)
            stage.await_arrivals(1)
        writer = disk.threads[-1]
        assert writer not in threads_of(disk, clients[1:])
        clients[0].send(piece)
        assert clients[0].reply()[:2] == (7, 0)


class Told(Connection):
    """Notes what it is told, announces itself, and waits for the next event before it goes on."""

    def __init__(self, sock: socket.socket, disk: PlainDisk, *awaited: threading.Event) -> None:
        super().__init__(sock, disk, structured=False, contexts={})
        self.polls: list[bool] = []
        self.is_there, self.is_back = threading.Event(), threading.Event()
        self._awaited = list(awaited)

    def serve_some(self, *, polls: bool = True) -> bool:
        (self.is_back if self.polls else self.is_there).set()
        self.polls.append(polls)
        return bool(self._awaited) and self._awaited.pop(0).wait(PATIENCE_SECONDS)


def test_who_is_served_alone_polls_unless_another_one_is_too(device: FileDevice) -> None:
    def serving(connection: Connection) -> threading.Thread:
        serve = functools.partial(served.serve, connection, ours.fileno(), lambda _: None, alone=True)
        thread = threading.Thread(target=serve)
        thread.start()
        return thread

    served, disk = rounds.Rounds(), PlainDisk(device)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        has_come, has_gone = threading.Event(), threading.Event()
        first = Told(ours, disk, has_come, has_gone)
        second = Told(ours, disk, first.is_back)
        staying = serving(first)
        assert first.is_there.wait(PATIENCE_SECONDS)
        leaving = serving(second)
        assert second.is_there.wait(PATIENCE_SECONDS)
        has_come.set()
        leaving.join(PATIENCE_SECONDS)
        has_gone.set()
        staying.join(PATIENCE_SECONDS)
    assert first.polls == [True, False, True]
    assert second.polls[0] is False


@pytest.mark.usefixtures("patience")
@pytest.mark.parametrize("length", [128 * KIB, MIB])
@pytest.mark.parametrize("can_tell", [True, False])
def test_copying_up_to_a_mebibyte_of_memory_is_no_reason_to_leave_the_rounds(
    device: FileDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, can_tell: bool
) -> None:
    """A file system that cannot tell what is in memory is trusted with less."""
    monkeypatch.setattr(replies, "_knows_haste", lambda fd: can_tell)
    monkeypatch.setattr(Trial, "prefers_first", property(lambda _: False, lambda *_: None), raising=False)
    disk, data = StagedDisk(device), random.Random(2).randbytes(MIB)
    with clients_of(disk, tmp_path, 3) as clients:
        device.pwrite(data, 0)
        assert clients[0].do(READ, 0, length).data == data[:length]
        assert len(threads_of(disk, clients)) == (1 if can_tell or length <= 128 * KIB else 2)


@pytest.mark.usefixtures("patience")
def test_data_that_is_not_in_memory_is_waited_for_outside_the_rounds(
    device: FileDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page_cache: PageCache
) -> None:
    """Where the file system can say so, as tmpfs cannot.

    On a busy machine with a quick disk the data may be there by the time that the kernel looks for it: try again.
    """
    assert device.fd is not None
    with page_cache.as_it_is():
        can_tell = replies._knows_haste(device.fd)
    monkeypatch.setattr(replies, "_knows_haste", lambda fd: can_tell)
    disk, data = StagedDisk(device), random.Random(1).randbytes(MIB)
    device.pwrite(data, 2 * MIB)
    with clients_of(disk, tmp_path, 3) as clients:
        device.flush()
        for _ in range(COLD_READS):
            os.posix_fadvise(device.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with page_cache.as_it_is():
                assert clients[0].do(READ, 2 * MIB, 4096).data == data[:4096]
            count = len(threads_of(disk, clients))
            be_quick(clients[0])
            assert len(threads_of(disk, clients)) == 1
            if count == 2:
                break
        assert count == 1 + can_tell


@pytest.mark.parametrize("stuck", [1, 3])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(HELD, 4), (SIZE, 4096), (SIZE, 256 * KIB)],
    ids=["write", "read", "long_read"],
)
def test_disk_that_does_not_answer_some_holds_up_no_other(
    device: FileDevice, tmp_path: Path, stuck: int, offset: int, length: int
) -> None:
    stage = Stage()
    with clients_of(StagedDisk(device, stage), tmp_path, 4) as clients:
        for client in clients[:stuck]:
            client.send(write(HELD, b"held") if offset == HELD else request(READ, SIZE, length))
            stage.await_arrivals(1)
            for other in clients[stuck:]:
                works(other)
        stage.open()
        for client in clients[:stuck]:
            assert client.reply(0 if offset == HELD else length, SIZE).error == 0
            works(client, ENOUGH)


def test_client_that_does_not_read_its_replies_holds_up_no_other(device: FileDevice, tmp_path: Path) -> None:
    most = 400
    with clients_of(StagedDisk(device), tmp_path, 3) as (deaf, *others):
        asked = b"".join(request(READ, 0, 4096, cookie=number) for number in range(most))
        sender = threading.Thread(target=deaf.send, args=(asked,))
        sender.start()
        deaf.receive(1)
        for other in others:
            works(other, ENOUGH)
        deaf._inbox = b"\x66" + deaf._inbox
        assert [deaf.reply(4096).cookie for _ in range(most)] == list(range(most))
        sender.join(PATIENCE_SECONDS)
        works(deaf, ENOUGH)


@pytest.mark.parametrize("length", [100, 64 * KIB, MIB])
def test_client_that_stops_in_the_middle_of_a_request_holds_up_no_other(
    device: FileDevice, tmp_path: Path, length: int
) -> None:
    with clients_of(StagedDisk(device), tmp_path, 3) as (slow, *others):
        whole = write(MIB, bytes([7]) * length, cookie=9)
        for begin, end in ((0, 10), (10, 28), (28, 28 + length // 2), (28 + length // 2, 28 + length)):
            slow.send(whole[begin:end])
            for other in others:
                works(other)
        assert slow.reply()[:2] == (9, 0)
        assert slow.do(READ, MIB, length).data == bytes([7]) * length


def test_writes_that_wait_for_a_commit_wait_together_and_nobody_else_does(
    device: FileDevice, tmp_path: Path
) -> None:
    stage = Stage()
    with clients_of(MarkedDisk(device, stage), tmp_path, 4) as clients:
        for number, client in enumerate(clients[:3]):
            client.send(write(HELD + number * MIB, b"new dirt"))
        stage.await_arrivals(3)
        works(clients[3], ENOUGH)
        stage.open()
        assert [client.reply().error for client in clients[:3]] == [0, 0, 0]
        for client in clients:
            works(client, ENOUGH)


def test_writes_that_wait_at_a_closed_gate_hold_up_no_read(device: FileDevice, tmp_path: Path) -> None:
    disk = MarkedDisk(device, Stage())
    with clients_of(disk, tmp_path, 3) as (reader, *clients):
        for _ in range(10):
            with disk.gate.drained():
                for client in clients:
                    client.send(write(0, b"waits at the gate"))
                    assert reader.do(READ, 0, 1).error == 0
            assert [client.reply().error for client in clients] == [0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_connections_end_in_any_order_and_the_rest_goes_on(
    device: FileDevice, tmp_path: Path, seed: int
) -> None:
    chosen = random.Random(seed)
    with clients_of(StagedDisk(device), tmp_path, 6) as clients:
        chosen.shuffle(clients)
        while clients:
            leaver = clients.pop()
            if chosen.random() < 0.3:
                leaver.send(b"no request " * 3)
                assert leaver.is_closed_by_server()
            elif chosen.random() < 0.5:
                leaver.send(request(DISC))
                assert leaver.is_closed_by_server()
            else:
                leaver.sock.close()
            for client in clients:
                works(client)


def test_connection_that_stays_behind_alone_is_served(device: FileDevice, tmp_path: Path) -> None:
    disk = StagedDisk(device)
    with clients_of(disk, tmp_path, 2) as (leaver, stayer):
        leaver.send(request(DISC))
        assert leaver.is_closed_by_server()
        works(stayer, ENOUGH)


def test_server_ends_while_all_go_round_and_some_are_stuck(device: FileDevice, tmp_path: Path) -> None:
    stage = Stage()
    with clients_of(StagedDisk(device, stage), tmp_path, 4) as clients:
        clients[0].send(write(HELD, b"held", cookie=5))
        stage.await_arrivals(1)
        threading.Timer(0, stage.open).start()
    assert clients[0]._inbox == b""


@pytest.mark.parametrize("seed", range(2))
def test_busy_clients_of_all_kinds_find_what_they_wrote(
    device: FileDevice, tmp_path: Path, seed: int
) -> None:
    """Each has its own part of the disk, and a model of it."""
    count, failures = 5, list[BaseException]()

    def live(client: RawClient, number: int) -> None:
        try:
            chosen, start = random.Random(seed * 100 + number), number * 2 * MIB
            model = bytearray(2 * MIB)
            for _ in range(150):
                length = chosen.choice([1, 512, 4096, 4096, 4096, 64 * KIB, 200 * KIB])
                at = chosen.randrange(2 * MIB - length)
                if chosen.random() < 0.5:
                    model[at : at + length] = data = chosen.randbytes(length)
                    assert client.do(WRITE, start + at, length, data=data).error == 0
                elif chosen.random() < 0.9:
                    assert client.do(READ, start + at, length).data == model[at : at + length]
                else:
                    flush(client)
        except BaseException as failure:
            failures.append(failure)

    with clients_of(StagedDisk(device), tmp_path, count) as clients:
        threads = [
            threading.Thread(target=live, args=(client, number)) for number, client in enumerate(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()
    assert not failures
