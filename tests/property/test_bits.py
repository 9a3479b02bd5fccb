"""The bitmap against a plain set of numbers, compared after every step."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmdbitmap import bits
from lmdbitmap.geometry import Geometry

BYTE_COUNT = 40
BIT_COUNT = BYTE_COUNT * 8

ranges = st.tuples(st.integers(0, BIT_COUNT), st.integers(0, BIT_COUNT)).map(lambda pair: sorted(pair))
patterns = st.binary(min_size=1, max_size=BYTE_COUNT)
wholes = st.binary(min_size=BYTE_COUNT, max_size=BYTE_COUNT)


def ones_of(buffer: bytes | bytearray) -> set[int]:
    return {bit for bit in range(len(buffer) * 8) if buffer[bit // 8] >> bit % 8 & 1}


def runs_of(ones: set[int]) -> Iterator[tuple[int, int]]:
    """The naive way: look at every bit."""
    start = None
    for bit in range(max(ones, default=-1) + 2):
        if bit in ones and start is None:
            start = bit
        if bit not in ones and start is not None:
            yield start, bit
            start = None


class BitmapMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.buffer = bytearray(BYTE_COUNT)
        self.ones: set[int] = set()

    @rule(span=ranges)
    def set_range(self, span: list[int]) -> None:
        bits.set_range(bits.bitmap_view(self.buffer), *span)
        self.ones |= set(range(*span))

    @rule(bit_count=st.integers(0, BIT_COUNT + 9))
    def truncate(self, bit_count: int) -> None:
        bits.truncate(self.buffer, bit_count)
        self.ones = {bit for bit in self.ones if bit < bit_count}

    @rule(source=patterns, data=st.data())
    def add(self, source: bytes, data: st.DataObject) -> None:
        offset = data.draw(st.integers(0, BYTE_COUNT - len(source)))
        bits.or_into(self.buffer, source, offset)
        self.ones |= {bit + offset * 8 for bit in ones_of(source)}

    @rule(source=wholes, operation=st.sampled_from(["and", "and_not", "xor"]))
    def combine(self, source: bytes, operation: str) -> None:
        getattr(bits, f"{operation}_into")(self.buffer, source)
        others = ones_of(source)
        self.ones = {"and": self.ones & others, "and_not": self.ones - others, "xor": self.ones ^ others}[
            operation
        ]

    @precondition(lambda self: self.ones)
    @rule(span=ranges)
    def questions_about_a_range(self, span: list[int]) -> None:
        view = bits.bitmap_view(self.buffer)
        inside = self.ones & set(range(*span))
        assert bits.count_ones(self.buffer, *span) == len(inside)
        assert bits.any_one(view, *span) == bool(inside)
        assert list(bits.runs(self.buffer, *span)) == list(runs_of(inside))

    @invariant()
    def holds_exactly_the_ones_of_the_model(self) -> None:
        assert ones_of(self.buffer) == self.ones
        assert list(bits.runs(self.buffer)) == list(runs_of(self.ones))


TestBitmapMachine = BitmapMachine.TestCase


@given(mask=st.integers(0, 2**64 - 1))
def test_every_mask_bit_becomes_its_word_of_ones(mask: int) -> None:
    exact = bits.expand_mask(mask)
    words = [exact[8 * extent : 8 * extent + 8] for extent in range(64)]
    assert words == [b"\xff" * 8 if mask >> extent & 1 else bytes(8) for extent in range(64)]


@given(
    size=st.integers(0, 100_000),
    from_bits=st.integers(9, 14),
    to_bits=st.integers(9, 14),
    pattern=st.binary(max_size=25),
)
def test_regraining_marks_exactly_the_blocks_that_share_a_byte_with_the_dirt(
    size: int, from_bits: int, to_bits: int, pattern: bytes
) -> None:
    source, target = Geometry(size, from_bits), Geometry(size, to_bits)
    regrained = list(bits.regrain_outward(bits.runs(pattern), source, to_bits))
    dirty = [source.bytes_of(block, block + 1) for block in ones_of(pattern)]
    marked = {
        block
        for block in range(target.block_count)
        if any(share_a_byte(target.bytes_of(block, block + 1), piece) for piece in dirty)
    }
    assert regrained == list(runs_of(marked))


def share_a_byte(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return max(one[0], other[0]) < min(sum(one), sum(other))


@given(mask=st.integers(0, 2**64 - 1), pattern=st.binary(min_size=512, max_size=512))
def test_a_region_is_dirty_where_a_bit_is_set_or_an_extent_armed(mask: int, pattern: bytes) -> None:
    armed = {bit for bit in range(4096) if mask >> bit // 64 & 1}
    assert ones_of(bits.dirty_bits(mask, pattern)) == armed | ones_of(pattern)
