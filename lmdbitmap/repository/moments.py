"""Parses a time as people write it, in ISO 8601: `2026-11-29`, `2026-11-29 02:38`, `2026-11-29T02:38:24.5Z`.

Without a zone it is the local clock's, as `ls` shows times; with `Z` it is UTC, as in `ls --json`. A date stands for
its whole day, a minute or a second for the whole of it, because times are shown without a fraction: so the time shown
of a backup finds that backup. An hour that the local clock shows twice, in autumn, is the later one. One that it jumps
over, in spring, is the moment before the jump.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone, tzinfo

from lmdbitmap.errors import InvalidArgument

_FORM = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)"
    r"(?:[T ](?P<minute>\d\d:\d\d)(?:(?P<second>:\d\d)(?:\.(?P<fraction>\d{1,9}))?)?"
    r"(?P<zone>Z|[+-]\d\d:\d\d)?)?",
    re.ASCII,
)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_SECOND_NS = 10**9


def last_ns_of(text: str, zone: tzinfo | None = None) -> int | None:
    """Return the last nanosecond, in Unix time, of what `text` stands for; None if it has not the form of a time.

    `zone` applies if the time names none; None is the local clock's. Raises `InvalidArgument` for a day or an hour that
    no calendar has.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        return None
    try:
        return _last_ns(found, zone)
    except (ValueError, OverflowError) as no_time:
        raise InvalidArgument(
            f"{text} is no time of any calendar ({no_time})", next_step="write it like 2026-11-29T02:38:24Z"
        ) from no_time


def _last_ns(found: re.Match[str], zone: tzinfo | None) -> int:
    date, minute, fraction = found["date"], found["minute"], found["fraction"]
    if minute is None:
        midnight = datetime.fromisoformat(date) + timedelta(days=1)
        return (_jump_over(midnight, zone) or _start_ns(midnight, zone)) - 1
    offset = (found["zone"] or "").replace("Z", "+00:00")
    moment = datetime.fromisoformat(f"{date} {minute}{found['second'] or ':00'}{offset}").replace(fold=1)
    jump_ns = _jump_over(moment, zone)
    if jump_ns is not None:
        return jump_ns - 1
    if fraction is not None:
        return _start_ns(moment, zone) + int(fraction.ljust(9, "0"))
    seconds = 60 if found["second"] is None else 1
    return _start_ns(moment, zone) + seconds * _SECOND_NS - 1


def _jump_over(moment: datetime, zone: tzinfo | None) -> int | None:
    """Return when the clock jumped over `moment`; None if it did not.

    For a time that no clock showed, Python takes the zone's offset before the jump or the one after it, and by `fold`
    the other one. The jump lies between these two answers.
    """
    early, late = sorted(_start_ns(moment.replace(fold=fold), zone) // _SECOND_NS for fold in (0, 1))
    shown = moment.replace(tzinfo=None, fold=0)
    if early == late or _shown_at(late, zone) == shown:
        return None
    while late - early > 1:
        middle = (early + late) // 2
        early, late = (middle, late) if _shown_at(middle, zone) < shown else (early, middle)
    return late * _SECOND_NS


def _shown_at(second: int, zone: tzinfo | None) -> datetime:
    """Return what the clock shows at that Unix time."""
    return (_EPOCH + timedelta(seconds=second)).astimezone(zone).replace(tzinfo=None, fold=0)


def _start_ns(moment: datetime, zone: tzinfo | None) -> int:
    if moment.tzinfo is None and zone is not None:
        moment = moment.replace(tzinfo=zone)
    return (moment.astimezone(timezone.utc) - _EPOCH) // timedelta(seconds=1) * _SECOND_NS
