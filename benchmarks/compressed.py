"""Compressed backups against `qemu-img convert -c` of the same data, in turns: the rate, and the bytes stored.

Both are whole processes on a cached image, in memory if there is room. Ours also computes digests and syncs.
"""

from __future__ import annotations

import functools
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.core import interleaved
from benchmarks.table import Line
from benchmarks.tracked import command, workplace

IMAGE_BYTES = 1 << 29
PIECE_BYTES = 1 << 20


def measure(rounds: int = 3) -> Iterator[Line]:
    with workplace(3 * IMAGE_BYTES) as folder:
        image = folder / "disk.raw"
        write_mixed(image)
        command(str(folder), "add", "disk", str(image))
        for compression in ("zlib", "zstd"):
            ours = functools.partial(back_up, folder, compression)
            theirs = functools.partial(convert, folder, compression)
            seconds = interleaved([ours, theirs], rounds)
            stored = ours() / theirs()
            yield Line(
                f"full backup of 512 MiB, {compression}",
                IMAGE_BYTES / 1e6 / seconds[0],
                "MB/s",
                "qemu-img convert -c",
                seconds[1] / seconds[0],
                ">= 1",
                f"{stored:.2f}x its size",
            )


def write_mixed(path: Path) -> None:
    """Write an image of half words, a quarter noise and a quarter zeroes, changing every few hundred KiB."""
    randomness = random.Random(7)
    words = [randomness.randbytes(randomness.randrange(2, 12)) for _ in range(4000)]
    with path.open("xb") as made:
        for _ in range(IMAGE_BYTES // PIECE_BYTES):
            text = b" ".join(randomness.choices(words, k=PIECE_BYTES // 12))[: PIECE_BYTES // 2]
            noise = randomness.randbytes(PIECE_BYTES // 4)
            made.write((text.ljust(PIECE_BYTES // 2, b" ") + noise).ljust(PIECE_BYTES, b"\0"))


def back_up(folder: Path, compression: str) -> int:
    """Make a full backup, delete it, and return the bytes that it stored."""
    words = ["backup", "disk", f"{folder}/backups", "--full", "--compress", compression, "--json"]
    [made] = json.loads(command(str(folder), *words))["backups"]
    Path(made["file"]).unlink()
    return int(made["bytes_stored"])


def convert(folder: Path, compression: str) -> int:
    target = folder / "converted.qcow2"
    options = ["-f", "raw", "-O", "qcow2", "-o", f"compression_type={compression}"]
    subprocess.run(["qemu-img", "convert", "-c", *options, folder / "disk.raw", target], check=True)
    stored = target.stat().st_size
    target.unlink()
    return stored
