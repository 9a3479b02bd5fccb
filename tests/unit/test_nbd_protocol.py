"""Parsers and builders of NBD's bytes: the wire tables, and what each parser refuses."""

from __future__ import annotations

import errno
import struct

import pytest

from lmdbitmap.errors import FormatError
from lmdbitmap.nbd import protocol as nbd


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def test_greeting_is_what_the_specification_prints() -> None:
    assert nbd.greeting() == b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"


def test_request_fields_lie_where_the_wire_table_puts_them() -> None:
    wire = bytes.fromhex("25609513 0001 0006 0102030405060708 00000000deadbeef 00001000")
    assert nbd.parse_request(wire) == nbd.Request(
        flags=nbd.NBD_CMD_FLAG_FUA,
        type=nbd.NBD_CMD_WRITE_ZEROES,
        cookie=0x0102030405060708,
        offset=0xDEADBEEF,
        length=4096,
    )


def test_request_with_another_magic_is_refused() -> None:
    with pytest.raises(FormatError, match="0x25609513"):
        nbd.parse_request(bytes(28))


def test_extended_request_fields_lie_where_the_wire_table_puts_them() -> None:
    fields = "0102030405060708 00000000deadbeef 0000000200001000"
    zeroes = nbd.parse_extended_request(bytes.fromhex(f"21e41c71 0001 0006 {fields}"))
    assert zeroes == nbd.Request(
        flags=nbd.NBD_CMD_FLAG_FUA,
        type=nbd.NBD_CMD_WRITE_ZEROES,
        cookie=0x0102030405060708,
        offset=0xDEADBEEF,
        length=0x200001000,
        payload=0,
    )
    with_payload = nbd.parse_extended_request(bytes.fromhex(f"21e41c71 0020 0007 {fields}"))
    assert (with_payload.flags, with_payload.payload) == (nbd.NBD_CMD_FLAG_PAYLOAD_LEN, 0x200001000)


def test_a_write_has_a_payload_whether_its_flags_say_so_or_not() -> None:
    plain = nbd.parse_request(bytes.fromhex("25609513 0000 0001 0102030405060708 00000000deadbeef 00001000"))
    assert (plain.length, plain.payload) == (4096, 4096)
    for flags in ("0000", "0020"):
        fields = f"21e41c71 {flags} 0001 0102030405060708 00000000deadbeef 0000000000001000"
        assert nbd.parse_extended_request(bytes.fromhex(fields)).payload == 4096


def test_extended_request_with_another_magic_is_refused() -> None:
    with pytest.raises(FormatError, match="0x21e41c71"):
        nbd.parse_extended_request(bytes.fromhex("25609513") + bytes(28))


def test_extended_replies_lie_where_the_wire_tables_put_them() -> None:
    reply = nbd.extended_reply(7, 0xDEADBEEF, nbd.NBD_REPLY_TYPE_ERROR, b"abc", done=False)
    assert reply == bytes.fromhex(
        "6e8a278c 0000 8001 0000000000000007 00000000deadbeef 0000000000000003 616263"
    )
    assert nbd.extended_reply(7, 1, nbd.NBD_REPLY_TYPE_NONE) == bytes.fromhex(
        "6e8a278c 0001 0000 0000000000000007 0000000000000001 0000000000000000"
    )
    payload = nbd.block_status_ext_payload(9, [(1 << 33, 3), (1, 0)])
    assert payload == struct.pack(">IIQQQQ", 9, 2, 1 << 33, 3, 1, 0)


def test_client_flags_may_only_be_the_two_known_ones() -> None:
    assert nbd.parse_client_flags(b"\0\0\0\3") == 3
    with pytest.raises(FormatError, match="0x4"):
        nbd.parse_client_flags(b"\0\0\0\4")


def test_option_header_names_the_option_and_the_length_to_come() -> None:
    wire = b"IHAVEOPT" + struct.pack(">II", 7, 99)
    assert nbd.parse_option_header(wire) == nbd.OptionHeader(nbd.NBD_OPT_GO, 99)
    with pytest.raises(FormatError, match="magic"):
        nbd.parse_option_header(b"IHAVEOPD" + wire[8:])


