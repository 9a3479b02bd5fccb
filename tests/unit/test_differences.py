"""Which pages of two buffers differ, beside a look at each; and that a target is mended in these and no other."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.images.device import PAGE_BYTES
from lmdbitmap.targets.differences import CHUNK_BYTES, Mender, chunks, differences
from lmdbitmap.targets.target import Target
from tests.helpers.watched import Watched, differing_pages, pages

SIZE = 2 * CHUNK_BYTES + 700

lengths = st.one_of(st.integers(0, 5 * PAGE_BYTES), st.integers(0, 300_000))


@given(length=lengths, places=st.lists(st.integers(0, 299_999), max_size=12))
def test_differences_are_those_that_a_look_at_each_page_finds(length: int, places: list[int]) -> None:
    one, other = bytearray(300_000), bytearray(300_000)
    for place in places:
        other[place] = 1
    found = list(differences(one, other, length))
    assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(found))
    covered = {page for start, stop in found for page in pages(start, stop - start)}
    assert covered == differing_pages(bytes(one[:length]), bytes(other[:length]))
    assert all(
        start % PAGE_BYTES == 0 and (stop % PAGE_BYTES == 0 or stop == length) for start, stop in found
    )


def test_runs_go_on_over_the_edge_of_a_coarse_piece() -> None:
    one, other = bytearray(200_000), bytearray(b"x" * 200_000)
    assert list(differences(one, other, 200_000)) == [(0, 200_000)]


# --- mending a target ---


def spoiled(content: bytes, seed: int) -> bytes:
    randomness, spoiled = random.Random(seed), bytearray(content)
    for _ in range(30):
        spoiled[randomness.randrange(len(content))] ^= 0x55
    return bytes(spoiled)


@pytest.mark.parametrize("of", [bytes, bytearray])
def test_data_is_written_in_the_pages_that_differ(of: type[bytes | bytearray]) -> None:
    """What is behind `length` in the buffer is of no concern."""
    content = random.Random(1).randbytes(SIZE)
    device, told = Watched(spoiled(content, 2)), list[int]()
    before = device.content()
    mender = Mender(Target("memory", device), told.append)
    for offset, length in chunks(0, SIZE):
        mender.mend_data(offset, of(content[offset : offset + length] + b"behind"), length)
    assert device.content() == content
    assert device.written == differing_pages(before, content)
    assert mender.bytes_written == sum(min(PAGE_BYTES, SIZE - page * PAGE_BYTES) for page in device.written)
    assert (mender.bytes_zeroed, mender.bytes_compared, device.bytes_read) == (0, SIZE, SIZE)
    assert told == [CHUNK_BYTES, CHUNK_BYTES, 700]


@pytest.mark.parametrize("offset", [0, 5 * PAGE_BYTES])
def test_zeroes_are_zeroed_where_something_else_is(offset: int) -> None:
    """And are not read where the target knows of them."""
    device, told = Watched(bytes(SIZE)), list[int]()
    device.pwrite(b"x", offset + PAGE_BYTES)
    device.pwrite(b"x" * 700, SIZE - 700)
    mender = Mender(Target("memory", device), told.append)
    mender.mend_zeroes(offset, SIZE - offset)
    assert device.content() == bytes(SIZE)
    assert device.zeroed == {offset // PAGE_BYTES + 1, SIZE // PAGE_BYTES}
    assert mender.bytes_zeroed == PAGE_BYTES + 700
    assert 0 < mender.bytes_compared == device.bytes_read <= 3 * PAGE_BYTES
    assert sum(told) == SIZE - offset


def test_chunks_end_on_multiples_of_a_chunk() -> None:
    assert list(chunks(0, 0)) == []
    assert list(chunks(5, 9)) == [(5, 4)]
    assert list(chunks(5, CHUNK_BYTES)) == [(5, CHUNK_BYTES - 5)]
    assert list(chunks(CHUNK_BYTES - 1, 2 * CHUNK_BYTES + 1)) == [
        (CHUNK_BYTES - 1, 1),
        (CHUNK_BYTES, CHUNK_BYTES),
        (2 * CHUNK_BYTES, 1),
    ]
