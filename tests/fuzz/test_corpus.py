"""Every input of the corpus, and some thousand random changes of them, through the targets; atheris is not needed.

The corpus holds one small input for each shape of honest bytes, and each input that ever found a defect.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.inputs import changed, chosen_seed
from tests.fuzz.targets import CORPUS, TARGETS, corpus_of

MUTATIONS = {"flat-import": 60, "requests": 250, "far-answers": 250}
"""Those that touch a store or move much; all others get so many:"""
MANY = 800
MOST_BYTES = 300 << 10


@pytest.mark.parametrize(
    ("target", "path"),
    [pytest.param(name, path, id=f"{name}/{path.name}") for name in TARGETS for path in corpus_of(name)],
)
def test_an_input_of_the_corpus_finds_nothing(target: str, path: Path) -> None:
    TARGETS[target].check(path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_random_changes_of_the_corpus_find_nothing(target: str) -> None:
    seed = chosen_seed()
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


def test_every_target_has_a_corpus_and_all_of_it_is_small() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    assert all(len(corpus_of(target)) >= 3 for target in TARGETS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < MOST_BYTES
