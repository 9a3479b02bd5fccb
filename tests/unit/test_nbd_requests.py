"""Which requests are refused, and by which error."""

from __future__ import annotations

import errno

import pytest

from lmdbitmap.errors import Busy, InvalidArgument, StorageError
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.handshake import MAX_PAYLOAD
from lmdbitmap.nbd.server.requests import Negotiated, error_of, refusal

SIZE = 1 << 30
CHANGING = [nbd.NBD_CMD_WRITE, nbd.NBD_CMD_TRIM, nbd.NBD_CMD_WRITE_ZEROES]
ALL = [*CHANGING, nbd.NBD_CMD_READ, nbd.NBD_CMD_FLUSH, nbd.NBD_CMD_CACHE, nbd.NBD_CMD_BLOCK_STATUS]


def refused(
    command: int,
    offset: int = 0,
    length: int = 4096,
    flags: int = 0,
    *,
    read_only: bool = False,
    in_chunks: bool = True,
    extended: bool = False,
    contexts: bool = True,
) -> int:
    request = nbd.Request(flags, command, 1, offset, length)
    refused = refusal(request, Negotiated(in_chunks, contexts, extended), SIZE, read_only=read_only)
    assert refused is None or (refused.error and refused.expected)
    return 0 if refused is None else refused.error


@pytest.mark.parametrize("command", ALL)
def test_everything_inside_the_disk_is_allowed_with_and_without_fua(command: int) -> None:
    assert refused(command) == 0
    assert refused(command, flags=nbd.NBD_CMD_FLAG_FUA) == 0
    assert refused(command, SIZE - 1, 1) == 0


@pytest.mark.parametrize("command", [8, 255, nbd.NBD_CMD_DISC])
def test_unknown_commands_are_invalid(command: int) -> None:
    assert refused(command) == nbd.NBD_EINVAL


@pytest.mark.parametrize(
    ("command", "allowed"),
    [
        (nbd.NBD_CMD_READ, nbd.NBD_CMD_FLAG_DF),
        (nbd.NBD_CMD_WRITE, 0),
        (nbd.NBD_CMD_FLUSH, 0),
        (nbd.NBD_CMD_TRIM, 0),
        (nbd.NBD_CMD_CACHE, 0),
        (nbd.NBD_CMD_WRITE_ZEROES, nbd.NBD_CMD_FLAG_NO_HOLE | nbd.NBD_CMD_FLAG_FAST_ZERO),
        (nbd.NBD_CMD_BLOCK_STATUS, nbd.NBD_CMD_FLAG_REQ_ONE),
    ],
)
def test_each_command_takes_its_own_flags_and_no_others(command: int, allowed: int) -> None:
    verdicts = {1 << bit: refused(command, flags=1 << bit) for bit in range(1, 16)}
    assert {flag for flag, error in verdicts.items() if error == 0} == {f for f in verdicts if f & allowed}
    assert set(verdicts.values()) <= {0, nbd.NBD_EINVAL}


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (nbd.NBD_CMD_READ, nbd.NBD_EINVAL),
        (nbd.NBD_CMD_TRIM, nbd.NBD_EINVAL),
        (nbd.NBD_CMD_CACHE, nbd.NBD_EINVAL),
        (nbd.NBD_CMD_BLOCK_STATUS, nbd.NBD_EINVAL),
        (nbd.NBD_CMD_WRITE, nbd.NBD_ENOSPC),
        (nbd.NBD_CMD_WRITE_ZEROES, nbd.NBD_ENOSPC),
    ],
)
def test_past_the_end_writes_lack_space_and_the_rest_is_invalid(command: int, error: int) -> None:
    assert refused(command, SIZE - 4095, 4096) == error
    assert refused(command, 2**64 - 1, 4096) == error


def test_a_flush_has_no_place_so_none_is_wrong() -> None:
    assert refused(nbd.NBD_CMD_FLUSH, 2**64 - 1, 2**32 - 1) == 0


@pytest.mark.parametrize("command", ALL)
def test_a_read_only_disk_permits_no_change_wherever_it_is(command: int) -> None:
    expected = nbd.NBD_EPERM if command in CHANGING else 0
    assert refused(command, read_only=True) == expected
    if expected:
        assert refused(command, SIZE, 4096, read_only=True) == expected


def test_payloads_end_at_32_mib_and_what_carries_none_does_not() -> None:
    assert refused(nbd.NBD_CMD_READ, 0, MAX_PAYLOAD) == refused(nbd.NBD_CMD_WRITE, 0, MAX_PAYLOAD) == 0
    assert refused(nbd.NBD_CMD_READ, 0, MAX_PAYLOAD + 1) == nbd.NBD_EINVAL
    assert refused(nbd.NBD_CMD_WRITE, 0, MAX_PAYLOAD + 1) == nbd.NBD_EINVAL
    assert refused(nbd.NBD_CMD_TRIM, 0, SIZE) == refused(nbd.NBD_CMD_WRITE_ZEROES, 0, SIZE) == 0


@pytest.mark.parametrize("command", ALL)
def test_of_no_bytes_only_a_status_is_refused(command: int) -> None:
    expected = nbd.NBD_EINVAL if command == nbd.NBD_CMD_BLOCK_STATUS else 0
    assert refused(command, 0, 0) == refused(command, SIZE, 0) == expected


def test_what_was_not_agreed_on_is_invalid() -> None:
    assert refused(nbd.NBD_CMD_READ, flags=nbd.NBD_CMD_FLAG_DF, in_chunks=False) == nbd.NBD_EINVAL
    assert refused(nbd.NBD_CMD_BLOCK_STATUS, contexts=False) == nbd.NBD_EINVAL


@pytest.mark.parametrize("command", ALL)
def test_a_payload_is_announced_behind_extended_headers_and_by_a_write_only(command: int) -> None:
    flags = nbd.NBD_CMD_FLAG_PAYLOAD_LEN
    assert refused(command, flags=flags) == nbd.NBD_EINVAL
    expected = 0 if command == nbd.NBD_CMD_WRITE else nbd.NBD_EINVAL
    assert refused(command, flags=flags, extended=True) == expected
    assert refused(command, extended=True) == 0


def test_64_bits_of_length_are_judged_as_32_are() -> None:
    for command in ALL:
        if command != nbd.NBD_CMD_FLUSH:
            assert refused(command, 1, 2**64 - 1, extended=True) != 0
    assert refused(nbd.NBD_CMD_READ, 0, MAX_PAYLOAD + 1, extended=True) == nbd.NBD_EINVAL


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (OSError(errno.ENOSPC, "full"), nbd.NBD_ENOSPC),
        (OSError("without a number"), nbd.NBD_EIO),
        (StorageError("there", OSError(errno.EROFS, "no"), next_step="mend it"), nbd.NBD_EPERM),
        (InvalidArgument("out of range", next_step="stay inside"), nbd.NBD_EINVAL),
        (Busy("taken", next_step="wait"), nbd.NBD_EIO),
    ],
)
def test_no_failure_is_told_as_success(failure: Exception, error: int) -> None:
    assert error_of(failure) == error
