"""Tracking over NBD: the steady state against other servers, the first touch against the same server untracked.

Also whole commands: a backup of a disk on which nothing changed.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import nbd
from benchmarks.table import Line

ROOT = Path(__file__).resolve().parent.parent

SPARSE_BYTES = 64 << 30
BLOCK = 1 << 16


def measure() -> Iterator[Line]:
    yield from steady_state()
    yield from first_touch()
    yield from nothing_changed()


def steady_state() -> Iterator[Line]:
    """Measure a disk on which every block is dirty already: the usual state for a guest."""
    with workplace(4 * nbd.IMAGE_BYTES) as folder:
        images = nbd.write_images(folder)
        yield from nbd.measure_nbd(images, tracked_peer(images.ours, folder, "dirty"))


def first_touch(requests: int = SPARSE_BYTES // BLOCK) -> Iterator[Line]:
    """Write every block of a sparse image once, at random, 32 in flight; in a folder on disk, so that syncs cost."""
    seconds = {}
    limits = {"untracked": 0, "": 1024, ", --max-armed 32768": 32768}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind, most in limits.items():
            image = folder / f"{most}.raw"
            with image.open("xb") as made:
                made.truncate(SPARSE_BYTES)
            peer = tracked_peer(image, folder, max_armed=most) if most else nbd.ours_untracked(image, folder)
            with nbd.running([peer]):
                start = time.monotonic()
                touch_all(peer, requests)
                seconds[kind] = time.monotonic() - start
            image.unlink()
            shutil.rmtree(folder / "store", ignore_errors=True)
    untracked_s = seconds.pop("untracked")
    for kind, tracked_s in seconds.items():
        name, note = f"NBD first touch, 64 GiB sparse{kind}", "" if kind else "1024 extents armed at most"
        yield Line(name, requests / tracked_s, "/s", "untracked", untracked_s / tracked_s, ">= 0.6", note)


def touch_all(peer: nbd.Peer, requests: int) -> None:
    """Write each block exactly once, in an order that fio reads from a log: its own random map cannot do strides."""
    folder = peer.socket.parent
    blocks = list(range(SPARSE_BYTES // BLOCK))
    random.Random(7).shuffle(blocks)
    with open(folder / "order.log", "w") as log:
        log.write("fio version 2 iolog\ndisk add\ndisk open\n")
        log.writelines(f"disk write {block * BLOCK} 4096\n" for block in blocks[:requests])
        log.write("disk close\n")
    command = [
        "fio", "--name=touch", "--ioengine=nbd", f"--uri={peer.uri}", "--iodepth=32", "--read_iolog=order.log",
        "--replay_no_stall=1", f"--size={SPARSE_BYTES}", "--minimal",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)


def nothing_changed(rounds: int = 5) -> Iterator[Line]:
    """Measure the whole command `lmdbitmap backup` for an unchanged sparse disk of 1 TiB."""
    with tempfile.TemporaryDirectory() as name:
        image = Path(name) / "disk.raw"
        with image.open("xb") as made:
            made.truncate(1 << 40)
        command(name, "add", "disk", str(image))
        command(name, "backup", "disk", f"{name}/backups")
        seconds = []
        for _ in range(rounds):
            start = time.monotonic()
            command(name, "backup", "disk", f"{name}/backups")
            seconds.append(time.monotonic() - start)
        reports = json.loads(command(name, "ls", "--json"))
    assert reports, "the disk is tracked"
    yield Line(
        "no-change incremental, 1 TiB sparse, whole process",
        statistics.median(seconds),
        "s",
        "",
        None,
        "< 1 s",
    )


def command(folder: str, *words: str) -> str:
    whole = [sys.executable, "-m", "lmdbitmap", "--store", f"{folder}/store", *words]
    return subprocess.run(whole, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def warm_memory(size: int) -> None:
    """Touch and free memory: in a virtual machine, its first user would wait for the host to provide it."""
    mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


@contextlib.contextmanager
def workplace(needed: int) -> Iterator[Path]:
    """Yield a folder in memory if there is room, so that the figures are free of a disk's noise."""
    base = "/dev/shm" if shutil.disk_usage("/dev/shm").free > needed else None
    with tempfile.TemporaryDirectory(dir=base) as name:
        yield Path(name)


def tracked_peer(image: Path, folder: Path, period: str = "clean", max_armed: int = 1024) -> nbd.Peer:
    """Return our server with a write-ahead tracker; `period` is how the open period begins: `clean` or `dirty`."""
    listen_at = folder / "tracked.sock"
    words = ["serve", str(image), str(listen_at), f"{folder}/store", period, str(max_armed)]
    return nbd.Peer("tracked", [sys.executable, "-m", "benchmarks.tracked", *words], listen_at)


def serve(image: str, listen_at: str, store_path: str, period: str, max_armed: str) -> None:
    from lmdbitmap.filter import Filter
    from lmdbitmap.nbd.server.server import Server
    from lmdbitmap.store import Store
    from lmdbitmap.tracker import session

    with Store.create(store_path) as store:
        session.add(store, nbd.EXPORT, os.path.realpath(image), granularity_bits=16)
        with Filter.attach(store, nbd.EXPORT, max_armed=int(max_armed)) as attached:
            if period == "clean":
                attached.checkpoint("clean")
            server = Server({nbd.EXPORT: attached})
            server.listen_unix(listen_at)
            signal.signal(signal.SIGTERM, lambda number, frame: server.request_stop())
            server.serve_forever()


if __name__ == "__main__":
    serve(*sys.argv[2:])
