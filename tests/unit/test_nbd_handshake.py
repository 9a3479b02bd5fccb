"""Option haggling: what the server answers, how it ends, and what costs the client its connection."""

from __future__ import annotations

import struct
from typing import NamedTuple

import pytest

from lmdbitmap.errors import FormatError
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.handshake import (
    ABORTED,
    MAX_OPTION_LENGTH,
    MAX_OPTIONS,
    MAX_QUERIES,
    START_TLS,
    Agreed,
    Export,
    Handshake,
)

FLAGS = nbd.NBD_FLAG_HAS_FLAGS | nbd.NBD_FLAG_SEND_FLUSH
SDA = Export("sda", 1 << 40, FLAGS, "the first", ("base:allocation", "qemu:dirty-bitmap:b0"))
SDB = Export("sdb", 512, FLAGS)
BOTH = {"sda": SDA, "sdb": SDB}
FIXED = struct.pack(">I", nbd.NBD_FLAG_C_FIXED_NEWSTYLE | nbd.NBD_FLAG_C_NO_ZEROES)


def heard(handshake: Handshake, data: bytes) -> bytes:
    """All answers to it."""
    return b"".join(handshake.receive(data))


class Reply(NamedTuple):
    option: int
    type: int
    data: bytes


def option(number: int, data: bytes = b"") -> bytes:
    return nbd.OPTION.pack(nbd.IHAVEOPT, number, len(data)) + data