def test_info_query_carries_a_name_and_the_types_asked_for() -> None:
    wire = string("dïsk".encode()) + struct.pack(">HHH", 2, nbd.NBD_INFO_NAME, nbd.NBD_INFO_BLOCK_SIZE)
    assert nbd.parse_info_query(wire) == nbd.InfoQuery("dïsk", (1, 3))
    assert nbd.parse_info_query(string(b"") + b"\0\0") == nbd.InfoQuery("", ())


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"\0\0",
        string(b"disk"),
        string(b"disk") + b"\0",
        string(b"disk") + b"\0\2\0\0",
        string(b"disk") + b"\0\1\0\0\0",
        struct.pack(">I", 5) + b"disk",
        struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
        string(b"\xff\xfe") + b"\0\0",
        string(b"x" * 4097) + b"\0\0",
    ],
)
def test_info_query_that_does_not_add_up_is_refused(wire: bytes) -> None:
    with pytest.raises(FormatError):
        nbd.parse_info_query(wire)


def test_meta_query_carries_a_name_and_queries() -> None:
    wire = string(b"disk") + struct.pack(">I", 2) + string(b"base:") + string(b"x-y:z")
    assert nbd.parse_meta_query(wire) == nbd.MetaQuery("disk", ("base:", "x-y:z"))


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        string(b"disk"),
        string(b"disk") + struct.pack(">I", 1),
        string(b"disk") + struct.pack(">I", 0xFFFFFFFF) + string(b"base:"),
        string(b"disk") + struct.pack(">I", 1) + string(b"base:") + b"tail",
    ],
)
def test_meta_query_that_does_not_add_up_is_refused(wire: bytes) -> None:
    with pytest.raises(FormatError):
        nbd.parse_meta_query(wire)


def test_names_of_4096_bytes_pass_and_longer_ones_do_not() -> None:
    assert nbd.parse_export_name(b"x" * 4096) == "x" * 4096
    with pytest.raises(FormatError, match="4096"):
        nbd.parse_export_name(b"x" * 4097)


def test_replies_are_laid_out_as_the_specification_says() -> None:
    assert nbd.simple_reply(7, nbd.NBD_EIO) == bytes.fromhex("67446698 00000005 0000000000000007")
    assert nbd.structured_reply(7, nbd.NBD_REPLY_TYPE_BLOCK_STATUS, b"abc", done=False) == (
        bytes.fromhex("668e33ef 0000 0005 0000000000000007 00000003") + b"abc"
    )
    assert nbd.error_payload(22, "no") == bytes.fromhex("00000016 0002") + b"no"
    assert nbd.block_status_payload(1, [(4096, 3), (1, 0)]) == bytes.fromhex(
        "00000001 00001000 00000003 00000001 00000000"
    )
    assert nbd.option_reply(7, nbd.NBD_REP_ERR_UNSUP, b"?") == bytes.fromhex(
        "0003e889045565a9 00000007 80000001 00000001 3f"
    )


def test_export_name_reply_is_padded_only_when_asked() -> None:
    bare = nbd.export_name_reply(1 << 40, 5, padded=False)
    assert bare == bytes.fromhex("0000010000000000 0005")
    assert nbd.export_name_reply(1 << 40, 5, padded=True) == bare + bytes(124)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, nbd.NBD_EPERM),
        (errno.EROFS, nbd.NBD_EPERM),
        (errno.ENOMEM, nbd.NBD_ENOMEM),
        (errno.EINVAL, nbd.NBD_EINVAL),
        (errno.ENOSPC, nbd.NBD_ENOSPC),
        (errno.EDQUOT, nbd.NBD_ENOSPC),
        (errno.EFBIG, nbd.NBD_ENOSPC),
        (errno.EOVERFLOW, nbd.NBD_EOVERFLOW),
        (errno.EOPNOTSUPP, nbd.NBD_ENOTSUP),
        (errno.ESHUTDOWN, nbd.NBD_ESHUTDOWN),
        (errno.EIO, nbd.NBD_EIO),
        (errno.EBADF, nbd.NBD_EIO),
        (0, nbd.NBD_EIO),
        (None, nbd.NBD_EIO),
    ],
)
def test_an_errno_becomes_the_protocols_word_for_it(number: int | None, error: int) -> None:
    assert nbd.nbd_error(number) == error
