"""Errors of the system below Python, one after another: the laboratory of test_io_errors.py and `make torture`.

A life is run by a child under strace, which lets the Nth call of one kind fail, once or from then on. So LMDB's own
writes are hit like ours. A life that is hit no more ends the sweep over N. There are two kinds of lives:

- a guest (`sick_guest.py`) attaches the disk, writes, makes checkpoints, and dies of SIGKILL or detaches. One of its
  files is sick: the store's, the image, the owner's file, or several. It keeps a diary of what it was told. Afterwards
  the image, the diary and the store must agree: see `Inquest`.
- a verb of the command line, whichever file it writes. It must end well, or in one sentence that says what to do,
  and the same verb must work right after it, with no clean-up by hand.
"""

from __future__ import annotations

import compileall
import contextlib
import errno
import json
import multiprocessing
import os
import random
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from lmdbitmap import export
from lmdbitmap.errors import LmdbitmapError, NotFound, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.flat_file.inspection import inspect_file
from lmdbitmap.restoring.restore import restore
from lmdbitmap.storage import schema
from lmdbitmap.store import Store
from lmdbitmap.tracker.changes import Changes
from tests.crash.sick_guest import BLOCK, GRANULARITY_BITS, LIVES, SIZE
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import PATIENCE_SECONDS, run, spawn
from tests.helpers.tracked import NAME, blocks_of, quick_folder, trust_of

_TREE = Path(__file__).parents[2]
MAX_SWEEP = 400
"""A life that makes more calls of one kind than this has lost its way."""

RENAME, UNLINK, MKDIR = "?rename,?renameat,?renameat2", "?unlink,?unlinkat", "?mkdir,?mkdirat"
"""One of each exists on any machine."""


class Sickness(NamedTuple):
    """`call` fails with `error` (a name) at its `nth` time, and from then on if it `lasts`; on `paths`, or on all."""

    call: str
    error: str
    nth: int
    lasts: bool
    paths: tuple[str, ...] = ()

    def options(self) -> list[str]:
        when = f"{self.nth}+" if self.lasts else str(self.nth)
        chosen = [word for path in self.paths for word in ("-P", path)]
        return [
            *chosen,
            "-e",
            f"trace={self.call}",
            "-e",
            f"inject={self.call}:error={self.error}:when={when}",
        ]


class Told(NamedTuple):
    """How a life under strace went."""

    hits: int
    code: int
    stdout: str
    stderr: str


def live(words: Iterable[str], sickness: Sickness, log: Path) -> Told:
    """Run a Python program that falls ill; SIGKILL shows as -9."""
    traced = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(log), *sickness.options()]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "LMDBITMAP_DEBUG": "1"}
    done = subprocess.run(
        [*traced, sys.executable, *words],
        capture_output=True, text=True, timeout=3 * PATIENCE_SECONDS, env=environment,
    )  # fmt: skip
    return Told(
        log.read_text(errors="replace").count("(INJECTED)"), done.returncode, done.stdout, done.stderr
    )


@contextlib.contextmanager
def falling_ill(pid: int, calls: str, error: str, paths: Iterable[object]) -> Iterator[None]:
    """In the block every one of `calls` of a living process on one of `paths` fails; after it they work again."""
    chosen = [word for path in paths for word in ("-P", str(path))]
    injected = ["-e", f"trace={calls}", "-e", f"inject={calls}:error={error}"]
    command = shlex.join(["strace", "-f", "-p", str(pid), "-o", os.devnull, *chosen, *injected])
    with spawn("sh", "-c", f"exec {command} 2>&1") as strace:
        strace.wait_for_line("attached")
        yield


# --- the inquest ---


class Entry(NamedTuple):
    step: str
    details: list[int | str]
    errno: int
    problem: str


