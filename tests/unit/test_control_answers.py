"""An owner's answer has all that is read of it, each of its kind, or is refused in one sentence."""

from __future__ import annotations

import copy
import json
from typing import Any
from uuid import UUID

import pytest

from lmdbitmap.errors import FormatError
from lmdbitmap.nbd.control_answers import require_answer
from lmdbitmap.work.latencies import BUCKETS, Latencies

SNAPSHOT = {"checkpoint": "c", "kept_bytes": 1, "limit_bytes": 2, "broken": None}
SERVED: dict[str, Any] = {
    "connections": {"now": 1, "ever": 2},
    "requests": {"reads": 3},
    "bytes": {"received": 4, "sent": 5},
    "rates": {"seconds": 10, "requests": {"reads": 0.5}, "received": 0, "sent": 1.5, "commits": 2},
    "latencies": {kind: Latencies().facts() for kind in ("commit", "flush", "batch")},
}
DISK: dict[str, Any] = {
    "name": "sda", "uuid": str(UUID(int=5)), "trust": "exact", "reason": None, "armed": 0, "snapshots": [SNAPSHOT],
    "image_lost": None,
    "served": SERVED,
}  # fmt: skip
HELD = {"disk": "sda", "export": "sda@c", "uuid": str(UUID(int=7)), "time_ns": 5, "direct": True}
ANSWERS: dict[str, dict[str, Any]] = {
    "info": {"disks": [DISK]},
    "snapshot": {"snapshots": [HELD]},
    "release": SNAPSHOT,
}
MAY_BE_MISSING = {"image_lost", "served", "direct", "reads"}
MAY_BE_NOTHING = {"reason", "image_lost", "broken"}
NEVER_READ = {"seconds"}
ARGUMENTS = {"disks": ["sda"]}


def places_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value within `value`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, one in inner for way in [(*path, key), *places_in(one, (*path, key))]]


def changed(answer: dict[str, Any], way: tuple[Any, ...], new: Any) -> dict[str, Any]:
    """A copy with another value there; without it for `...`."""
    copied = copy.deepcopy(answer)
    place: Any = copied
    for key in way[:-1]:
        place = place[key]
    if new is ...:
        del place[way[-1]]
    else:
        place[way[-1]] = new
    return copied


@pytest.mark.parametrize("operation", ANSWERS)
def test_what_is_documented_passes_and_more_than_that_too(operation: str) -> None:
    require_answer(operation, ARGUMENTS, ANSWERS[operation], "here")
    require_answer(operation, ARGUMENTS, {**ANSWERS[operation], "more": {}}, "here")
    assert json.loads(json.dumps(ANSWERS[operation])) == ANSWERS[operation]


@pytest.mark.parametrize("operation", ANSWERS)
def test_every_field_that_is_read_must_be_there_and_of_its_kind(operation: str) -> None:
    tried = 0
    for way in places_in(ANSWERS[operation]):
        field = way[-1]
        wrong: list[Any] = [(), -1, 1 << 64, float("nan"), {"more": None}] if field not in NEVER_READ else []
        wrong += [None] if field not in MAY_BE_NOTHING | NEVER_READ else []
        wrong += [...] if isinstance(field, str) and field not in MAY_BE_MISSING | NEVER_READ else []
        for new in wrong:
            with pytest.raises(FormatError, match=r"^here: expected .*; use the same version"):
                require_answer(operation, ARGUMENTS, changed(ANSWERS[operation], way, new), "here")
            tried += 1
    assert tried > 20


def test_what_an_older_owner_does_not_say_may_be_missing() -> None:
    disk = {name: value for name, value in DISK.items() if name not in MAY_BE_MISSING}
    require_answer("info", {}, {"disks": [disk]}, "here")
    held = {name: value for name, value in HELD.items() if name not in MAY_BE_MISSING}
    require_answer("snapshot", ARGUMENTS, {"snapshots": [held]}, "here")


@pytest.mark.parametrize(
    ("way", "new"),
    [
        (("disks", 0, "trust"), "certain"),
        (("disks", 0, "served", "latencies", "commit", "buckets"), [0] * (BUCKETS - 1)),
        (("disks", 0, "served", "rates", "commits"), float("inf")),
        (("disks", 0, "armed"), True),
    ],
)
def test_what_is_of_the_kind_and_still_cannot_be_used_is_refused(way: tuple[Any, ...], new: Any) -> None:
    with pytest.raises(FormatError):
        require_answer("info", {}, changed(ANSWERS["info"], way, new), "here")


def test_as_many_disks_are_held_as_were_asked_for() -> None:
    for held in ([], [HELD, HELD]):
        with pytest.raises(FormatError, match="1 snapshots"):
            require_answer("snapshot", ARGUMENTS, {"snapshots": held}, "here")


def test_a_uuid_that_is_none_is_refused() -> None:
    with pytest.raises(FormatError, match=r"uuid as answer\.snapshots\[\]\.uuid"):
        require_answer("snapshot", ARGUMENTS, {"snapshots": [{**HELD, "uuid": "7"}]}, "here")
