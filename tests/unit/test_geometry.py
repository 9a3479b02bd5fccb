"""Bytes and blocks, compared with counting them one by one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.geometry import MAX_SIZE, REGION_BLOCKS, Geometry, ceil_div, check_range, granularity_bits_of

SMALL = Geometry(5 * 512 + 7, 9)


@pytest.mark.parametrize(("granularity", "exponent"), [(512, 9), (4096, 12), (65536, 16), (1 << 31, 31)])
def test_granularity_is_a_power_of_two(granularity: int, exponent: int) -> None:
    assert granularity_bits_of(granularity) == exponent
    assert Geometry(0, exponent).granularity == granularity


@pytest.mark.parametrize("granularity", [-512, -1, 0, 1, 256, 511, 513, 65537, 3 << 20, 1 << 32, 1 << 90])
def test_other_granularities_are_refused(granularity: int) -> None:
    with pytest.raises(InvalidArgument):
        granularity_bits_of(granularity)


@pytest.mark.parametrize(
    ("size", "bits"),
    [(-1, 16), (1 << 63, 16), (1.5, 16), (None, 16), (0, 8), (0, 32), (0, -1), (0, 65536), (0, "16")],
)
def test_impossible_geometry_is_refused(size: Any, bits: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"{size!r} is no whole|{bits!r} is no whole"):
        Geometry(size, bits)


@pytest.mark.parametrize(
    ("size", "blocks", "regions"),
    [
        (0, 0, 0),
        (1, 1, 1),
        (512, 1, 1),
        (513, 2, 1),
        (REGION_BLOCKS * 512, REGION_BLOCKS, 1),
        (REGION_BLOCKS * 512 + 1, REGION_BLOCKS + 1, 2),
        (MAX_SIZE, 1 << 54, 1 << 42),
    ],
)
def test_last_block_and_region_may_be_short(size: int, blocks: int, regions: int) -> None:
    geometry = Geometry(size, 9)
    assert (geometry.block_count, geometry.region_count) == (blocks, regions)


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**20))
def test_ceil_div_rounds_up(numerator: int, denominator: int) -> None:
    quotient = ceil_div(numerator, denominator)
    assert (quotient - 1) * denominator < numerator <= quotient * denominator


@st.composite
def ranges(draw: st.DrawFn) -> tuple[Geometry, int, int]:
    geometry = Geometry(draw(st.integers(0, 20_000)), draw(st.sampled_from([9, 10, 12])))
    offset = draw(st.integers(0, geometry.size))
    return geometry, offset, draw(st.integers(0, geometry.size - offset))


@given(ranges())
def test_outward_is_every_block_that_a_byte_is_in(drawn: tuple[Geometry, int, int]) -> None:
    geometry, offset, length = drawn
    touched = {byte // geometry.granularity for byte in range(offset, offset + length)}
    assert set(geometry.blocks_outward(offset, length)) == touched


@given(ranges())
def test_inward_is_every_block_all_of_whose_bytes_are_in(drawn: tuple[Geometry, int, int]) -> None:
    geometry, offset, length = drawn
    covered = set()
    for block in range(geometry.block_count):
        start, size = geometry.bytes_of(block, block + 1)
        if offset <= start and start + size <= offset + length:
            covered.add(block)
    assert set(geometry.blocks_inward(offset, length)) == covered


@given(ranges())
def test_bytes_of_blocks_hold_the_range_that_touched_them(drawn: tuple[Geometry, int, int]) -> None:
    geometry, offset, length = drawn
    blocks = geometry.blocks_outward(offset, length)
    start, size = geometry.bytes_of(blocks.start, blocks.stop)
    assert start + size <= geometry.size
    if length:
        assert start <= offset
        assert offset + length <= start + size
    else:
        assert (start, size) == (0, 0)


@given(ranges())
def test_bytes_in_counts_a_short_last_block_as_short(drawn: tuple[Geometry, int, int]) -> None:
    geometry, *_ = drawn
    blocks = geometry.block_count
    assert geometry.bytes_in(blocks, with_last=blocks > 0) == geometry.size
    if blocks:
        assert geometry.bytes_in(blocks - 1, with_last=False) == (blocks - 1) * geometry.granularity


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1), (0, -1), (-5, 10), (SMALL.size, 1), (SMALL.size + 1, 0), (2**64, 2**64)]
)
def test_range_off_the_disk_is_refused_everywhere(offset: int, length: int) -> None:
    for call in (SMALL.check_range, SMALL.blocks_outward, SMALL.blocks_inward):
        with pytest.raises(InvalidArgument):
            call(offset, length)
    with pytest.raises(InvalidArgument):
        check_range(offset, length, SMALL.size)


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 7), (7, 7)])
def test_blocks_off_the_disk_are_refused(start: int, stop: int) -> None:
    with pytest.raises(InvalidArgument):
        SMALL.check_blocks(start, stop)
    SMALL.check_blocks(0, 6)
    SMALL.check_blocks(6, 6)


def test_largest_disk_has_a_last_byte() -> None:
    geometry = Geometry(MAX_SIZE, 9)
    assert list(geometry.blocks_outward(MAX_SIZE - 1, 1)) == [geometry.block_count - 1]
    assert geometry.bytes_of(geometry.block_count - 1, geometry.block_count) == (MAX_SIZE - 511, 511)
