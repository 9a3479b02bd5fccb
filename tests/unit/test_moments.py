"""What a time stands for that a person wrote, and what is none."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest

from lmdbitmap.cli.sizes import format_time, iso_time
from lmdbitmap.errors import InvalidArgument
from lmdbitmap.repository.moments import last_ns_of

SECOND = 10**9
NOON = int(datetime(2026, 11, 29, 12, tzinfo=timezone.utc).timestamp()) * SECOND
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE


@pytest.mark.parametrize(
    ("text", "last_ns"),
    [
        ("2026-11-29", NOON + 12 * HOUR - 1),
        ("2026-11-29 12:00", NOON + MINUTE - 1),
        ("2026-11-29T12:00", NOON + MINUTE - 1),
        ("2026-11-29 12:00:00", NOON + SECOND - 1),
        ("2026-11-29T12:00:01Z", NOON + 2 * SECOND - 1),
        ("2026-11-29T12:00:00.5Z", NOON + SECOND // 2),
        ("2026-11-29T12:00:00.000000042Z", NOON + 42),
        ("2026-11-29T14:30+02:30", NOON + MINUTE - 1),
        ("1970-01-01T00:00:00.0Z", 0),
        ("1969-12-31", -1),
    ],
)
def test_a_time_stands_for_all_that_it_names(text: str, last_ns: int) -> None:
    assert last_ns_of(text, timezone.utc) == last_ns


def test_the_zone_counts_where_the_time_names_none() -> None:
    zone = timezone(timedelta(hours=2))
    assert last_ns_of("2026-11-29 14:00", zone) == NOON + MINUTE - 1
    assert last_ns_of("2026-11-29", zone) == NOON + 10 * HOUR - 1
    assert last_ns_of("2026-11-29T12:00Z", zone) == NOON + MINUTE - 1


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/St_Johns"])
def test_what_is_shown_of_a_time_stands_for_it(monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert last_ns_of(format_time(NOON + 42)) == NOON + SECOND - 1
        assert last_ns_of(iso_time(NOON + 42)) == NOON + 42
    finally:
        monkeypatch.undo()
        time.tzset()


def test_an_hour_that_comes_twice_is_the_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what `ls` shows of a backup of the second one would find none, or an older one."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        second = int(datetime(2026, 10, 25, 1, 30, tzinfo=timezone.utc).timestamp()) * SECOND
        assert format_time(second) == "2026-10-25 02:30:00"
        assert last_ns_of("2026-10-25 02:30:00") == second + SECOND - 1
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("shown", ["02:00", "02:30", "02:59:59", "02:30:00.5"])
def test_an_hour_that_is_jumped_over_is_the_moment_before_the_jump(
    monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    """Else it would be earlier than the minute before it, or later than the one after it."""
    jump = int(datetime(2026, 3, 29, 1, tzinfo=timezone.utc).timestamp()) * SECOND
    assert last_ns_of(f"2026-03-29 {shown}", ZoneInfo("Europe/Berlin")) == jump - 1
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert format_time(jump) == "2026-03-29 03:00:00"
        assert last_ns_of("2026-03-29 01:59") == last_ns_of(f"2026-03-29 {shown}") == jump - 1
        assert last_ns_of("2026-03-29 03:00") == jump + MINUTE - 1
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_day_ends_where_the_next_one_begins_for_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Havana the first hour of a day in autumn comes twice, and both belong to that day."""
    monkeypatch.setenv("TZ", "America/Havana")
    time.tzset()
    try:
        end = int(datetime(2026, 11, 1, 4, tzinfo=timezone.utc).timestamp()) * SECOND
        assert format_time(end) == "2026-11-01 00:00:00"
        assert last_ns_of("2026-10-31") == end - 1
        assert last_ns_of("2026-11-01 00:30") == end + HOUR + 31 * MINUTE - 1
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_day_whose_next_one_begins_with_a_jump_ends_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Santiago a day in spring begins at 1:00. Else the last hour of the day before would be cut off."""
    jump = int(datetime(2026, 9, 6, 4, tzinfo=timezone.utc).timestamp()) * SECOND
    assert last_ns_of("2026-09-05", ZoneInfo("America/Santiago")) == jump - 1
    monkeypatch.setenv("TZ", "America/Santiago")
    time.tzset()
    try:
        assert format_time(jump - SECOND) == "2026-09-05 23:59:59"
        assert format_time(jump) == "2026-09-06 01:00:00"
        assert last_ns_of("2026-09-05") == jump - 1
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "text",
    [
        "", "3", "20261129", "2026-11", "2026-1-2", "26-11-29", "2026-11-29 ", "2026-11-29T", "2026-11-29 12",
        "2026-11-29  12:00", "2026-11-29Z", "2026-11-29 12:00.5", "2026-11-29 12:00:00.", "2026-11-29 12:00 UTC",
        "2026-11-29 12:00:00.0123456789", "\u0662\u0660\u0662\u0666-11-29", "2026-11-29\n",
    ],
)  # fmt: skip
def test_what_has_another_form_is_no_time(text: str) -> None:
    assert last_ns_of(text, timezone.utc) is None


@pytest.mark.parametrize(
    "text",
    [
        "2026-02-30", "2026-13-01", "0000-01-01", "9999-12-31", "2026-11-29 25:00", "2026-11-29 12:60",
        "2026-11-29 12:00:60", "2026-11-29 12:00+99:00", "0001-01-01 00:00+01:00",
    ],
)  # fmt: skip
def test_what_no_calendar_has_is_refused(text: str) -> None:
    with pytest.raises(
        InvalidArgument, match=r"is no time of any calendar .*; write it like 2026-11-29T02:38:24Z"
    ):
        last_ns_of(text, timezone.utc)
