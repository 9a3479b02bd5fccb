"""The whole command `verify` against `sha256sum`, with digests of either kind."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.table import Line
from benchmarks.tracked import command, workplace
from lmdbitmap.copying.digest_algorithms import DigestAlgorithm

DISK_BYTES = 1 << 30


def measure(rounds: int = 5) -> Iterator[Line]:
    """Yield the lines. Both read the image from memory; ours includes the process's start and checks the structure."""
    with workplace(4 * DISK_BYTES) as folder:
        with (folder / "disk.raw").open("xb") as image, open("/dev/urandom", "rb") as noise:
            for _ in range(DISK_BYTES >> 20):
                image.write(noise.read(1 << 20))
        command(str(folder), "add", "disk", str(image.name))
        for digest in DigestAlgorithm:
            yield from proven(folder, digest, rounds)


def proven(folder: Path, digest: DigestAlgorithm, rounds: int) -> Iterator[Line]:
    repository = folder / digest.value
    command(str(folder), "backup", "disk", str(repository), "--digest", digest.value)
    [backup] = (repository / "disk").glob("*.qcow2")
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(seconds(lambda: command(str(folder), "verify", str(repository))))
        theirs.append(seconds(lambda: subprocess.run(["sha256sum", backup], check=True, capture_output=True)))
    taken, peers = statistics.median(ours), statistics.median(theirs)
    name, rate = f"verify, {digest.title}, whole process", DISK_BYTES / taken / 1e9
    yield Line(name, rate, "GB/s", "", None, ">= 1", "1 GiB of data")
    yield Line(name, rate, "GB/s", "sha256sum", peers / taken, ">= 1")


def seconds(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start
