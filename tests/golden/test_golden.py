"""Files frozen when their format was released: read for ever, written the same for ever, see README.md."""

from __future__ import annotations

import hashlib
import re
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lmdbitmap import bits
from lmdbitmap import format as flat
from lmdbitmap.errors import FormatError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.format import BitsTally, Flags, FlatHeader
from tests.helpers import naive_flat

FLAT_V1 = Path(__file__).parent / "flat-v1"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")

DIGESTS = {
    "later-minor": "f44d9f2aea4d454e855ebc2cbfecdf06bef024902af3432a26726b60077c89f2",
    "long-metadata": "93564e59a28bfe3f2cdb0a5b66eefec800ec0057c377b5e7e82cd0a9419fabd6",
    "no-bytes": "91e77aba731a93f05740037b99cbb726494eeaf3a54602ce8cfd6ea0a8983eb6",
    "not-clean": "e9010558d4662ead310d00ed3c29666bc93560bbc37e9bb01ec8734a5d60f136",
    "recording-superset": "89b7ea78f524fa60f7a88863425fedca723af420139f10c4d5b9cbf22d1eca8b",
    "refused-incompatible-feature": "79b7816efc7386b1a850f40bf2b3cf4c75b148c78c252687bd5df936a366acab",
    "refused-next-major": "23b5a56cde0f315d45c8dd46993a805f5a440ee8c8bfa514c19d831659b1c750",
    "refused-unknown-flag": "f2a4e20ee072d621cf6c3e6a3f71b236e0b8753b1a1ddd983fe14ebceb22810e",
    "worked-example": "89d22a1b5387202fc6cb614fa34bf8252fe6a025197e2d96a6c4b9f644b114b2",
}
BITMAP = uuid.UUID("11111111-1111-4111-8111-111111111111")
DISK = uuid.UUID("22222222-2222-4222-8222-222222222222")
EPOCH = uuid.UUID("33333333-3333-4333-8333-333333333333")
SINCE = uuid.UUID("44444444-4444-4444-8444-444444444444")
UNTIL = uuid.UUID("55555555-5555-4555-8555-555555555555")


@dataclass
class Golden:
    """What a frozen file was written from."""

    size: int
    granularity_bits: int
    blocks: set[int]
    metadata: dict[str, object]
    trust: Trust = Trust.EXACT
    flags: Flags = field(default=Flags(0))
    until: uuid.UUID | None = UNTIL

    def header(self) -> FlatHeader:
        return FlatHeader(
            disk_size=self.size,
            granularity_bits=self.granularity_bits,
            bitmap_uuid=BITMAP,
            disk_uuid=DISK,
            epoch_uuid=EPOCH,
            since_uuid=SINCE,
            until_uuid=self.until,
            since_time_ns=1_700_000_000_123_456_789,
            flags=self.flags,
        )


WRITTEN_BY_US = {
    "worked-example": Golden(300 * 1024, 16, {0, 4}, {"checkpoint": "monday", "disk": "sda"}),
    "recording-superset": Golden(
        size=100 * 4096 - 1,
        granularity_bits=12,
        blocks=set(range(3, 70)) | {99},
        metadata={"disk": "sdb", "note": "after a crash — early"},
        trust=Trust.SUPERSET,
        flags=Flags.RECORDING | Flags.SUPERSET,
        until=None,
    ),
    "no-bytes": Golden(0, 9, set(), {}),
    "long-metadata": Golden(
        size=1 << 40,
        granularity_bits=31,
        blocks={511},
        metadata={"labels": ["x" * 1000] * 4, "nested": {"a": None, "b": [True, -1, 2**64 - 1]}},
    ),
}


def golden(name: str) -> bytes:
    return (FLAT_V1 / f"{name}.dbm").read_bytes()


def read(data: bytes) -> tuple[FlatHeader, flat.Metadata, set[int]]:
    header, metadata = flat.decode_header(data, file_size=len(data), place="golden")
    kept = b"".join(flat.trusted_bits(header, [data[header.header_size :]], place="golden"))
    return header, metadata, {block for start, stop in bits.runs(kept) for block in range(start, stop)}


def test_every_frozen_file_is_as_it_was() -> None:
    found = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in FLAT_V1.iterdir()}
    assert found == DIGESTS


@pytest.mark.parametrize("name", WRITTEN_BY_US)
def test_a_frozen_file_reads_as_what_it_was_written_from(name: str) -> None:
    wanted = WRITTEN_BY_US[name]
    header, metadata, blocks = read(golden(name))
    assert header.unsealed() == wanted.header()
    assert (header.trust, header.dirty_count) == (wanted.trust, len(wanted.blocks))
    assert (metadata, blocks) == (wanted.metadata, wanted.blocks)


@pytest.mark.parametrize("name", WRITTEN_BY_US)
def test_the_same_bitmap_still_gives_the_same_bytes(name: str) -> None:
    wanted = WRITTEN_BY_US[name]
    header = wanted.header()
    data = bytearray(header.bits_size)
    for block in wanted.blocks:
        bits.set_range(bits.bitmap_view(data), block, block + 1)
    tally = BitsTally(header.bit_count)
    tally.add(data)
    assert flat.encode_header(header.sealed(tally), wanted.metadata) + bytes(data) == golden(name)


def test_a_frozen_file_of_a_later_minor_version_is_read() -> None:
    header, metadata, blocks = read(golden("later-minor"))
    assert header.trust is Trust.EXACT
    assert (metadata, blocks) == ({"disk": "sda"}, {0, 4})


def test_a_frozen_file_that_was_not_closed_cleanly_is_never_trusted() -> None:
    with pytest.raises(Untrusted):
        read(golden("not-clean"))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("refused-next-major", "major_version at byte 8: expected 1, found 2"),
        ("refused-incompatible-feature", "incompatible_features at byte 16"),
        ("refused-unknown-flag", "flags at byte 32"),
    ],
)
def test_a_frozen_file_from_a_future_that_we_cannot_read_is_refused(name: str, complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint):
        read(golden(name))


def test_the_worked_example_in_the_document_is_the_frozen_file() -> None:
    assert "```\n" + hexdump(golden("worked-example")) + "```\n" in DOCUMENT


def test_the_table_in_the_document_is_the_one_that_the_code_reads_by() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)` \|", DOCUMENT, re.MULTILINE)
    assert [(name, int(offset)) for offset, _, name in rows] == list(flat.OFFSETS.items())
    assert {name: (int(offset), int(size)) for offset, size, name in rows} == naive_flat.TABLE
    assert sum(int(size) for _, size, _ in rows) == flat.FIXED_SIZE


def test_the_flags_in_the_document_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| ([A-Z]+) \|", DOCUMENT, re.MULTILINE)
    assert {name: 1 << int(bit) for bit, name in rows} == {flag.name: flag.value for flag in Flags}


def hexdump(data: bytes) -> str:
    """As `hexdump -C` prints it: repeated lines become one asterisk, the last line is the length."""
    lines: list[str] = []
    before = b""
    for start in range(0, len(data), 16):
        piece = data[start : start + 16]
        if piece != before:
            lines.append(hexdump_line(start, piece))
        elif lines[-1] != "*":
            lines.append("*")
        before = piece
    return "\n".join([*lines, f"{len(data):08x}", ""])


def hexdump_line(start: int, piece: bytes) -> str:
    halves = f"{piece[:8].hex(' '):<23}  {piece[8:].hex(' '):<23}"
    text = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in piece)
    return f"{start:08x}  {halves}  |{text}|"
