"""The cost of long chains: of checkpoints that were never forgotten, and of increments that were never pruned.

A *checkpoint* is compared with the first ones of the same disk: writers wait for it, however many there are. A
*restore* of many increments is compared with one of the same disk from a full backup alone.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.table import Line
from benchmarks.tracked import command, workplace
from lmdbitmap import Filter, Store, add, back_up, restore_backup

CHECKPOINTS = 1000
INCREMENTS = 400
SIZE = 16 << 30
BLOCK = 1 << 16
WRITES = 20
"""How many random blocks a guest writes between two checkpoints or backups."""


def measure() -> Iterator[Line]:
    with workplace(1 << 30) as folder, made(folder) as store:
        yield from checkpoints(folder, store)
    with workplace(4 << 30) as folder, made(folder) as store:
        yield from increments(folder, store)


def made(folder: Path) -> Store:
    """Return a new store that tracks a sparse disk."""
    with (folder / "disk.raw").open("xb") as image:
        image.truncate(SIZE)
    store = Store.create(os.fspath(folder / "store"))
    add(store, "disk", os.fspath(folder / "disk.raw"), granularity_bits=16)
    return store


def write(disk: Filter, chosen: random.Random) -> None:
    for _ in range(WRITES):
        disk.pwrite(chosen.randbytes(4096), chosen.randrange(SIZE // BLOCK) * BLOCK)


def seconds(deed: Callable[[], object]) -> float:
    start = time.monotonic()
    deed()
    return time.monotonic() - start


def checkpoints(folder: Path, store: Store) -> Iterator[Line]:
    chosen, taken = random.Random(1), []
    with Filter.attach(store, "disk") as disk:
        for number in range(CHECKPOINTS):
            write(disk, chosen)
            taken.append(seconds(partial(disk.checkpoint, f"c{number}")))
    first, last = statistics.median(taken[10:60]), statistics.median(taken[-50:])
    yield Line(f"checkpoint number {CHECKPOINTS}", last * 1e3, "ms", "the first", last / first, "")
    for verb in (["info", "disk"], ["changes", "disk", "--since", "c0"], ["check"]):
        whole_s = seconds(partial(command, str(folder), *verb))
        name = f"{verb[0]}, {CHECKPOINTS} checkpoints, whole process"
        yield Line(name, whole_s, "s", "", None, "< 5 s", f"{WRITES} writes between two")


def increments(folder: Path, store: Store) -> Iterator[Line]:
    chosen = random.Random(2)
    for _ in range(INCREMENTS):
        with Filter.attach(store, "disk") as disk:
            write(disk, chosen)
        back_up(store, ["disk"], os.fspath(folder / "increments"))
    back_up(store, ["disk"], os.fspath(folder / "full"))
    taken = {}
    for kind in ("increments", "full"):
        out = folder / f"{kind}.raw"
        taken[kind] = seconds(partial(restore_backup, folder / kind, "disk", out))
        out.unlink()
    name, ratio = f"restore of {INCREMENTS} increments", taken["full"] / taken["increments"]
    note = f"{WRITES} blocks in each"
    yield Line(name, taken["increments"], "s", "one full backup", ratio, "", note)
    kept = seconds(partial(command, str(folder), "prune", f"{folder}/increments", "disk", "--keep", "10"))
    yield Line(f"prune of {INCREMENTS} increments to 10, whole process", kept, "s", "", None, "", note)
