"""EIO and ENOSPC at any write and any sync: a sample of io_errors.py's sweeps; servers that fall ill and recover."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.extents import Trust
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.storage import owner_file, schema
from tests.crash.io_errors import (
    ERRORS,
    VERBS,
    GuestCase,
    Tally,
    VerbCase,
    drawn,
    falling_ill,
    guest_cases,
    run_case,
    sweep,
    verb_cases,
)
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.nbd_raw import FLUSH, READ, WRITE, RawClient
from tests.helpers.support import Child, requires, run, spawn
from tests.helpers.tracked import NAME, quick_folder, trust_of

pytestmark = requires("strace", "5.3")

SIZE = 4 << 20
FAR = 3 << 20
EIO, ENOSPC = 5, 28
STORE_CALLS = "pwrite64,writev,pwritev,fdatasync"


# --- sweeps ---

_CALLS_AT_LEAST = {"store": 9, "image": 4, "owner": 2}
"""How often a guest calls, on each of its files."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with quick_folder() as found:
        yield found


@pytest.mark.parametrize("policy", [schema.GUEST_FIRST, schema.STRICT])
@pytest.mark.parametrize("sick", ["store", "image", "owner"])
def test_no_failing_call_of_a_guest_makes_a_changed_block_clean(folder: Path, policy: str, sick: str) -> None:
    chance = random.Random(f"{policy} {sick}")
    cases = [case for case in guest_cases(ERRORS) if (case.policy, case.sick) == (policy, sick)]
    total = Tally()
    for case in chance.sample([case for case in cases if case.call in ("pwrite64", "fdatasync")], 2):
        total.add(run_case(case, chance.randint(1, _CALLS_AT_LEAST[sick]), folder))
    assert total.lives == 2
    assert total.hits >= 1


def test_store_is_opened_anew_when_a_meta_page_could_not_be_written(folder: Path) -> None:
    case = GuestCase("leaving", schema.GUEST_FIRST, "store", "pwrite64", "EIO", lasts=False)
    total = Tally()
    for nth in (5, 6, 7):  # a page and the meta page in turns
        total.add(run_case(case, nth, folder))
    assert total.hits == 3
    assert total.seen["stores opened anew"] >= 1


@pytest.mark.parametrize("verb", VERBS)
def test_no_failing_call_of_a_verb_leaves_a_half_or_blocks_the_next(folder: Path, verb: str) -> None:
    chance = random.Random(verb)
    cases = [case for case in verb_cases(ERRORS) if case.verb == verb and not case.lasts]
    busy = [case for case in cases if case.call in ("fsync", "pwrite64", "fdatasync", "write")]
    total = Tally()
    for case in chance.sample(busy, 2):
        total.add(run_case(case, 1, folder))
    assert total.lives == 2
    assert total.hits >= 1


def test_a_sweep_ends_with_the_life_that_is_not_hit(folder: Path) -> None:
    tally = sweep(VerbCase("restore", "fsync", "EIO", lasts=False), folder)
    assert tally.lives == tally.hits + 1 >= 3
    assert tally.seen["restores done"] >= 1


def test_the_long_run_takes_each_kind_of_case_once_before_any_comes_again() -> None:
    once = drawn(seed=1, scale=1)
    assert {case._replace(error="") for case in once} == {*guest_cases([""]), *verb_cases([""])}
    assert len(once) == len(guest_cases([""])) + len(verb_cases([""]))
    assert {case.error for case in once} == set(ERRORS)
    assert sorted(drawn(seed=1, scale=4)) == sorted([*guest_cases(), *verb_cases()])


# --- servers ---


