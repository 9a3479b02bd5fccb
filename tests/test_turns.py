"""Tests side by side: one that is alone is alone, and nothing that would fail in one process passes in two."""

from __future__ import annotations

import fcntl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from xdist.workermanage import NodeManager  # type: ignore[import-untyped]

from tests.helpers import turns
from tests.helpers.support import PATIENCE_SECONDS, run
from tests.helpers.turns import Turns, Workers

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(120)  # some start an interpreter or three, twice


def is_free(path: Path, kind: int) -> bool:
    """Whether somebody else could have this lock now."""
    with path.open() as lock:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Turns, Turns]]:
    with closing(Turns(tmp_path)) as ours, closing(Turns(tmp_path)) as theirs:
        yield ours, theirs


def test_others_run_side_by_side_and_not_beside_one_that_is_alone(
    two: tuple[Turns, Turns], tmp_path: Path
) -> None:
    ours, theirs = two
    with ours.taken(alone=False), theirs.taken(alone=False):
        assert not is_free(tmp_path / "room", fcntl.LOCK_EX)
    with ours.taken(alone=True):
        assert not is_free(tmp_path / "room", fcntl.LOCK_SH)
    assert is_free(tmp_path / "room", fcntl.LOCK_EX)


def test_nobody_overtakes_one_that_waits_to_be_alone(two: tuple[Turns, Turns], tmp_path: Path) -> None:
    (ours, theirs), entered = two, threading.Event()

    def be_alone() -> None:
        with theirs.taken(alone=True):
            entered.set()

    waiting = threading.Thread(target=be_alone)
    with ours.taken(alone=False):
        waiting.start()
        deadline = time.monotonic() + PATIENCE_SECONDS
        while is_free(tmp_path / "door", fcntl.LOCK_EX):
            assert time.monotonic() < deadline
        assert not entered.is_set()
    waiting.join(PATIENCE_SECONDS)
    assert entered.is_set()
    assert is_free(tmp_path / "door", fcntl.LOCK_EX)


def test_a_test_that_fails_gives_its_turn_away(two: tuple[Turns, Turns], tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), two[0].taken(alone=True):
        raise ZeroDivisionError
    assert is_free(tmp_path / "room", fcntl.LOCK_EX)


HELD = """
import fcntl, os
from pathlib import Path
import pytest

def kind(request):
    folder = Path(request.config.workerinput["turns"])
    for kind in ("EX", "SH"):
        with (folder / "room").open() as lock:
            try:
                fcntl.flock(lock, getattr(fcntl, f"LOCK_{kind}") | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return kind
    return None

@pytest.fixture
def held_in_fixture(request):
    return kind(request)

@pytest.mark.alone
def test_alone(request, held_in_fixture):
    assert kind(request) is held_in_fixture is None

@pytest.mark.parametrize("number", range(8))
def test_beside_others(request, held_in_fixture, number):
    assert kind(request) == held_in_fixture == "SH"
"""
SKIPPING = """
import pytest

def test_fine(): pass

@pytest.mark.skip(reason="the moon is full")
def test_skipped(): pass
"""
SKIPPED_WHOLE = "import pytest\npytest.skip('no moon at all', allow_module_level=True)\n"
DYING = "import os\n\ndef test_fine(): pass\n\ndef test_dying(): os._exit(0)\n\ndef test_more(): pass\n"
DYING_AT_ITS_END = """
import os, pytest

@pytest.fixture(scope="session", autouse=True)
def end():
    yield
    os._exit(0)

def test_fine(): pass
"""
DYING_AFTER_ITS_END = """
import atexit, os, signal

def test_fine():
    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
"""
SEEDED = """
from hypothesis import given, strategies

@given(strategies.integers())
def test_random(number):
    with open("seen", "a") as seen:
        seen.write(f"{number} ")
"""


def outcome(folder: Path, workers: int, *options: str, **sources: str) -> tuple[int, str]:
    """Exit code and output of pytest with so many workers, under the rules of `.ci/run`, for modules of these names."""
    for name, source in sources.items():
        (folder / f"test_{name}.py").write_text(source)
    done = run(
        sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", f"--rootdir={folder}",
        f"--numprocesses={workers}", "--max-worker-restart=0", *options, folder,
        timeout=2 * PATIENCE_SECONDS, cwd=folder, check=False,
        env={"LMDBITMAP_NO_SKIP": "1", "PYTHONPATH": str(ROOT), "CI": "true"},
    )  # fmt: skip
    return done.returncode, done.stdout


def test_workers_hold_their_turn_from_set_up_to_the_end_and_a_skip_is_a_failure(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, 2, held=HELD, skipping=SKIPPING, whole=SKIPPED_WHOLE)
    assert code == 1, said
    assert "10 passed, 2 skipped" in said
    assert "test_skipping.py::test_skipped: the moon is full" in said
    assert "test_whole.py: no moon at all" in said


@pytest.mark.parametrize(
    "source",
    [DYING, DYING_AT_ITS_END, DYING_AFTER_ITS_END],
    ids=["in a test", "at its end", "when its interpreter exits"],
)
def test_a_worker_that_dies_is_a_failure(tmp_path: Path, source: str) -> None:
    code, said = outcome(tmp_path, 1, dying=source)
    assert code == 1, said
    assert "workers that died" in said


def test_a_worker_that_is_slow_to_end_is_not_killed() -> None:
    Workers().pytest_unconfigure()
    assert turns._END_S == NodeManager.EXIT_TIMEOUT >= 3 * PATIENCE_SECONDS


@pytest.mark.parametrize("workers", [0, 1])
def test_a_seed_chooses_the_examples(tmp_path: Path, workers: int) -> None:
    """The same in a worker as without one; another seed, as of another commit in CI, chooses others."""
    seen = []
    for count, seed in ((0, 42), (workers, 42), (workers, 43)):
        code, said = outcome(tmp_path, count, f"--hypothesis-seed={seed}", seeded=SEEDED)
        assert code == 0, said
        seen.append((tmp_path / "seen").read_text())
        (tmp_path / "seen").unlink()
    assert seen[0] == seen[1] != seen[2]
    assert len(seen[0].split()) == 100
