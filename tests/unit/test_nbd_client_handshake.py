from __future__ import annotations

import struct
from collections.abc import Iterable
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.errors import Busy, FormatError, InvalidArgument, LmdbitmapError, NotFound
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.handshake import FarExport, negotiation
from tests.helpers.nbd_far import ACK, INFO, META_CONTEXT, STARTTLS, TLS_REQD, UNSUP, option_reply
from tests.helpers.nbd_raw import EXTENDED_HEADERS, GO, SET_META_CONTEXT, STRUCTURED_REPLY, option, string

GREETING = b"NBDMAGICIHAVEOPT\0\3"
COMPACT = option_reply(EXTENDED_HEADERS, UNSUP)
"""What servers say that do not know extended headers."""
SIZE = 1 << 20
EXPORT = option_reply(GO, INFO, struct.pack(">HQH", 0, SIZE, 5))
CONTEXT = option_reply(SET_META_CONTEXT, META_CONTEXT, b"\0\0\0\7base:allocation")


def ack(number: int) -> bytes:
    return option_reply(number, ACK)


def block_sizes(*sizes: int) -> bytes:
    return option_reply(GO, INFO, struct.pack(">HIII", 3, *sizes))


def negotiated(heard: bytes) -> tuple[FarExport, bytes]:
    """What comes of the handshake with a server that says `heard`, and what the client said."""
    export, said, rest = played(heard)
    assert rest == b""
    return export, said


def played(heard: bytes, *, tls: bool = False) -> tuple[FarExport, bytes, bytes]:
    """The same, and what is left of `heard`. Where TLS begins, `|` is said."""
    said, steps = b"", negotiation("disk", tls=tls)
    step = next(steps)
    try:
        while True:
            if isinstance(step, bytes):
                said += step
                step = steps.send(b"")
            elif not isinstance(step, int):
                said += b"|"
                step = steps.send(b"")
            else:
                assert 0 < step <= 64 << 10
                if step > len(heard):
                    raise EOFError(f"waits for {step - len(heard)} more bytes")
                taken, heard = heard[:step], heard[step:]
                step = steps.send(taken)
    except StopIteration as agreed:
        export: FarExport = agreed.value
        return export, said, heard


def agreed(*infos: bytes, greeting: bytes = GREETING) -> bytes:
    """A server without structured replies that lets us in."""
    return greeting + COMPACT + option_reply(STRUCTURED_REPLY, UNSUP) + b"".join(infos) + ack(GO)


def refused(outcome: int, message: bytes = b"") -> bytes:
    return GREETING + COMPACT + option_reply(STRUCTURED_REPLY, UNSUP) + option_reply(GO, outcome, message)


def test_all_that_is_asked_for_is_agreed_on() -> None:
    heard = GREETING + COMPACT + ack(STRUCTURED_REPLY) + CONTEXT + ack(SET_META_CONTEXT)
    export, said = negotiated(heard + block_sizes(512, 4096, 1 << 20) + EXPORT + ack(GO))
    assert export == FarExport(SIZE, 5, 512, 1 << 20, structured=True, context_id=7)
    context = string("disk") + b"\0\0\0\1" + string("base:allocation")
    go = string("disk") + b"\0\2\0\3\0\2"
    asked = (
        option(EXTENDED_HEADERS)
        + option(STRUCTURED_REPLY)
        + option(SET_META_CONTEXT, context)
        + option(GO, go)
    )
    assert said == b"\0\0\0\3" + asked


def test_a_disk_is_known_by_what_our_server_says_of_it() -> None:
    uuid, another = UUID(int=1), UUID(int=2)
    said = nbd.info_text(nbd.NBD_INFO_DESCRIPTION, "sda, writable" + nbd.of_disk(uuid))
    export, _ = negotiated(agreed(EXPORT, option_reply(GO, nbd.NBD_REP_INFO, said)))
    assert export.is_of(uuid)
    assert not export.is_of(another)
    assert not FarExport(SIZE, 5).is_of(uuid)


def test_a_description_may_be_anything() -> None:
    wild = nbd.NBD_INFO_DESCRIPTION.to_bytes(2, "big") + b"\xff" * 60_000
    export, _ = negotiated(agreed(EXPORT, option_reply(GO, nbd.NBD_REP_INFO, wild)))
    assert len(export.description) == nbd.NBD_MAX_STRING


def test_server_without_extras_is_used_with_the_defaults() -> None:
    assert negotiated(agreed(EXPORT))[0] == FarExport(SIZE, 5, 1, 32 << 20)


