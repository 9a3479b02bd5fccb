"""The wire: haggling, requests and the control socket's lines, whole and in pieces, the same events each way."""

from __future__ import annotations

import contextlib
import struct
from typing import Any, NamedTuple, cast

from lmdbitmap.cli.answers import served_words
from lmdbitmap.errors import FormatError, InvalidArgument, LmdbitmapError
from lmdbitmap.nbd import control_wire
from lmdbitmap.nbd.control import orders
from lmdbitmap.nbd.control_answers import require_answer
from lmdbitmap.nbd.server.handshake import Agreed, Export, Handshake, Outcome
from tests.fuzz.inputs import WHOLE, Input, check_words, pieces_of

# --- haggling ---

EXPORTS = {
    "sda": Export("sda", 1 << 30, 0x0D6D, "sda, writable", ("base:allocation", "lmdbitmap:dirty:monday")),
    "ß": Export("ß", 5, 0x0003, "read-only"),
}
NAMES = (b"sda", "ß".encode(), "ß".encode("latin-1"), b"", b"nobody")
QUERIES = (b"base:allocation", b"base:", b"lmdbitmap:", b"lmdbitmap:dirty:", b"lmdbitmap:dirty:monday", b"")
ENDS = {0x80000000 + kind for kind in range(1, 11)} | {1}
IHAVEOPT, STARTTLS = 0x49484156454F5054, 5
SCRIPTED, FEW, TLS, ASKS_FOR_TLS = (1 << bit for bit in range(4))
MOST_TEXT = 4096
MOST_SAID = 1024
"""Bytes of a talk that is put together, about."""


class Talk(NamedTuple):
    """How a talk went: what was answered, how much of it before TLS, the refusal that ended it, what was agreed."""

    answers: bytes
    in_plain: int | None
    refusal: str | None
    outcome: Outcome | None
    trailing: bytes


def handshake(data: bytes) -> None:
    source = Input(data)
    mode, cut, split = source.byte(), source.byte(), source.number(2)
    exports = {"sda": EXPORTS["sda"]} if mode & FEW else EXPORTS
    stream = haggling(source) if mode & SCRIPTED else source.rest()
    parts = parts_of(stream, mode, split)
    tls = bool(mode & TLS)
    whole, other = converse(exports, parts, WHOLE, tls), converse(exports, parts, cut, tls)
    assert other[2:] == whole[2:], f"{other} cut by {cut} is not {whole}"
    # A lie ends the talk, and takes the answers of its own batch with it.
    assert other.answers == whole.answers or (whole.refusal and other.answers.startswith(whole.answers))
    said = b"".join(parts) if other.in_plain is not None else parts[0]
    check_replies(other, said.removesuffix(other.trailing), exports)
    check_agreement(other, said.removesuffix(other.trailing), exports)
    if tls:
        check_silence(other)


def parts_of(stream: bytes, mode: int, split: int) -> tuple[bytes, bytes]:
    """What is said in plain text, and what behind TLS if it comes to that."""
    if not mode & TLS:
        return stream, b""
    if mode & ASKS_FOR_TLS:
        return stream[:4] + struct.pack(">QII", IHAVEOPT, STARTTLS, 0), stream[4:]
    split %= len(stream) + 1
    return stream[:split], stream[split:]


def haggling(source: Input) -> bytes:
    """Flags, then options whose lengths and counts are right, unless a choice says otherwise."""
    said = bytearray(struct.pack(">I", source.byte() % 5))
    while source.left and len(said) < MOST_SAID:
        option, kind = source.byte() % 14, source.byte() % 8
        data = option_data(kind, source)
        length = len(data) if source.byte() % 16 else source.number(2)
        said += struct.pack(">QII", IHAVEOPT, option, length) + data
    return bytes(said)


