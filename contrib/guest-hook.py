#!/usr/bin/python3
"""A hook for `lmdbitmap backup --hook`: has the guest agent bring a guest's file systems in order, and lets it go on.

    guest-hook.py --domain DOMAIN freeze|thaw NAME…    through libvirt: `virsh domfsfreeze`, `virsh domfsthaw`
    guest-hook.py --agent SOCKET freeze|thaw NAME…     through the agent's own socket, of a QEMU without libvirt

All file systems of the guest are frozen, whichever of its disks are named. Disks of several guests that are backed up
at one moment: name each of them (`--domain a --domain b`). A domain that is shut off has nothing to freeze.

A thaw is tried again for a while, for nobody can work in a guest that stays frozen, and each guest is thawed, whatever
became of the others. Ends with 0 if everything is done, else with 1 and a sentence on stderr. It needs nothing but
Python, so that it can be copied and changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

AGENT_S = 20.0
"""Until the agent has answered: a freeze waits until the guest has written what it had in memory."""
THAW_S, BETWEEN_THAWS_S = 20.0, 1.0
"""Less than the 30 s that `--hook-limit` gives unless told otherwise: then the reason would be lost."""
MOST_BYTES = 1 << 16
"""Of an answer: the guest may be anybody's."""
OVER = b"\xff"
"""What was said before this byte is nobody's: guest-sync-delimited, in both directions."""


class Failure(Exception):
    pass


class Domain:
    """A guest of libvirt's. LIBVIRT_DEFAULT_URI says where that is, as for virsh."""

    def __init__(self, name: str) -> None:
        self.name = name

    def freeze(self) -> None:
        if self._virsh("domstate") != "shut off":
            self._virsh("domfsfreeze")

    def thaw(self) -> None:
        if self._virsh("domstate") != "shut off":
            self._virsh("domfsthaw")

    def _virsh(self, command: str) -> str:
        words = ["virsh", "--quiet", command, "--domain", self.name]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, errors="replace", env={**os.environ, "LC_ALL": "C"}
            )
        except OSError as refusal:
            raise Failure(f"virsh {command} {self.name}: {refusal}") from refusal
        if done.returncode != 0:
            raise Failure(f"virsh {command} {self.name}: {' '.join(done.stderr.split())}")
        return done.stdout.strip()


class Agent:
    """A guest by the socket of its agent, to which nobody else may be connected."""

    def __init__(self, path: str) -> None:
        self.name = path

    def freeze(self) -> None:
        self._tell("guest-fsfreeze-freeze")

    def thaw(self) -> None:
        self._tell("guest-fsfreeze-thaw")

    def _tell(self, command: str) -> None:
        try:
            with self._connected() as line:
                _asked(line, command)
        except (OSError, ValueError, RecursionError) as refusal:
            raise Failure(f"{command} at {self.name}: {refusal}") from refusal

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """Both sides agree where answers begin: an earlier caller may have left without its own."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(AGENT_S)
            sock.connect(self.name)
            with sock.makefile("rwb") as line:
                mark = int.from_bytes(os.urandom(4), "little")
                line.write(OVER)
                _say(line, "guest-sync-delimited", {"id": mark})
                for _ in range(MOST_BYTES):
                    if (byte := line.read(1)) in (OVER, b""):
                        break
                if byte != OVER:
                    raise ValueError("the agent hung up, or speaks of something else")
                if _answer(line) != mark:
                    raise ValueError("the answer is another caller's")
                yield line


def _asked(line: Any, command: str) -> object:
    _say(line, command, {})
    return _answer(line)


def _say(line: Any, command: str, arguments: dict[str, object]) -> None:
    line.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
    line.flush()


def _answer(line: Any) -> object:
    told = json.loads(line.readline(MOST_BYTES) or b"{}")
    if isinstance(told, dict) and "return" in told:
        return told["return"]
    error = told.get("error") if isinstance(told, dict) else None
    words = error.get("desc") if isinstance(error, dict) else None
    raise ValueError(words or (f"the agent says {json.dumps(told)[:200]}" if told else "the agent hung up"))


def freeze(guests: list[Domain | Agent]) -> None:
    for guest in guests:
        guest.freeze()


def thaw(guests: list[Domain | Agent]) -> None:
    """All at once, so that none waits for another's. Raises `Failure` if some guest is not thawed in time."""
    deadline = time.monotonic() + THAW_S
    frozen = {guest: f"{guest.name} does not answer" for guest in guests}
    threads = [
        threading.Thread(target=thaw_one, args=(guest, frozen, deadline), daemon=True) for guest in guests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    if frozen:
        raise Failure("; ".join(list(frozen.values())))


def thaw_one(guest: Domain | Agent, frozen: dict[Domain | Agent, str], deadline: float) -> None:
    """Until it is not `frozen` any more, which says why it is."""
    while True:
        try:
            guest.thaw()
        except Failure as failure:
            frozen[guest] = str(failure)
        else:
            del frozen[guest]
            return
        if time.monotonic() > deadline - BETWEEN_THAWS_S:
            return
        time.sleep(BETWEEN_THAWS_S)


def main() -> int:
    parser = argparse.ArgumentParser(description="Freezes and thaws guests around a backup's point in time.")
    parser.add_argument("--domain", dest="guests", action="append", type=Domain, default=[])
    parser.add_argument("--agent", dest="guests", action="append", type=Agent, metavar="SOCKET")
    parser.add_argument("deed", choices=["freeze", "thaw"])
    parser.add_argument("disks", nargs="*")
    asked = parser.parse_args()
    if not asked.guests:
        parser.error("say whose disks they are: --domain or --agent")
    try:
        (freeze if asked.deed == "freeze" else thaw)(asked.guests)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
