"""Backups of disks while they are served, each figure in one run with its peer.

A *full* backup is compared with `qemu-img convert` of the same image from raw to qcow2, which computes no digests and
syncs nothing. The note names our digests; SHA-256 has a line of its own. An *increment* of 1 % is compared with
`qemu-img convert` of the whole. The time of both depends on the bytes they copy. So a 100 GiB image with
`INCREMENT_OF_BYTES` of data has the ratio of a full image, apart from the fixed cost of a run. Rates leave out the
start of the interpreter; lines that say "whole process" include it.

Full backups of a served disk are measured twice, with an idle and a busy guest: an idle guest leaves them one processor
more.

*Latencies* are those of fio over NBD at a steady rate, in three cases: while one full backup follows another; without a
backup; and while `qemu-img convert` copies the image again and again, with the niceness of a backup. The last case,
which keeps no old data and involves no server, is the minimum that a copy costs a guest.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from benchmarks import nbd
from benchmarks.table import Line
from benchmarks.tracked import command, warm_memory, workplace

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

MIB = 1 << 20
GIB = 1 << 30
DATA_BYTES = 2 * GIB
INCREMENT_OF_BYTES = 4 * GIB
SPARSE_BYTES = 100 * GIB
HUGE_BYTES = 64 << 40
BLOCK = 1 << 16
LATENCY_SECONDS = 4.0


def measure() -> Iterator[Line]:
    with workplace(4 * DATA_BYTES) as folder:
        yield from full_backups(folder)
    with workplace(3 * INCREMENT_OF_BYTES) as folder:
        yield from increments(folder)
    with workplace(0) as folder:
        yield from huge_disk(folder)
    yield from latencies("in memory", memory=True)
    yield from latencies("on disk", memory=False)


# -- a backup ----------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One `lmdbitmap backup`: the seconds that it reports, those of the whole process, its memory and its digest."""

    seconds: float
    whole_s: float
    memory_bytes: int
    digest: str


def back_up(folder: Path, *options: str) -> Run:
    words = ["--store", f"{folder}/store", "backup", "disk", f"{folder}/backups", "--json", *options]
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "lmdbitmap", *words], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    memory_bytes = peak_bytes(process)
    told = process.stdout.read()
    if process.returncode != 0:
        raise RuntimeError(f"a backup ended with {process.returncode}")
    [made] = json.loads(told)["backups"]
    whole_s = time.monotonic() - start
    return Run(float(made["seconds"]), whole_s, memory_bytes, made["digest"])