def option_data(kind: int, source: Input) -> bytes:
    if kind == 0:
        return b""
    name = source.take(source.byte() % 8) if kind == 1 else source.pick(NAMES)
    if kind == 2:
        name *= 1 + source.number(2) % 1000
    if kind < 4:
        return name
    if kind == 4:
        infos = source.take(2 * (source.byte() % 5))
        return string(name) + struct.pack(">H", len(infos) // 2) + infos[: len(infos) // 2 * 2]
    queries = [source.pick(QUERIES) if kind == 5 else source.take(source.byte() % 9)
               for _ in range(source.byte() % 5)]  # fmt: skip
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def converse(exports: dict[str, Export], parts: tuple[bytes, bytes], choice: int, tls: bool) -> Talk:
    talk, answers, in_plain = Handshake(lambda: exports, tls_required=tls), bytearray(), None
    try:
        for piece in pieces_of(parts[0], choice):
            answers += b"".join(talk.receive(piece))
        if talk.wants_tls:
            talk.secured()
            in_plain = len(answers)
            for piece in pieces_of(parts[1], choice):
                answers += b"".join(talk.receive(piece))
    except FormatError as lie:
        assert not isinstance(talk.outcome, Agreed)
        return Talk(bytes(answers), in_plain, str(lie), None, b"")
    return Talk(bytes(answers), in_plain, None, talk.outcome, talk.trailing)


def check_agreement(talk: Talk, said: bytes, exports: dict[str, Export]) -> None:
    """Nobody gets through but to the disk it named, which is served, with contexts that it has."""
    outcome = talk.outcome
    if not isinstance(outcome, Agreed):
        return
    export = exports[outcome.export_name]
    name = name_in(said)
    assert outcome.export_name == name or (name == "" and len(exports) == 1)
    ids = [number for number, _ in outcome.contexts]
    assert len(set(ids)) == len(ids)
    assert {name for _, name in outcome.contexts} <= set(export.contexts)
    options = options_of(said)
    assert not outcome.contexts or outcome.structured or outcome.extended
    assert not outcome.structured or (8, b"") in options
    assert outcome.extended == ((11, b"") in options)
    assert not outcome.extended or options[-1][0] == 7


def check_silence(talk: Talk) -> None:
    """Where TLS is required, plain text agrees on nothing, and hears "yes, TLS", "TLS first" and "goodbye" only."""
    assert talk.in_plain is not None or not isinstance(talk.outcome, Agreed)
    told, position = talk.answers[: talk.in_plain], 0
    while position < len(told):
        _, option, kind, length = struct.unpack_from(">QIII", told, position)
        assert kind in (0x80000005, 0x80000003) or (kind == 1 and option in (2, STARTTLS))
        position += 20 + length


def name_in(said: bytes) -> str:
    """The name in the last option of a talk that ended well."""
    option, data = options_of(said)[-1]
    assert option in (1, 7)
    (length,) = struct.unpack_from(">I", data) if option == 7 else (0,)
    return (data[4 : 4 + length] if option == 7 else data).decode()


def check_replies(talk: Talk, stream: bytes, exports: dict[str, Export]) -> None:
    """Every option is answered once: pieces, then an end; the texts are texts."""
    answers, position, options, count = talk.answers, 0, options_of(stream), 0
    for option, _ in options:
        if position == len(answers):
            break
        if option == 1:
            position += 10 if stream[3] & 2 else 134
            count += 1
            continue
        kind = -1
        while kind not in ENDS:
            magic, answered, kind, length = struct.unpack_from(">QIII", answers, position)
            assert (magic, answered) == (0x3E889045565A9, option)
            payload = answers[position + 20 : position + 20 + length]
            assert len(payload) == length <= MOST_TEXT + 8
            check_payload(kind, payload, exports)
            position += 20 + length
        count += 1
    assert position == len(answers)
    if isinstance(talk.outcome, Agreed):
        assert count == len(options)


def options_of(stream: bytes) -> list[tuple[int, bytes]]:
    """The options of a stream and their data, as far as they are whole."""
    position = 4
    found: list[tuple[int, bytes]] = []
    while len(stream) - position >= 16:
        magic, option, length = struct.unpack_from(">QII", stream, position)
        position += 16 + length
        if magic != IHAVEOPT or position > len(stream):
            break
        found.append((option, stream[position - length : position]))
    return found


def check_payload(kind: int, payload: bytes, exports: dict[str, Export]) -> None:
    if kind == 2:
        (length,) = struct.unpack_from(">I", payload)
        assert payload[4 : 4 + length].decode() in exports
    elif kind == 4:
        assert any(payload[4:].decode() in export.contexts for export in exports.values())
    elif kind == 3:
        (what,) = struct.unpack_from(">H", payload)
        sizes = {export.size for export in exports.values()}
        assert what != 0 or struct.unpack_from(">Q", payload, 2)[0] in sizes
    elif kind != 1:
        payload.decode()


# --- the control socket ---

FIELDS: tuple[tuple[str, type], ...] = (
    ("operation", str), ("arguments", dict), ("error", dict), ("answer", dict), ("protocol", int), ("disks", list),
)  # fmt: skip


def control_lines(data: bytes) -> None:
    source = Input(data)
    choice, nesting = source.byte(), source.byte()
    stream = source.rest()
    if nesting == 255:
        depth = 8 * choice
        stream = b'{"operation":' + b"[" * depth + b"]" * depth + b"}\n" + stream
    whole, other = lines_of(stream, WHOLE), lines_of(stream, choice)
    assert whole == other
    assert b"\n".join(whole) == stream[: max(stream.rfind(b"\n"), 0)]
    for line in whole:
        check_line(line)


def lines_of(stream: bytes, choice: int) -> list[bytes]:
    lines, found = control_wire.LineBuffer("here"), []
    for piece in pieces_of(stream, choice):
        lines.add(piece)
        while (line := lines.take()) is not None:
            found.append(line)
    return found


def check_line(line: bytes) -> None:
    try:
        message = control_wire.decode(line, "here")
    except FormatError as refusal:
        check_words(refusal)
        return
    with contextlib.suppress(InvalidArgument):
        again = control_wire.encode(message)
        assert control_wire.encode(control_wire.decode(again[:-1], "here")) == again
    for name, kind in FIELDS:
        with contextlib.suppress(FormatError):
            assert type(control_wire.field(message, name, kind, "here")) is kind
    check_error(message)
    check_answer(message)
    answer_of(message)


def check_answer(message: dict[str, object]) -> None:
    """What passes for an answer can be shown."""
    with contextlib.suppress(FormatError):
        require_answer("release", {}, message, "here")
        assert message["broken"] is None or type(message["broken"]) is str
    with contextlib.suppress(FormatError):
        require_answer("info", {}, message, "here")
        for disk in cast(list[dict[str, Any]], message["disks"]):
            if "served" in disk:
                process = {"pid": 1, "version": "", "image_lost": None}
                assert list(served_words({**process, **disk, **disk["served"]}))


def check_error(message: dict[str, object]) -> None:
    """An error that arrives can be sent on, and arrives there the same."""
    with contextlib.suppress(FormatError):
        error = control_wire.error_from(message, "here")
        fields = control_wire.error_fields(error)
        again = control_wire.error_from(fields, "there")
        assert (type(again), str(again)) == (type(error), str(error))
        assert control_wire.error_fields(again) == fields


def answer_of(message: dict[str, object]) -> None:
    """An owner without disks does nothing, and says so in words that can be sent."""
    try:
        control_wire.encode({"answer": orders.answer(orders.Scene({}), message)})
    except LmdbitmapError as error:
        with contextlib.suppress(InvalidArgument):
            control_wire.encode({"error": control_wire.error_fields(error)})
