"""Every input of the corpus, and some thousand random changes of them, through the targets; atheris is not needed.

The corpus holds one small input for each shape of honest bytes, and each input that ever found a defect.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.fuzz.targets import CORPUS, TARGETS, corpus_of

MUTATIONS = {"flat-import": 60, "requests": 250}
"""Those that touch a store or move much; all others get so many:"""
MANY = 800
SEED = None if os.environ.get("CI") is None else 1
MOST_BYTES = 300 << 10


@pytest.mark.parametrize(
    ("target", "path"),
    [pytest.param(name, path, id=f"{name}/{path.name}") for name in TARGETS for path in corpus_of(name)],
)
def test_an_input_of_the_corpus_finds_nothing(target: str, path: Path) -> None:
    TARGETS[target].check(path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_random_changes_of_the_corpus_find_nothing(target: str) -> None:
    seed = SEED if SEED is not None else random.SystemRandom().randrange(2**32)
    randomness = random.Random(seed)
    inputs = [path.read_bytes() for path in corpus_of(target)]
    count = MUTATIONS.get(target, MANY)
    for _ in range(count):
        data = changed(randomness.choice(inputs), randomness.choice(inputs), randomness)
        try:
            TARGETS[target].check(data)
        except Exception as defect:
            raise AssertionError(f"{target}, seed {seed}: {data.hex()}") from defect
    assert count > 0


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


def test_every_target_has_a_corpus_and_all_of_it_is_small() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert all(len(corpus_of(target)) >= 3 for target in TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < MOST_BYTES
