"""Extents, compared with a list that says for every byte whether it is dirty and whether it is zero."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.extents import Extent, Trust, merged, with_zeroes

Byte = tuple[bool, bool]

lengths = st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), max_size=12)


def laid_out(parts: list[tuple[int, bool, bool]], with_gaps: bool = False) -> list[Extent]:
    """Extents one after another; where a part is clean, with a gap in its place."""
    offset, extents = 0, []
    for length, dirty, zero in parts:
        if dirty or not with_gaps:
            extents.append(Extent(offset, length, dirty, zero))
        offset += length
    return extents


def bytes_of(extents: list[Extent]) -> dict[int, Byte]:
    return {
        byte: (extent.dirty, extent.zero)
        for extent in extents
        for byte in range(extent.offset, extent.offset + extent.length)
    }


def assert_canonical(extents: list[Extent]) -> None:
    assert all(extent.length > 0 for extent in extents)
    for left, right in itertools.pairwise(extents):
        assert left.end <= right.offset
        assert left.end < right.offset or left[2:] != right[2:]


@given(lengths, st.booleans())
def test_merging_changes_no_byte_and_leaves_nothing_to_merge(
    parts: list[tuple[int, bool, bool]], with_gaps: bool
) -> None:
    extents = laid_out(parts, with_gaps)
    joined = list(merged(extents))
    assert bytes_of(joined) == bytes_of(extents)
    assert_canonical(joined)


@given(lengths, st.booleans(), lengths)
def test_zeroes_are_added_and_dirt_is_kept(
    parts: list[tuple[int, bool, bool]], with_gaps: bool, holes: list[tuple[int, bool, bool]]
) -> None:
    extents = laid_out(parts, with_gaps)
    zeroes = [(hole.offset, hole.length) for hole in laid_out(holes, with_gaps=True)]
    zero_bytes = {byte for offset, length in zeroes for byte in range(offset, offset + length)}
    expected = {
        byte: (dirty, zero or byte in zero_bytes) for byte, (dirty, zero) in bytes_of(extents).items()
    }
    split = list(with_zeroes(extents, zeroes))
    assert bytes_of(split) == expected
    assert all(left.end <= right.offset for left, right in itertools.pairwise(split))


def test_dirty_zeroes_are_both() -> None:
    found = list(with_zeroes([Extent(0, 10, dirty=True, zero=False)], [(4, 3)]))
    assert found == [
        Extent(0, 4, dirty=True, zero=False),
        Extent(4, 3, dirty=True, zero=True),
        Extent(7, 3, dirty=True, zero=False),
    ]


@pytest.mark.parametrize("left", list(Trust))
@pytest.mark.parametrize("right", list(Trust))
def test_worse_trust_wins(left: Trust, right: Trust) -> None:
    order = [Trust.EXACT, Trust.SUPERSET, Trust.UNTRUSTED]
    assert left.worse(right) is order[max(order.index(left), order.index(right))]
