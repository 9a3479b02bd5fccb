"""NBD servers side by side: fio's nbd engine against each, over a unix socket, in turns.

Every peer has an image of its own, because an image that one server has open is locked for the others. All images are
in the page cache before the first round, and lie there alike (`write_images`). A round gives every peer the same few
seconds of the same work. The figure is the median of the rounds, and the ratio is the median of the rounds' ratios, so
that a noisy moment hits all peers or is left out. Further figures are the server's processor time per request and the
memory of a busy connection.

Run alone it measures an untracked disk: `python -m benchmarks.nbd [SECONDS [ROUNDS]]`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.table import Line, as_text

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 20.0
IMAGE_BYTES = 1 << 30
EXPORT = "disk"
CONNECTIONS = 4
CROWD = 8
"""The number of connections over which memory is measured: the number that qemu-nbd is told to allow."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Load(NamedTuple):
    """A pattern of requests, and the target ratios against qemu-nbd and nbdkit."""

    work: str
    block: str
    depth: int
    owed: dict[str, float]

    @property
    def name(self) -> str:
        return f"NBD {self.work.removeprefix('rand')} {self.block}, depth {self.depth}"


SMALL = {"qemu-nbd": 4.0, "nbdkit file": 1.1}
LARGE = {"qemu-nbd": 1.5, "nbdkit file": 1.1}
SINGLE = {"qemu-nbd": 1.0, "nbdkit file": 1.0}
LOADS = [
    Load("randwrite", "4k", 32, SMALL),
    Load("randread", "4k", 32, SMALL),
    Load("randwrite", "64k", 16, LARGE),
    Load("randread", "64k", 16, LARGE),
    Load("randwrite", "1m", 4, LARGE),
    Load("randread", "1m", 4, LARGE),
    Load("randwrite", "4k", 1, SINGLE),
    Load("randread", "4k", 1, SINGLE),
]


class Sample(NamedTuple):
    """Requests per second, and the server's processor time per request."""

    rate: float
    processor_us: float


class Peer(NamedTuple):
    """A server to start: its command makes it listen at `socket` in the foreground."""

    name: str
    command: Sequence[str]
    socket: Path
    export: str = EXPORT

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.export}?socket={self.socket}"


class Images(NamedTuple):
    """Files of `IMAGE_BYTES`: one for each server, and one to copy from."""

    ours: Path
    qemu_nbd: Path
    nbdkit: Path
    source: Path


# -- peers -------------------------------------------------------------------------------------------------


def ours_untracked(image: Path, folder: Path) -> Peer:
    """Return our server on the bare image: the baseline for tracking."""
    listen_at = folder / "ours.sock"
    return Peer(
        "untracked", [sys.executable, "-m", "benchmarks.nbd", "serve", str(image), str(listen_at)], listen_at
    )


def qemu_nbd(image: Path, folder: Path) -> Peer:
    listen_at = folder / "qemu.sock"
    options = ["--persistent", "--shared=8", "--format=raw", "--cache=writeback"]
    return Peer("qemu-nbd", ["qemu-nbd", *options, "-k", str(listen_at), "-x", EXPORT, str(image)], listen_at)


def nbdkit_file(image: Path, folder: Path) -> Peer:
    listen_at = folder / "nbdkit.sock"
    return Peer(
        "nbdkit file",
        ["nbdkit", "--foreground", "-U", str(listen_at), "-e", EXPORT, "file", str(image)],
        listen_at,
    )


@contextlib.contextmanager
def running(peers: Iterable[Peer]) -> Iterator[dict[str, int]]:
    """Start all peers, wait until they listen, and end them after the block. Yields their pids by name."""
    with contextlib.ExitStack() as stack:
        yield {peer.name: stack.enter_context(_running(peer)) for peer in peers}


