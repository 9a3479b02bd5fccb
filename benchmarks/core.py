"""The cost of tracking without a network: the settled write, attach, export, changes, checkpoints, over-report.

Every figure is compared with a peer in the same run, or is a bound on the time or memory of one whole process. Such a
process runs this file as `python -m benchmarks.core SCENE ARGUMENT…` and prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.table import Line
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import REGION_BLOCKS, REGION_BYTES
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import session
from lmdbitmap.tracker.chain import current_checkpoint
from lmdbitmap.tracker.changes import changes

ROOT = Path(__file__).resolve().parent.parent

TIB = 1 << 40
BLOCK = 1 << 16


def measure() -> Iterator[Line]:
    """Yield all lines of this file; the caller prints each as it comes."""
    yield from settled_write()
    yield from huge_disks()
    yield from checkpoint_stall()
    yield from over_report()
    yield from import_time()


# -- the hot path ------------------------------------------------------------------------------------------


def settled_write(image_bytes: int = 1 << 28, rounds: int = 9) -> Iterator[Line]:
    """4 KiB writes at random places of a cached image: bare pwrite, a lane's pwrite, a lane's batch of 32."""
    with tracked(image_bytes) as attached:
        fill(attached, image_bytes)
        data = memoryview(os.urandom(4096))
        places = [random.randrange(image_bytes >> 12) << 12 for _ in range(30_000)]
        batches = [[(place, data) for place in places[i : i + 32]] for i in range(0, len(places), 32)]
        lane, fd, bare = attached.lane(), attached.fd, os.pwrite

        def plain() -> None:
            for place in places:
                bare(fd, data, place)  # type: ignore[arg-type]

        def single() -> None:
            for place in places:
                lane.pwrite(data, place)

        def batched() -> None:
            for batch in batches:
                lane.write_many(batch)

        seconds = interleaved([plain, single, batched], rounds)
        bare_ns = seconds[0] / len(places) * 1e9
        for name, taken in (("one by one", seconds[1]), ("in batches of 32", seconds[2])):
            ratio = taken / seconds[0]
            yield Line(
                f"settled 4 KiB write, {name}", bare_ns * ratio, "ns", "os.pwrite", ratio, "<= 1.10", "time"
            )


def fill(attached: Filter, image_bytes: int) -> None:
    """Write everything once: the image is in the page cache and every block is settled.

    It is written in pages, as a guest would. Small writes to a file that was written in large pieces are five times
    slower, which would make any ratio look good.
    """
    lane, data = attached.lane(), os.urandom(4096)
    for offset in range(0, image_bytes, len(data)):
        lane.pwrite(data, offset)


def interleaved(works: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median seconds of each function, run in turns so that a noisy moment hits all of them."""
    taken: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, times in zip(works, taken, strict=True):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


# -- huge disks --------------------------------------------------------------------------------------------


def huge_disks() -> Iterator[Line]:
    """A 64 TiB disk: clean, fully dirty, and with every second block dirty."""
    with huge_store(bits=None) as store:
        seen = child("attach", store)
        yield bound("idle clean 64 TiB disk: memory", seen["peak_mib"], "MiB", 40)
    with huge_store(bits=b"\xff") as store:
        seen = child("attach", store)
        yield bound("attach of a fully dirty 64 TiB disk", seen["seconds"], "s", 1)
        seen = child("load", store)
        yield bound("the same after a write to every region: memory", seen["peak_mib"], "MiB", 384)
        seen = child("export", store)
        yield bound("export of its bitmap (128 MiB)", seen["seconds"], "s", 2)
        yield bound("export: private memory", seen["private_mib"], "MiB", 64)
    yield from alternating()


def alternating() -> Iterator[Line]:
    """Stream 16 million single dirty blocks, and half as many: a ratio of 2 means linear time."""
    seconds = []
    for regions in (4096, 8192):
        with huge_store(bits=b"\x55", regions=regions) as store:
            seen = child("changes", store)
            seconds.append(seen["seconds"])
    yield bound("changes: 16 million extents, private memory", seen["private_mib"], "MiB", 256)
    yield Line(
        "changes: 16 million extents", seconds[1], "s", "8 million", seconds[1] / seconds[0], "~ 2", "linear"
    )