@dataclass
class Served:
    """A disk that a process of its own serves, and a guest of it."""

    disk: BackedUpDisk
    child: Child
    guest: RawClient

    def write(self, data: bytes, offset: int) -> int:
        return self.guest.do(WRITE, offset, len(data), data=data).error

    def flush(self) -> int:
        return self.guest.do(FLUSH).error

    def read(self, length: int, offset: int) -> bytes:
        return self.guest.do(READ, offset, length).data

    @property
    def data(self) -> Path:
        return self.disk.folder / "store" / "lmdb" / "data.mdb"

    @property
    def owners(self) -> str:
        return self.disk.store.owner_path(self.disk.disk().uuid)

    def verb(self, *words: object, code: int = 0) -> Any:
        """What a verb of another process answers, or says when it fails."""
        done = run(*_command(self.disk, *words), "--json", check=False)
        assert done.returncode == code, done
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout) if code == 0 else done.stderr

    def end(self, how: int) -> int:
        self.guest.sock.close()
        self.child.process.send_signal(how)
        return self.child.wait()


_IMPATIENT = """
from lmdbitmap.cli.main import main
from lmdbitmap.tracker import vouching
vouching.SILENCE_S = 3.0
main()
"""
"""For a server whose machine is not restarted: then this is long enough."""


def _command(disk: BackedUpDisk, *words: object, python: Sequence[str] = ("-m", "lmdbitmap")) -> list[str]:
    return [sys.executable, *python, "--store", disk.store.path, *map(str, words)]


@contextlib.contextmanager
def serving(disk: BackedUpDisk, python: Sequence[str] = ("-m", "lmdbitmap")) -> Iterator[Served]:
    socket = disk.folder / "sda.sock"
    with spawn(*_command(disk, "serve", NAME, "--socket", socket, python=python)) as child:
        child.wait_for_line("^ready$")
        with RawClient.connect(str(socket)) as guest:
            guest.go(NAME)
            yield Served(disk, child, guest)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    with contextlib.closing(BackedUpDisk(tmp_path, SIZE)) as made:
        yield begun(made)


@pytest.fixture
def strict_disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    with contextlib.closing(BackedUpDisk(tmp_path, SIZE, policy=schema.STRICT)) as made:
        yield begun(made)


def begun(disk: BackedUpDisk) -> BackedUpDisk:
    disk.write(b"first", 0)
    disk.backup()
    disk.clean()
    return disk


@pytest.mark.parametrize(
    ("calls", "error"),
    [("pwrite64,writev,pwritev", "ENOSPC"), ("fdatasync", "EIO")],
)
def test_server_says_untrusted_while_its_store_fails_and_recovers_by_itself(
    disk: BackedUpDisk, calls: str, error: str
) -> None:
    with serving(disk) as served:
        assert served.write(b"before", 0) == 0
        with falling_ill(served.child.pid, calls, error, [served.data]):
            assert served.write(b"during", FAR) == 0
            assert "tracking failed" in served.verb("changes", NAME, "--since", "start", code=3)
            assert served.write(b"and on", FAR + 65536) == 0
            failed = served.verb("checkpoint", NAME, "monday", code=1)
            assert "; " in failed
        served.verb("checkpoint", NAME, "tuesday")
        assert served.write(b"after", 1 << 20) == 0
        answer = served.verb("changes", NAME, "--since", "tuesday")
        assert (answer["trust"], answer["dirty_bytes"]) == ("exact", 4096)
        assert served.end(signal.SIGTERM) == 0
    entry = disk.backup()
    assert entry.type_actual is BackupType.RESCAN
    assert entry.reason is not None
    assert "tracking failed" in entry.reason.words
    assert disk.restored() == disk.content()


def test_killed_while_its_store_fails_a_server_has_said_so_already(disk: BackedUpDisk) -> None:
    with serving(disk) as served:
        with falling_ill(served.child.pid, STORE_CALLS, "EIO", [served.data]):
            assert served.write(b"during", FAR) == 0
            served.end(signal.SIGKILL)
        said = owner_file.distrust(served.owners)
        assert said is not None
        assert "Input/output error" in said.reason
    assert trust_of(disk.changes("start")) is Trust.UNTRUSTED
    entry = disk.backup()
    assert entry.type_actual is BackupType.RESCAN
    assert disk.restored() == disk.content()