@contextlib.contextmanager
def _running(peer: Peer) -> Iterator[int]:
    process = subprocess.Popen(peer.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        _await_listening(peer, process)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_listening(peer: Peer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not _listens(peer.socket):
        if process.poll() is not None:
            raise RuntimeError(f"{peer.name} ended with {process.returncode} before it listened")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{peer.name} does not listen at {peer.socket}")
        time.sleep(0.02)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


# -- measuring ---------------------------------------------------------------------------------------------


def fio_rate(uri: str, load: Load, seconds: float, extra: Sequence[str] = ()) -> float:
    """Return the requests per second that fio achieved."""
    return _fio(uri, load, seconds, extra)[0]


def sample(peer: Peer, pid: int, load: Load, seconds: float, extra: Sequence[str] = ()) -> Sample:
    begun_s = processor_s(pid)
    rate, requests = _fio(peer.uri, load, seconds, extra)
    return Sample(rate, (processor_s(pid) - begun_s) * 1e6 / max(requests, 1))


def _fio(uri: str, load: Load, seconds: float, extra: Sequence[str]) -> tuple[float, int]:
    """Return the requests per second and their total number."""
    with tempfile.TemporaryDirectory() as folder:  # fio leaves files where it runs
        done = subprocess.run(
            [*fio_command(uri, load, seconds), *extra],
            capture_output=True, text=True, check=True, timeout=seconds + PATIENCE_S, cwd=folder,
        )  # fmt: skip
    report = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if report["error"]:
        raise RuntimeError(f"fio failed: {done.stdout}")
    both = report["read"], report["write"]
    return sum(float(way["iops"]) for way in both), sum(int(way["total_ios"]) for way in both)


def fio_command(uri: str, load: Load, seconds: float) -> list[str]:
    return [
        "fio",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri={uri}",
        f"--rw={load.work}",
        f"--bs={load.block}",
        f"--iodepth={load.depth}",
        f"--runtime={int(seconds * 1000)}ms",
        "--time_based",
        "--norandommap",
        "--randrepeat=0",
        "--output-format=json",
    ]


def processor_s(pid: int) -> float:
    """Return the processor time of a process, user and system, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def private_bytes(pid: int) -> int:
    """Return the anonymous memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def samples(
    peers: Sequence[Peer], pids: Mapping[str, int], load: Load, rounds: int, seconds: float
) -> list[list[Sample]]:
    """Return the samples of every peer in every round; the peers take turns, and each round begins with another."""
    measured: list[list[Sample]] = [[] for _ in peers]
    for turn in range(rounds):
        for index in range(len(peers)):
            peer = (index + turn) % len(peers)
            measured[peer].append(sample(peers[peer], pids[peers[peer].name], load, seconds))
    return measured


def measure_nbd(
    images: Images,
    ours: Peer,
    *,
    loads: Sequence[Load] = LOADS,
    rounds: int = 5,
    seconds: float = 1.0,
) -> Iterator[Line]:
    """Compare `ours`, which serves its image, with qemu-nbd and nbdkit serving theirs; yield a line per pair."""
    folder = images.ours.parent
    peers = [ours, qemu_nbd(images.qemu_nbd, folder), nbdkit_file(images.nbdkit, folder)]
    with running(peers) as pids:
        for load in loads:
            yield from _lines(load, peers, samples(peers, pids, load, rounds, seconds))
        for load in loads[:4]:
            yield from many_connections(ours, pids[ours.name], load, rounds, seconds)
        for connections in (1, CONNECTIONS):
            yield from copies(peers, images.source, connections, rounds)
        yield from memory_lines(peers, pids, seconds)


def many_connections(ours: Peer, pid: int, load: Load, rounds: int, seconds: float) -> Iterator[Line]:
    """Compare four connections with one: with the same depth over all four together, and with the same depth each."""
    apart = _over(CONNECTIONS)
    ways = ((load, ()), (load._replace(depth=load.depth // CONNECTIONS), apart), (load, apart))
    rows = [[sample(ours, pid, each, seconds, extra) for each, extra in ways] for _ in range(rounds)]
    for way, kind in ((1, "together"), (2, "each")):
        ratio = _median(row[way].rate / row[0].rate for row in rows)
        name = f"{load.name} {kind}, over {CONNECTIONS} connections"
        yield Line(name, _median(row[way].rate for row in rows), "/s", "over one", ratio, ">= 1", ours.name)
        cost, alone = (_median(row[each].processor_us for row in rows) for each in (way, 0))
        yield Line(f"{name}, processor", cost, "us each", "over one", cost / alone, "", ours.name)


def copies(peers: Sequence[Peer], source: Path, connections: int, rounds: int) -> Iterator[Line]:
    """Measure nbdcopy of a whole disk into nothing, and of another disk onto it, over that many connections."""
    for work, ends in (("read", ("{uri}", "null:")), ("write", ("{source}", "{uri}"))):
        rates: list[list[float]] = [[] for _ in peers]
        for turn in range(rounds):
            for index in range(len(peers)):
                which = (index + turn) % len(peers)
                words = [end.format(uri=peers[which].uri, source=source) for end in ends]
                rates[which].append(_copy_rate(f"--connections={connections}", *words))
        for peer, theirs in zip(peers[1:], rates[1:], strict=True):
            ratio = _median(a / b for a, b in zip(rates[0], theirs, strict=True))
            name, owed = f"nbdcopy {work}, connections: {connections}", f">= {LARGE[peer.name]:g}"
            yield Line(name, _median(rates[0]), "GB/s", peer.name, ratio, owed, peers[0].name)


def _copy_rate(*words: str) -> float:
    start = time.monotonic()
    subprocess.run(["nbdcopy", *words], check=True, timeout=PATIENCE_S)
    return IMAGE_BYTES / (time.monotonic() - start) / 1e9


def _over(connections: int) -> list[str]:
    """Return fio's options for that many connections."""
    return ["--thread", f"--numjobs={connections}", "--group_reporting", f"--size={IMAGE_BYTES}"]


def memory_lines(peers: Sequence[Peer], pids: Mapping[str, int], seconds: float) -> Iterator[Line]:
    """Measure the memory per connection of `CROWD` connections that read and write."""
    taken = [_memory_per_connection(peer, pids[peer.name], seconds) / (1 << 10) for peer in peers]
    for peer, theirs in zip(peers[1:], taken[1:], strict=True):
        ratio = taken[0] / theirs if theirs > 0 else None
        yield Line("NBD memory per busy connection", taken[0], "KiB", peer.name, ratio, "", peers[0].name)


def _memory_per_connection(peer: Peer, pid: int, seconds: float) -> float:
    """Return the peak seen while fio works, less the memory before, per connection."""
    load = Load("randrw", "4k", 32, {})
    before = most = private_bytes(pid)
    with tempfile.TemporaryDirectory() as folder:
        command = [*fio_command(peer.uri, load, seconds), *_over(CROWD)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder) as fio:
            while fio.poll() is None:
                most = max(most, private_bytes(pid))
                time.sleep(0.05)
    return (most - before) / CROWD


def _lines(load: Load, peers: Sequence[Peer], measured: list[list[Sample]]) -> Iterator[Line]:
    mine = measured[0]
    for peer, theirs in zip(peers[1:], measured[1:], strict=True):
        pairs = list(zip(mine, theirs, strict=True))
        rate, ratio = _median(a.rate for a in mine), _median(a.rate / b.rate for a, b in pairs)
        owed = f">= {load.owed[peer.name]:g}"
        yield Line(load.name, rate, "/s", peer.name, ratio, owed, peers[0].name)
        cost = _median(a.processor_us for a in mine)
        ratio = cost / _median(b.processor_us for b in theirs)
        yield Line(f"{load.name}, processor", cost, "us each", peer.name, ratio, "", peers[0].name)


def _median(figures: Iterable[float]) -> float:
    return statistics.median(list(figures))


def write_images(folder: Path) -> Images:
    """Write all images at once, a page of each in turns.

    A file written in large pieces lies in large folios, which makes small writes to it several times slower. Of files
    that are written one after another, the last one was read 1.4 times as fast as the first, by the same server.
    """
    images = Images(*(folder / f"{name}.raw" for name in Images._fields))
    page = os.urandom(4096)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("xb", buffering=0)) for path in images]
        for _ in range(IMAGE_BYTES // len(page)):
            for file in files:
                file.write(page)
    return images


# -- alone -------------------------------------------------------------------------------------------------


def serve(image: str, listen_at: str) -> None:
    from lmdbitmap.images.device import FileDevice
    from lmdbitmap.images.plain import PlainDisk
    from lmdbitmap.nbd.server.server import Server

    with FileDevice.open(image) as device:
        server = Server({EXPORT: PlainDisk(device)})
        server.listen_unix(listen_at)
        signal.signal(signal.SIGTERM, lambda number, frame: server.request_stop())
        server.serve_forever()


def main(seconds: str = "1", rounds: str = "3") -> None:
    base = "/dev/shm" if shutil.disk_usage("/dev/shm").free > 4 * IMAGE_BYTES else None
    with tempfile.TemporaryDirectory(dir=base) as name:
        images = write_images(Path(name))
        ours = ours_untracked(images.ours, Path(name))
        with contextlib.suppress(KeyboardInterrupt):
            lines = []
            for line in measure_nbd(images, ours, rounds=int(rounds), seconds=float(seconds)):
                lines.append(line)
                print(as_text([line]).splitlines()[-1], file=sys.stderr, flush=True)
            print(as_text(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
