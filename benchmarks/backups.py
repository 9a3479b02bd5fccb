"""Backups as whole commands: proving one, against the tool that everybody would use for it."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.table import Line
from benchmarks.tracked import command, workplace

DISK_BYTES = 1 << 30


def measure(rounds: int = 5) -> Iterator[Line]:
    """Both read the image from memory; ours counts the start of the process, and looks at the structure too."""
    with workplace(3 * DISK_BYTES) as folder:
        with (folder / "disk.raw").open("xb") as image, open("/dev/urandom", "rb") as noise:
            for _ in range(DISK_BYTES >> 20):
                image.write(noise.read(1 << 20))
        command(str(folder), "add", "disk", str(image.name))
        command(str(folder), "backup", "disk", f"{folder}/backups")
        [backup] = Path(folder, "backups", "disk").glob("*.qcow2")
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(seconds(lambda: command(str(folder), "verify", f"{folder}/backups")))
            theirs.append(
                seconds(lambda: subprocess.run(["sha256sum", backup], check=True, capture_output=True))
            )
    taken = statistics.median(ours)
    yield Line("verify, whole process", DISK_BYTES / taken / 1e9, "GB/s", "", None, ">= 1", "1 GiB of data")
    ratio = statistics.median(theirs) / taken
    yield Line("verify, whole process", DISK_BYTES / taken / 1e9, "GB/s", "sha256sum", ratio, ">= 1")


def seconds(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start
