"""What we hear and read when an image is another server's export: its haggling, and the URI that leads there."""

from __future__ import annotations

import struct

from lmdbitmap.errors import Busy, FormatError, InvalidArgument, NotFound
from lmdbitmap.nbd import uri
from lmdbitmap.nbd.client.handshake import MAX_PAYLOAD, FarExport, negotiation
from tests.fuzz.inputs import MOST_WORDS, Input, check_words

SCRIPTED = 1
OPTIONS = (11, 8, 10, 7)
"""In the order in which our client asks; the second is left out behind a yes to the first."""
KINDS = (1, 3, 4, 2, 0x80000001, 0x80000005, 0x80000006, 0x80000007, 0x80000009)
MOST_WANTED = 64 << 10


def far_server(data: bytes) -> None:
    source = Input(data)
    said = haggling(source) if source.byte() & SCRIPTED else source.rest()
    try:
        export = converse(Input(said))
    except (FormatError, NotFound, InvalidArgument, Busy) as refusal:
        check_words(refusal, most=6000)
        return
    if export is not None:
        check_export(export)


def haggling(source: Input) -> bytes:
    """A greeting, and replies to the options that our client asks, with right magics and lengths."""
    said = bytearray(struct.pack(">QQH", 0x4E42444D41474943, 0x49484156454F5054, source.byte() % 4))
    is_extended = False
    for option in OPTIONS:
        if option == 8 and is_extended:
            continue
        kind = 0
        while source.left and kind != 1 and not kind >> 31:
            kind = source.pick(KINDS)
            payload = payload_of(source)
            said += struct.pack(">QIII", 0x3E889045565A9, option, kind, len(payload)) + payload
        is_extended = is_extended or (option, kind) == (11, 1)
    return bytes(said + source.rest())


def payload_of(source: Input) -> bytes:
    kind = source.byte() % 6
    if kind == 0:
        return struct.pack(">HQH", 0, source.number(8), source.number(2))
    if kind == 1:
        return struct.pack(">HQH", 0, source.number(2) << source.byte() % 16, source.number(2))
    if kind == 2:
        return struct.pack(">HIII", 3, 1 << source.byte() % 20, source.number(4), source.number(4))
    if kind == 3:
        return source.take(4).ljust(4, b"\0") + b"base:allocation"
    return source.take(source.byte() % 20) if kind == 4 else b""


def converse(said: Input) -> FarExport | None:
    """What the client believes in the end; None where the server hangs up before."""
    talk = negotiation("sda")
    step = next(talk)
    while True:
        heard = b""
        if isinstance(step, int):
            assert 0 < step <= MOST_WANTED, f"{step} bytes are awaited"
            heard = said.take(step)
            if len(heard) < step:
                talk.close()
                return None
        try:
            step = talk.send(heard)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def check_export(export: FarExport) -> None:
    """Sizes that can be reckoned with: whole blocks, and room for at least one in a request."""
    assert 0 <= export.size < 2**63
    assert export.minimum in [1 << bits for bits in range(17)]
    assert export.size % export.minimum == 0
    assert export.minimum <= export.maximum <= MAX_PAYLOAD
    assert export.maximum % export.minimum == 0
    assert export.context_id is None or export.structured
    assert export.structured or not export.extended


def uris(data: bytes) -> None:
    """A place that was read is found again where it says it is; what is no host at all is found out on connecting."""
    text = data.decode(errors="surrogateescape")
    uri.is_uri(text)
    try:
        place = uri.parse(text)
    except InvalidArgument as refusal:
        check_words(refusal, most=MOST_WORDS + 10 * len(text))
        return
    assert bool(place.socket_path) != bool(place.host)
    assert "\0" not in place.socket_path + place.export
    assert uri.parse(place.uri) == place
    assert uri.parse(place.uri).uri == place.uri
