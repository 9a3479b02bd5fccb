"""The wire: haggling, requests and the control socket's lines, whole and in pieces, the same events each way."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

from lmdbitmap.errors import FormatError, InvalidArgument, LmdbitmapError
from lmdbitmap.nbd import control, control_wire
from lmdbitmap.nbd.handshake import Agreed, Export, Handshake, Outcome
from tests.fuzz.inputs import WHOLE, Input, check_words, pieces_of

# --- haggling ---

EXPORTS = {
    "sda": Export("sda", 1 << 30, 0x0D6D, "sda, writable", ("base:allocation", "lmdbitmap:dirty:monday")),
    "ß": Export("ß", 5, 0x0003, "read-only"),
}
NAMES = (b"sda", "ß".encode(), "ß".encode("latin-1"), b"", b"nobody")
QUERIES = (b"base:allocation", b"base:", b"lmdbitmap:", b"lmdbitmap:dirty:", b"lmdbitmap:dirty:monday", b"")
ENDS = {0x80000000 + kind for kind in range(1, 10)} | {1}
MOST_TEXT = 4096
MOST_SAID = 1024
"""Bytes of a talk that is put together, about."""


def handshake(data: bytes) -> None:
    source = Input(data)
    mode, cut = source.byte(), source.byte()
    exports = {"sda": EXPORTS["sda"]} if mode & 2 else EXPORTS
    stream = haggling(source) if mode & 1 else source.rest()
    whole = converse(exports, stream, WHOLE)
    other = converse(exports, stream, cut)
    assert other[1:] == whole[1:], f"{other} cut by {cut} is not {whole}"
    # A lie ends the talk, and takes the answers of its own batch with it.
    assert other[0] == whole[0] or (whole[1] is not None and other[0].startswith(whole[0]))
    check_replies(other[0], stream[: len(stream) - len(other[2][1])], exports, other[2][0])
    check_agreement(whole[2], stream, exports)


def haggling(source: Input) -> bytes:
    """Flags, then options whose lengths and counts are right, unless a choice says otherwise."""
    said = bytearray(struct.pack(">I", source.byte() % 5))
    while source.left and len(said) < MOST_SAID:
        option, kind = source.byte() % 14, source.byte() % 8
        data = option_data(kind, source)
        length = len(data) if source.byte() % 16 else source.number(2)
        said += struct.pack(">QII", 0x49484156454F5054, option, length) + data
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


def converse(exports: dict[str, Export], stream: bytes, choice: int) -> tuple[bytes, str | None, Any]:
    """(answers, the refusal that ended it, (outcome, what came behind))."""
    talk, answers = Handshake(exports), bytearray()
    try:
        for piece in pieces_of(stream, choice):
            answers += talk.receive(piece)
    except FormatError as lie:
        assert talk.outcome is None
        return bytes(answers), str(lie), (None, b"")
    return bytes(answers), None, (talk.outcome, talk.trailing)


def check_agreement(ended: tuple[Outcome | None, bytes], stream: bytes, exports: dict[str, Export]) -> None:
    """Nobody gets through but to a disk that is served, with contexts that it has."""
    outcome, trailing = ended
    assert stream.endswith(trailing)
    if not isinstance(outcome, Agreed):
        return
    export = exports[outcome.export_name]
    name = name_in(stream[: len(stream) - len(trailing)])
    assert outcome.export_name == name or (name == "" and len(exports) == 1)
    ids = [number for number, _ in outcome.contexts]
    assert len(set(ids)) == len(ids)
    assert {name for _, name in outcome.contexts} <= set(export.contexts)
    assert not outcome.contexts or outcome.structured
    assert not outcome.structured or struct.pack(">QII", 0x49484156454F5054, 8, 0) in stream


def name_in(said: bytes) -> str:
    """The name in the last option of a talk that ended well."""
    option, data = options_of(said)[-1]
    assert option in (1, 7)
    (length,) = struct.unpack_from(">I", data) if option == 7 else (0,)
    return (data[4 : 4 + length] if option == 7 else data).decode()


def check_replies(answers: bytes, stream: bytes, exports: dict[str, Export], outcome: Outcome | None) -> None:
    """Every option is answered once: pieces, then an end; the texts are texts."""
    position, options, count = 0, options_of(stream), 0
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
    if isinstance(outcome, Agreed):
        assert count == len(options)


def options_of(stream: bytes) -> list[tuple[int, bytes]]:
    """The options of a stream and their data, as far as they are whole."""
    position = 4
    found: list[tuple[int, bytes]] = []
    while len(stream) - position >= 16:
        magic, option, length = struct.unpack_from(">QII", stream, position)
        position += 16 + length
        if magic != 0x49484156454F5054 or position > len(stream):
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
    answer_of(message)


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
        control_wire.encode({"answer": control.answer({}, message)})
    except LmdbitmapError as error:
        with contextlib.suppress(InvalidArgument):
            control_wire.encode({"error": control_wire.error_fields(error)})