@dataclass
class Tally:
    """What a sweep met."""

    lives: int = 0
    hits: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.lives += other.lives
        self.hits += other.hits
        self.seen.update(other.seen)

    def __str__(self) -> str:
        seen = ", ".join(f"{count} {what}" for what, count in sorted(self.seen.items()))
        return f"{self.hits} errors in {self.lives} lives: {seen}"


class Inquest:
    """Was anything lost? Compares what a guest was told with the image that it left, and with what the store says."""

    def __init__(self, disk: BackedUpDisk, told: Told, sick: str) -> None:
        self.disk = disk
        self.told = told
        self.sick = sick
        lines = (disk.folder / "diary").read_text().splitlines()
        self.diary = [Entry(line[0], line[1:-2], line[-2], line[-1]) for line in map(json.loads, lines)]
        self.image = disk.content()
        self.seen: Counter[str] = Counter()

    def hold(self) -> None:
        """Asks first, as whoever looks at the store right after a death; then goes on with the disk as a new owner."""
        assert "Traceback" not in self.told.stderr, self.told.stderr
        self.seen["stores opened anew"] = self.told.stderr.count("opened anew")
        self._policy_was_kept()
        self._what_was_told_is_in_the_image()
        for since in ("start", "one", "two"):
            self._changes_are_named(since)
        self._checkpoints_are_what_was_told()
        self._backups_tell_the_truth()
        self._disk_is_usable()

    def _policy_was_kept(self) -> None:
        """Only an image that is sick, or the policy `strict`, makes a guest's write fail."""
        failed = [entry for entry in self.diary if entry.step == "write" and entry.errno]
        self.seen["writes refused"] = len(failed)
        if self.sick == "image" or self.disk.policy == schema.STRICT:
            assert all(
                entry.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG) for entry in failed
            )
        else:
            assert not failed, failed

    def _what_was_told_is_in_the_image(self) -> None:
        expected = bytearray((self.disk.folder / "at-start").read_bytes()).ljust(len(self.image), b"\0")
        for entry in self.diary:
            if entry.step == "write":
                offset, length, fill = map(int, entry.details)
                if entry.errno == 0:
                    expected[offset : offset + length] = bytes([fill]) * length
                elif self.sick == "image":  # nobody can say what a write that failed left there
                    expected[offset : offset + length] = self.image[offset : offset + length]
        wrong = differing(expected, self.image)
        assert not wrong, f"blocks {sorted(wrong)} are not what was written"

    def _changes_are_named(self, since: str) -> None:
        answer = self._ask(since)
        if answer is None:
            return
        before = (self.disk.folder / f"at-{since}").read_bytes()
        lost = differing(before, self.image) - blocks_of(answer)
        assert not lost, (
            f"blocks {sorted(lost)} changed since {since} and are called clean ({answer.standing})"
        )

    def _ask(self, since: str) -> Changes | None:
        """None where nothing is known, and that is said with its reason; or where there is no such checkpoint."""
        try:
            answer = self.disk.changes(since)
        except Untrusted:
            self.seen["answers of an older epoch refused"] += 1
            return None
        except LmdbitmapError:
            assert since not in self.disk.checkpoints()
            return None
        if trust_of(answer) is Trust.UNTRUSTED:
            assert answer.standing.reason
            self.seen["answers called untrusted"] += 1
            return None
        return answer

    def _checkpoints_are_what_was_told(self) -> None:
        there = self.disk.checkpoints()
        forgotten = any(entry.step == "forget" for entry in self.diary)
        for entry in self.diary:
            if entry.step == "checkpoint":
                [name] = entry.details
                assert entry.errno or name in there or (name == "one" and forgotten), f"{name} is gone"
                if "no checkpoint was made" in entry.problem:
                    self.seen["checkpoints taken back"] += 1
                    assert name not in there or self._ask(str(name)) is None

    def _backups_tell_the_truth(self) -> None:
        entry = self.disk.backup()
        self.seen[f"{entry.type_actual.value} backups after"] += 1
        if entry.type_actual.value in ("full", "rescan"):
            assert entry.reason is not None
            assert entry.reason.words
        assert self.disk.restored() == self.image

    def _disk_is_usable(self) -> None:
        with self.disk.attach() as again:
            again.checkpoint("well again")
            again.pwrite(b"x", 77 * BLOCK)
            assert blocks_of(again.changes(since="well again")) == {77}
        assert blocks_of(self.disk.changes("well again")) == {77}
        assert trust_of(self.disk.changes("well again")) is Trust.EXACT


