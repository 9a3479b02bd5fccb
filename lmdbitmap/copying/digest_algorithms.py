"""The algorithms for the digests of an image's chunks, by their names in a manifest.

Both are cryptographic and 32 bytes long: if a digest fits, the data is what it was, to the bit. SHA-256 is in the
standard library. BLAKE3 takes half of its time or less. It is the package `blake3`, which is imported when the first
digest is wanted. Both let other threads run while they work.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable
from typing import Final, Protocol

from lmdbitmap.errors import InvalidArgument, NotFound
from lmdbitmap.interfaces import Buffer

DIGEST_BYTES: Final = 32


class DigestAlgorithm(enum.Enum):
    SHA256 = "sha256"
    BLAKE3 = "blake3"

    @property
    def title(self) -> str:
        """The name as people write it."""
        return _TITLES[self]


_TITLES = {DigestAlgorithm.SHA256: "SHA-256", DigestAlgorithm.BLAKE3: "BLAKE3"}
INSTALL: Final = "run: pip install 'lmdbitmap[fast]'"


class Hasher(Protocol):
    """Computes one digest, fed piece by piece."""

    def update(self, data: Buffer, /) -> object: ...
    def digest(self) -> bytes: ...


def named(name: str) -> DigestAlgorithm:
    """Return the algorithm called `sha256` or `blake3`. Raise `NotFound` if its package is missing."""
    for algorithm in DigestAlgorithm:
        if algorithm.value == name:
            require(algorithm, f"digest {name}")
            return algorithm
    known = " or ".join(algorithm.value for algorithm in DigestAlgorithm)
    raise InvalidArgument(f"{name!r} is no kind of digest", next_step=f"choose {known}")


def fastest() -> DigestAlgorithm:
    """Return the fastest algorithm that this Python has."""
    blake3 = DigestAlgorithm.BLAKE3
    return blake3 if is_available(blake3) else DigestAlgorithm.SHA256


def is_available(algorithm: DigestAlgorithm) -> bool:
    try:
        _maker(algorithm)
    except ImportError:
        return False
    return True


def require(algorithm: DigestAlgorithm, place: str, *, instead: str = "") -> None:
    """Raise `NotFound` if the algorithm's package is missing: better before the work than in the middle of it.

    `place` is what needs it; `instead` is what else a user can do.
    """
    if not is_available(algorithm):
        raise NotFound(
            f"{place}: expected the package {algorithm.value}, which {algorithm.title} digests need, found none",
            next_step=INSTALL + (f", or {instead}" if instead else ""),
        )


def new_hasher(algorithm: DigestAlgorithm) -> Hasher:
    """Return a hasher without data. If the package may be missing, call `require` before."""
    return _maker(algorithm)()


def _maker(algorithm: DigestAlgorithm) -> Callable[[], Hasher]:
    if algorithm is DigestAlgorithm.SHA256:
        return hashlib.sha256
    from blake3 import blake3

    return blake3
