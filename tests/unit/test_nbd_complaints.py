"""What went wrong for a client is told once, and then now and then, however often it goes wrong."""

from __future__ import annotations

import errno
import itertools
import ssl

import pytest

from lmdbitmap.errors import FormatError, StorageError
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.complaints import Complaints, Volume


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def complaints(clock: Clock) -> Complaints:
    return Complaints("process 7 of user 0", "sda", clock=clock)


def vanished() -> Exception:
    return StorageError("nbd://far/disk", OSError(errno.ENOTCONN, "gone"), next_step="start it")


def test_a_line_names_disk_and_client_for_people_and_for_programs(
    complaints: Complaints, caplog: pytest.LogCaptureFixture
) -> None:
    complaints.failed("READ", "4096 bytes at 512", OSError(errno.EIO, "Input/output error"))
    [record] = caplog.records
    assert record.getMessage() == (
        "disk sda: process 7 of user 0: READ of 4096 bytes at 512 failed: [Errno 5] Input/output error"
    )
    assert (record.__dict__["disk"], record.__dict__["client"]) == ("sda", "process 7 of user 0")
    assert record.levelname == "WARNING"


def test_a_guest_that_tries_again_for_an_hour_is_told_of_once_a_minute(
    complaints: Complaints, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(36_000):
        complaints.failed("WRITE", "512 bytes at 0", vanished())
        clock.now_s += 0.1
    assert 59 <= len(caplog.records) <= 61
    told = [record.getMessage().partition("(")[2] for record in caplog.records]
    assert told[0] == ""
    for said in told[1:]:
        assert 598 <= int(said.split(" ")[0]) <= 601
        assert said.endswith("more like it since that was last told)")


def test_no_failure_is_lost_from_the_count(
    complaints: Complaints, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for times in (5, 3, 1):
        complaints.failed("WRITE", "512 bytes at 0", vanished(), times=times)
    clock.now_s += 60
    complaints.failed("WRITE", "512 bytes at 0", vanished())
    assert len(caplog.records) == 2
    assert "(8 more like it" in caplog.records[1].getMessage()
    clock.now_s += 60
    complaints.failed("WRITE", "512 bytes at 0", vanished())
    assert "more like it" not in caplog.records[2].getMessage()


def test_each_kind_is_told_at_once(complaints: Complaints, caplog: pytest.LogCaptureFixture) -> None:
    kinds = itertools.product(
        ("READ", "WRITE"), (OSError(errno.EIO, "broken"), OSError(errno.ENOSPC, "full"), ValueError("odd"))
    )
    for command, failure in kinds:
        for _ in range(3):
            complaints.failed(command, "512 bytes at 0", failure)
    complaints.refused("READ", "512 bytes at 0", expected="an end at 100 at most", found=512)
    assert len(caplog.records) == 7


def test_what_the_client_chooses_makes_no_new_kind(
    complaints: Complaints, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(1000):
        complaints.refused("READ", f"1 bytes at {number}", expected="an end at 0 at most", found=number + 1)
        complaints.turned_down(nbd.malformed("export name", "the name of a served disk", f"'{number}'"))
    assert len(caplog.records) == 2


def test_a_client_is_not_dropped_and_turned_down_for_one_thing(
    complaints: Complaints, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = FormatError(
        "NBD export name", expected="one that is known", found="'x'", next_step="look again"
    )
    complaints.turned_down(refusal)
    complaints.dropped(refusal)
    complaints.dropped(ssl.SSLError("no certificate"))
    assert [record.getMessage() for record in caplog.records] == [
        "disk sda: process 7 of user 0: NBD export name: expected one that is known, found 'x'; look again",
        "disk sda: process 7 of user 0 was dropped: TLS failed: ('no certificate',)",
    ]


def test_clients_that_come_anew_each_time_are_told_of_ten_times_a_minute_in_all(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    volume = Volume(clock=clock)
    for number in range(6000):
        client = Complaints(f"process {number} of user 0", volume=volume, clock=clock)
        client.turned_down(FormatError("a handshake", expected="an option", found=number, next_step="none"))
        clock.now_s += 0.02
    told = [record.getMessage() for record in caplog.records]
    assert 20 <= len(told) <= 21
    assert [said.partition("(")[2] for said in told[:10]] == [""] * 10
    assert told[10].endswith(f"({told_later(told)} more like it since that was last told)")


def told_later(told: list[str]) -> int:
    """How many were left untold before the eleventh, by the numbers of the clients."""
    tenth, eleventh = (int(said.split(" ")[1]) for said in told[9:11])
    return eleventh - tenth - 1


def test_what_one_disks_clients_do_silences_nothing_about_another(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    volume = Volume(clock=clock)
    for disk in ("sda", "sdb"):
        for number in range(20):
            Complaints(f"client {number}", disk, volume, clock=clock).failed("READ", "all", vanished())
    told = [record.getMessage().partition(": ")[0] for record in caplog.records]
    assert (told.count("disk sda"), told.count("disk sdb"), len(told)) == (10, 10, 20)


def test_clients_that_find_no_room_are_told_of_ten_times_a_minute_of_a_reason(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    volume = Volume(clock=clock)
    for number in range(50):
        Complaints(f"client {number}", volume=volume, clock=clock).turned_away("too many come at once")
    Complaints("client 50", "sda", volume, clock=clock).turned_away("64 are connected already")
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "client 0 was turned away: too many come at once"
    assert told[10:] == ["disk sda: client 50 was turned away: 64 are connected already"]
