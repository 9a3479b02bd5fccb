"""A disk that another process holds, through what that passes: from its image where it can, else through its export."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.access import through_owner
from lmdbitmap.access.direct import DirectDevice
from lmdbitmap.access.routes import ServedElsewhere
from lmdbitmap.backups.backup import backup
from lmdbitmap.errors import Busy, InvalidArgument, NotFound, StorageError
from lmdbitmap.filter import Filter
from lmdbitmap.nbd import control_client
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.client.dial import agreed
from lmdbitmap.nbd.client.kept_question import KeptQuestion
from lmdbitmap.nbd.control import orders
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.nbd.control.held import HeldSnapshots
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.store import Store
from lmdbitmap.tracker import session
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.snapshot import Snapshot
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.crash.tapped import TappedDevice
from tests.helpers.nbd_raw import BLOCK_STATUS, GO, READ, REQ_ONE, RawClient, string
from tests.helpers.serving import Serving, serving
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

BLOCK = 4096
ACK, LIST = 1, 3
SIZE = 100 * BLOCK + 512
OLD, NEW = os.urandom(SIZE), os.urandom(SIZE)


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def tracked(folder: Path) -> TrackedDisk:
    return TrackedDisk(folder, SIZE).clean()


@pytest.fixture
def served(tracked: TrackedDisk, folder: Path) -> Iterator[Serving]:
    with serving(tracked, folder) as served:
        served.disk.pwrite(OLD, 0)
        yield served


@contextmanager
def held(disk: Filter, *, once: bool = False) -> Iterator[Any]:
    with closing(ServedElsewhere(disk.store, [NAME])) as route:
        (point,) = route.take_point("now", [None], once=once)
        yield point.device


def test_what_was_not_kept_is_read_from_the_image_and_the_rest_from_the_owner(served: Serving) -> None:
    with held(served.disk) as device:
        assert isinstance(device, DirectDevice)
        served.disk.pwrite(NEW[: 2 * BLOCK], 10 * BLOCK)
        assert device.pread(SIZE, 0) == OLD
    assert 2 * BLOCK < sent_in_all(served) < 3 * BLOCK


def sent_in_all(served: Serving) -> int:
    """By the NBD server, which is stopped for it: a connection counts what it has sent afterwards."""
    assert served.server.stop()
    return served.server.counters.bytes_sent


def test_backup_of_a_disk_that_is_written_all_the_time_goes_past_its_owner(
    served: Serving, folder: Path, tracked: TrackedDisk
) -> None:
    def overwrite(done: int, total: int) -> None:
        served.disk.pwrite(NEW, 0)

    [made] = backup(served.disk.store, [NAME], folder / "backups", progress=overwrite)
    assert made.bytes_read >= SIZE
    assert sent_in_all(served) < SIZE // 4


def test_the_descriptor_that_is_passed_cannot_write(served: Serving) -> None:
    with held(served.disk) as device:
        fd = device._image.fd
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)


def test_no_descriptor_of_the_image_stays_open(served: Serving, tracked: TrackedDisk) -> None:
    def opened() -> int:
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):  # threads of the owner close others meanwhile
                found += os.readlink(f"/proc/self/fd/{fd}") == str(tracked.image)
        return found

    before = opened()
    with closing(ServedElsewhere(served.disk.store, [NAME])) as route:
        (point,) = route.take_point("now", [None])
        point.device.pread(BLOCK, 0)
        route._client.call("info")  # answered when the owner's own copy is closed
        assert opened() == before + 1
    assert opened() == before


def test_snapshot_that_broke_fails_the_backup_with_the_reason(tracked: TrackedDisk, folder: Path) -> None:
    class Narrow(HeldSnapshots):
        def __init__(self, filters: Mapping[str, Filter], server: Server | None, scratch: Scratch) -> None:
            super().__init__(filters, server, scratch._replace(limit_bytes=BLOCK))

    with serving(tracked, folder, Narrow) as served:
        served.disk.pwrite(OLD, 0)

        @contextmanager
        def overwrite() -> Iterator[None]:
            yield
            served.disk.pwrite(NEW, 0)

        with pytest.raises(StorageError, match="scratch file is full"):
            backup(served.disk.store, [NAME], folder / "backups", quiesced=overwrite)
        assert served.disk.pread(SIZE, 0) == NEW


def test_snapshot_that_another_releases_fails_whoever_reads(served: Serving) -> None:
    with held(served.disk) as device:
        assert device.pread(BLOCK, 0) == OLD[:BLOCK]
        path = served.disk.store.control_path(served.disk.disk.uuid)
        control_client.call(path, "release", disk=NAME, checkpoint="now")
        served.disk.pwrite(NEW, 0)
        with pytest.raises(OSError, match=r"went away|nput/output"):
            device.pread(BLOCK, 5 * BLOCK)


def test_stranger_who_reads_every_export_makes_no_backup_fail(tracked: TrackedDisk, folder: Path) -> None:
    with serving(tracked, folder, listening=folder / "nbd") as served:
        served.disk.pwrite(OLD, 0)
        with held(served.disk, once=True) as device:
            seen = read_all_that_is_listed(folder / "nbd")
            served.disk.pwrite(NEW, 0)
            assert device.pread(SIZE, 0) == OLD
        assert seen == [NAME]
        path = served.disk.store.control_path(served.disk.disk.uuid)
        ordered: dict[str, Any] = {"name": "ordered", "since": [""], "bound": False, "once": False}
        control_client.call(path, "snapshot", disks=[NAME], **ordered)
        assert read_all_that_is_listed(folder / "nbd") == [NAME, f"{NAME}@ordered"]


def read_all_that_is_listed(listening: Path) -> list[str]:
    """As a tool does that shows a server's disks; and those whose name it guesses."""
    with RawClient.connect(str(listening)) as client:
        client.greet()
        listed = [data for _, data in client.ask(LIST)[:-1]]
    names = [data[4 : 4 + int.from_bytes(data[:4], "big")].decode() for data in listed]
    for name in {*names, f"{NAME}@now"}:
        with RawClient.connect(str(listening)) as client:
            client.greet()
            if client.ask(GO, string(name) + b"\0\0")[-1][0] == ACK:
                client.structured = False
                client.do(READ, 0, SIZE)
    return names


