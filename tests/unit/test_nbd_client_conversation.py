"""A far image never calls durable what its server may have lost: one flush that failed is never forgotten."""

from __future__ import annotations

import errno
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdbitmap.errors import StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.images.device import FileDevice
from lmdbitmap.nbd.client import unflushed
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.client.link import Call, Link, Request
from lmdbitmap.nbd.client.unflushed import Unflushed
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from lmdbitmap.tracker.changes import changes
from tests.helpers.nbd_far import (
    ALL,
    EINVAL,
    EIO,
    ENOTSUP,
    ESHUTDOWN,
    SEND_FLUSH,
    TRIM,
    WRITE_ZEROES,
    Asked,
    Behaviour,
    Crash,
    FarServer,
    HangUp,
    far_server,
    honest,
    simple,
)
from tests.helpers.nbd_raw import FAST_ZERO, FLUSH, NO_HOLE, READ, WRITE
from tests.helpers.support import PATIENCE_SECONDS, run
from tests.helpers.tracked import TrackedDisk, blocks_of, quick_folder, trust_of

SIZE = 64 << 10
ENOSPC = 28
KEEP_BYTES = 20_000
PIECE = b"x" * 4096
UNTIL_ONE_OF_OUR_OWN = 4
"""Pieces that are written before a flush of our own begins: more than half of what may be kept."""


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarServer]:
    with far_server(tmp_path, SIZE) as server:
        yield server


def opened(uri: str) -> NbdDevice:
    return NbdDevice.open(uri, reconnect_s=PATIENCE_SECONDS, keep_bytes=KEEP_BYTES)


