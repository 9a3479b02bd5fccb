"""What went wrong for a client is told once, and then now and then, however often it goes wrong."""

from __future__ import annotations

import errno
import itertools
import ssl

import pytest

from lmdbitmap.errors import FormatError, StorageError
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.complaints import Complaints


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