def string(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()


def go(name: str, *info_types: int, number: int = nbd.NBD_OPT_GO) -> bytes:
    asked = struct.pack(f">H{len(info_types)}H", len(info_types), *info_types)
    return option(number, string(name) + asked)


def meta(number: int, name: str, *queries: str) -> bytes:
    listed = struct.pack(">I", len(queries)) + b"".join(map(string, queries))
    return option(number, string(name) + listed)


def replies(data: bytes) -> list[Reply]:
    found = []
    while data:
        magic, number, kind, length = nbd.OPTION_REPLY.unpack_from(data)
        assert magic == nbd.NBD_REP_MAGIC
        found.append(Reply(number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def started(exports: dict[str, Export] = BOTH, flags: bytes = FIXED) -> Handshake:
    handshake = Handshake(lambda: exports)
    assert heard(handshake, flags) == b""
    return handshake


def structured(exports: dict[str, Export] = BOTH) -> Handshake:
    handshake = started(exports)
    [reply] = replies(heard(handshake, option(nbd.NBD_OPT_STRUCTURED_REPLY)))
    assert reply.type == nbd.NBD_REP_ACK
    return handshake


def contexts_in(answer: bytes) -> list[tuple[int, str]]:
    listed = [reply for reply in replies(answer) if reply.type == nbd.NBD_REP_META_CONTEXT]
    assert replies(answer)[-1].type == nbd.NBD_REP_ACK
    return [(struct.unpack(">I", reply.data[:4])[0], reply.data[4:].decode()) for reply in listed]


def test_go_agrees_and_describes_the_disk() -> None:
    handshake = started()
    answer = replies(heard(handshake, go("sda", nbd.NBD_INFO_NAME, nbd.NBD_INFO_DESCRIPTION)))
    assert [reply.type for reply in answer] == [nbd.NBD_REP_INFO] * 4 + [nbd.NBD_REP_ACK]
    infos = {struct.unpack(">H", reply.data[:2])[0]: reply.data[2:] for reply in answer[:-1]}
    assert infos == {
        nbd.NBD_INFO_EXPORT: struct.pack(">QH", 1 << 40, FLAGS),
        nbd.NBD_INFO_BLOCK_SIZE: struct.pack(">III", 1, 4096, 32 << 20),
        nbd.NBD_INFO_NAME: b"sda",
        nbd.NBD_INFO_DESCRIPTION: b"the first",
    }
    assert handshake.outcome == Agreed("sda", structured=False, contexts=())


def test_df_is_offered_only_behind_structured_replies() -> None:
    [export, *_] = replies(heard(structured(), go("sda")))
    assert struct.unpack(">HQH", export.data) == (0, 1 << 40, FLAGS | nbd.NBD_FLAG_SEND_DF)


def test_info_describes_without_ending_the_haggling() -> None:
    handshake = started()
    answer = replies(heard(handshake, go("sdb", number=nbd.NBD_OPT_INFO)))
    assert [reply.type for reply in answer] == [nbd.NBD_REP_INFO, nbd.NBD_REP_INFO, nbd.NBD_REP_ACK]
    assert handshake.outcome is None


@pytest.mark.parametrize("number", [nbd.NBD_OPT_GO, nbd.NBD_OPT_INFO])
def test_an_unknown_disk_is_named_in_the_error_and_another_may_be_tried(number: int) -> None:
    handshake = started()
    [reply] = replies(heard(handshake, go("sdz", number=number)))
    assert reply.type == nbd.NBD_REP_ERR_UNKNOWN
    assert b"sdz" in reply.data
    heard(handshake, go("sda"))
    assert handshake.outcome is not None


@pytest.mark.parametrize("name", ["ß" * 2047, "a" + "ß" * 2047, "日" * 1365])
def test_a_long_name_is_cut_between_two_characters(name: str) -> None:
    [reply] = replies(heard(started(), go(name)))
    assert reply.type == nbd.NBD_REP_ERR_UNKNOWN
    assert nbd.NBD_MAX_STRING - 4 < len(reply.data) <= nbd.NBD_MAX_STRING
    assert name[:1000] in reply.data.decode()


def test_the_empty_name_is_the_only_disk_and_ambiguous_with_two() -> None:
    alone = started({"sda": SDA})
    assert replies(heard(alone, go("", nbd.NBD_INFO_NAME)))[-2].data[2:] == b"sda"
    assert alone.outcome == Agreed("sda", structured=False, contexts=())
    assert replies(heard(started(), go("")))[0].type == nbd.NBD_REP_ERR_UNKNOWN


@pytest.mark.parametrize(("flags", "padding"), [(FIXED, 0), (b"\0\0\0\1", 124), (b"\0\0\0\0", 124)])
def test_export_name_answers_without_a_header_and_padded_unless_waived(flags: bytes, padding: int) -> None:
    handshake = started(flags=flags)
    answer = heard(handshake, option(nbd.NBD_OPT_EXPORT_NAME, b"sdb"))
    assert answer == struct.pack(">QH", 512, FLAGS) + bytes(padding)
    assert handshake.outcome == Agreed("sdb", structured=False, contexts=())


def test_export_name_of_an_unknown_disk_costs_the_connection() -> None:
    with pytest.raises(FormatError, match="sdz"):
        heard(started(), option(nbd.NBD_OPT_EXPORT_NAME, b"sdz"))


def test_list_names_every_disk() -> None:
    answer = replies(heard(started(), option(nbd.NBD_OPT_LIST)))
    assert [reply.data for reply in answer] == [string("sda") + b"the first", string("sdb"), b""]
    assert [reply.type for reply in answer] == [nbd.NBD_REP_SERVER, nbd.NBD_REP_SERVER, nbd.NBD_REP_ACK]


def test_abort_is_acknowledged_whatever_it_carries() -> None:
    handshake = started()
    assert replies(heard(handshake, option(nbd.NBD_OPT_ABORT, b"bye")))[0].type == nbd.NBD_REP_ACK
    assert handshake.outcome is ABORTED


@pytest.mark.parametrize("number", [0, 4, 12, 99, 2**32 - 1])
def test_an_option_we_lack_is_answered_so_and_the_haggling_goes_on(number: int) -> None:
    handshake = started()
    [reply] = replies(heard(handshake, option(number, b"whatever")))
    assert (reply.option, reply.type) == (number, nbd.NBD_REP_ERR_UNSUP)
    assert len(replies(heard(handshake, option(nbd.NBD_OPT_LIST)))) == 3


@pytest.mark.parametrize(
    "request_",
    [
        option(nbd.NBD_OPT_LIST, b"x"),
        option(nbd.NBD_OPT_STRUCTURED_REPLY, b"x"),
        option(nbd.NBD_OPT_EXTENDED_HEADERS, b"x"),
        option(nbd.NBD_OPT_GO, b"x"),
        option(nbd.NBD_OPT_INFO),
        option(nbd.NBD_OPT_LIST_META_CONTEXT, b"\0\0\0\7sda"),
        meta(nbd.NBD_OPT_LIST_META_CONTEXT, "sda", "q" * 4097),
        go("n" * 4097),
    ],
)
def test_a_malformed_option_is_invalid_and_the_haggling_goes_on(request_: bytes) -> None:
    handshake = structured()
    [reply] = replies(heard(handshake, request_))
    assert reply.type == nbd.NBD_REP_ERR_INVALID
    assert handshake.outcome is None


def test_contexts_need_structured_replies_first() -> None:
    handshake = started()
    for number in (nbd.NBD_OPT_LIST_META_CONTEXT, nbd.NBD_OPT_SET_META_CONTEXT):
        [reply] = replies(heard(handshake, meta(number, "sda")))
        assert reply.type == nbd.NBD_REP_ERR_INVALID


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ([], ["base:allocation", "qemu:dirty-bitmap:b0"]),
        (["base:"], ["base:allocation"]),
        (["qemu:"], ["qemu:dirty-bitmap:b0"]),
        (["qemu:dirty-bitmap:"], ["qemu:dirty-bitmap:b0"]),
        (["base:allocation", "base:"], ["base:allocation"]),
        (["base:alloc", "qemu:dirty-bitmap:b", "x:", "nonsense", ""], []),
    ],
)
def test_contexts_are_listed_by_name_and_by_namespace(queries: list[str], listed: list[str]) -> None:
    answer = heard(structured(), meta(nbd.NBD_OPT_LIST_META_CONTEXT, "sda", *queries))
    assert [name for _, name in contexts_in(answer)] == listed


@pytest.mark.parametrize(
    ("queries", "selected"),
    [
        ([], []),
        (["base:", "qemu:", "qemu:dirty-bitmap:"], []),
        (["base:allocation"], ["base:allocation"]),
        (["base:other", "qemu:dirty-bitmap:b0"], ["qemu:dirty-bitmap:b0"]),
        (["qemu:dirty-bitmap:b0", "base:allocation", "base:allocation"], list(SDA.contexts)),
    ],
)
def test_contexts_are_selected_by_exact_name_alone(queries: list[str], selected: list[str]) -> None:
    handshake = structured()
    told = contexts_in(heard(handshake, meta(nbd.NBD_OPT_SET_META_CONTEXT, "sda", *queries)))
    assert [name for _, name in told] == selected
    assert len({number for number, _ in told}) == len(selected)
    heard(handshake, go("sda"))
    assert handshake.outcome == Agreed("sda", structured=True, contexts=tuple(told))


@pytest.mark.parametrize(
    "afterwards",
    [
        meta(nbd.NBD_OPT_SET_META_CONTEXT, "sda"),
        meta(nbd.NBD_OPT_SET_META_CONTEXT, "sdz", "base:allocation"),
        option(nbd.NBD_OPT_SET_META_CONTEXT, b"broken"),
    ],
)
def test_a_later_selection_replaces_the_earlier_even_when_it_fails(afterwards: bytes) -> None:
    handshake = structured()
    heard(handshake, meta(nbd.NBD_OPT_SET_META_CONTEXT, "sda", "base:allocation"))
    heard(handshake, afterwards)
    heard(handshake, go("sda"))
    assert handshake.outcome == Agreed("sda", structured=True, contexts=())


def test_contexts_selected_for_another_disk_do_not_count() -> None:
    handshake = structured()
    heard(handshake, meta(nbd.NBD_OPT_SET_META_CONTEXT, "sda", "base:allocation"))
    heard(handshake, go("sdb"))
    assert handshake.outcome == Agreed("sdb", structured=True, contexts=())


def test_contexts_selected_under_the_empty_name_count_for_the_only_disk() -> None:
    handshake = structured({"sda": SDA})
    heard(handshake, meta(nbd.NBD_OPT_SET_META_CONTEXT, "", "base:allocation"))
    heard(handshake, go("sda"))
    assert handshake.outcome == Agreed("sda", structured=True, contexts=((1, "base:allocation"),))


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        (b"\xff\xff\xff\xff", "client flags"),
        (b"\0\0\0\3" + b"GET / HTTP/1.1\r\n", "magic"),
        (b"\0\0\0\3" + nbd.OPTION.pack(nbd.IHAVEOPT, 6, MAX_OPTION_LENGTH + 1), "65536"),
        (b"\0\0\0\3" + nbd.OPTION.pack(nbd.IHAVEOPT, 99, 2**32 - 1), "65536"),
        (b"\0\0\0\0" + option(nbd.NBD_OPT_LIST), "fixed newstyle"),
        (b"\0\0\0\3" + option(nbd.NBD_OPT_EXPORT_NAME, b"\xff"), "UTF-8"),
        (b"\0\0\0\3" + option(99) * (MAX_OPTIONS + 1), "1024"),
    ],
)
def test_a_breach_of_the_protocol_costs_the_connection(wire: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        heard(Handshake(lambda: BOTH), wire)


def test_an_endless_option_is_refused_before_its_data_is_kept() -> None:
    handshake = started()
    with pytest.raises(FormatError):
        heard(handshake, nbd.OPTION.pack(nbd.IHAVEOPT, nbd.NBD_OPT_GO, 1 << 31))


CONVERSATION = (
    FIXED
    + option(nbd.NBD_OPT_STRUCTURED_REPLY)
    + option(nbd.NBD_OPT_LIST)
    + meta(nbd.NBD_OPT_SET_META_CONTEXT, "sda", "base:allocation")
    + go("sda", nbd.NBD_INFO_BLOCK_SIZE)
)
FIRST_REQUEST = nbd.REQUEST.pack(nbd.NBD_REQUEST_MAGIC, 0, nbd.NBD_CMD_READ, 1, 0, 512)


@pytest.mark.parametrize("step", [1, 3, 17, len(CONVERSATION) + 28])
def test_the_size_of_the_pieces_changes_nothing(step: int) -> None:
    whole = Handshake(lambda: BOTH)
    expected = heard(whole, CONVERSATION)
    wire = CONVERSATION + FIRST_REQUEST
    handshake = Handshake(lambda: BOTH)
    pieces = [wire[at : at + step] for at in range(0, len(wire), step)]
    answer = b"".join(heard(handshake, piece) for piece in pieces)
    assert answer == expected
    assert handshake.outcome == whole.outcome is not None
    assert handshake.trailing == FIRST_REQUEST


def test_each_answer_is_given_before_the_next_option_is_looked_at() -> None:
    handshake = started()
    answers = handshake.receive(option(nbd.NBD_OPT_LIST) * 3 + option(nbd.NBD_OPT_ABORT))
    for left in (3, 2, 1):
        assert len(replies(next(answers))) == 3
        assert len(handshake.trailing) == left * nbd.OPTION.size
    assert handshake.outcome is None
    assert len(list(answers)) == 1
    assert handshake.outcome is ABORTED


@pytest.mark.parametrize("number", [nbd.NBD_OPT_LIST_META_CONTEXT, nbd.NBD_OPT_SET_META_CONTEXT])
def test_contexts_are_asked_for_by_a_bounded_number_of_queries(number: int) -> None:
    handshake, queries = structured(), ["base:allocation"] * MAX_QUERIES
    assert contexts_in(heard(handshake, meta(number, "sda", *queries)))
    [reply] = replies(heard(handshake, meta(number, "sda", *queries, "base:allocation")))
    assert reply.type == nbd.NBD_REP_ERR_TOO_BIG
    assert handshake.outcome is None


def test_what_there_is_is_looked_up_once_and_not_before_it_is_asked_for() -> None:
    looked: list[int] = []

    def look_up() -> dict[str, Export]:
        looked.append(1)
        return BOTH

    handshake = Handshake(look_up)
    heard(handshake, FIXED + option(nbd.NBD_OPT_STRUCTURED_REPLY) + option(99))
    assert looked == []
    heard(handshake, option(nbd.NBD_OPT_LIST) * 2 + go("sda"))
    assert (looked, handshake.outcome) == ([1], Agreed("sda", structured=True, contexts=()))


# --- TLS ---

STARTTLS = option(nbd.NBD_OPT_STARTTLS)


def only_type(handshake: Handshake, data: bytes) -> int:
    [reply] = replies(heard(handshake, data))
    return reply.type


def guarded(flags: bytes = FIXED) -> Handshake:
    handshake = Handshake(lambda: BOTH, tls_required=True)
    assert heard(handshake, flags) == b""
    return handshake


def test_tls_is_unknown_to_a_server_without_certificates() -> None:
    handshake = started()
    assert only_type(handshake, STARTTLS) == nbd.NBD_REP_ERR_UNSUP
    assert handshake.outcome is None


@pytest.mark.parametrize(
    "asked",
    [
        option(nbd.NBD_OPT_LIST), go("sda"), go("sda", number=nbd.NBD_OPT_INFO), option(nbd.NBD_OPT_STRUCTURED_REPLY),
        meta(nbd.NBD_OPT_LIST_META_CONTEXT, "sda"), meta(nbd.NBD_OPT_SET_META_CONTEXT, "sda"), option(99), go("x"),
    ],
)  # fmt: skip
def test_nothing_is_told_before_tls_where_it_is_required(asked: bytes) -> None:
    handshake = guarded()
    assert only_type(handshake, asked) == nbd.NBD_REP_ERR_TLS_REQD
    assert handshake.outcome is None


def test_export_name_before_tls_costs_the_connection() -> None:
    with pytest.raises(FormatError, match="NBD_OPT_STARTTLS before it"):
        heard(guarded(), option(nbd.NBD_OPT_EXPORT_NAME, b"sda"))


def test_haggling_goes_on_behind_tls_and_tls_begins_once() -> None:
    handshake = guarded()
    assert only_type(handshake, STARTTLS) == nbd.NBD_REP_ACK
    assert handshake.outcome is START_TLS
    handshake.secured()
    assert only_type(handshake, STARTTLS) == nbd.NBD_REP_ERR_INVALID
    assert heard(handshake, go("sda"))
    assert isinstance(handshake.outcome, Agreed)


def test_nothing_is_looked_up_before_tls_where_it_is_required() -> None:
    looked: list[int] = []

    def look_up() -> dict[str, Export]:
        looked.append(1)
        return BOTH

    handshake = Handshake(look_up, tls_required=True)
    meddling = meta(nbd.NBD_OPT_LIST_META_CONTEXT, "sda")
    heard(handshake, FIXED + option(nbd.NBD_OPT_LIST) + go("sda") + meddling + STARTTLS)
    handshake.secured()
    assert looked == []
    heard(handshake, go("sda"))
    assert looked == [1]


def test_abort_is_heard_before_tls() -> None:
    handshake = guarded()
    assert only_type(handshake, option(nbd.NBD_OPT_ABORT)) == nbd.NBD_REP_ACK
    assert handshake.outcome is ABORTED


def test_starttls_with_data_is_refused() -> None:
    assert only_type(guarded(), option(nbd.NBD_OPT_STARTTLS, b"x")) == nbd.NBD_REP_ERR_INVALID


def test_words_in_plain_text_behind_starttls_are_not_taken_for_the_clients_own() -> None:
    handshake = guarded()
    assert only_type(handshake, STARTTLS + go("sda")) == nbd.NBD_REP_ACK
    with pytest.raises(FormatError, match="nothing more in plain text"):
        handshake.secured()


# --- extended headers ---


def extended() -> Handshake:
    handshake = started()
    assert replies(heard(handshake, option(nbd.NBD_OPT_EXTENDED_HEADERS))) == [ACKNOWLEDGED]
    return handshake


ACKNOWLEDGED = Reply(nbd.NBD_OPT_EXTENDED_HEADERS, nbd.NBD_REP_ACK, b"")


def test_extended_headers_bring_what_structured_replies_bring() -> None:
    handshake = extended()
    told = contexts_in(heard(handshake, meta(nbd.NBD_OPT_LIST_META_CONTEXT, "sda")))
    assert [name for _, name in told] == list(SDA.contexts)
    chosen = contexts_in(heard(handshake, meta(nbd.NBD_OPT_SET_META_CONTEXT, "sda", "base:allocation")))
    [export, *_] = replies(heard(handshake, go("sda")))
    assert struct.unpack(">HQH", export.data) == (0, 1 << 40, FLAGS | nbd.NBD_FLAG_SEND_DF)
    assert handshake.outcome == Agreed("sda", structured=False, contexts=tuple(chosen), extended=True)


def test_extended_headers_may_follow_structured_replies_and_be_asked_for_twice() -> None:
    handshake = structured()
    for _ in range(2):
        assert replies(heard(handshake, option(nbd.NBD_OPT_EXTENDED_HEADERS))) == [ACKNOWLEDGED]
    heard(handshake, go("sda"))
    assert handshake.outcome == Agreed("sda", structured=True, contexts=(), extended=True)


def test_behind_extended_headers_there_is_no_way_back_to_structured_replies() -> None:
    handshake = extended()
    [reply] = replies(heard(handshake, option(nbd.NBD_OPT_STRUCTURED_REPLY)))
    assert reply.type == nbd.NBD_REP_ERR_EXT_HEADER_REQD == 2**31 + 10
    heard(handshake, go("sda"))
    assert handshake.outcome == Agreed("sda", structured=False, contexts=(), extended=True)


def test_behind_extended_headers_the_old_way_in_costs_the_connection() -> None:
    handshake = extended()
    with pytest.raises(FormatError, match="NBD_OPT_GO"):
        heard(handshake, option(nbd.NBD_OPT_EXPORT_NAME, b"sda"))
    assert handshake.outcome is None


def test_extended_headers_are_not_spoken_of_before_tls() -> None:
    handshake = Handshake(lambda: BOTH, tls_required=True)
    [reply] = replies(heard(handshake, FIXED + option(nbd.NBD_OPT_EXTENDED_HEADERS)))
    assert reply.type == nbd.NBD_REP_ERR_TLS_REQD
    heard(handshake, option(nbd.NBD_OPT_STARTTLS))
    handshake.secured()
    heard(handshake, go("sda"))
    assert handshake.outcome == Agreed("sda", structured=False, contexts=(), extended=False)
