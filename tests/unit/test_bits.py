"""Bits in a buffer: order, half-open ranges, sharing, and what an empty range does (nothing)."""

from __future__ import annotations

import mmap
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap import bits
from lmdbitmap.geometry import Geometry

Combine = Callable[[bytearray, bytes], None]


def test_bit_i_is_byte_i_div_8_least_significant_first() -> None:
    buffer = bytearray(4)
    view = bits.bitmap_view(buffer)
    view[0] = view[9] = view[31] = 1
    assert buffer == b"\x01\x02\x00\x80"


def test_a_view_shares_its_buffer_both_ways() -> None:
    buffer = bytearray(2)
    view = bits.bitmap_view(buffer)
    bits.set_range(view, 4, 12)
    assert buffer == b"\xf0\x0f"
    buffer[0] = 0
    assert not bits.any_one(view, 0, 8)


def test_a_view_of_a_read_only_buffer_refuses_writes() -> None:
    view = bits.bitmap_view(b"\x00")
    with pytest.raises(TypeError):
        bits.set_range(view, 0, 1)


def test_anonymous_memory_is_a_bitmap_too() -> None:
    with mmap.mmap(-1, 4096) as memory:
        view = bits.bitmap_view(memory)
        bits.set_range(view, 32760, 32768)
        assert list(bits.runs(memory)) == [(32760, 32768)]
        assert bits.count_ones(memory) == 8
        del view


@pytest.mark.parametrize("position", [0, 5, 16])
def test_an_empty_range_is_a_no_op_everywhere(position: int) -> None:
    buffer = bytearray(b"\x0f\xf0")
    view = bits.bitmap_view(buffer)
    bits.set_range(view, position, position)
    assert buffer == b"\x0f\xf0"
    assert not bits.any_one(view, position, position)
    assert bits.count_ones(buffer, position, position) == 0
    assert list(bits.runs(buffer, position, position)) == []


def test_an_empty_buffer_is_a_bitmap_of_no_bits() -> None:
    assert list(bits.runs(b"")) == []
    assert bits.count_ones(b"") == 0
    bits.truncate(bytearray(), 0)
    bits.or_into(bytearray(), b"")


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (4, 3), (0, 17)])
def test_a_range_outside_the_bitmap_is_a_bug_of_the_caller(start: int, stop: int) -> None:
    view = bits.bitmap_view(bytearray(2))
    for use in (bits.set_range, bits.any_one):
        with pytest.raises(AssertionError):
            use(view, start, stop)
    for walk in (bits.runs, bits.count_ones):
        with pytest.raises(AssertionError):
            walk(bytearray(2), start, stop)


@pytest.mark.parametrize(
    ("combine", "expected"),
    [(bits.and_into, "0001"), (bits.and_not_into, "0010"), (bits.xor_into, "0110")],
)
def test_two_bitmaps_are_combined_as_sets_are(combine: Combine, expected: str) -> None:
    target = bytearray.fromhex("0011")
    combine(target, bytes.fromhex("0101"))
    assert target == bytearray.fromhex(expected)


@pytest.mark.parametrize("combine", [bits.and_into, bits.and_not_into, bits.xor_into])
@pytest.mark.parametrize("length", [1, 3])
def test_bitmaps_of_two_lengths_are_not_combined(combine: Combine, length: int) -> None:
    target = bytearray(b"\x0f\x0f")
    with pytest.raises(AssertionError):
        combine(target, b"\xff" * length)
    assert target == b"\x0f\x0f"


def test_what_is_added_touches_only_the_bytes_it_faces() -> None:
    target = bytearray.fromhex("ff 0011 ff")
    bits.or_into(target, bytes.fromhex("0101"), 1)
    assert target == bytearray.fromhex("ff 0111 ff")


def test_adding_past_the_end_changes_nothing() -> None:
    target = bytearray(4)
    with pytest.raises(AssertionError):
        bits.or_into(target, b"\xff\xff", 3)
    assert target == bytes(4)


def test_expand_mask_gives_64_ones_for_every_mask_bit() -> None:
    exact = bits.expand_mask(1 << 63 | 0b101)
    assert len(exact) == 512
    assert list(bits.runs(exact)) == [(0, 64), (128, 192), (4032, 4096)]
    assert bits.expand_mask(0) == bytes(512)
    assert bits.expand_mask(2**64 - 1) == b"\xff" * 512


def test_truncate_clears_from_the_count_on() -> None:
    buffer = bytearray(b"\xff" * 3)
    bits.truncate(buffer, 10)
    assert buffer == b"\xff\x03\x00"
    bits.truncate(buffer, 24)
    assert buffer == b"\xff\x03\x00"


def test_runs_cross_the_stretches_they_are_found_in() -> None:
    stretch = bits._STRETCH_BITS
    buffer = bytearray(stretch // 8 * 3)
    view = bits.bitmap_view(buffer)
    bits.set_range(view, stretch - 1, 2 * stretch + 1)
    bits.set_range(view, 3 * stretch - 2, 3 * stretch)
    assert list(bits.runs(buffer)) == [(stretch - 1, 2 * stretch + 1), (3 * stretch - 2, 3 * stretch)]


def test_runs_stream_in_memory_that_does_not_grow_with_the_bitmap() -> None:
    bitmap = b"\x55" * (1 << 17)
    tracemalloc.start()
    try:
        found = sum(1 for _ in bits.runs(bitmap))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == 1 << 19
    assert peak < 1 << 20


def test_finer_blocks_are_clipped_to_the_disk() -> None:
    disk = Geometry(size=5 * 512, granularity_bits=11)
    assert list(bits.regrain_outward([(1, 2)], disk, 9)) == [(4, 5)]


def test_coarser_blocks_are_every_one_touched_and_merged() -> None:
    disk = Geometry(size=64 * 512, granularity_bits=9)
    touched = bits.regrain_outward([(0, 1), (3, 4), (9, 10), (15, 17), (40, 41)], disk, 11)
    assert list(touched) == [(0, 1), (2, 5), (10, 11)]


def test_runs_past_the_end_of_the_disk_are_dropped() -> None:
    disk = Geometry(size=3 * 512, granularity_bits=9)
    assert list(bits.regrain_outward([(2, 70), (80, 81)], disk, 10)) == [(1, 2)]


@given(st.integers(0, 2**40 - 1), st.integers(0, 40), st.integers(0, 40))
def test_runs_by_search_are_those_of_a_look_at_each_bit(value: int, start: int, length: int) -> None:
    stop = min(start + length, 40)
    start = min(start, stop)
    view = bits.bitmap_view(bytearray(value.to_bytes(5, "little")))
    for runs, wanted in ((bits.one_runs, 1), (bits.zero_runs, 0)):
        found = [bit for first, last in runs(view, start, stop) for bit in range(first, last)]
        assert found == [bit for bit in range(start, stop) if value >> bit & 1 == wanted]
