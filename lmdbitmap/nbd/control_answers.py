"""The shapes of an owner's answers, as docs/control.md lists them: whoever receives one may use it as it is.

Only fields that are read are listed. Others pass, as a newer owner may say more than an older caller knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias
from uuid import UUID

from lmdbitmap.errors import FormatError
from lmdbitmap.extents import Trust
from lmdbitmap.work.latencies import BUCKETS

Shape: TypeAlias = "Callable[[object], bool] | dict[str, Shape] | list[Shape]"
"""Of a value: whether it is one of that kind; of an object: the shapes of its fields; of a list: that of every item."""

OPTIONAL: Final = "?"
"""At the end of a field's name: it may be missing."""
EVERY: Final = "*"
"""Stands for all fields."""


def _a_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _a_rate(value: object) -> bool:
    return _a_count(value) or (type(value) is float and math.isfinite(value) and value >= 0)


def _a_text(value: object) -> bool:
    return type(value) is str


def _a_text_or_none(value: object) -> bool:
    return value is None or _a_text(value)


def _true_or_false(value: object) -> bool:
    return type(value) is bool


def _a_trust(value: object) -> bool:
    return value in [trust.value for trust in Trust]


def _a_uuid(value: object) -> bool:
    try:
        return type(value) is str and str(UUID(value)) == value
    except ValueError:
        return False


def _all_buckets(value: object) -> bool:
    return isinstance(value, list) and len(value) == BUCKETS and all(map(_a_count, value))


_SNAPSHOT: Final[Shape] = {
    "checkpoint": _a_text, "kept_bytes": _a_count, "limit_bytes": _a_count, "broken": _a_text_or_none,
}  # fmt: skip
_LATENCIES: Final[Shape] = {
    "count": _a_count, "total_ns": _a_count, "max_ns": _a_count, "p50_ns": _a_count, "p99_ns": _a_count,
    "buckets": _all_buckets,
}  # fmt: skip
_SERVED: Final[Shape] = {
    "connections": {"now": _a_count, "ever": _a_count},
    "requests": {EVERY: _a_count},
    "bytes": {"received": _a_count, "sent": _a_count},
    "rates": {"requests": {EVERY: _a_rate}, "received": _a_rate, "sent": _a_rate, "commits": _a_rate},
    "latencies": {"commit": _LATENCIES, "flush": _LATENCIES, "batch": _LATENCIES},
}
_DISK: Final[Shape] = {
    "name": _a_text, "uuid": _a_uuid, "trust": _a_trust, "reason": _a_text_or_none, "armed": _a_count,
    "snapshots": [_SNAPSHOT], "image_lost?": _a_text_or_none, "served?": _SERVED,
}  # fmt: skip
_HELD: Final[Shape] = {
    "disk": _a_text, "export": _a_text, "uuid": _a_uuid, "time_ns": _a_count, "direct?": _true_or_false,
}  # fmt: skip
_ANSWERS: Final[dict[str, Shape]] = {
    "info": {"disks": [_DISK]}, "snapshot": {"snapshots": [_HELD]}, "release": _SNAPSHOT,
    "room": {"bytes": _a_count},
}  # fmt: skip


def require_answer(
    operation: str, arguments: Mapping[str, object], answer: Mapping[str, object], place: str
) -> None:
    """Raise `FormatError` unless the answer has what a caller of the operation reads."""
    _require(answer, _ANSWERS.get(operation, {}), "answer", place)
    if operation == "snapshot":
        held, disks = answer["snapshots"], arguments["disks"]
        assert isinstance(held, list)
        assert isinstance(disks, list)
        if len(held) != len(disks):
            raise _error(place, f"{len(disks)} snapshots", len(held))


def _require(value: object, shape: Shape, what: str, place: str) -> None:
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            raise _error(place, f"an object as {what}", value)
        for field, inner in _fields(value, shape):
            if field not in value:
                raise _error(place, f"{what}.{field}", sorted(value))
            _require(value[field], inner, f"{what}.{field}", place)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise _error(place, f"a list as {what}", value)
        for item in value:
            _require(item, shape[0], f"{what}[]", place)
    elif not shape(value):
        raise _error(place, f"{shape.__name__[1:].replace('_', ' ')} as {what}", value)


def _fields(value: Mapping[str, object], shape: dict[str, Shape]) -> list[tuple[str, Shape]]:
    """The fields to look at, and their shapes."""
    if EVERY in shape:
        return [(field, shape[EVERY]) for field in value]
    wanted = ((name.removesuffix(OPTIONAL), name.endswith(OPTIONAL), inner) for name, inner in shape.items())
    return [(field, inner) for field, may_be_missing, inner in wanted if field in value or not may_be_missing]


def _error(place: str, expected: str, found: object) -> FormatError:
    return FormatError(
        place,
        expected=expected,
        found=repr(found)[:80],
        next_step="use the same version of lmdbitmap on both sides",
    )
