"""Which backups stay, told by examples with a calendar."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.repository.retention import Retention, kept
from tests.unit.test_manifest import entry

UTC = timezone.utc


def at(*moments: str) -> list[BackupEntry]:
    """Backups `b0`, `b1`, … at these times, UTC."""
    return [
        entry(number, time_ns=int(datetime.fromisoformat(f"{moment}+00:00").timestamp()) * 10**9)
        for number, moment in enumerate(moments)
    ]


def stay(backups: list[BackupEntry], rules: Retention) -> str:
    ids = kept(backups, rules, UTC)
    return " ".join(backup.id for backup in backups if backup.id in ids)


WEEK = at(
    "2025-12-28T08:00", "2025-12-28T20:00", "2025-12-29T08:00", "2025-12-31T23:59", "2026-01-01T00:00",
    "2026-01-05T08:00",
)  # fmt: skip
"""Sunday twice, Monday, Wednesday, Thursday of the same week in the next year; and a Monday."""


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Retention(last=1), "b5"),
        (Retention(last=3), "b3 b4 b5"),
        (Retention(last=99), "b0 b1 b2 b3 b4 b5"),
        (Retention(daily=1), "b5"),
        (Retention(daily=4), "b2 b3 b4 b5"),
        (Retention(daily=5), "b1 b2 b3 b4 b5"),
        (Retention(weekly=2), "b4 b5"),
        (Retention(weekly=3), "b1 b4 b5"),
        (Retention(monthly=2), "b3 b5"),
        (Retention(last=2, weekly=3, monthly=2), "b1 b3 b4 b5"),
    ],
)
def test_each_rule_keeps_its_own_and_they_add_up(rules: Retention, expected: str) -> None:
    assert stay(WEEK, rules) == expected


def test_days_without_a_backup_do_not_count() -> None:
    assert stay(at("2020-01-01T00:00", "2024-01-01T00:00"), Retention(daily=2)) == "b0 b1"


def test_the_newest_stays_though_the_clock_went_back() -> None:
    backups = at("2025-01-02T00:00", "2025-01-01T00:00", "2025-01-02T01:00", "2025-01-01T01:00")
    assert stay(backups, Retention(daily=1)) == "b3"
    assert stay(backups, Retention(daily=2)) == "b2 b3"


def test_a_day_is_that_of_the_zone() -> None:
    backups = at("2025-01-01T22:30", "2025-01-01T23:30")
    assert kept(backups, Retention(daily=2), UTC) == {"b1"}
    assert kept(backups, Retention(daily=2), timezone(timedelta(hours=1))) == {"b0", "b1"}


def test_a_time_that_no_calendar_has_is_no_reason_to_fail() -> None:
    assert kept([entry(0, time_ns=2**63 - 1), entry(1, 0, time_ns=0)], Retention(monthly=2)) == {"b0", "b1"}


def test_of_no_backups_none_stays() -> None:
    assert kept([], Retention(last=1)) == set()


@pytest.mark.parametrize("numbers", [(0, 0, 0, 0), (-1, 5, 0, 0)])
def test_rules_that_keep_nothing_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(InvalidArgument, match="no backup would be kept"):
        Retention(*numbers)