@contextmanager
def huge_store(*, bits: bytes | None, regions: int = 262_144) -> Iterator[str]:
    """Yield a store with one 64 TiB disk whose first regions all hold `bits`; the image is sparse, in memory."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        with tracked(64 * TIB, folder, memory) as attached:
            bitmap_id = newest_bitmap(attached)
        if bits is not None:
            with Store.open(f"{folder}/store") as store:
                store.update(lambda writer: fill_regions(writer, bitmap_id, bits * REGION_BYTES, regions))
        yield f"{folder}/store"


def fill_regions(writer: Writer, bitmap_id: int, bits: bytes, regions: int) -> None:
    for number in range(regions):
        writer.put_region(bitmap_id, number, 0, bits)


def newest_bitmap(attached: Filter) -> int:
    with attached.store.read() as reader:
        return current_checkpoint(reader, attached.disk).bitmap_id


# -- points in time, and crashes ---------------------------------------------------------------------------


def checkpoint_stall(checkpoints: int = 60) -> Iterator[Line]:
    """Measure a writer's longest wait around each checkpoint of a 1 TiB disk that is written at random."""
    with tracked(TIB) as attached:
        waits: list[tuple[float, float]] = []
        stop = threading.Event()
        writer = threading.Thread(target=write_at_random, args=(attached, stop, waits))
        writer.start()
        time.sleep(1)
        spans = []
        for number in range(checkpoints):
            start = time.perf_counter()
            attached.checkpoint(f"point {number}")
            spans.append((start, time.perf_counter()))
            time.sleep(0.05)
        stop.set()
        writer.join()
    stalls = sorted(longest_wait(waits, span) * 1e3 for span in spans)
    yield bound("checkpoint under write load, 1 TiB: p99 stall", stalls[int(len(stalls) * 0.99)], "ms", 20)


def write_at_random(attached: Filter, stop: threading.Event, waits: list[tuple[float, float]]) -> None:
    lane, data = attached.lane(), os.urandom(4096)
    while not stop.is_set():
        start = time.perf_counter()
        lane.pwrite(data, random.randrange(attached.size >> 12) << 12)
        waits.append((start, time.perf_counter()))


def longest_wait(waits: list[tuple[float, float]], span: tuple[float, float]) -> float:
    return max((end - start for start, end in waits if start <= span[1] and end >= span[0]), default=0.0)


def over_report() -> Iterator[Line]:
    """Kill -9 the tracker while random blocks are first touched, and two seconds after the load moved to one place."""
    for name, moved in (("under load", False), ("2 s after the load moved", True)):
        with tempfile.TemporaryDirectory() as folder:
            with tracked(64 << 30, folder):
                pass
            written, dirty = killed_load(f"{folder}/store", moved)
        excess = (dirty - written) * BLOCK / (1 << 20)
        note = f"{written} blocks written, {dirty} reported"
        yield Line(
            f"over-report after kill -9, {name}",
            excess,
            "MiB",
            "",
            None,
            "<= 4096 MiB",
            f"{note}: {dirty / written:.2f}x",
        )


def killed_load(store_path: str, moved: bool) -> tuple[int, int]:
    """Return how many blocks a child wrote before it was killed, and how many count as dirty after that."""
    load = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.core", "load-until-killed", store_path, str(moved)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert load.stdout is not None
    written = int(load.stdout.readline())
    os.kill(load.pid, signal.SIGKILL)
    load.wait()
    with Store.open(store_path) as store, Filter.attach(store, "huge") as attached:
        return written, attached.changes().summary.dirty_blocks


