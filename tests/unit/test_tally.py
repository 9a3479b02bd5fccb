"""Tallies: what a change makes of one is what all records together make."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.storage import schema, tally
from lmdbitmap.storage.tally import GROUP_REGIONS, NOTHING, Tally

KEYS = st.binary(min_size=1, max_size=3)
RECORDS = st.dictionaries(KEYS, st.binary(min_size=4, max_size=12), max_size=8)


@given(RECORDS, st.lists(st.tuples(KEYS, st.none() | st.binary(min_size=4, max_size=12)), max_size=20))
def test_differences_add_up_to_what_there_is(
    records: dict[bytes, bytes], steps: list[tuple[bytes, bytes | None]]
) -> None:
    known = tally.of(records.items())
    for key, value in steps:
        before = records.pop(key, None)
        known = known.minus(tally.of([] if before is None else [(key, before)]))
        if value is not None:
            records[key] = value
            known = known.plus(tally.of([(key, value)]))
        assert known == tally.of(records.items())
    for item in records.items():
        known = known.minus(tally.of([item]))
    assert known == NOTHING


def region(number: int, armed: int = 0) -> tuple[bytes, bytes]:
    key = schema.region_key(1, number)
    return key, schema.encode_region(key, armed, schema.ALL_CLEAN_BITS)


WHOLE = [region(number) for number in range(5)]


@pytest.mark.parametrize(
    "found",
    [
        WHOLE[1:],
        [*WHOLE, region(5)],
        [*WHOLE[:4], region(4, armed=1)],
        [*WHOLE[:4], (schema.region_key(1, 7), WHOLE[4][1])],
        [*WHOLE[:4], (WHOLE[4][0], WHOLE[4][1][:-1])],
        [*WHOLE[:4], WHOLE[3]],
    ],
)
def test_records_that_were_lost_doubled_moved_or_changed_weigh_something_else(
    found: Iterable[tuple[bytes, bytes]],
) -> None:
    assert tally.of(found) != tally.of(WHOLE)


def test_damage_inside_a_record_is_for_its_own_crc_to_tell() -> None:
    """So that one damaged record makes one region dirty, and not its whole group."""
    key, value = WHOLE[2]
    assert tally.of([(key, b"\xff" + value[1:])]) == tally.of([(key, value)])


def test_groups_are_told_apart() -> None:
    keys = [
        tally.group_key(database, key)
        for database, key in [
            ("meta", b"store"),
            ("disks", b"d" * 16),
            ("disks", b"e" * 16),
            ("checkpoints", b"d" * 16 + bytes(8)),
            ("bitmaps", schema.bitmap_key(1)),
            ("regions", schema.region_key(1, 0)),
            ("regions", schema.region_key(1, GROUP_REGIONS)),
            ("regions", schema.region_key(2, 0)),
        ]
    ]
    assert len({tally.STAMP_KEY, *keys}) == 9
    assert tally.group_key("meta", b"other") == keys[0]
    assert tally.group_key("checkpoints", b"d" * 16 + b"\xff" * 8) == keys[3]
    assert tally.group_key("regions", schema.region_key(1, GROUP_REGIONS - 1)) == keys[5]


@given(st.sampled_from(["meta", "disks", "checkpoints", "bitmaps", "regions"]), st.binary(max_size=40))
def test_key_that_no_writer_made_belongs_to_some_group(database: str, key: bytes) -> None:
    assert tally.group_key(database, key).startswith(tally.groups_of(database))


@given(st.builds(Tally, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), KEYS)
def test_tally_comes_back(known: Tally, key: bytes) -> None:
    record = tally.encode(key, known)
    assert tally.decode(key, record) == known
    assert tally.decode(key + b"x", record) is None
    for place in range(len(record)):
        assert tally.decode(key, record[:place] + bytes([record[place] ^ 1]) + record[place + 1 :]) is None
        assert tally.decode(key, record[:place]) is None