def failing_flush(number: int) -> Behaviour:
    """Only that flush fails, counted from 1; the server is well before and afterwards."""
    flushes: list[Asked] = []

    def fail_one(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command == FLUSH:
            flushes.append(asked)
        return simple(asked.cookie, EIO) if asked.command == FLUSH and len(flushes) == number else None

    return fail_one


def write_until_flushed(far: FarServer, write: Callable[[bytes, int], None]) -> None:
    """Returns when a flush of our own was answered: what comes later on the connection is answered later."""
    for piece in range(UNTIL_ONE_OF_OUR_OWN):
        write(PIECE, piece * len(PIECE))
    write(b"end", SIZE - 3)
    assert far.commands().count(FLUSH) == 1


def flush_error(device: NbdDevice) -> int | None:
    with pytest.raises(OSError) as refused:
        device.flush()
    return refused.value.errno


def test_flush_of_our_own_that_failed_fails_all_that_follow(far: FarServer) -> None:
    far.behave = failing_flush(1)
    with opened(far.uri) as device:
        write_until_flushed(far, device.pwrite)
        assert [flush_error(device) for _ in range(3)] == [errno.EIO] * 3
        assert device.pread(4, 0) == b"xxxx"
        device.pwrite(b"still", 0)
    assert far.commands().count(FLUSH) == 1, "asking again would be to hope for a lie"


def test_flush_of_a_callers_that_failed_fails_all_that_follow(far: FarServer) -> None:
    far.behave = failing_flush(2)
    with opened(far.uri) as device:
        device.pwrite(b"x", 0)
        device.flush()
        device.pwrite(b"y", 0)
        assert [flush_error(device) for _ in range(3)] == [errno.EIO] * 3


def test_flush_that_failed_is_not_forgotten_on_a_new_connection(far: FarServer) -> None:
    far.behave = failing_flush(1)
    with opened(far.uri) as device:
        write_until_flushed(far, device.pwrite)
        far.crash()
        assert device.pread(4, 0) == b"xxxx"
        assert far.handshakes == 2
        assert flush_error(device) == errno.EIO


def test_flush_waits_for_the_one_that_is_under_way_and_shares_its_failure(far: FarServer) -> None:
    """A server's kernel tells of lost data once: of two flushes at a time only one might hear of it."""
    held: list[Asked] = []

    def hold_the_first_flush(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command == FLUSH and not held:
            held.append(asked)
            return b""
        if asked.command == READ:
            return simple(held[0].cookie, EIO) + server.reply(asked)
        return None

    far.behave = hold_the_first_flush
    with opened(far.uri) as device, ThreadPoolExecutor(1) as pool:
        write_until_flushed(far, device.pwrite)
        flushing = pool.submit(device.flush)
        device.pread(1, 0)
        error = flushing.exception(PATIENCE_SECONDS)
        assert isinstance(error, OSError)
        assert error.errno == errno.EIO
    assert far.commands().count(FLUSH) == 1


def test_flush_that_waited_for_one_of_our_own_is_sent_after_it(far: FarServer) -> None:
    held: list[Asked] = []

    def hold_the_first_flush(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command == FLUSH and not held:
            held.append(asked)
            return b""
        return simple(held[0].cookie) + server.reply(asked) if asked.command == READ else None

    far.behave = hold_the_first_flush
    with opened(far.uri) as device, ThreadPoolExecutor(2) as pool:
        write_until_flushed(far, device.pwrite)
        flushing = [pool.submit(device.flush) for _ in range(2)]
        device.pread(1, 0)
        for flush in flushing:
            flush.result(PATIENCE_SECONDS)
    assert far.commands()[-4:].count(FLUSH) >= 2
    assert far.stable == far.data


def test_flush_of_our_own_whose_connection_broke_is_sent_again(far: FarServer) -> None:
    cut: list[Asked] = []

    def hang_up_on_the_first_flush(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command == FLUSH and not cut:
            cut.append(asked)
            raise HangUp
        return None

    far.behave = hang_up_on_the_first_flush
    with opened(far.uri) as device:
        for piece in range(UNTIL_ONE_OF_OUR_OWN):
            device.pwrite(PIECE, piece * len(PIECE))
        device.pwrite(b"end", SIZE - 3)
        device.flush()
        assert far.stable == far.data
    assert far.handshakes == 2


@pytest.mark.parametrize("error", [EIO, ENOSPC])
def test_change_that_failed_where_each_one_is_a_flush_fails_all_flushes(far: FarServer, error: int) -> None:
    """Its server may have told it, and no other one, of the loss of what was written beside it."""
    far.flags = ALL & ~SEND_FLUSH
    with opened(far.uri) as device:
        device.pwrite(b"x", 0)
        device.flush()
        far.behave = lambda server, asked: simple(asked.cookie, error) if asked.offset == 5 else None
        with pytest.raises(OSError):
            device.pwrite(b"y", 5)
        assert [flush_error(device) for _ in range(2)] == [error] * 2
        device.pwrite(b"z", 0)
        assert device.pread(1, 0) == b"z"


@pytest.mark.parametrize("error", [EINVAL, ENOTSUP])
def test_change_that_cannot_be_done_at_all_is_no_flush_that_failed(far: FarServer, error: int) -> None:
    far.flags = ALL & ~SEND_FLUSH
    far.behave = lambda server, asked: simple(asked.cookie, error) if asked.command == WRITE_ZEROES else None
    with opened(far.uri) as device:
        with pytest.raises(OSError):
            device.write_zeroes(0, 100, fast_only=True)
        device.flush()


def test_write_that_failed_where_flushes_are_asked_for_is_the_callers_alone(far: FarServer) -> None:
    far.behave = lambda server, asked: simple(asked.cookie, ENOSPC) if asked.offset == 5 else None
    with opened(far.uri) as device:
        with pytest.raises(OSError):
            device.pwrite(b"y", 5)
        device.flush()


class Forgetful:
    """As Linux does it: what a flush fails to write is clean from then on, and gone with the next crash."""

    def __init__(self) -> None:
        self.unwritten: list[slice] = []
        self.next_flush_fails = False
        self.crash_in = 0

    def __call__(self, server: FarServer, asked: Asked) -> bytes | None:
        self.crash_in -= 1
        if self.crash_in == 0:
            self.unwritten.clear()
            raise Crash
        if asked.command == FLUSH:
            error, self.next_flush_fails = EIO if self.next_flush_fails else 0, False
            for part in self.unwritten if not error else ():
                server.stable[part] = server.data[part]
            self.unwritten.clear()
            return simple(asked.cookie, error)
        if asked.command == WRITE:
            self.unwritten.append(slice(asked.offset, asked.offset + asked.length))
        return None


steps = st.lists(
    st.tuples(
        st.sampled_from(["write"] * 8 + ["read", "flush", "fail", "crash", "crash in"]),
        st.integers(0, 7000),
        st.integers(1, 1000),
    ),
    min_size=10,
    max_size=60,
)


@settings(max_examples=80)
@given(steps=steps)
def test_what_was_flushed_survives_and_what_was_acknowledged_can_be_read(
    steps: list[tuple[str, int, int]],
) -> None:
    """Whichever flush fails, one of a caller's or one of our own; and none succeeds after it."""
    with quick_folder() as folder, far_server(folder, 8192) as far:
        far.behave = forgetful = Forgetful()
        with NbdDevice.open(far.uri, reconnect_s=PATIENCE_SECONDS, keep_bytes=8192) as device:
            model, lost = bytearray(8192), list[OSError]()
            device.tell_of_loss(lost.append)
            for number, (step, offset, length) in enumerate(steps):
                data = bytes([number + 1]) * length
                if step == "write":
                    try:
                        device.pwrite(data, offset)
                    except OSError:
                        assert lost, "no more can be kept"
                    else:
                        model[offset : offset + length] = data
                elif step == "read":
                    assert device.pread(8192, 0) == model
                elif step == "fail":
                    forgetful.next_flush_fails = True
                elif step == "crash in":
                    forgetful.crash_in = length % 8 + 1
                elif step == "crash":
                    forgetful.unwritten.clear()
                    far.crash()
                else:
                    try:
                        device.flush()
                    except OSError:
                        assert lost
                    else:
                        assert not lost
                        assert far.stable == model
            assert device.pread(8192, 0) == model


# --- what cannot be written again ---


def refusing_again(command: int, error: int) -> Behaviour:
    """A server that has lost what was not flushed, and takes no request of that kind from its next connection."""
    return lambda server, asked: (
        simple(asked.cookie, error) if asked.connection > 1 and asked.command == command else None
    )


def test_server_that_refuses_what_it_had_acknowledged_can_be_read_and_never_flushed(far: FarServer) -> None:
    far.data[:4] = far.stable[:4] = b"old."
    far.behave = refusing_again(WRITE, ENOSPC)
    with opened(far.uri) as device:
        device.pwrite(b"new.", 0)
        device.write_zeroes(8192, 100)
        device.pwrite(b"more", 4096)
        far.crash()
        assert device.pread(4, 0) == b"old."
        assert device.in_doubt() == [(0, 4), (4096, 4100)]
        assert [flush_error(device) for _ in range(2)] == [errno.ENOSPC] * 2
        with pytest.raises(OSError):
            device.pwrite(b"new", 9000)
        device.write_zeroes(9000, 10)
    assert far.handshakes == 2
    assert far.commands() == [
        WRITE,
        WRITE_ZEROES,
        WRITE,
        *[WRITE, WRITE_ZEROES, WRITE],
        READ,
        WRITE,
        WRITE_ZEROES,
    ]


def test_flush_under_way_while_what_was_acknowledged_is_refused_fails(far: FarServer) -> None:
    def die_once(server: FarServer, asked: Asked) -> bytes | None:
        if asked.connection == 1 and asked.command == FLUSH:
            raise Crash
        return refusing_again(WRITE, EIO)(server, asked)

    far.behave = die_once
    with opened(far.uri) as device:
        device.pwrite(b"lost", 0)
        assert flush_error(device) == errno.EIO
    assert far.commands() == [WRITE, FLUSH, WRITE, FLUSH]


def test_what_was_refused_is_tried_again_on_each_new_connection(far: FarServer) -> None:
    far.behave = refusing_again(WRITE, ENOSPC)
    with opened(far.uri) as device:
        device.pwrite(b"data", 0)
        far.crash()
        assert device.pread(4, 0) == bytes(4)
        far.behave = honest
        far.crash()
        assert device.pread(4, 0) == b"data"
        assert flush_error(device) == errno.ENOSPC, "what came between may rest on what was lost"


def test_server_that_shuts_down_while_it_is_written_to_again_has_refused_nothing(far: FarServer) -> None:
    def shut_down_twice(server: FarServer, asked: Asked) -> bytes | None:
        return simple(asked.cookie, ESHUTDOWN) if asked.connection in (2, 3) else None

    far.behave = shut_down_twice
    with opened(far.uri) as device:
        device.pwrite(b"kept", 0)
        far.crash()
        device.flush()
        assert far.stable[:4] == b"kept"
    assert far.handshakes == 4


def test_zeroes_that_were_fast_are_written_again_at_any_speed(far: FarServer) -> None:
    """They may not be fast any more where the server lost nothing, and wrote them out by then."""

    def none_is_fast_again(server: FarServer, asked: Asked) -> bytes | None:
        return simple(asked.cookie, ENOTSUP) if asked.connection > 1 and asked.flags & FAST_ZERO else None

    far.behave = none_is_fast_again
    with opened(far.uri) as device:
        device.write_zeroes(0, 4096, fast_only=True)
        device.write_zeroes(4096, 4096, may_unmap=False)
        far.crash()
        device.flush()
    assert [asked.flags for asked in far.asked if asked.command == WRITE_ZEROES] == [
        FAST_ZERO, NO_HOLE, 0, NO_HOLE,
    ]  # fmt: skip


def test_discard_that_is_refused_the_second_time_is_in_doubt_and_no_loss(far: FarServer) -> None:
    """It was advice; but what is read there now may be what was there before."""
    far.behave = refusing_again(TRIM, EIO)
    with opened(far.uri) as device:
        device.discard(4096, 4096)
        far.crash()
        device.flush()
        assert device.in_doubt() == [(4096, 8192)]


def test_write_whose_caller_is_interrupted_just_before_it_is_sent_is_in_doubt_at_once(
    far: FarServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller is gone when another thread, which connects again, sends it: in which period is not known."""
    doubts: list[Sequence[tuple[int, int]]] = []
    with opened(far.uri) as device:
        talk = device._conversation
        late, call, not_sent = Request(WRITE, 4096, 4, data=b"late"), Call(1), talk._not_sent

        def and_interrupt(link: Link) -> list[Request]:
            todo = not_sent(link)
            if late in todo:
                talk._abandon(call, [late])
                doubts.append(device.in_doubt())
            return todo

        monkeypatch.setattr(talk, "_not_sent", and_interrupt)
        assert talk._link is not None
        talk._lose(talk._link, ConnectionResetError())
        talk.post(call, [late])
        device.pread(1, 0)
    assert doubts == [[(4096, 4100)]]


class Interrupted(BaseException):
    pass


class InterruptedOnceItIsHeld:
    """A lock; the first thread that gets it is interrupted right then, as by Ctrl-C."""

    def __init__(self, lock: AbstractContextManager[object]) -> None:
        self._lock: Any = lock
        self.is_due = True

    def acquire(self, blocking: bool = True) -> bool:
        is_held: bool = self._lock.acquire(blocking)
        if is_held and self.is_due:
            self.is_due = False
            raise Interrupted
        return is_held

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize(
    ("holder", "lock", "pieces"),
    [("_link", "_sending", 0), ("flushes", "_turn", UNTIL_ONE_OF_OUR_OWN - 1)],
    ids=["to send", "to flush by ourselves"],
)
def test_writer_that_is_interrupted_just_when_it_has_a_lock_does_not_keep_it(
    far: FarServer, monkeypatch: pytest.MonkeyPatch, holder: str, lock: str, pieces: int
) -> None:
    device = opened(far.uri)
    for piece in range(pieces):
        device.pwrite(PIECE, piece * len(PIECE))
    has_it = getattr(device._conversation, holder)
    interrupted = InterruptedOnceItIsHeld(getattr(has_it, lock))
    monkeypatch.setattr(has_it, lock, interrupted)
    with pytest.raises(Interrupted):
        device.pwrite(b"lost", 0)
    assert not interrupted.is_due
    require_that_it_goes_on(device, far)


def require_that_it_goes_on(device: NbdDevice, far: FarServer) -> None:
    def go_on() -> None:
        device.pwrite(b"kept", 0)
        device.flush()
        device.close()

    going_on = threading.Thread(target=go_on, daemon=True)  # a test that fails must end
    going_on.start()
    going_on.join(PATIENCE_SECONDS)
    assert not going_on.is_alive()
    assert far.stable[:4] == b"kept"


def test_flush_of_our_own_that_was_interrupted_before_it_was_sent_is_not_waited_for(
    far: FarServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = opened(far.uri)
    for piece in range(UNTIL_ONE_OF_OUR_OWN - 1):
        device.pwrite(PIECE, piece * len(PIECE))

    def interrupt(link: Link, requests: Sequence[Request]) -> None:
        assert [request.command for request in requests] == [FLUSH]
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(Link, "post", interrupt)
        with pytest.raises(Interrupted):
            device.pwrite(b"lost", 0)
    require_that_it_goes_on(device, far)


def test_write_whose_caller_is_interrupted_before_it_waits_is_in_doubt(
    far: FarServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted

    with opened(far.uri) as device:
        monkeypatch.setattr(device._conversation, "wait_for", interrupt)
        with pytest.raises(Interrupted):
            device.pwrite(b"late", 4096)
        assert device.in_doubt() == [(4096, 4100)]


def test_write_whose_caller_is_interrupted_twice_is_in_doubt(
    far: FarServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time just when the first interruption is dealt with."""
    with opened(far.uri) as device:
        talk, doubt = device._conversation, device._conversation._doubt

        def interrupt(*_: object) -> None:
            raise Interrupted

        def interrupt_once(sent: Iterable[Request]) -> None:
            monkeypatch.setattr(talk, "_doubt", doubt)
            raise Interrupted

        monkeypatch.setattr(talk, "_lead_or_wait", interrupt)
        monkeypatch.setattr(talk, "_doubt", interrupt_once)
        with pytest.raises(Interrupted):
            device.pwrite(b"late", 4096)
        assert device.in_doubt() == [(4096, 4100)]


def test_write_at_whose_answer_another_thread_was_interrupted_ends(
    far: FarServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept and in flight as well: what is written again is not sent once more as a request in flight."""
    far.behave = lambda server, asked: b"" if asked.command == READ and asked.connection == 1 else None
    with opened(far.uri) as device, ThreadPoolExecutor(1) as pool:
        talk, conclude = device._conversation, device._conversation._conclude

        def write_while_another_leads() -> None:
            while talk._leader is None:
                time.sleep(0.001)
            device.pwrite(b"kept", 0)

        def interrupt_once(request: Request) -> None:
            monkeypatch.setattr(talk, "_conclude", conclude)
            raise Interrupted

        monkeypatch.setattr(talk, "_conclude", interrupt_once)
        writing = pool.submit(write_while_another_leads)
        with pytest.raises(Interrupted):
            device.pread(1, 9)
        writing.result(PATIENCE_SECONDS)
        far.crash()
        assert device.pread(4, 0) == b"kept"
    assert far.handshakes == 3


def test_writer_that_is_interrupted_while_what_was_flushed_is_let_go_of_spoils_nothing_for_others(
    far: FarServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flush was one of our own, and is answered once more on the next connection."""
    let_go = Unflushed._let_go_before

    def interrupt(change: Request) -> int:
        monkeypatch.undo()
        raise Interrupted

    def let_go_and_interrupt(kept: Unflushed, mark: int) -> None:
        monkeypatch.setattr(unflushed, "_cost", interrupt)
        let_go(kept, mark)

    monkeypatch.setattr(Unflushed, "_let_go_before", let_go_and_interrupt)
    with opened(far.uri) as device:
        with pytest.raises(Interrupted):
            write_until_flushed(far, device.pwrite)
        device.pwrite(b"more", 0)
        device.flush()
        device.pwrite(b"late", 4)
        far.crash()
        assert device.pread(9, 0) == b"morelatex"
    assert far.commands()[-2:] == [WRITE, READ], "only what no flush covers is written again"


# --- forks ---

FORKING = """
import os, sys
from lmdbitmap.nbd.client.device import NbdDevice
device = NbdDevice.open(sys.argv[1], reconnect_s=0)
device.pwrite(b"kept, as nobody flushed", 0)
device._conversation._state.acquire()  # as another thread, which the child will not have
child = os.fork()
if child == 0:
    for attempt in (lambda: device.pread(4, 0), lambda: device.pwrite(b"child", 0), device.flush):
        try:
            attempt()
        except OSError as refused:
            print(refused.strerror, flush=True)
    device.close()
    os._exit(0)
os.waitpid(child, 0)
device._conversation._state.release()
print(device.pread(4, 0).decode())
device.close()
"""


def test_forked_child_says_nothing_on_its_parents_connection(far: FarServer) -> None:
    """The answer would be taken for one of the parent's, as both go on counting from the same cookie."""
    said = run(sys.executable, "-c", FORKING, far.uri).stdout.splitlines()
    assert said == [*["the image is closed"] * 3, "kept"]
    assert far.handshakes == 1
    assert far.commands() == [WRITE, READ]


# --- what is told of a tracked disk ---


@pytest.fixture
def store(far: FarServer, tmp_path: Path) -> Iterator[Store]:
    with closing(Store.create(str(tmp_path / "store"))) as store:
        session.add(store, "sda", far.uri, granularity_bits=12)
        with attached(store) as disk:
            disk.checkpoint("start")
        far.asked.clear()
        yield store


def attached(store: Store) -> Filter:
    return Filter.attach(store, "sda", background=False, open_device=opened)


def test_flush_that_failed_unseen_loses_track_at_once_and_durably(far: FarServer, store: Store) -> None:
    """What the server lost may go back to what it was when a later period is open, which would call it clean."""
    disk = attached(store)
    far.behave = failing_flush(1)
    far.asked.clear()
    write_until_flushed(far, disk.pwrite)
    assert trust_of(changes(store, "sda", since="start")) is Trust.UNTRUSTED, "whoever dies now has said so"
    assert trust_of(disk.changes(since="start")) is Trust.UNTRUSTED
    for _ in range(2):
        with pytest.raises(StorageError, match="could not be flushed"):
            disk.checkpoint("lie")
        with pytest.raises(StorageError, match="could not be flushed"):
            disk.flush()
    disk.background_pass()
    assert trust_of(disk.changes(since="start")) is Trust.UNTRUSTED, "only a new attach begins anew"
    disk.abandon()
    with attached(store) as disk:
        assert "could not be flushed" in str(disk.standing().reason)
        disk.checkpoint("true")
        assert trust_of(disk.changes(since="true")) is Trust.EXACT


class LosesWhenMeasured(FileDevice):
    """Tells of a loss just when its size is asked for."""

    tell: Callable[[OSError], None] | None = None
    is_losing = False

    def tell_of_loss(self, tell: Callable[[OSError], None]) -> None:
        self.tell = tell

    @property
    def size(self) -> int:
        if self.is_losing and self.tell is not None:
            self.tell(OSError(errno.EIO, "injected"))
        return super().size


def test_loss_while_tracking_begins_again_is_not_forgotten_with_what_was_lost_before(tmp_path: Path) -> None:
    tracked = TrackedDisk(tmp_path, 64 * 4096).clean()
    with closing(tracked.store):
        disk = Filter.attach(tracked.store, "sda", open_device=LosesWhenMeasured.open, background=False)
        disk._voucher.lose_track("another reason")
        device = disk.device
        assert isinstance(device, LosesWhenMeasured)
        device.is_losing = True
        disk.regain_trust()
        assert trust_of(disk.changes()) is Trust.UNTRUSTED
        assert trust_of(tracked.changes()) is Trust.UNTRUSTED
        disk.abandon()


def test_track_is_lost_where_what_was_acknowledged_is_refused(far: FarServer, store: Store) -> None:
    disk = attached(store)
    first = far.handshakes

    def refuse(server: FarServer, asked: Asked) -> bytes | None:
        return simple(asked.cookie, ENOSPC) if asked.connection > first and asked.command == WRITE else None

    far.behave = refuse
    disk.pwrite(b"x", 5000)
    far.crash()
    assert disk.pread(1, 5000) == b"\0"
    assert trust_of(changes(store, "sda", since="start")) is Trust.UNTRUSTED
    with pytest.raises(
        StorageError, match="could not be flushed: its server answered: No space left on device"
    ):
        disk.checkpoint("lie")
    disk.abandon()


def test_discard_that_is_refused_the_second_time_is_dirty_in_each_period(
    far: FarServer, store: Store
) -> None:
    with attached(store) as disk:
        first = far.handshakes

        def refuse(server: FarServer, asked: Asked) -> bytes | None:
            return simple(asked.cookie, EIO) if asked.connection > first and asked.command == TRIM else None

        far.behave = refuse
        disk.discard(5 * 4096, 4096)
        far.crash()
        disk.pread(1, 0)
        for name in ("one", "two"):
            disk.checkpoint(name)
            assert blocks_of(disk.changes(since=name)) == {5}


def test_guest_writes_on_after_a_flush_that_failed_unseen(far: FarServer, store: Store) -> None:
    disk = attached(store)
    far.behave = failing_flush(1)
    far.asked.clear()
    write_until_flushed(far, disk.pwrite)
    disk.pwrite(b"goes on", 5 * 4096)
    assert disk.pread(7, 5 * 4096) == b"goes on"
    disk.abandon()
    assert far.commands().count(WRITE) == UNTIL_ONE_OF_OUR_OWN + 2
