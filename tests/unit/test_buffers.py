"""Where large buffers lie. A first page tells of all: what begins 1 to 31 bytes into one is filled slowly."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lmdbitmap.work.buffers import new_buffer

PLACES = """
import ctypes
from lmdbitmap.work.buffers import new_buffer
held = [new_buffer(length << 18) for length in (1, 2, 4, 4, 16)]
print(*(ctypes.addressof(ctypes.c_char.from_buffer(each)) % 4096 for each in held))
"""


@pytest.mark.parametrize("length", [0, 1, 47, 4096, 1 << 20])
def test_a_buffer_is_a_bytearray_of_zeroes(length: int) -> None:
    assert new_buffer(length) == bytearray(length)


def test_large_buffers_do_not_begin_where_they_are_filled_slowly() -> None:
    """In an interpreter that has freed nothing large yet, after which it may have memory from somewhere else."""
    told = subprocess.run([sys.executable, "-c", PLACES], capture_output=True, check=True)
    places = [int(word) for word in told.stdout.split()]
    assert len(places) == 5
    assert not any(0 < place < 32 for place in places)