def peak_bytes(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process and return its peak memory. (The figure of `wait4` includes its parent's before exec.)"""
    most = 0
    while process.poll() is None:
        with contextlib.suppress(OSError):
            told = Path(f"/proc/{process.pid}/status").read_text()
            most = max(most, int(told.partition("VmHWM:")[2].split()[0]) << 10) if "VmHWM:" in told else most
        time.sleep(0.01)
    return most


def back_up_anew(folder: Path, *options: str) -> Run:
    """Make a full backup and delete it, so that the next one has as much room."""
    run = back_up(folder, "--full", *options)
    for image in Path(folder, "backups", "disk").glob("*.qcow2"):
        image.unlink()
    return run


@contextlib.contextmanager
def served(folder: Path) -> Iterator[nbd.Peer]:
    listen_at = folder / "served.sock"
    words = ["--store", f"{folder}/store", "serve", "disk", "--socket", str(listen_at)]
    peer = nbd.Peer("served", [sys.executable, "-m", "lmdbitmap", *words], listen_at)
    with nbd.running([peer]):
        yield peer


def convert(folder: Path) -> float:
    out = folder / "theirs.qcow2"
    warm_memory(DATA_BYTES * 3 // 2)
    start = time.monotonic()
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", folder / "disk.raw", out], check=True)
    seconds = time.monotonic() - start
    out.unlink()
    return seconds


def make_disk(folder: Path, size: int, places: Sequence[int], noise: bytes) -> None:
    with (folder / "disk.raw").open("xb") as image:
        image.truncate(size)
        for place in places:
            image.seek(place)
            image.write(noise)
    command(str(folder), "add", "disk", f"{folder}/disk.raw")


# -- figures -----------------------------------------------------------------------------------------------


def full_backups(folder: Path, rounds: int = 3) -> Iterator[Line]:
    """Measure full backups. Half of the disk is incompressible data, in pieces of a megabyte."""
    make_disk(folder, 2 * DATA_BYTES, range(0, 2 * DATA_BYTES, 2 * MIB), os.urandom(MIB))
    beside = "served, beside 2000 writes a second"
    runs: dict[str, list[Run]] = {"unserved": [], "unserved, SHA-256": [], "served": [], beside: []}
    theirs = []
    for _ in range(rounds):
        warm_memory(DATA_BYTES * 3 // 2)
        runs["unserved"].append(back_up_anew(folder))
        warm_memory(DATA_BYTES * 3 // 2)
        runs["unserved, SHA-256"].append(back_up_anew(folder, "--digest", "sha256"))
        with served(folder):
            warm_memory(DATA_BYTES * 3 // 2)
            runs["served"].append(back_up_anew(folder))
        with served(folder) as door, busy_guest(door):
            warm_memory(DATA_BYTES * 3 // 2)
            runs[beside].append(back_up_anew(folder))
        theirs.append(convert(folder))
    peer = statistics.median(theirs)
    for kind, made in runs.items():
        seconds = statistics.median(run.seconds for run in made)
        whole = statistics.median(run.whole_s for run in made)
        name = f"full backup, {kind}, 2 GiB of 4"
        rate, note = DATA_BYTES / seconds / 1e9, made[0].digest
        yield Line(name, rate, "GB/s", "qemu-img convert", peer / seconds, ">= 1", note)
        yield Line(f"{name}, whole process", whole, "s", "qemu-img convert", peer / whole, "", note)
        yield memory_line(name, made)


@contextlib.contextmanager
def busy_guest(peer: nbd.Peer) -> Iterator[None]:
    """Run a guest that writes only where data is already, so that the image's allocated size does not change."""
    load = nbd.Load("randwrite", "4k", 4, {})
    words = [*nbd.fio_command(peer.uri, load, 60), "--rate_iops=2000", "--zonemode=strided"]
    words += [f"--zonerange={MIB}", f"--zonesize={MIB // 16}", f"--zoneskip={MIB}"]
    with tempfile.TemporaryDirectory() as folder:
        guest = subprocess.Popen(words, stdout=subprocess.DEVNULL, cwd=folder)
        try:
            yield
        finally:
            guest.terminate()
            guest.wait()


def memory_line(name: str, runs: Sequence[Run]) -> Line:
    most = max(run.memory_bytes for run in runs)
    return Line(f"{name}, memory", most / MIB, "MiB", "", None, "< 256", "peak RSS of the backup")


def increments(folder: Path, rounds: int = 5) -> Iterator[Line]:
    """Measure increments, in turns with the peer. 1 % of the data is rewritten, in random blocks of 64 KiB."""
    places = range(0, SPARSE_BYTES, SPARSE_BYTES // (INCREMENT_OF_BYTES // MIB))
    make_disk(folder, SPARSE_BYTES, places, os.urandom(MIB))
    back_up(folder)
    runs, theirs = [], []
    for number in range(rounds):
        with served(folder) as peer:
            rewrite(peer, random.Random(number).sample(places, INCREMENT_OF_BYTES // 100 // BLOCK))
            warm_memory(INCREMENT_OF_BYTES // 10)
            runs.append(back_up(folder))
        theirs.append(convert(folder))
    seconds = statistics.median(run.seconds for run in runs)
    ratio, whole_ratio = (
        statistics.median(peer / ours for peer, ours in zip(theirs, taken, strict=True))
        for taken in ([run.seconds for run in runs], [run.whole_s for run in runs])
    )
    whole = statistics.median(run.whole_s for run in runs)
    name = f"increment, served, 1 % of {INCREMENT_OF_BYTES // GIB} GiB in 100 GiB sparse"
    yield Line(name, seconds, "s", "qemu-img convert", ratio, ">= 20", "of the whole")
    yield Line(f"{name}, whole process", whole, "s", "qemu-img convert", whole_ratio, "")
    yield memory_line(name, runs)


def rewrite(peer: nbd.Peer, places: Sequence[int]) -> None:
    from lmdbitmap.nbd.client.device import NbdDevice

    with contextlib.closing(NbdDevice.open(peer.uri)) as disk:
        for place in places:
            disk.pwrite(os.urandom(BLOCK), place)


def huge_disk(folder: Path, rounds: int = 3) -> Iterator[Line]:
    """Measure a sparse disk of 64 TiB on which nothing changes."""
    make_disk(folder, HUGE_BYTES, [], b"")
    size = f"{HUGE_BYTES >> 40} TiB sparse"
    with served(folder):
        full = back_up(folder)
        runs = [back_up(folder) for _ in range(rounds)]
    unserved = [back_up(folder) for _ in range(rounds)]
    yield Line(f"full backup, served, {size}, whole process", full.whole_s, "s", "", None, "")
    for kind, made in (("served", runs), ("unserved", unserved)):
        whole = statistics.median(run.whole_s for run in made)
        yield Line(f"no-change increment, {kind}, {size}, whole process", whole, "s", "", None, "< 3")
    yield memory_line(f"full backup and increments, {size}", [full, *runs, *unserved])


# -- what a guest notices ----------------------------------------------------------------------------------

GUESTS = (("4k", 2000), ("64k", 500))
"""The size of a write, and the number of writes per second."""


class Slowest(NamedTuple):
    """The 99th percentile of write latency, in microseconds, and the number of backups made meanwhile."""

    alone: float
    beside_ours: float
    beside_theirs: float
    backups: int


def latencies(where: str, *, memory: bool, rounds: int = 3) -> Iterator[Line]:
    with workplace(4 * DATA_BYTES) if memory else on_disk() as folder:
        make_disk(folder, DATA_BYTES, range(0, DATA_BYTES, MIB), os.urandom(MIB))
        with served(folder) as peer:
            back_up_anew(folder)
            for block, rate in GUESTS:
                rows = [slowest(folder, peer, block, rate) for _ in range(rounds)]
                name = f"guest's {block} write, p99 during a backup, {where}"
                note = f"{rate}/s at random, {sum(row.backups for row in rows)} full backups meanwhile"
                yield from latency_lines(name, note, rows)


def slowest(folder: Path, peer: nbd.Peer, block: str, rate: int) -> Slowest:
    alone = p99_us(peer, block, rate)
    with all_the_time(lambda: back_up_anew(folder)) as made:
        ours = p99_us(peer, block, rate)
    with all_the_time(lambda: convert_nicely(folder)):
        theirs = p99_us(peer, block, rate)
    return Slowest(alone, ours, theirs, len(made))


def latency_lines(name: str, note: str, rows: Sequence[Slowest]) -> Iterator[Line]:
    ours = statistics.median(row.beside_ours for row in rows)
    ratio = statistics.median(row.beside_ours / row.alone for row in rows)
    yield Line(name, ours, "us", "without", ratio, "<= 2", note)
    ratio = statistics.median(row.beside_ours / row.beside_theirs for row in rows)
    yield Line(name, ours, "us", f"beside {' '.join(NICE_CONVERT)}", ratio, "", note)


@contextlib.contextmanager
def on_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def p99_us(peer: nbd.Peer, block: str, rate: int) -> float:
    load = nbd.Load("randwrite", block, 4, {})
    words = [*nbd.fio_command(peer.uri, load, LATENCY_SECONDS), f"--rate_iops={rate}"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=folder)
    [job] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return float(job["write"]["clat_ns"]["percentile"]["99.000000"]) / 1e3


NICE_CONVERT = ("nice", "-n", "10", "qemu-img", "convert")


def convert_nicely(folder: Path) -> None:
    out = folder / "theirs.qcow2"
    words = [*NICE_CONVERT, "--force-share", "-f", "raw", "-O", "qcow2", f"{folder}/disk.raw", str(out)]
    subprocess.run(words, check=True)
    out.unlink()


@contextlib.contextmanager
def all_the_time(copy: Callable[[], T]) -> Iterator[list[T]]:
    """Make one copy after another until the block ends; the first has begun when the block begins."""
    made: list[T] = []
    begun, ending = threading.Event(), threading.Event()

    def work() -> None:
        for _ in itertools.takewhile(lambda _: not ending.is_set(), itertools.count()):
            begun.set()
            made.append(copy())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        begun.wait()
        yield made
    finally:
        ending.set()
        thread.join()


if __name__ == "__main__":
    from benchmarks.table import as_text

    for line in measure():
        print(as_text([line]).splitlines()[-1], flush=True)