@pytest.mark.parametrize(
    "context_replies",
    [
        option_reply(SET_META_CONTEXT, UNSUP),
        ack(SET_META_CONTEXT),
        option_reply(SET_META_CONTEXT, META_CONTEXT, b"\0\0\0\1x-odd:thing") + ack(SET_META_CONTEXT),
        CONTEXT + CONTEXT + ack(SET_META_CONTEXT),
        CONTEXT + option_reply(SET_META_CONTEXT, UNSUP),
    ],
)
def test_server_that_does_not_select_the_context_is_not_asked_for_it(context_replies: bytes) -> None:
    heard = GREETING + COMPACT + ack(STRUCTURED_REPLY) + context_replies + EXPORT + ack(GO)
    assert negotiated(heard)[0] == FarExport(SIZE, 5, structured=True, context_id=None)


def test_behind_extended_headers_structured_replies_are_not_asked_for() -> None:
    heard = GREETING + ack(EXTENDED_HEADERS) + CONTEXT + ack(SET_META_CONTEXT) + EXPORT + ack(GO)
    export, said = negotiated(heard)
    assert export == FarExport(SIZE, 5, structured=True, context_id=7, extended=True)
    assert option(STRUCTURED_REPLY) not in said


def test_a_server_of_extended_headers_has_no_excuse_not_to_know_go() -> None:
    said = option_reply(SET_META_CONTEXT, UNSUP) + option_reply(GO, UNSUP)
    with pytest.raises(InvalidArgument, match="refuses export 'disk' with error 1"):
        negotiated(GREETING + ack(EXTENDED_HEADERS) + said)


@pytest.mark.parametrize(("flags", "padding"), [(1, bytes(124)), (3, b"")])
def test_server_without_go_is_asked_by_export_name(flags: int, padding: bytes) -> None:
    heard = b"NBDMAGICIHAVEOPT" + struct.pack(">H", flags)
    heard += COMPACT + option_reply(STRUCTURED_REPLY, UNSUP) + option_reply(GO, UNSUP)
    export, said = negotiated(heard + struct.pack(">QH", SIZE, 5) + padding)
    assert export == FarExport(SIZE, 5)
    assert said.startswith(struct.pack(">I", flags))
    assert said.endswith(option(1, b"disk"))


def test_server_of_the_first_newstyle_is_asked_by_export_name_at_once() -> None:
    export, said = negotiated(b"NBDMAGICIHAVEOPT\0\0" + struct.pack(">QH", SIZE, 5) + bytes(124))
    assert (export, said) == (FarExport(SIZE, 5), bytes(4) + option(1, b"disk"))


@pytest.mark.parametrize(
    ("sizes", "used"),
    [
        ((1, 512, 0xFFFFFFFF), (1, 32 << 20)),
        ((4096, 4096, 4096), (4096, 4096)),
        ((512, 4096, 1_000_000), (512, 999_936)),
        ((65536, 65536, 1 << 26), (65536, 32 << 20)),
    ],
)
def test_block_sizes_are_kept_to(sizes: tuple[int, int, int], used: tuple[int, int]) -> None:
    export, _ = negotiated(agreed(EXPORT, block_sizes(*sizes)))
    assert (export.minimum, export.maximum) == used


@pytest.mark.parametrize(
    "sizes", [(0, 512, 4096), (3, 512, 4096), (1 << 17, 1 << 17, 1 << 20), (512, 512, 511)]
)
def test_block_sizes_that_cannot_be_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(FormatError, match="block sizes"):
        negotiated(agreed(EXPORT, block_sizes(*sizes)))


def test_export_whose_end_cannot_be_reached_is_refused() -> None:
    odd = option_reply(GO, INFO, struct.pack(">HQH", 0, 1000, 5))
    with pytest.raises(InvalidArgument, match="last bytes cannot be reached"):
        negotiated(agreed(odd, block_sizes(512, 512, 512)))


