from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.image import is_far, is_same_image, lasting_name, open_image
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.uri import parse
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from lmdbitmap.tracker.changes import changes
from lmdbitmap.tracker.scratch import Scratch
from tests.helpers.nbd_far import Asked, Crash, FarServer, HangUp, far_server, until_it_works
from tests.helpers.nbd_raw import FLUSH, WRITE
from tests.helpers.support import make_raw_image
from tests.helpers.tracked import TrackedDisk, blocks_of, trust_of


@pytest.fixture
def far(tmp_path: Path) -> Iterator[FarServer]:
    with far_server(tmp_path) as server:
        yield server


@pytest.fixture
def store(tmp_path: Path, far: FarServer) -> Iterator[Store]:
    """Tracks the far image as `sda`, in blocks of 4 KiB, nothing dirty since `start`."""
    with Store.create(str(tmp_path / "store")) as store:
        session.add(store, "sda", far.uri, granularity_bits=12)
        with Filter.attach(store, "sda", background=False) as attached:
            attached.checkpoint("start")
        yield store


def test_uri_opens_what_a_server_has_and_a_path_a_file(far: FarServer, tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    for image, kind in ((far.uri, NbdDevice), (str(tmp_path / "disk.raw"), FileDevice)):
        device = open_image(image, read_only=True)
        assert (type(device), device.read_only, is_far(image)) == (kind, True, kind is NbdDevice)
        device.close()


def test_name_lasts_whatever_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("socket")
    assert lasting_name("disk.raw") == str(tmp_path / "disk.raw")
    assert lasting_name("nbd+unix:///a%62?socket=link") == f"nbd+unix:///ab?socket={tmp_path}/socket"
    assert lasting_name("NBD://Host/x") == "nbd://host:10809/x"


def test_name_that_cannot_last_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for image in ("caf\udce9.raw", "nbds://host/x?tls-type=psk", "nbd+unix:///x"):
        with pytest.raises(InvalidArgument):
            lasting_name(image)
    (tmp_path / ("f" * 100)).mkdir()
    monkeypatch.chdir(tmp_path / ("f" * 100))
    with pytest.raises(InvalidArgument, match="longer than 107 bytes"):
        lasting_name("nbd+unix:///x?socket=s")


def test_far_disk_is_tracked_from_session_to_session(far: FarServer, store: Store) -> None:
    with Filter.attach(store, "sda", background=False) as attached:
        attached.pwrite(b"x", 5000)
        attached.lane().write_many([(9000, memoryview(b"y")), (40_000, memoryview(b"z"))])
    with Filter.attach(store, "sda", background=False) as attached:
        attached.write_zeroes(60_000, 1)
        assert blocks_of(attached.changes(since="start")) == {1, 2, 9, 14}
    answer = changes(store, "sda", since="start")
    assert (trust_of(answer), blocks_of(answer)) == (Trust.EXACT, {1, 2, 9, 14})
    assert far.stable[5000:5001] + far.stable[9000:9001] + far.stable[40_000:40_001] == b"xyz"


@pytest.mark.parametrize("settled", [False, True])
def test_writes_of_one_batch_are_under_way_together(far: FarServer, store: Store, settled: bool) -> None:
    """The server answers none of them until it has seen them all."""
    held: list[Asked] = []

    def all_or_none(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command != WRITE:
            return None
        held.append(asked)
        return b"".join(server.reply(held.pop()) for _ in range(8)) if len(held) == 8 else b""

    with Filter.attach(store, "sda", background=False) as attached:
        if settled:
            attached.pwrite(bytes(32768), 0)
        far.behave = all_or_none
        writes = [(number * 4096, memoryview(bytes([number + 1]) * 10)) for number in range(8)]
        off_the_disk = [
            (attached.size, memoryview(b"x")),
            (-1, memoryview(b"x")),
            (attached.size, memoryview(b"")),
        ]
        failed = attached.lane().write_many([*off_the_disk, *writes])
        assert failed == {0: errno.ENOSPC, 1: errno.ENOSPC}
        assert [far.data[offset] for offset, _ in writes] == list(range(1, 9))
        assert blocks_of(attached.changes(since="start")) == set(range(8))


def test_server_with_room_for_one_client_is_not_asked_for_more(far: FarServer, store: Store) -> None:
    with Filter.attach(store, "sda", background=False):
        before = far.handshakes
        assert blocks_of(changes(store, "sda", since="start")) == set()
        assert far.handshakes == before
    changes(store, "sda", since="start")
    assert far.handshakes == before + 1


def test_writes_that_fail_are_dirty(far: FarServer, store: Store) -> None:
    """A server that goes away takes no dirt with it: whether a write took place or not, its blocks are named."""

    def impatient(image: str) -> NbdDevice:
        return NbdDevice.open(image, reconnect_s=0)

    with Filter.attach(store, "sda", background=False, open_device=impatient) as attached:
        far.stop_listening()
        far.crash()
        with pytest.raises(OSError):
            attached.pwrite(b"x", 5000)
        assert blocks_of(attached.changes(since="start")) == {1}
        far.listen()
        until_it_works(lambda: attached.pwrite(b"x", 5000))
    assert blocks_of(changes(store, "sda", since="start")) == {1}


@pytest.mark.parametrize("patience_s", [0.0, 20.0])
def test_write_in_flight_on_a_connection_that_broke_is_dirty_in_every_period_that_follows(
    far: FarServer, store: Store, patience_s: float
) -> None:
    """It may take place whenever the old connection is looked at, also where a second copy was acknowledged."""

    def open_device(image: str) -> NbdDevice:
        return NbdDevice.open(image, reconnect_s=patience_s)

    with Filter.attach(store, "sda", background=False, open_device=open_device) as attached:
        attached.pwrite(b"x", 9 * 4096)
        lost: list[Asked] = []

        def lose_one(server: FarServer, asked: Asked) -> bytes | None:
            if asked.command != WRITE or lost:
                return None
            lost.append(asked)
            raise HangUp

        far.behave = lose_one
        if patience_s:
            attached.pwrite(b"x" * 5000, 4000)
        else:
            with pytest.raises(OSError):
                attached.pwrite(b"x" * 5000, 4000)
        assert blocks_of(attached.changes(since="start")) == {0, 1, 2, 9}
        for name in ("first", "second"):
            until_it_works(lambda: attached.flush())
            attached.checkpoint(name)
            assert blocks_of(attached.changes(since=name)) == {0, 1, 2}
        attached.pwrite(b"y", 14 * 4096)
    assert blocks_of(changes(store, "sda", since="second")) == {0, 1, 2, 14}
    assert blocks_of(changes(store, "sda", since="first", until="second")) == {0, 1, 2}


def test_doubt_makes_no_snapshot_keep_anything(far: FarServer, store: Store, tmp_path: Path) -> None:
    """Else a large piece of zeroes that was in flight once would break the snapshot of each backup."""
    lost: list[Asked] = []

    def lose_one(server: FarServer, asked: Asked) -> bytes | None:
        if asked.command != WRITE or lost:
            return None
        lost.append(asked)
        raise HangUp

    with Filter.attach(store, "sda", background=False) as attached:
        far.behave = lose_one
        attached.pwrite(b"x" * 32768, 0)
        snapshot = attached.snapshot("now", Scratch(str(tmp_path)))
        attached.background_pass()
        assert blocks_of(attached.changes(since="now")) == set(range(8))
        assert (snapshot.kept_bytes, snapshot.broken) == (0, None)
        attached.pwrite(b"y", 0)
        assert snapshot.kept_bytes > 0
        assert snapshot.pread(1, 0) == b"x"


def test_write_that_was_repeated_on_a_connection_that_broke_too_is_dirty_at_once(
    far: FarServer, store: Store
) -> None:
    """It was acknowledged, and counted for the period before, but its copies are under way in this one."""

    def die_twice(server: FarServer, asked: Asked) -> bytes | None:
        if (asked.connection, asked.command) == (before, FLUSH):
            raise Crash
        if (asked.connection, asked.command) == (before + 1, WRITE):
            raise HangUp
        return None

    with Filter.attach(store, "sda", background=False) as attached:
        before, far.behave = far.handshakes, die_twice
        attached.pwrite(b"x", 5000)
        attached.checkpoint("next")
        assert far.handshakes == before + 2
        assert blocks_of(attached.changes(since="next")) == {1}
    assert far.stable[5000:5001] == b"x"


def test_one_image_has_many_names(tmp_path: Path) -> None:
    image = make_raw_image(tmp_path / "disk.raw", 4096)
    other = make_raw_image(tmp_path / "other.raw", 4096)
    (tmp_path / "symbolic").symlink_to("disk.raw")
    os.link(image, tmp_path / "hard")
    names = [image, tmp_path / "symbolic", tmp_path / "hard", tmp_path / "x" / ".." / "disk.raw"]
    assert [is_same_image(str(image), str(name)) for name in names] == [True] * 4
    missing = str(tmp_path / "none")
    assert not is_same_image(str(image), str(other))
    assert not is_same_image(str(image), missing)
    assert is_same_image(missing, missing)


def test_one_export_has_many_uris() -> None:
    assert is_same_image("nbd://host/sda", "nbd://host:10809/sda")
    assert not is_same_image("nbd://host/sda", "nbd://host/sdb")
    assert not is_same_image("nbd://host/sda", "/nbd://host/sda")


def test_one_export_is_one_image_by_all_names_of_its_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as another:
        one.bind(str(tmp_path / "one"))
        another.bind(str(tmp_path / "another"))
    os.link(tmp_path / "one", tmp_path / "same")
    uris = {name: f"nbd+unix:///sda?socket={tmp_path}/{name}" for name in ("one", "same", "another", "none")}
    assert is_same_image(uris["one"], uris["same"])
    assert is_same_image(uris["none"], uris["none"])
    assert not is_same_image(uris["one"], uris["same"].replace("sda", "sdb"))
    for name in ("another", "none"):
        assert not is_same_image(uris["one"], uris[name])


def test_one_export_is_one_image_by_all_names_of_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"store": ["10.0.0.7", "fd00::7"], "store.lan": ["fd00::7"], "other": ["10.0.0.8"]}

    def look_up(host: str, port: int, **_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        if host == "away":
            raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")
        return [(0, 0, 0, "", (address, port)) for address in hosts.get(host, [host])]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    same = [
        is_same_image("nbd://store/sda", f"nbd://{name}/sda")
        for name in ("store.lan", "10.0.0.7", "[fd00::7]")
    ]
    assert same == [True] * 3
    for another in ("nbd://other/sda", "nbd://store.lan/sdb", "nbd://store.lan:10810/sda", "nbd://away/sda"):
        assert not is_same_image("nbd://store/sda", another)
    assert not is_same_image("nbd://away/sda", "nbd+unix:///sda?socket=/s")


def test_one_export_is_one_image_however_it_is_spoken_to() -> None:
    assert is_same_image("nbd://host/sda", "nbds://host/sda?tls-certificates=/etc/pki")
    assert is_same_image(
        "nbds+unix:///?socket=/s&tls-hostname=a", "nbds+unix:///?socket=/s&tls-verify-peer=false"
    )
    assert not is_same_image("nbds://host/sda", "nbds://host/sdb")
    assert parse("nbds://host/sda?tls-hostname=a").bare.uri == "nbd://host:10809/sda"


def test_certificates_are_found_from_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the link that leads to them, so that it may lead to others some day."""
    (tmp_path / "of 2026").mkdir()
    (tmp_path / "present").symlink_to("of 2026")
    monkeypatch.chdir(tmp_path)
    lasting = lasting_name("nbds://host/sda?tls-certificates=present")
    assert lasting == f"nbds://host:10809/sda?tls-certificates={tmp_path}/present"


class Doubtful(FileDevice):
    """Has doubts, and more of them after its next flush."""

    doubts: Sequence[tuple[int, int]] = ()
    after_flush: Sequence[tuple[int, int]] = ()

    def in_doubt(self) -> Sequence[tuple[int, int]]:
        return self.doubts

    def flush(self) -> None:
        super().flush()
        self.doubts, self.after_flush = [*self.doubts, *self.after_flush], ()


@pytest.mark.parametrize("loaded", [False, True])
def test_doubt_that_comes_up_at_the_end_of_a_period_is_in_it(tmp_path: Path, loaded: bool) -> None:
    """A write of an earlier period may land before the next checkpoint, of which no pass had time to tell (law 2)."""
    tracked = TrackedDisk(tmp_path, 64 * 4096).clean()
    with closing(tracked.store):
        with Filter.attach(tracked.store, "sda", open_device=Doubtful.open, background=False) as attached:
            attached.checkpoint("first")
            if loaded:
                attached.pwrite(b"x", 9 * 4096)
            device = attached.device
            assert isinstance(device, Doubtful)
            device.doubts = [(5 * 4096, 5 * 4096 + 1)]
            attached.checkpoint("second")
            device.after_flush = [(7 * 4096, 7 * 4096 + 1)]
        assert blocks_of(tracked.changes("first", "second")) == ({5, 9} if loaded else {5})
        assert blocks_of(tracked.changes("second")) == {5, 7}


@pytest.mark.parametrize("held", [False, True])
def test_doubt_that_comes_up_while_a_checkpoint_is_flushed_survives_its_owner(
    tmp_path: Path, held: bool
) -> None:
    """A write of the period before, sent again on a new connection, may land in the new one, though no pass was yet."""
    tracked = TrackedDisk(tmp_path, 64 * 4096).clean()
    with closing(tracked.store):
        attached = Filter.attach(tracked.store, "sda", open_device=Doubtful.open, background=False)
        device = attached.device
        assert isinstance(device, Doubtful)
        device.after_flush = [(7 * 4096, 7 * 4096 + 1)]
        if held:
            attached.snapshot("second", Scratch(tmp_path))
        else:
            attached.checkpoint("second")
        attached.abandon()
        assert 7 in blocks_of(tracked.changes("second"))