# --- another snapshot of the same name ---


def take_the_name(disk: Filter) -> None:
    """Have the snapshot released, its checkpoint forgotten, and another one taken by its name, of newer data."""
    path = disk.store.control_path(disk.disk.uuid)
    control_client.call(path, "release", disk=NAME, checkpoint="now")
    disk.pwrite(NEW, 0)
    disk.checkpoint("between")
    control_client.call(path, "forget", disk=NAME, checkpoint="now")
    control_client.call(path, "snapshot", disks=[NAME], name="now", since=[""], bound=False, once=False)


def with_another_by(served: Serving, monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
    """Have the name taken just before that function of a module is called."""
    function = getattr(place, name)

    def meddled(*words: Any, **named: Any) -> Any:
        monkeypatch.setattr(place, name, function)
        take_the_name(served.disk)
        return function(*words, **named)

    monkeypatch.setattr(place, name, meddled)


@pytest.mark.parametrize(
    ("offers", "place"),
    [(True, "_opened"), (True, "_direct"), (True, "_image"), (False, "_opened"), (False, "_direct_if_offered"),
     (None, "_opened"), (None, "_direct_if_offered")],
)  # fmt: skip
def test_newer_data_under_the_same_name_is_not_believed(
    served: Serving, monkeypatch: pytest.MonkeyPatch, offers: bool | None, place: str
) -> None:
    offer(offers, monkeypatch)
    with_another_by(served, monkeypatch, through_owner, place)
    with closing(ServedElsewhere(served.disk.store, [NAME])) as route:
        (point,) = route.take_point("now", [None], once=True)

        def read_and_prove() -> None:
            point.device.pread(SIZE, 0)
            route.prove(point)

        with pytest.raises((OSError, Busy, NotFound)):
            read_and_prove()
        route.end_reading()
    if offers is not None:  # an older owner knows them by their names alone
        assert len(served.disk.snapshots) == 1, "somebody else's is held still"


def test_checkpoint_that_another_has_replaced_at_once_is_refused(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_another_by(served, monkeypatch, ServedElsewhere, "_found")
    with (
        closing(ServedElsewhere(served.disk.store, [NAME])) as route,
        pytest.raises(Busy, match="another one has its"),
    ):
        route.take_point("now", [None])


def test_snapshot_is_found_by_its_uuid_too(served: Serving) -> None:
    path = served.disk.store.control_path(served.disk.disk.uuid)
    snapshot = served.disk.snapshot("now", Scratch(str(Path(served.disk.store.path).parent)))
    ours: dict[str, Any] = {"disk": NAME, "checkpoint": "now", "uuid": str(snapshot.checkpoint.uuid)}
    owner = control_client.reach(path)
    assert owner is not None
    with owner:
        for operation in ("image", "release"):
            with pytest.raises(NotFound, match="no snapshot of checkpoint 'now' with uuid 0"):
                owner.call(operation, **{**ours, "uuid": "0"})
        os.close(owner.image(**ours))
        assert owner.call("release", **ours)["broken"] is None


def offer(direct: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the owner say this of its image; None as an older one, which knows of neither image nor uuids."""
    if direct:
        return
    operations = dict(orders._OPERATIONS)
    take = operations["snapshot"]

    def told(*words: Any, **named: Any) -> orders.Answer:
        [one] = take.act(*words, **named)["snapshots"]
        return {"snapshots": [{key: one[key] for key in one if key != "direct"} if direct is None
                              else {**one, "direct": False}]}  # fmt: skip

    operations["snapshot"] = take._replace(act=told)
    if direct is None:
        del operations["image"]
        operations["release"] = operations["release"]._replace(optional={})
    monkeypatch.setattr(orders, "_OPERATIONS", operations)


# --- where it is not offered, or cannot be had ---


def test_owner_that_does_not_know_of_it_is_read_through(
    served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(None, monkeypatch)
    with held(served.disk) as device:
        assert isinstance(device, NbdDevice)
        served.disk.pwrite(NEW, 0)
        assert device.pread(SIZE, 0) == OLD


class CannotOpen(HeldSnapshots):
    def open_image(self, disk: str, checkpoint: str, uuid: str | None = None) -> int:
        raise StorageError("image", OSError(13, "Permission denied"), next_step="none")


class OpensAnother(HeldSnapshots):
    """Of another size."""

    def open_image(self, disk: str, checkpoint: str, uuid: str | None = None) -> int:
        return os.memfd_create("another")


@pytest.mark.parametrize("holding", [CannotOpen, OpensAnother])
def test_image_that_cannot_be_opened_again_is_read_through_the_owner(
    tracked: TrackedDisk, folder: Path, holding: type[HeldSnapshots]
) -> None:
    with serving(tracked, folder, holding) as served, held(served.disk) as device:
        served.disk.pwrite(NEW, 0)
        assert isinstance(device, NbdDevice)
        assert device.pread(SIZE, 0) == bytes(SIZE)


def test_owner_with_room_for_one_connection_to_an_export_is_read_through(
    tracked: TrackedDisk, folder: Path
) -> None:
    with serving(tracked, folder, max_connections=1) as served, held(served.disk) as device:
        assert isinstance(device, NbdDevice)
        assert device.pread(SIZE, 0) == bytes(SIZE)


def test_owner_with_room_for_the_exports_alone_serves_them_all(folder: Path) -> None:
    with ExitStack() as stack:
        disks = {}
        store = Store.create(str(folder / "store"))
        for name in ("a", "b", "c"):
            (folder / name).write_bytes(bytes(SIZE))
            session.add(store, name, str(folder / name), granularity_bits=12)
            disks[name] = stack.enter_context(Filter.attach(store, name, background=False))
        server = Server(disks, max_connections=1)
        server.start()
        stack.callback(server.stop)
        holding = HeldSnapshots(disks, server, Scratch(str(folder)))
        stack.enter_context(ControlServer(disks, held=holding))
        route = stack.enter_context(closing(ServedElsewhere(store, list(disks))))
        points = route.take_point("now", [None] * 3)
        assert [type(point.device) for point in points] == [NbdDevice] * 3
        for point in points:
            assert point.device.pread(SIZE, 0) == bytes(SIZE)
            route.prove(point)


def test_image_without_a_descriptor_is_read_through_the_owner(tracked: TrackedDisk, folder: Path) -> None:
    class Tapped(TrackedDisk):
        def attach(self, *, max_armed: int = 1024) -> Filter:
            opened: Any = TappedDevice.open
            return Filter.attach(self.store, NAME, open_device=opened, background=False)

    tracked.__class__ = Tapped
    with serving(tracked, folder) as served, held(served.disk) as device:
        assert isinstance(device, NbdDevice)
        path = served.disk.store.control_path(served.disk.disk.uuid)
        owner = control_client.reach(path)
        assert owner is not None
        with owner, pytest.raises(Exception, match="has no descriptor"):
            owner.image(disk=NAME, checkpoint="now")


def test_image_of_what_is_not_held_is_not_passed(served: Serving) -> None:
    owner = control_client.reach(served.disk.store.control_path(served.disk.disk.uuid))
    assert owner is not None
    with owner:
        with pytest.raises(NotFound, match="holds no snapshot"):
            owner.image(disk=NAME, checkpoint="now")
        with pytest.raises(NotFound, match="not served"):
            owner.image(disk="other", checkpoint="now")


# --- the question ---


@contextmanager
def asking(disk: Filter, *, once: bool = False) -> Iterator[tuple[KeptQuestion, Snapshot]]:
    with ExitStack() as stack:
        route = stack.enter_context(closing(ServedElsewhere(disk.store, [NAME])))
        route.take_point("now", [None], once=once)
        question = stack.enter_context(closing(question_of(route, f"{NAME}@now")))
        yield question, disk.snapshots[0]


def question_of(route: ServedElsewhere, export: str) -> KeptQuestion:
    return KeptQuestion(
        lambda: agreed(route._client.connection(), export, context=nbd.LMDBITMAP_META_KEPT), "the owner"
    )


def test_answer_names_what_was_kept_of_each_range(served: Serving) -> None:
    with asking(served.disk) as (question, _):
        assert question.ask([(0, SIZE)]) == []
        served.disk.pwrite(b"x", 3 * BLOCK + 5)
        served.disk.write_zeroes(50 * BLOCK, 2 * BLOCK)
        assert question.ask([(0, SIZE)]) == [(3 * BLOCK, BLOCK), (50 * BLOCK, 2 * BLOCK)]
        assert question.ask([(10, 20), (3 * BLOCK + 7, 100), (4 * BLOCK, BLOCK)]) == [(3 * BLOCK + 7, 100)]
        assert question.ask([]) == question.ask([(5, 0)]) == []
        many = [(number * BLOCK, 100) for number in range(100)] * 6
        assert (
            question.ask(many) == [(3 * BLOCK, 100)] * 6 + [(50 * BLOCK, 100)] * 6 + [(51 * BLOCK, 100)] * 6
        )


def test_long_range_is_asked_in_parts(tracked: TrackedDisk, folder: Path) -> None:
    size = 300 << 20
    (folder / "large").mkdir()
    large = TrackedDisk(folder / "large", size).clean()
    tracked.close()
    with serving(large, folder) as served, asking(served.disk) as (question, _):
        served.disk.pwrite(b"x", size - 1)
        served.disk.pwrite(b"x", 1)
        assert question.ask([(0, size)]) == [(0, BLOCK), (size - BLOCK, BLOCK)]


def test_question_gives_up_what_it_tells_of_and_nothing_else(served: Serving) -> None:
    with asking(served.disk, once=True) as (question, snapshot):
        question.ask([(0, 10 * BLOCK), (20 * BLOCK, BLOCK)])
        served.disk.pwrite(NEW, 0)
        assert snapshot.kept_bytes == (101 - 11) * BLOCK
        with pytest.raises(OSError, match="the owner"):
            question.ask([(0, BLOCK)])


@contextmanager
def asking_raw(served: Serving, *more: str, once: bool = True) -> Iterator[tuple[RawClient, Snapshot]]:
    """Of a snapshot of which nothing is read twice, by a client that selects `more` contexts."""
    with closing(ServedElsewhere(served.disk.store, [NAME])) as route:
        route.take_point("now", [None], once=once)
        with RawClient(route._client.connection()) as client:
            client.go(f"{NAME}@now", contexts=[nbd.LMDBITMAP_META_KEPT, *more])
            yield client, served.disk.snapshots[0]


def test_question_that_would_be_answered_in_part_is_refused_and_gives_up_nothing(served: Serving) -> None:
    with asking_raw(served) as (client, snapshot):
        assert client.do(BLOCK_STATUS, 0, SIZE, flags=REQ_ONE).error == errno.EINVAL
        served.disk.pwrite(NEW, 0)
        assert snapshot.kept_bytes == 101 * BLOCK


def test_question_beside_another_context_is_refused_and_gives_up_nothing(served: Serving) -> None:
    with asking_raw(served, nbd.NBD_META_BASE_ALLOCATION) as (client, snapshot):
        assert client.do(BLOCK_STATUS, 0, SIZE).error == errno.EINVAL
        served.disk.pwrite(NEW, 0)
        assert snapshot.kept_bytes == 101 * BLOCK


def test_who_comes_by_himself_is_not_offered_the_question(tracked: TrackedDisk, folder: Path) -> None:
    names = [nbd.LMDBITMAP_META_KEPT, nbd.NBD_META_BASE_ALLOCATION]
    with (
        serving(tracked, folder, listening=folder / "nbd") as served,
        held(served.disk),
        RawClient.connect(str(folder / "nbd")) as stranger,
    ):
        assert list(stranger.go(f"{NAME}@now", contexts=names)) == [nbd.NBD_META_BASE_ALLOCATION]


def test_broken_snapshot_answers_with_an_error(served: Serving) -> None:
    with asking(served.disk) as (question, snapshot):
        with snapshot._keeping:
            snapshot._break("by intent")
        with pytest.raises(OSError, match="nput/output"):
            question.ask([(0, BLOCK)])


def test_only_snapshots_can_be_asked(served: Serving) -> None:
    with (
        closing(ServedElsewhere(served.disk.store, [NAME])) as route,
        pytest.raises(NotFound, match="has no lmdbitmap:kept"),
    ):
        question_of(route, NAME)


# --- other images ---


class OnNode(TrackedDisk):
    node: Path

    def __post_init__(self) -> None:
        self.store, self.image = Store.create(str(self.folder / "store")), self.node
        session.add(self.store, NAME, str(self.node), granularity_bits=12)


@pytest.mark.skipif(not can_make_loop_devices(), reason="a loop device cannot be had here: run as root")
def test_block_device_is_read_directly_too(folder: Path) -> None:
    size = 100 * BLOCK
    with loop_node(folder, size) as OnNode.node, serving(OnNode(folder, size).clean(), folder) as served:
        served.disk.pwrite(OLD[:size], 0)
        with held(served.disk) as device:
            assert isinstance(device, DirectDevice)
            served.disk.pwrite(NEW[: 3 * BLOCK], 7 * BLOCK)
            assert device.pread(size, 0) == OLD[:size]


def test_reader_outside_the_disk_is_refused(served: Serving) -> None:
    with held(served.disk) as device, pytest.raises(InvalidArgument):
        device.pread(BLOCK, SIZE)