def import_time(rounds: int = 9) -> Iterator[Line]:
    """Measure `import lmdbitmap` in a fresh interpreter, less the start of the interpreter itself."""

    def python(code: str) -> Callable[[], None]:
        return lambda: void(subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT))

    bare, imported = interleaved([python("pass"), python("import lmdbitmap")], rounds)
    yield bound("import lmdbitmap", (imported - bare) * 1e3, "ms", 60)


# -- scenes: whole processes -------------------------------------------------------------------------------


def scene_attach(store: str) -> None:
    start = time.perf_counter()
    with Store.open(store) as opened:
        attached = Filter.attach(opened, "huge")
        tell(start)
        attached.detach()


def scene_load(store: str) -> None:
    """Touch every region, as a guest that writes all over the disk would."""
    with Store.open(store) as opened, Filter.attach(opened, "huge", background=False) as attached:
        start = time.perf_counter()
        for region in range(attached.disk.geometry.region_count):
            attached._tracking.period.make_durable([(region * REGION_BLOCKS, region * REGION_BLOCKS + 1)])
        tell(start)


def scene_export(store: str) -> None:
    from lmdbitmap.export import export_changes

    with Store.open(store) as opened:
        start = time.perf_counter()
        export_changes(changes(opened, "huge"), f"{store}/../out.dbm")
        tell(start)


def scene_changes(store: str) -> None:
    with Store.open(store) as opened:
        start = time.perf_counter()
        count = sum(1 for _ in changes(opened, "huge").extents())
        tell(start, count=count)


def scene_load_until_killed(store: str, moved: str) -> None:
    """First touches at random for two seconds; then, if the load moves, two seconds in one extent."""
    attached = Filter.attach(Store.open(store), "huge")
    lane, data = attached.lane(), memoryview(os.urandom(4096))
    blocks = list(range(attached.size // BLOCK))
    random.shuffle(blocks)
    touched: set[int] = set()
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        batch = [blocks.pop() for _ in range(32)]
        lane.write_many([(block * BLOCK, data) for block in batch])
        touched.update(batch)
    deadline = time.monotonic() + 2
    while moved == "True" and time.monotonic() < deadline:
        block = random.randrange(64)
        lane.pwrite(data, block * BLOCK)
        touched.add(block)
    print(len(touched), flush=True)
    signal.pause()


def tell(start: float, **more: float) -> None:
    lines = Path("/proc/self/status").read_text().splitlines()
    memory = {
        line.split()[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("VmHWM", "Rss"))
    }
    told = {
        "seconds": time.perf_counter() - start,
        "peak_mib": memory["VmHWM:"],
        "private_mib": memory["RssAnon:"],
    }
    print(json.dumps(told | more))


SCENES: dict[str, Callable[..., None]] = {
    "attach": scene_attach,
    "load": scene_load,
    "export": scene_export,
    "changes": scene_changes,
    "load-until-killed": scene_load_until_killed,
}


def child(scene: str, *arguments: str) -> dict[str, float]:
    """Run `scene` in a new process and return its figures."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.core", scene, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
    )
    told: dict[str, float] = json.loads(done.stdout)
    return told


# -- help --------------------------------------------------------------------------------------------------


@contextmanager
def tracked(size: int, folder: str | None = None, image_folder: str | None = None) -> Iterator[Filter]:
    """Yield a new disk `huge` of `size` bytes, attached, with a clean period."""
    with tempfile.TemporaryDirectory() as fallback:
        folder = folder or fallback
        image = Path(image_folder or folder) / "disk.raw"
        with open(image, "wb") as made:
            made.truncate(size)
        with Store.create(f"{folder}/store") as store:
            session.add(store, "huge", str(image), granularity_bits=16)
            with Filter.attach(store, "huge") as attached:
                attached.checkpoint("clean")
                yield attached


def bound(name: str, value: float, unit: str, limit: float) -> Line:
    return Line(name, value, unit, "", None, f"< {limit:g} {unit}", "")


def void(_: object) -> None:
    """Drop an answer."""


if __name__ == "__main__":
    SCENES[sys.argv[1]](*sys.argv[2:])
