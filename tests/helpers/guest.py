"""A real Linux guest in software emulation, on a disk that is an NBD export; commanded over its serial line."""

from __future__ import annotations

import contextlib
import itertools
import queue
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

GUEST = Path(__file__).parents[2] / ".venv" / "guest"
"""What tools/guest.py made."""
BOOT_SECONDS = 60.0
RECONNECT_SECONDS = 50

requires_guest = pytest.mark.skipif(
    not (GUEST / "initramfs").exists(),
    reason="needs the guest that tools/guest.py makes of Debian's packages",
)


class Guest:
    """A running guest; /dev/vda is the export."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._numbers = itertools.count(1)
        threading.Thread(target=self._listen, daemon=True).start()

    def run(self, script: str, timeout: float = BOOT_SECONDS) -> str:
        """What a piece of shell says; it must end with 0."""
        self.start(script)
        return self.finish(timeout)

    def start(self, script: str) -> None:
        self._number = next(self._numbers)
        assert self.process.stdin is not None
        self.process.stdin.write(f'{{ {script}\n}}; echo "<$? {self._number}>"\n')
        self.process.stdin.flush()

    def finish(self, timeout: float = BOOT_SECONDS) -> str:
        said, ended = self._until(rf"^(.*)<(\d+) {self._number}>$", timeout)
        assert ended[2] == "0", f"the guest's shell ended with {ended[2]}: {said}"
        return "\n".join([*said, ended[1]]).strip()

    def wait_for_line(self, pattern: str, timeout: float = BOOT_SECONDS) -> re.Match[str]:
        return self._until(pattern, timeout)[1]

    def lines(self) -> list[str]:
        """All that it said so far."""
        return list(self._said)

    def power_off(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("poweroff -f\n")
        self.process.stdin.flush()
        assert self.process.wait(BOOT_SECONDS) == 0

    def _until(self, pattern: str, timeout: float) -> tuple[list[str], re.Match[str]]:
        """The lines before the one in which `pattern` is found, and that one."""
        deadline = time.monotonic() + timeout
        before: list[str] = []
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                line = None
            if line is None:
                pytest.fail(f"the guest never said {pattern!r}:\n" + "\n".join(self._said[-50:]))
            match = re.search(pattern, line)
            if match is not None:
                return before, match
            before.append(line)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed under us, at the end
            for line in self.process.stdout:
                self._said.append(line.rstrip())
                self._lines.put(line.rstrip())
        self._lines.put(None)


@contextlib.contextmanager
def booted(socket: Path, export: str, *more: str) -> Iterator[Guest]:
    """A guest on the export at a unix socket; QEMU waits for a server that is gone, as long as it may take.

    `more` are further words for QEMU.
    """
    blockdev = (
        f"driver=nbd,node-name=disk,server.type=unix,server.path={socket},export={export},"
        f"discard=unmap,reconnect-delay={RECONNECT_SECONDS}"
    )
    command = [
        "qemu-system-x86_64", "-accel", "tcg", "-m", "192", "-nodefaults", "-display", "none", "-no-reboot",
        "-serial", "stdio", "-kernel", str(GUEST / "vmlinuz"), "-initrd", str(GUEST / "initramfs"),
        "-append", "console=ttyS0 quiet panic=-1", "-blockdev", blockdev, "-device", "virtio-blk-pci,drive=disk",
        *more,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    guest = Guest(process)
    try:
        guest.wait_for_line("the guest is up")
        yield guest
    finally:
        process.kill()
        process.communicate()
