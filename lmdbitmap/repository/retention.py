"""Decides which backups stay: a number of the newest, and the newest of a number of days, weeks and months.

The rules add up, each for itself, as restic's do: a backup stays if one of them keeps it. A day, a week (from Monday)
or a month without a backup does not count. The newest backup always stays. Days are those of the local clock, unless a
time zone is given; "newest" is the order in which backups were made, whatever the clock said.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone, tzinfo

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.repository.manifest import BackupEntry

_LATEST_SECONDS = 250_000_000_000
"""Latest time that a calendar of four digits can hold, in seconds; a manifest may say anything."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How many backups to keep by each rule; 0 keeps none."""

    last: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0

    def __post_init__(self) -> None:
        counts = (self.last, self.daily, self.weekly, self.monthly)
        if min(counts) < 0 or max(counts) == 0:
            raise InvalidArgument(
                "no backup would be kept",
                next_step="say by at least one rule how many to keep, such as --keep 7",
            )


def kept(backups: Sequence[BackupEntry], rules: Retention, zone: tzinfo | None = None) -> set[str]:
    """Return the ids of the backups that stay."""
    periods: list[tuple[int, Callable[[BackupEntry], Hashable]]] = [
        (rules.last, lambda entry: entry.id),
        (rules.daily, lambda entry: _moment(entry, zone).date()),
        (rules.weekly, lambda entry: _moment(entry, zone).isocalendar()[:2]),
        (rules.monthly, lambda entry: (_moment(entry, zone).year, _moment(entry, zone).month)),
    ]
    stay = {entry.id for entry in backups[-1:]}
    for count, period_of in periods:
        stay |= _newest_of_each(backups, count, period_of)
    return stay


def _newest_of_each(
    backups: Sequence[BackupEntry], count: int, period_of: Callable[[BackupEntry], Hashable]
) -> set[str]:
    """Return the newest backup of each of the newest `count` periods that have one."""
    newest: dict[Hashable, str] = {}
    for entry in reversed(backups):
        if len(newest) == count:
            break
        newest.setdefault(period_of(entry), entry.id)
    return set(newest.values())


def _moment(entry: BackupEntry, zone: tzinfo | None) -> datetime:
    seconds = min(entry.time_ns // 1_000_000_000, _LATEST_SECONDS)
    return datetime.fromtimestamp(seconds, timezone.utc).astimezone(zone)
