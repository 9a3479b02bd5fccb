"""What the targets share: numbers and pieces out of a fuzzer's bytes, and a folder in memory.

A fuzzer changes bytes. A target that reads its choices off the front of them, and makes checksums and lengths
right where a choice says so, lets it get past both.
"""

from __future__ import annotations

import atexit
import functools
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import TypeVar

from lmdbitmap.errors import LmdbitmapError

T = TypeVar("T")

MOST_WORDS = 1500
MOST_PIECES = 300
WHOLE, BYTEWISE = 0, 1

MEMORY = "/dev/shm"


class Input:
    """The bytes of one input, read from the front; past their end there are zeroes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        return max(len(self._data) - self._position, 0)

    def take(self, length: int) -> bytes:
        """As many of the bytes as there are."""
        taken = self._data[self._position : self._position + length]
        self._position += length
        return taken

    def rest(self) -> bytes:
        return self.take(self.left)

    def number(self, size: int) -> int:
        """Of `size` bytes, little-endian."""
        return int.from_bytes(self.take(size), "little")

    def byte(self) -> int:
        return self.number(1)

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.byte() % len(choices)]


def pieces_of(stream: bytes, choice: int) -> Iterator[bytes]:
    """The stream in pieces: 0 is whole, 1 is byte by byte, every other number cuts it in its own way.

    What is left after `MOST_PIECES` comes as one.
    """
    position, state = 0, choice
    for _ in range(MOST_PIECES):
        state = (state * 1103515245 + 12345) % 2**31
        size = {WHOLE: len(stream), BYTEWISE: 1}.get(choice, 1 + (state >> 8) % (1 << 1 + choice % 11))
        yield stream[position : position + size]
        position += size
        if position >= len(stream):
            return
    yield stream[position:]


def check_words(refusal: LmdbitmapError, place: str = "", most: int = MOST_WORDS) -> None:
    """A refusal is a sentence of bearable length that names the place and the next step."""
    words = str(refusal)
    assert len(words) < most, f"{len(words)} characters: {words[:200]}"
    assert words.startswith(place)
    assert words.endswith(refusal.next_step)
    words.encode("utf-8", "surrogatepass")


def damaged(written: bytes, source: Input) -> bytes:
    """`written` with a change that CRC-32 is sure to notice: up to 32 bits in a row, or another length."""
    kind, where = source.byte() % 4, source.number(2)
    position = where % max(len(written), 1)
    if kind == 0:
        return written[:position]
    if kind == 1:
        return written + source.take(1 + where % 8)
    if kind == 2:
        return _with_flipped(written, position, 1 << where % 8)
    burst = source.take(4)[: len(written) - position]
    return written[:position] + burst + written[position + len(burst) :]


def _with_flipped(written: bytes, position: int, mask: int) -> bytes:
    changed = bytearray(written)
    changed[position] ^= mask
    return bytes(changed)


def chosen_seed() -> int:
    """For one run of the random changes: another one each time, but in CI."""
    return 1 if os.environ.get("CI") else random.SystemRandom().randrange(2**32)


def changed(data: bytes, other: bytes, randomness: random.Random) -> bytes:
    """One to four of: a byte replaced, a bit flipped, bytes put in, taken out, doubled, or taken from `other`."""
    changing = bytearray(data)
    for _ in range(randomness.randint(1, 4)):
        start = randomness.randrange(len(changing) + 1)
        stop = min(start + randomness.choice((1, 1, 2, 4, 8, 64)), len(changing))
        number = randomness.choice((0, 1, 0x7F, 0x80, 0xFF, randomness.randrange(256)))
        changing[start:stop] = randomness.choice(
            (
                bytes([number]) * (stop - start),
                bytes([changing[start] ^ 1 << number % 8]) if start < len(changing) else b"",
                bytes([number]) * 3 + changing[start:stop],
                b"",
                changing[start:stop] * 2,
                other[start:stop],
            )
        )
    return bytes(changing)


@functools.cache
def scratch_folder() -> str:
    """A folder of this process's own, in memory where the machine has such a place."""
    in_memory = MEMORY if os.path.isdir(MEMORY) else None
    folder = tempfile.mkdtemp(prefix="lmdbitmap-fuzz-", dir=os.environ.get("TMPDIR", in_memory))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def scratch_file() -> tuple[int, str]:
    """A descriptor of a file in memory, and a path that opens it."""
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    return fd, f"/proc/self/fd/{fd}"


def fill_scratch_file(content: bytes) -> str:
    """Make `content`, pages of zeroes left out as holes, the content of that file; answer its path."""
    fd, path = scratch_file()
    os.ftruncate(fd, 0)
    os.ftruncate(fd, len(content))
    for start in range(0, len(content), 4096):
        page = content[start : start + 4096]
        if any(page):
            os.pwrite(fd, page, start)
    return path
