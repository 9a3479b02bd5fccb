"""Parses a time as people write it, in ISO 8601: `2026-11-29`, `2026-11-29 02:38`, `2026-11-29T02:38:24.5Z`.

Without a zone it is the local clock's, as `ls` shows times; with `Z` it is UTC, as in `ls --json`. A date stands for
its whole day, a minute or a second for the whole of it, because times are shown without a fraction: so the time shown
of a backup finds that backup. An hour that the local clock shows twice, in autumn, is the later one.
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
        return _start_ns(datetime.fromisoformat(date) + timedelta(days=1), zone) - 1
    offset = (found["zone"] or "").replace("Z", "+00:00")
    moment = datetime.fromisoformat(f"{date} {minute}{found['second'] or ':00'}{offset}").replace(fold=1)
    if fraction is not None:
        return _start_ns(moment, zone) + int(fraction.ljust(9, "0"))
    seconds = 60 if found["second"] is None else 1
    return _start_ns(moment, zone) + seconds * _SECOND_NS - 1


def _start_ns(moment: datetime, zone: tzinfo | None) -> int:
    if moment.tzinfo is None and zone is not None:
        moment = moment.replace(tzinfo=zone)
    return (moment.astimezone(timezone.utc) - _EPOCH) // timedelta(seconds=1) * _SECOND_NS
