"""Each kind of bad input is one clear sentence in the log, for each connection that sends it, however often."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.nbd.server.server import Server
from tests.helpers.nbd_raw import (
    BLOCK_STATUS,
    FLUSH,
    READ,
    STRUCTURED_REPLY,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    string,
)
from tests.helpers.support import PATIENCE_SECONDS

SIZE = 64 << 20
MAX = 32 << 20
GO, INFO, EXPORT_NAME, LIST_META, SET_META = 7, 6, 1, 9, 10
WHO = f"process {os.getpid()} of user {os.getuid()}"
HINT = "; connect with a client that speaks NBD newstyle"


@pytest.fixture
def device() -> MemoryDevice:
    return MemoryDevice(SIZE)


@pytest.fixture
def handshake_timeout_s() -> float:
    return PATIENCE_SECONDS


@pytest.fixture
def path(tmp_path: Path, device: MemoryDevice, handshake_timeout_s: float) -> Iterator[str]:
    disks = {
        "sda": PlainDisk(device),
        "old": PlainDisk(MemoryDevice(SIZE, read_only=True)),
    }
    server = Server(disks, handshake_timeout_s=handshake_timeout_s)
    server.listen_unix(str(tmp_path / "nbd.sock"))
    server.start()
    yield str(tmp_path / "nbd.sock")
    assert server.stop()


def told(caplog: pytest.LogCaptureFixture, disk: str | None) -> str:
    """The only line that was logged, less whom it is about."""
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert (record.__dict__["disk"], record.__dict__["client"]) == (disk, WHO)
    whom = WHO if disk is None else f"disk {disk}: {WHO}"
    assert record.getMessage().startswith(whom)
    return record.getMessage()[len(whom) :].removeprefix(": ")


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize(
    ("disk", "command", "offset", "length", "sentence"),
    [
        ("sda", READ, SIZE - 99, 100, f"expected an end at {SIZE} at most, found {SIZE + 1}"),
        ("sda", READ, 2**64 - 1, 100, f"expected an end at {SIZE} at most, found {2**64 + 99}"),
        ("sda", WRITE, SIZE - 99, 100, f"expected an end at {SIZE} at most, found {SIZE + 1}"),
        (
            "sda",
            WRITE,
            SIZE - 99,
            1 << 20,
            f"expected an end at {SIZE} at most, found {SIZE - 99 + (1 << 20)}",
        ),
        ("sda", TRIM, SIZE, 1, f"expected an end at {SIZE} at most, found {SIZE + 1}"),
        ("old", WRITE, 0, 100, "expected no change of a disk that is read-only, found one"),
        ("old", WRITE, 0, 1 << 20, "expected no change of a disk that is read-only, found one"),
        ("old", WRITE_ZEROES, 0, 100, "expected no change of a disk that is read-only, found one"),
        ("sda", READ, 0, MAX + 1, f"expected at most {MAX} bytes, found {MAX + 1}"),
        ("sda", BLOCK_STATUS, 0, 0, "expected a byte at least, found none"),
        ("sda", 99, 0, 7, "expected a command that is known, found 99"),
    ],
)
def test_a_request_that_is_refused_is_one_sentence(
    path: str, caplog: pytest.LogCaptureFixture, disk: str, command: int, offset: int, length: int,
    sentence: str, extended: bool, times: int,
) -> None:  # fmt: skip
    data = bytes(length) if command == WRITE else b""
    with RawClient.connect(path) as client:
        client.go(disk, extended=extended, contexts=["base:allocation"])
        for _ in range(times):
            assert client.do(command, offset, length, data=data).error in (
                errno.EINVAL, errno.ENOSPC, errno.EPERM,
            )  # fmt: skip
    names = {1: "WRITE", 0: "READ", 4: "TRIM", 6: "WRITE_ZEROES", 7: "BLOCK_STATUS", 99: "an unknown command"}
    assert told(caplog, disk) == f"{names[command]} of {length} bytes at {offset} is refused: {sentence}"


def test_a_write_of_32_mib_and_a_byte_is_one_sentence(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with RawClient.connect(path) as client:
        client.go("sda")
        assert client.do(WRITE, 0, MAX + 1, data=bytes(MAX + 1)).error == errno.EINVAL
    place = f"WRITE of {MAX + 1} bytes at 0"
    assert told(caplog, "sda") == f"{place} is refused: expected at most {MAX} bytes, found {MAX + 1}"


def test_behind_extended_headers_it_costs_the_connection_and_is_one_sentence_too(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with RawClient.connect(path) as client:
        client.go("sda", extended=True)
        client.send(client.request(WRITE, 0, MAX + 1))
        assert client.is_closed_by_server()
    sentence = f"NBD request: expected a payload of at most {MAX} bytes, found {MAX + 1}"
    assert told(caplog, "sda") == f" was dropped: {sentence}{HINT}"


UNKNOWN = (
    "NBD export name: expected the name of a served disk, found 'sdz'; name one that `nbdinfo --list` shows"
)


@pytest.mark.parametrize(
    ("option", "data"),
    [
        (GO, string("sdz") + b"\0\0"),
        (INFO, string("sdz") + b"\0\0"),
        (LIST_META, string("sdz") + struct.pack(">I", 0)),
        (SET_META, string("sdz") + struct.pack(">I", 1) + string("base:allocation")),
    ],
)
def test_a_name_that_is_not_served_is_one_sentence(
    path: str, caplog: pytest.LogCaptureFixture, option: int, data: bytes
) -> None:
    with RawClient.connect(path) as client:
        client.greet()
        client.ask(STRUCTURED_REPLY)
        for _ in range(3):
            assert client.ask(option, data)[-1][0] == 0x80000006
    assert told(caplog, None) == UNKNOWN


def test_so_it_is_when_it_costs_the_connection(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with RawClient.connect(path) as client:
        client.greet()
        client.send(b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, 3) + b"sdz")
        assert client.is_closed_by_server()
    assert told(caplog, None) == UNKNOWN


def test_a_long_name_is_a_sentence_of_bearable_length(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with RawClient.connect(path) as client:
        client.greet()
        client.ask(GO, string("\n" * 4096) + b"\0\0")
    assert len(told(caplog, None)) < 600


@pytest.mark.parametrize("handshake_timeout_s", [2])
def test_a_handshake_that_took_too_long_is_one_sentence(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with RawClient.connect(path) as client:
        client.greet()
        assert client.is_closed_by_server()
    assert told(caplog, None) == f" was dropped: NBD handshake: expected its end within 2 s, found none{HINT}"


@pytest.mark.parametrize(
    ("command", "method", "length", "place"),
    [
        (READ, "pread_into", 4096, "READ of 4096 bytes at 512"),
        (READ, "pread_into", 1 << 20, "READ of 1048576 bytes at 512"),
        (WRITE, "pwrite", 4096, "WRITE of 4096 bytes at 512"),
        (WRITE, "pwrite", 1 << 20, "WRITE of "),
        (TRIM, "discard", 4096, "TRIM of 4096 bytes at 512"),
        (FLUSH, "flush", 0, "FLUSH of the image"),
    ],
)
def test_a_guest_that_tries_again_what_failed_does_not_flood_the_log(
    path: str, device: MemoryDevice, caplog: pytest.LogCaptureFixture,
    command: int, method: str, length: int, place: str,
) -> None:  # fmt: skip
    data = bytes(length) if command == WRITE else b""
    with RawClient.connect(path) as client:
        client.go("sda")
        for _ in range(100):
            device.fail_next[method] = errno.EIO
            assert client.do(command, 512 if length else 0, length, data=data).error == errno.EIO
    sentence = told(caplog, "sda")
    assert sentence.startswith(place)
    assert sentence.endswith(" failed: [Errno 5] Input/output error")


def test_an_honest_client_is_told_of_by_no_warning(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with RawClient.connect(path) as client:
        client.go("sda", contexts=["base:allocation"])
        assert client.do(WRITE, 0, 1 << 20, data=bytes(1 << 20)).error == 0
        for command in (READ, WRITE, TRIM, WRITE_ZEROES):
            assert client.do(command, SIZE, 0).error == 0
        assert client.do(READ, 0, MAX).error == 0
    assert caplog.records == []
