"""The whole cycle on a real file system: track, crash in the middle of writes, back up, restore, compare.

A folder tree becomes an ext4 image. A client (fio) writes into a file of that file system through the tracker, and
meanwhile the tracker is killed with `kill -9`. The tracker starts again, the client goes on writing, and an increment
is made, restored and compared bit by bit. Everything happens in a temporary folder; nothing is left behind.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
LMDBITMAP = [sys.executable, "-m", "lmdbitmap"]
IMAGE_MIB = 512
WORK_FILE_MIB = 192
BLOCK = 1 << 16
EXT4_BLOCK = 4096
MIB = 1 << 20


class Demo:
    """The steps of the demo in their order; every step leaves its files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.image = folder / "sda.raw"
        self.before = folder / "sda-at-full-backup.raw"
        self.restored = folder / "restored.raw"
        self.backups = folder / "backups"
        self.socket = folder / "sda.sock"
        self.tree = folder / "tree"
        self.store = folder / "store"
        self.work_offset = self.work_length = 0

    def run(self) -> None:
        self.make_file_system()
        self.track_and_back_up()
        dirty_before = self.write_until_killed()
        self.look_after_crash(dirty_before)
        self.write_on()
        self.back_up_increment()
        self.restore_and_compare()

    def make_file_system(self) -> None:
        say("1. a real ext4 file system, made from this project's folder")
        shutil.copytree(
            ROOT, self.tree / "project", ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__")
        )
        work = self.tree / "work.bin"
        with open(work, "wb") as made:
            for _ in range(WORK_FILE_MIB):
                made.write(b"\x5a" * MIB)
        run("mke2fs", "-q", "-t", "ext4", "-d", str(self.tree), str(self.image), f"{IMAGE_MIB}M")
        self.work_offset, self.work_length = largest_extent(self.image, "/work.bin")
        files = sum(1 for path in self.tree.rglob("*") if path.is_file())
        tell(f"{self.image.name}: {IMAGE_MIB} MiB, {files} files")
        tell(f"clients will write into {mib(self.work_length)} of its work.bin")

    def track_and_back_up(self) -> None:
        say("2. track it, and make the full backup")
        self.lmdbitmap("add", "sda", str(self.image))
        tell_lines(self.lmdbitmap("backup", "sda", str(self.backups)))
        run("cp", "--sparse=always", str(self.image), str(self.before))

    def write_until_killed(self) -> int:
        say("3. a client writes through the tracker, and the tracker dies in the middle of it")
        with self.served() as server:
            self.fio("warm-up", "--io_size=24M")
            dirty = self.dirty_bytes()
            tell(f"dirty so far, asked while it is served: {mib(dirty)}")
            client = subprocess.Popen(
                self.fio_command("crash", "--io_size=4G"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            wait_until(lambda: self.changed_on_disk() > 1.4 * dirty)
            server.kill()
            server.wait()
            client.kill()  # fio never gives up on a server that is gone
            client.wait()
        tell("killed with SIGKILL while fio had 16 writes in flight")
        return dirty

    def look_after_crash(self, dirty_before: int) -> None:
        say("4. what is known after the crash")
        answer = json.loads(self.lmdbitmap("changes", "sda", "--json"))
        reported, written = answer["dirty_bytes"], self.changed_on_disk()
        missed = self.blocks_missed(answer["extents"])
        tell(
            f"dirty before the last client: {mib(dirty_before)}; now: {mib(reported)}, trust: {answer['trust']}"
        )
        tell(
            f"really different from the full backup: {mib(written)}; over-reported: {mib(reported - written)}"
        )
        tell(f"changed blocks that are called clean: {missed}")
        assert missed == 0

    def write_on(self) -> None:
        say("5. the tracker starts again, and the client goes on")
        start = time.monotonic()
        with self.served() as server:
            tell(f"served again after {time.monotonic() - start:.2f} s")
            self.fio("after", "--io_size=8M")
            uri = self.uri
            run("qemu-io", "-f", "raw", "-c", f"write -z {self.work_offset} 1M", "-c", "flush", uri)
            server.terminate()
            assert server.wait() == 0

    def back_up_increment(self) -> None:
        say("6. the increment")
        tell_lines(self.lmdbitmap("backup", "sda", str(self.backups)))
        for file in sorted((self.backups / "sda").glob("*.qcow2")):
            run("qemu-img", "check", "-q", str(file))
            tell(f"{file.name}: {mib(file.stat().st_size)}, qemu-img check: clean")

    def restore_and_compare(self) -> None:
        say("7. restored, and compared")
        tell_lines(self.lmdbitmap("restore", str(self.backups), "sda", str(self.restored)))
        newest = sorted((self.backups / "sda").glob("*.qcow2"))[-1]
        run("cmp", str(self.image), str(self.restored))
        run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", str(self.image), str(newest))
        run("e2fsck", "-fn", str(self.restored))
        tell("cmp: no difference; qemu-img compare of the chain: no difference; e2fsck: clean")
        print("identical", flush=True)

    # -- the tools --------------------------------------------------------------------------------------------

    def lmdbitmap(self, *arguments: str) -> str:
        return run(*LMDBITMAP, "--store", str(self.store), *arguments)

    @contextmanager
    def served(self) -> Iterator[subprocess.Popen[str]]:
        """Yield a server of the disk that listens; kill it at the end of the block if it still lives."""
        command = [*LMDBITMAP, "--store", str(self.store), "serve", "sda", "--socket", str(self.socket)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                assert server.stdout.readline().strip() == "ready", "the server did not start"
                self.uri = server.stdout.readline().strip()
                yield server
            finally:
                if server.poll() is None:
                    server.kill()

    def fio_command(self, name: str, *options: str) -> list[str]:
        """Return the fio command for random writes of 4 to 64 KiB into the work file's blocks, 16 in flight."""
        return [
            "fio", f"--name={name}", "--ioengine=nbd", f"--uri={self.uri}", "--rw=randwrite", "--iodepth=16",
            "--bsrange=4k-64k", "--norandommap", "--rate=60M", f"--offset={self.work_offset}",
            f"--size={self.work_length}", "--randrepeat=0", "--thread", "--minimal", *options,
        ]  # fmt: skip

    def fio(self, name: str, *options: str) -> None:
        start = time.monotonic()
        out = run(*self.fio_command(name, *options))
        kib = int(next(line for line in out.splitlines() if line.startswith("3;")).split(";")[46])
        tell(f"fio wrote {kib / 1024:.0f} MiB in {time.monotonic() - start:.1f} s")

    def dirty_bytes(self) -> int:
        return int(json.loads(self.lmdbitmap("changes", "sda", "--json"))["dirty_bytes"])

    def changed_on_disk(self) -> int:
        """Return the bytes of blocks that really differ from the full backup."""
        return BLOCK * len(self.changed_blocks())

    def changed_blocks(self) -> set[int]:
        with open(self.image, "rb") as now, open(self.before, "rb") as then:
            pairs = enumerate(zip(chunks(now), chunks(then), strict=True))
            return {number for number, (left, right) in pairs if left != right}

    def blocks_missed(self, extents: list[dict[str, int]]) -> int:
        named = {
            block
            for extent in extents
            for block in range(extent["offset"] // BLOCK, -(-(extent["offset"] + extent["length"]) // BLOCK))
        }
        return len(self.changed_blocks() - named)


def largest_extent(image: Path, name: str) -> tuple[int, int]:
    """Return the offset and length, in bytes, of the longest contiguous piece of a file in an ext4 image."""
    out = run("debugfs", "-R", f"ex {name}", str(image))
    rows = [
        list(map(int, re.findall(r"\d+", line))) for line in out.splitlines() if re.match(r"\s*\d+/", line)
    ]
    leaves = [row for row in rows if len(row) == 9 and row[0] == row[1]]
    start, count = max(((row[6], row[8]) for row in leaves), key=lambda found: found[1])
    offset = -(-start * EXT4_BLOCK // BLOCK) * BLOCK
    end = (start + count) * EXT4_BLOCK // BLOCK * BLOCK
    return offset, end - offset


def chunks(source: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: source.read(BLOCK), b"")


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the client writes nothing"
        time.sleep(0.05)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def say(heading: str) -> None:
    print(f"\n{heading}", flush=True)


def tell(line: str) -> None:
    print(f"   {line}", flush=True)


def tell_lines(text: str) -> None:
    for line in text.splitlines():
        tell(line)


def mib(count: int) -> str:
    return f"{count / MIB:.1f} MiB"


def main() -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lmdbitmap-demo-") as folder:
        Demo(Path(folder)).run()
    print(f"in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