def differing(before: bytes | bytearray, after: bytes) -> set[int]:
    """Blocks in which two contents of a disk differ; what one of them lacks is a difference."""
    blocks = range(-(-max(len(before), len(after)) // BLOCK))
    return {n for n in blocks if before[n * BLOCK : (n + 1) * BLOCK] != after[n * BLOCK : (n + 1) * BLOCK]}


def prepare(folder: Path, policy: str = schema.GUEST_FIRST) -> BackedUpDisk:
    """A disk with a full backup, a checkpoint `start` and known content; nobody is attached."""
    folder.mkdir()
    disk = BackedUpDisk(folder, SIZE, GRANULARITY_BITS, policy=policy)
    disk.write(b"\xee" * (20 * BLOCK), 2 * BLOCK)
    disk.backup()
    disk.clean()
    (folder / "at-start").write_bytes(disk.content())
    return disk


class GuestCase(NamedTuple):
    """A guest, which of its files are sick, and which call on them."""

    life: str
    policy: str
    sick: str
    call: str
    error: str
    lasts: bool

    def run(self, folder: Path, nth: int) -> Tally:
        disk = prepare(folder, self.policy)
        with contextlib.closing(disk):
            sickness = Sickness(self.call, self.error, nth, self.lasts, sick_paths(disk, self.sick))
            words = ["-m", "tests.crash.sick_guest", self.life, str(folder), NAME]
            told = live(words, sickness, folder / "strace.log")
            inquest = Inquest(disk, told, self.sick)
            inquest.hold()
        return Tally(1, told.hits, inquest.seen)


def sick_paths(disk: BackedUpDisk, sick: str) -> tuple[str, ...]:
    data = str(disk.folder / "store" / "lmdb" / "data.mdb")
    owners = disk.store.owner_path(disk.disk().uuid)
    return {"store": (data,), "image": (str(disk.image),), "owner": (owners,)}[sick]


_CALLS_OF = {
    "store": ("pwrite64", "writev", "pwritev", "fdatasync"),
    "image": ("pwrite64", "fdatasync", "fallocate", "ftruncate"),
    "owner": ("pwrite64", "fdatasync"),
}
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EFBIG")


def guest_cases(errors: Iterable[str] = ERRORS) -> list[GuestCase]:
    return [
        GuestCase(life, policy, sick, call, error, lasts)
        for life in LIVES
        for policy in (schema.GUEST_FIRST, schema.STRICT)
        for sick, calls in _CALLS_OF.items()
        for call in calls
        for error in errors
        for lasts in (False, True)
    ]


# --- verbs of the command line ---


class VerbCase(NamedTuple):
    """A verb, whichever of its calls of one kind fails."""

    verb: str
    call: str
    error: str
    lasts: bool

    def run(self, folder: Path, nth: int) -> Tally:
        disk = prepare(folder)
        with contextlib.closing(disk):
            disk.write(b"\xdd" * (3 * BLOCK), 50 * BLOCK)
            words = ["-m", "lmdbitmap", "--store", disk.store.path, *VERBS[self.verb].words(disk)]
            told = live(words, Sickness(self.call, self.error, nth, self.lasts), folder / "strace.log")
            seen = Counter({f"{self.verb}s failed" if told.code else f"{self.verb}s done": 1})
            judge(told)
            VERBS[self.verb].check(disk, told)
        return Tally(1, told.hits, seen)


def judge(told: Told) -> None:
    """An exit code of ours, and for a failure a sentence that ends with the next step."""
    assert "Traceback" not in told.stderr, told.stderr
    assert "fault of lmdbitmap" not in told.stderr, told.stderr
    assert told.code in (0, 1, 3, 4), told
    if told.code and not self_inflicted(told):
        last = told.stderr.strip().splitlines()[-1]
        assert last.startswith("lmdbitmap: "), told.stderr
        assert "; " in last, told.stderr


def self_inflicted(told: Told) -> bool:
    """Whether not even the complaint could be written."""
    return not told.stderr


class Verb(NamedTuple):
    """Its words, and what must hold after it went well or ill."""

    words: Callable[[BackedUpDisk], list[str]]
    check: Callable[[BackedUpDisk, Told], None]


def check_backup(disk: BackedUpDisk, told: Told) -> None:
    contents = [(disk.folder / "at-start").read_bytes(), disk.content()]
    backups = disk.manifest().backups
    assert len(backups) == 2 if told.code == 0 else len(backups) in (1, 2)
    for entry, content in zip(backups, contents, strict=False):
        assert disk.restored(entry.id) == content
    disk.backup()
    assert disk.restored() == contents[1]
    assert all(name.endswith(".qcow2") for name in disk.files()), disk.files()
    assert len(disk.files()) == len(disk.manifest().backups)


def check_restore(disk: BackedUpDisk, told: Told) -> None:
    out, content = disk.folder / "out.raw", (disk.folder / "at-start").read_bytes()
    if told.code == 0 or out.exists():  # it failed in telling that it was done
        assert out.read_bytes() == content
        return
    restore(disk.folder / "backups", NAME, out)
    assert out.read_bytes() == content
    assert not list(disk.folder.glob("*.partial"))


def check_export(disk: BackedUpDisk, told: Told) -> None:
    out = disk.folder / "out.dbm"
    assert told.code or out.exists()
    if out.exists():
        assert inspect_file(out).problems == []
    asked = disk.changes("start")
    export.export_changes(asked, out)
    assert inspect_file(out).dirty_bytes >= 3 * BLOCK
    assert blocks_of(asked) >= {50, 51, 52}
    assert not list(disk.folder.glob("*.partial"))


def check_checkpoint(disk: BackedUpDisk, told: Told) -> None:
    assert told.code or "monday" in disk.checkpoints()
    with contextlib.suppress(Untrusted):
        assert blocks_of(disk.changes("start")) >= {50, 51, 52}
    with disk.attach() as attached:
        attached.checkpoint("tuesday")


def check_add(disk: BackedUpDisk, told: Told) -> None:
    check_added(disk, disk.store.path, told)


def check_add_to_new_store(disk: BackedUpDisk, told: Told) -> None:
    check_added(disk, str(disk.folder / "new store"), told)


def check_added(disk: BackedUpDisk, store_path: str, told: Told) -> None:
    """The disk is there and whole, or it can be added now."""
    with contextlib.suppress(NotFound), Store.open(store_path) as store, store.read() as reader:
        if any(known.name == "sdb" for known in reader.disks()):
            told = told._replace(code=0)  # it failed in telling that it was done
    if told.code:
        words = ["--store", store_path, "add", "sdb", str(disk.folder / "other.raw")]
        run(sys.executable, "-m", "lmdbitmap", *words)
    with Store.open(store_path) as store, Filter.attach(store, "sdb", background=False) as attached:
        assert attached.disk.epoch_number == 1
        attached.checkpoint("monday")


def _add_words(disk: BackedUpDisk) -> list[str]:
    (disk.folder / "other.raw").write_bytes(bytes(SIZE))
    return ["add", "sdb", str(disk.folder / "other.raw")]


VERBS = {
    "backup": Verb(lambda disk: ["backup", NAME, str(disk.folder / "backups")], check_backup),
    "restore": Verb(
        lambda disk: ["restore", str(disk.folder / "backups"), NAME, str(disk.folder / "out.raw")],
        check_restore,
    ),
    "export": Verb(
        lambda disk: ["export", NAME, str(disk.folder / "out.dbm"), "--since", "start"], check_export
    ),
    "checkpoint": Verb(lambda disk: ["checkpoint", NAME, "monday"], check_checkpoint),
    "add": Verb(_add_words, check_add),
    "add to a new store": Verb(
        lambda disk: ["--store", str(disk.folder / "new store"), *_add_words(disk)], check_add_to_new_store
    ),
}
_CALLS_OF_VERBS = (
    "pwrite64", "write", "writev", "fdatasync", "fsync", "ftruncate", "copy_file_range", RENAME, UNLINK, MKDIR,
)  # fmt: skip


def verb_cases(errors: Iterable[str] = ERRORS) -> list[VerbCase]:
    return [
        VerbCase(verb, call, error, lasts)
        for verb in VERBS
        for call in _CALLS_OF_VERBS
        for error in errors
        for lasts in (False, True)
    ]


# --- sweeps ---

Case = GuestCase | VerbCase


def sweep(case: Case, folder: Path) -> Tally:
    """N = 1, 2, 3 … until the life ends without a hit."""
    tally = Tally()
    for nth in range(1, MAX_SWEEP):
        one = run_case(case, nth, folder)
        tally.add(one)
        if one.hits == 0:
            return tally
    raise AssertionError(f"{case} makes more than {MAX_SWEEP} calls")


def run_case(case: Case, nth: int, folder: Path) -> Tally:
    """One life in a folder of its own, which only a failure leaves behind."""
    place = folder / f"{os.urandom(4).hex()}-{nth}"
    try:
        tally = case.run(place, nth)
    except (Exception, pytest.fail.Exception) as failure:
        raise AssertionError(f"{case}, call {nth}: {type(failure).__name__}: {failure}") from failure
    remove(place)
    return tally


def remove(folder: Path) -> None:
    for root, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(Path(root, name))
        for name in folders:
            os.rmdir(Path(root, name))
    folder.rmdir()


def side_by_side() -> ProcessPoolExecutor:
    """Processes, and not threads: a child that one of them starts holds the others' locks until it execs."""
    return ProcessPoolExecutor(max_workers=2, mp_context=multiprocessing.get_context("spawn"))


def torture(seed: int, scale: float) -> str:
    """Each kind of case with one error, as the seed chooses; scale 4 is each with every error."""
    compile_what_lives_import()
    chosen = drawn(seed, scale)
    total = Tally()
    with quick_folder() as folder, side_by_side() as pool:
        for tally in pool.map(sweep, chosen, [folder] * len(chosen)):
            total.add(tally)
    assert total.hits > (len(chosen) if scale >= 0.1 else 0), "hardly anything was hit"
    return f"{len(chosen)} sweeps, {total}"


def drawn(seed: int, scale: float) -> list[Case]:
    """Every kind of case comes once before any comes again, with another error."""
    chance = random.Random(seed)
    kinds: list[Case] = [*guest_cases(ERRORS[:1]), *verb_cases(ERRORS[:1])]
    errors_of = [chance.sample(ERRORS, len(ERRORS)) for _ in kinds]
    cases: list[Case] = []
    for errors in zip(*errors_of, strict=True):
        once = [kind._replace(error=error) for kind, error in zip(kinds, errors, strict=True)]
        cases += chance.sample(once, len(once))
    return cases[: max(1, round(len(kinds) * scale))]


def compile_what_lives_import() -> None:
    """They write no bytecode, as those would be calls to be hit too. Where there is none each takes twice as long."""
    for package in ("lmdbitmap", "tests"):
        compileall.compile_dir(_TREE / package, quiet=1)