@pytest.mark.parametrize(
    ("outcome", "kind", "said"),
    [
        (2, InvalidArgument, r"error 2 \(not you\)"),
        (3, InvalidArgument, "error 3"),
        (5, InvalidArgument, "TLS"),
        (6, NotFound, "no export called 'disk'"),
        (7, Busy, "shutting down"),
        (1 << 30, InvalidArgument, "error"),
    ],
)
def test_refusal_says_why_and_says_goodbye(outcome: int, kind: type[LmdbitmapError], said: str) -> None:
    with pytest.raises(kind, match=said) as error:
        negotiated(refused((1 << 31) + outcome, b"not you"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("heard", "said"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "greeting"),
        (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0", "oldstyle"),
        (GREETING + bytes(20), "option reply"),
        (GREETING + ack(GO), "option reply"),
        (GREETING + COMPACT + option_reply(STRUCTURED_REPLY, 2) * 256, "option replies"),
        (GREETING + struct.pack(">QIII", 0x3E889045565A9, STRUCTURED_REPLY, ACK, 1 << 17), "option reply"),
        (agreed(), "size"),
        (agreed(EXPORT, option_reply(GO, 2, b"")), "reply to GO"),
        (agreed(EXPORT, option_reply(GO, INFO, b"\0")), "reply to GO"),
        (agreed(option_reply(GO, INFO, bytes(11))), "information"),
        (agreed(EXPORT, option_reply(GO, INFO, b"\0\3" + bytes(13))), "information"),
        (agreed(option_reply(GO, INFO, struct.pack(">HQH", 0, 1 << 63, 5))), "export size"),
    ],
)
def test_what_is_no_nbd_is_refused(heard: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        negotiated(heard)


def test_information_that_nobody_asked_for_is_passed_over() -> None:
    name, odd = option_reply(GO, INFO, b"\0\1disk"), option_reply(GO, INFO, b"\xff\xff" + bytes(99))
    assert negotiated(agreed(name, odd, EXPORT))[0].size == SIZE


def test_every_cut_is_waited_out_and_not_guessed() -> None:
    heard = GREETING + COMPACT + ack(STRUCTURED_REPLY) + CONTEXT + ack(SET_META_CONTEXT) + EXPORT + ack(GO)
    for length in range(len(heard)):
        with pytest.raises(EOFError):
            negotiated(heard[:length])
    assert negotiated(heard)[0].size == SIZE


def server_words() -> st.SearchStrategy[Iterable[bytes]]:
    kinds = st.sampled_from([ACK, 2, INFO, META_CONTEXT, UNSUP, (1 << 31) + 6, 99])
    options = st.sampled_from([EXTENDED_HEADERS, STRUCTURED_REPLY, SET_META_CONTEXT, GO, 1])
    replies = st.builds(option_reply, options, kinds, st.binary(max_size=20))
    return st.lists(st.one_of(replies, st.just(EXPORT), st.just(CONTEXT), st.binary(max_size=30)), max_size=8)


@given(words=server_words())
def test_any_server_is_understood_or_refused(words: Iterable[bytes]) -> None:
    try:
        export, _, _ = played(GREETING + b"".join(words))
    except (LmdbitmapError, EOFError):
        return
    assert export.size % export.minimum == 0


# --- TLS ---


def test_nothing_is_said_before_tls_but_that_it_is_wanted() -> None:
    heard = agreed(EXPORT, greeting=GREETING + ack(STARTTLS))
    export, said, rest = played(heard, tls=True)
    assert (export, rest) == (FarExport(SIZE, 5, 1, 32 << 20), b"")
    assert said.startswith(b"\0\0\0\3" + option(STARTTLS) + b"|" + option(EXTENDED_HEADERS))
    assert b"disk" not in said[: said.index(b"|")]


@pytest.mark.parametrize("kind", [UNSUP, UNSUP + 1, TLS_REQD])
def test_server_that_does_not_begin_tls_is_told_nothing_more(kind: int) -> None:
    with pytest.raises(InvalidArgument, match=r"does not speak TLS.*nbds"):
        played(GREETING + option_reply(STARTTLS, kind) + agreed(EXPORT, greeting=b""), tls=True)


def test_server_that_is_too_old_for_tls_is_told_nothing_more() -> None:
    with pytest.raises(InvalidArgument, match="does not speak TLS"):
        played(b"NBDMAGICIHAVEOPT\0\0" + struct.pack(">QH", SIZE, 5) + bytes(124), tls=True)


@pytest.mark.parametrize(
    "reply", [option_reply(STARTTLS, ACK, b"x"), option_reply(STARTTLS, INFO, b"\0\0") + ack(STARTTLS)]
)
def test_acknowledgement_of_tls_is_one_and_empty(reply: bytes) -> None:
    with pytest.raises(FormatError, match="STARTTLS"):
        played(agreed(EXPORT, greeting=GREETING + reply), tls=True)


def test_server_that_insists_on_tls_is_said_how_to_be_reached() -> None:
    heard = GREETING + COMPACT + option_reply(STRUCTURED_REPLY, TLS_REQD) + option_reply(GO, TLS_REQD)
    with pytest.raises(InvalidArgument, match="demands TLS; write nbds: in place of nbd:"):
        played(heard)
