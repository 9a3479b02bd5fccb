"""Whether guests are quiet: never for a while after anybody saw a request, and not for those who are no guests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap.access.direct import DirectDevice
from lmdbitmap.access.routes import ServedElsewhere
from lmdbitmap.copying.readable import Metered, read_methods_of
from lmdbitmap.nbd.control.watch import Watch
from lmdbitmap.nbd.server.quiet import QUIET_S, Quiet
from lmdbitmap.work.latencies import Latencies
from tests.helpers.nbd_raw import READ, WRITE, RawClient
from tests.helpers.serving import Serving, serving
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

BLOCK = 4096


class Guests:
    def __init__(self) -> None:
        self.requests = 0
        self.now_s = 1000.0
        self.quiet = Quiet(lambda: self.requests, lambda: self.now_s)

    def look_after(self, seconds: float, requests: int = 0) -> bool:
        self.now_s += seconds
        self.requests += requests
        return self.quiet.look()


def test_guests_that_never_asked_for_anything_are_quiet() -> None:
    assert Guests().quiet.look()


def test_guests_are_quiet_again_a_while_after_their_last_request_was_seen() -> None:
    guests = Guests()
    assert not guests.look_after(0, requests=1)
    assert not guests.look_after(0.9 * QUIET_S)
    assert not guests.look_after(0.9 * QUIET_S, requests=1)
    assert not guests.look_after(0.9 * QUIET_S)
    assert guests.look_after(0.2 * QUIET_S)


def test_what_came_since_nobody_looked_counts_from_the_next_look() -> None:
    guests = Guests()
    assert not guests.look_after(100 * QUIET_S, requests=1)
    assert guests.look_after(QUIET_S)


# --- of a server, and to whom it is told ---


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def served(folder: Path) -> Iterator[Serving]:
    with serving(TrackedDisk(folder, 100 * BLOCK).clean(), folder, listening=folder / "nbd") as served:
        yield served


def test_a_backup_spares_a_processor_once_a_guest_has_asked_for_something(
    served: Serving, folder: Path
) -> None:
    """It hears of it with each answer, and spares one until the first."""
    served.server.quiet._clock_s = lambda: 1000.0  # it is not quiet again before somebody looks
    with (
        RawClient.connect(str(folder / "nbd")) as guest,
        closing(ServedElsewhere(served.disk.store, [NAME])) as route,
    ):
        guest.go(NAME)
        [point] = route.take_point("now", [None])
        assert isinstance(point.device, DirectDevice)
        spared = read_methods_of(Metered(point.device)).spared
        assert spared() == 1
        point.device.pread(BLOCK, 0)
        assert spared() == 0
        assert guest.do(WRITE, 0, BLOCK, data=bytes(BLOCK)).error == 0
        point.device.pread(BLOCK, 50 * BLOCK)
        assert spared() == served.disk.snapshots[0].spared_processors == 1


def test_whoever_reads_a_snapshot_is_no_guest(served: Serving, folder: Path) -> None:
    with closing(ServedElsewhere(served.disk.store, [NAME])) as route:
        route.take_point("now", [None])
        with RawClient.connect(str(folder / "nbd")) as reader:
            reader.go(f"{NAME}@now")
            assert reader.do(READ, 0, BLOCK).error == 0
            assert served.server.quiet.look()


def test_a_watch_looks_with_each_tick(served: Serving, folder: Path) -> None:
    watch = Watch(served.server, {NAME: Latencies()})
    with RawClient.connect(str(folder / "nbd")) as guest:
        guest.go(NAME)
        assert guest.do(READ, 0, BLOCK).error == 0
    now_s = 1000.0
    served.server.quiet._clock_s = lambda: now_s
    watch.tick()
    now_s += QUIET_S
    assert served.server.quiet.look(), "what was heard was heard at the tick"