@pytest.mark.usefixtures("exact_grace")
def test_where_not_even_that_can_be_written_silence_says_it(disk: BackedUpDisk) -> None:
    """Waits for real: the write comes later than any beat can vouch for."""
    with serving(disk, python=("-c", _IMPATIENT)) as served:
        with falling_ill(served.child.pid, STORE_CALLS, "EIO", [served.data, served.owners]):
            assert served.write(b"during", FAR) == 0
            served.end(signal.SIGKILL)
        assert owner_file.distrust(served.owners) is None
    answer = disk.changes("start")
    assert trust_of(answer) is Trust.UNTRUSTED
    assert "last sign of life" in str(answer.standing.reason)
    entry = disk.backup()
    assert entry.type_actual is BackupType.RESCAN
    assert disk.restored() == disk.content()


def test_strict_server_refuses_what_it_cannot_record_and_goes_on_when_it_can(
    strict_disk: BackedUpDisk,
) -> None:
    with serving(strict_disk) as served:
        assert served.write(b"before", 0) == 0
        with falling_ill(served.child.pid, STORE_CALLS, "ENOSPC", [served.data]):
            assert served.write(b"refused", FAR) == ENOSPC
            assert served.read(7, FAR) == bytes(7)
            assert served.write(b"settled", 0) == 0
        assert served.write(b"taken", 1 << 20) == 0
        answer = served.verb("changes", NAME, "--since", "start")
        assert answer["trust"] == "exact"
        assert [extent["offset"] for extent in answer["extents"]] == [0, 1 << 20]
        assert served.end(signal.SIGTERM) == 0
    assert strict_disk.backup().type_actual is BackupType.INCREMENTAL
    assert strict_disk.restored() == strict_disk.content()


@pytest.mark.parametrize(("error", "answer"), [("EIO", EIO), ("EDQUOT", ENOSPC)])
def test_write_that_the_image_refuses_is_the_guests_error_and_costs_no_trust(
    disk: BackedUpDisk, error: str, answer: int
) -> None:
    with serving(disk) as served:
        with falling_ill(served.child.pid, "pwrite64", error, [disk.image]):
            assert served.write(b"refused", FAR) == answer
            assert served.write(b"refused", FAR) == answer
        assert served.write(b"taken", FAR) == 0
        said = served.verb("changes", NAME, "--since", "start")
        assert (said["trust"], said["dirty_bytes"]) == ("exact", 4096)
        assert served.end(signal.SIGTERM) == 0
    assert disk.backup().type_actual is BackupType.INCREMENTAL
    assert disk.restored() == disk.content()


def test_flush_that_failed_is_not_forgotten_when_the_next_would_succeed(disk: BackedUpDisk) -> None:
    with serving(disk) as served:
        assert served.write(b"where is it", FAR) == 0
        assert served.flush() == 0
        with falling_ill(served.child.pid, "fdatasync", "EIO", [disk.image]):
            assert served.flush() == EIO
        assert served.flush() == EIO
        assert "could not be flushed" in served.verb("checkpoint", NAME, "monday", code=1)
        assert "could not be flushed" in served.verb("changes", NAME, "--since", "start", code=3)
        assert served.write(b"the guest goes on", FAR) == 0
        assert served.end(signal.SIGTERM) == 1
        assert "could not be flushed" in served.child.stderr.splitlines()[-1]
    assert disk.checkpoints()[-1] == "start"
    assert trust_of(disk.changes("start")) is Trust.UNTRUSTED
    with serving(disk) as again:
        assert again.flush() == 0
        again.verb("checkpoint", NAME, "tuesday")
        assert again.end(signal.SIGTERM) == 0
    entry = disk.backup()
    assert entry.reason is not None
    assert "could not be flushed" in entry.reason.words
    assert disk.restored() == disk.content()
