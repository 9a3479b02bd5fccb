"""Restores against `qemu-img convert` of the same chain to a raw file, in turns. The interpreter's start is left out.

The peer compares no digest. If everything is in memory, SHA-256 costs more than the copy and BLAKE3 about half of it;
all cores compute them. The note names the digest. With `--no-verify` both do the same work. On disk we sync what we
wrote, which the peer does not unless it is told to (`-t writeback`): it is measured either way.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.table import Line
from benchmarks.tracked import command, warm_memory, workplace
from lmdbitmap.copying.digest_algorithms import fastest
from lmdbitmap.filter import Filter
from lmdbitmap.restoring.restore import restore as restored_in_library
from lmdbitmap.store import Store
from tests.helpers.deep_chain import make_deep_chain

DATA_BYTES = 1 << 30
SIZE = 2 * DATA_BYTES
MIB = 1 << 20
INCREMENTS = 10
DEEP_BYTES = 64 << 20


class Peer(NamedTuple):
    """A way to call `qemu-img convert`."""

    name: str
    options: tuple[str, ...]


PEERS = [Peer("qemu-img convert", ()), Peer("the same, synced", ("-t", "writeback"))]


def measure() -> Iterator[Line]:
    yield from restores("in memory", memory=True)
    yield from restores("on disk", memory=False)
    yield deep_chain()


def restores(where: str, *, memory: bool, rounds: int = 3) -> Iterator[Line]:
    """Measure restores to a new file of a full backup and of one with increments, and in place if nothing differs."""
    unproven, in_place = "--no-verify", "--in-place"
    with workplace(5 * SIZE) if memory else folder_on_disk() as folder:
        make_backup(folder)
        data, size = DATA_BYTES / (1 << 30), SIZE / (1 << 30)
        peers = PEERS[:1] if memory else PEERS
        yield from compared(folder, f"restore, {data:g} GiB of {size:g}, {where}", rounds, peers)
        yield from compared(folder, f"the same {unproven}", rounds, peers, unproven)
        yield from with_sha256(folder, "the same with SHA-256", rounds, peers)
        make_increments(folder)
        name = f"restore of {INCREMENTS} increments {unproven}, {where}"
        yield from compared(folder, name, rounds, peers, unproven)
        name = f"restore {in_place} {unproven}, nothing differs"
        yield from compared(folder, name, rounds, peers, in_place, unproven)


def with_sha256(folder: Path, name: str, rounds: int, peers: Sequence[Peer]) -> Iterator[Line]:
    """Measure a restore from a second repository with SHA-256, which is deleted afterwards."""
    backups, other = folder / "backups", folder / "aside"
    backups.rename(other)
    command(str(folder), "backup", "disk", str(backups), "--digest", "sha256", "--new-repository")
    yield from compared(folder, name, rounds, peers)
    shutil.rmtree(backups)
    other.rename(backups)


def deep_chain() -> Line:
    """Restore a chain of a thousand images with 25 scattered clusters of 4 KiB each, and prove every byte of them."""
    with workplace(4 * DEEP_BYTES) as folder:
        made, truth = make_deep_chain(folder / "backups", 1000, size=DEEP_BYTES, written=25)
        start = time.monotonic()
        restored_in_library(made.repository_path, made.disk_name, folder / "out.raw")
        seconds = time.monotonic() - start
        assert (folder / "out.raw").read_bytes() == truth
    name, note = f"restore of 1000 images, {DEEP_BYTES // MIB} MiB", fastest().value
    return Line(name, seconds, "s", "", None, "< 10 s", note)


def compared(folder: Path, name: str, rounds: int, peers: Sequence[Peer], *options: str) -> Iterator[Line]:
    ours, theirs = folder / "ours.raw", [folder / f"theirs{number}.raw" for number in range(len(peers))]
    newest = max((folder / "backups" / "disk").glob("*.qcow2"))
    if "--in-place" in options:
        restore(folder, ours)
    works: list[tuple[Path, Callable[[], float]]] = [
        (ours, lambda: restore(folder, ours, *options)),
        *(
            (out, functools.partial(convert, newest, out, peer))
            for out, peer in zip(theirs, peers, strict=True)
        ),
    ]
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for (out, work), seconds in zip(works, taken, strict=True):
            if out is not ours or "--in-place" not in options:
                out.unlink(missing_ok=True)
            seconds.append(work())
    subprocess.run(["cmp", ours, theirs[0]], check=True)
    for out, _ in works:
        out.unlink()
    mine, *others = (statistics.median(seconds) for seconds in taken)
    note = "" if "--no-verify" in options else digest_of(folder)
    for peer, their_s in zip(peers, others, strict=True):
        yield Line(name, DATA_BYTES / mine / 1e9, "GB/s", peer.name, their_s / mine, ">= 1", note)


def digest_of(folder: Path) -> str:
    [disk] = json.loads(command(str(folder), "ls", f"{folder}/backups", "--json"))["disks"]
    return str(disk["backups"][-1]["digest"])


def restore(folder: Path, out: Path, *options: str) -> float:
    """Restore and return the seconds that the command reports."""
    warm_memory(DATA_BYTES * 3 // 2)
    words = ("restore", f"{folder}/backups", "disk", str(out), "--json", *options)
    told: float = json.loads(command(str(folder), *words))["seconds"]
    return told


def convert(image: Path, out: Path, peer: Peer) -> float:
    warm_memory(DATA_BYTES * 3 // 2)
    start = time.monotonic()
    subprocess.run(["qemu-img", "convert", *peer.options, "-O", "raw", image, out], check=True)
    return time.monotonic() - start


def make_backup(folder: Path) -> None:
    """Make a disk and back it up. Half of it is incompressible data, in pieces of a megabyte."""
    noise = os.urandom(MIB)
    with (folder / "disk.raw").open("xb") as image:
        image.truncate(SIZE)
        for number in range(DATA_BYTES // MIB):
            image.seek(2 * number * MIB)
            image.write(noise[number:] + noise[:number])
    command(str(folder), "add", "disk", f"{folder}/disk.raw")
    command(str(folder), "backup", "disk", f"{folder}/backups")


def make_increments(folder: Path) -> None:
    """Make increments of 1 % of the disk each."""
    for number in range(INCREMENTS):
        with Store.open(f"{folder}/store") as store, Filter.attach(store, "disk") as disk:
            for piece in range(SIZE // 100 // 65536):
                offset = (piece * 6553 + number * 977) * 65536 % (SIZE - 65536)
                disk.pwrite(os.urandom(65536), offset)
        command(str(folder), "backup", "disk", f"{folder}/backups")


@contextlib.contextmanager
def folder_on_disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


if __name__ == "__main__":
    from benchmarks.table import as_text

    print(as_text(list(measure())))
