"""What another NBD server answers to requests: our client on a server that lies, fails and dies (far_disk.py).

The client raises documented errors only. What it reads is what the disk has, and unless it reported a loss, **a flush
that succeeds leaves all that was acknowledged durable**.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from unittest import mock

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.interfaces import Buffer
from lmdbitmap.nbd.client import conversation
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.uri import parse
from tests.fuzz.far_disk import SIZE, FarServer
from tests.fuzz.inputs import Input

PATIENT, KEEPS_MUCH = 16, 32
"""Bits of the mode, beside those of far_disk.py."""
MOST_ACTS, MOST_WRITTEN = 60, 5000
_CERTAIN = bytes([0xFF]) + bytes(255)
"""Turns `Guest.uncertain` into a mask of what must be right."""


def far_answers(data: bytes) -> None:
    source = Input(data)
    mode, sizes = source.byte(), source.byte()
    server = FarServer(source, mode, sizes)
    with ExitStack() as patches:
        for pause in ("_FIRST_PAUSE_S", "_LONGEST_PAUSE_S"):
            patches.enter_context(mock.patch.object(conversation, pause, 0.0))
        patches.enter_context(mock.patch.object(conversation, "log"))
        device = NbdDevice(
            parse("nbd+unix:///?socket=/far"), read_only=False, reconnect_s=60 if mode & PATIENT else 0,
            keep_bytes=1 << 20 if mode & KEEPS_MUCH else 6000, connect=server.connect,
        )  # fmt: skip
        guest = Guest(device, server)
        for number in range(MOST_ACTS):
            if not source.left:
                break
            guest.act(source, number)
        server.is_honest = True
        guest.flush()
        device.close()


# --- the guest, and what it may rely on ---


class Guest:
    """Uses the device as a guest does, and knows what must be there then."""

    def __init__(self, device: NbdDevice, server: FarServer) -> None:
        self.device = device
        self.server = server
        self.expected = bytearray(server.durable)
        self.uncertain = bytearray(SIZE)
        """1 for a byte that a request was about that failed, or has not ended: it may be old or new."""
        self.losses: list[OSError] = []
        device.tell_of_loss(self.losses.append)

    def act(self, source: Input, number: int) -> None:
        act = source.pick(
            (self.read, self.write, self.write_many, self.zero, self.discard, self.ask, self.read_many)
        )
        offset = source.number(2) % (SIZE + 1)
        length = source.number(2) % (SIZE - offset + 1)
        if source.byte() % 2:
            offset, length = offset & ~511, length & ~511
        if source.byte() % 8 == 1:
            self.flush()
        with suppress(OSError, LmdbitmapError):
            act(offset, length, number + 1)

    def read(self, offset: int, length: int, _: int) -> None:
        self.check(self.device.pread(length, offset), offset)

    def read_many(self, offset: int, _: int, number: int) -> None:
        starts = [(offset + 777 * part) % (SIZE - 400) for part in range(1 + number % 4)]
        buffers = [memoryview(bytearray(b"?" * (1 + 99 * part))) for part in range(len(starts))]
        self.device.pread_many(list(zip(buffers, starts, strict=True)))
        for buffer, start in zip(buffers, starts, strict=True):
            self.check(buffer, start)

    def write(self, offset: int, length: int, number: int) -> None:
        data = bytes([number]) * min(length, MOST_WRITTEN)
        self.begin(offset, len(data))
        self.device.pwrite(data, offset)
        self.end(offset, data)

    def write_many(self, offset: int, _: int, number: int) -> None:
        """They do not touch: which of two writes at once comes last is nobody's promise."""
        starts = [(offset + 2000 * part) % (SIZE - 400) & ~511 for part in range(1 + number % 3)]
        writes = [(start, bytes([100 + number]) * (1 + 150 * part)) for part, start in enumerate(starts)]
        for start, data in writes:
            self.begin(start, len(data))
        failed = self.device.pwrite_many(writes)
        assert all(isinstance(failure, (OSError, LmdbitmapError)) for failure in failed.values())
        for position, (start, data) in enumerate(writes):
            if position not in failed:
                self.end(start, data)

    def zero(self, offset: int, length: int, number: int) -> None:
        self.begin(offset, length)
        self.device.write_zeroes(offset, length, may_unmap=bool(number & 1), fast_only=bool(number & 2))
        self.end(offset, bytes(length))

    def discard(self, offset: int, length: int, _: int) -> None:
        """Advice: what is there afterwards is uncertain."""
        self.begin(offset, length)
        self.device.discard(offset, length)

    def ask(self, offset: int, length: int, _: int) -> None:
        found = [extent.length for extent in self.device.allocation(offset, length)]
        assert sum(found) == length
        assert all(found) or not length

    def flush(self) -> None:
        try:
            self.device.flush()
        except (OSError, LmdbitmapError):
            return
        assert not self.losses, "a flush succeeds after data was lost"
        self.check(self.server.durable, 0)

    def begin(self, offset: int, length: int) -> None:
        self.uncertain[offset : offset + length] = b"\1" * length

    def end(self, offset: int, data: bytes) -> None:
        self.expected[offset : offset + len(data)] = data
        self.uncertain[offset : offset + len(data)] = bytes(len(data))

    def check(self, found: Buffer, offset: int) -> None:
        """Once a loss was reported, any data may be gone."""
        stop = offset + len(found)
        differences = int.from_bytes(found, "big") ^ int.from_bytes(self.expected[offset:stop], "big")
        certain = int.from_bytes(self.uncertain[offset:stop].translate(_CERTAIN), "big")
        assert self.losses or not differences & certain, f"other bytes within {offset} to {stop}"
