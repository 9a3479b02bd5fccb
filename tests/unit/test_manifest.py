"""The manifest's bytes, its refusals by name and place, and the chain a restore needs."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.errors import FormatError, InvalidArgument, NotFound
from lmdbitmap.extents import Trust
from lmdbitmap.notes.references import CheckpointRef, Reason
from lmdbitmap.qcow2 import CompressionType
from lmdbitmap.repository.manifest import (
    MAX_MANIFEST_BYTES,
    BackupEntry,
    BackupType,
    ChunkDigests,
    DiskRef,
    Manifest,
    chain_to,
    decode,
    encode,
    id_at,
)

DISK = DiskRef("sda", UUID(int=1))
TOLD = Reason("first", "there is no earlier backup")


def entry(number: int, parent: int | None = None, **changes: Any) -> BackupEntry:
    """Backup `number`, full unless it has a parent."""
    kind = BackupType.FULL if parent is None else BackupType.INCREMENTAL
    made = BackupEntry(
        id=f"b{number}",
        sequence=number,
        file=f"{number:04}.qcow2",
        parent=None if parent is None else f"b{parent}",
        type_requested=kind,
        type_actual=kind,
        reason=None,
        time_ns=1_700_000_000_000_000_000 + number,
        checkpoint=CheckpointRef(UUID(int=100 + number), f"c{number}"),
        epoch=UUID(int=2),
        disk_size=1_000_001,
        granularity=65536,
        cluster_size=65536,
        trust=Trust.EXACT,
        bytes_changed=131072,
        bytes_zero=65536,
        bytes_stored=458752,
        sha256="0123456789abcdef" * 4,
    )
    return dataclasses.replace(made, **changes)


CHAIN = Manifest(DISK, (entry(0), entry(1, 0), entry(2, 1), entry(3), entry(4, 1), entry(5, 3)))


def tree() -> Any:
    """The manifest of two backups as parsed JSON, to be bent."""
    return json.loads(encode(Manifest(DISK, (entry(0), entry(1, 0)))))


def decoded(value: object) -> Manifest:
    return decode(json.dumps(value).encode())


# --- writing ---


def test_what_was_encoded_decodes_to_the_same() -> None:
    assert decode(encode(CHAIN)) == CHAIN
    assert decode(encode(Manifest(DISK))) == Manifest(DISK)


def test_the_file_is_sorted_indented_and_ends_with_a_newline() -> None:
    text = encode(Manifest(DISK)).decode()
    assert text == (
        '{\n  "backups": [],\n  "disk": {\n    "name": "sda",\n'
        '    "uuid": "00000000-0000-0000-0000-000000000001"\n  },\n  "format_version": 1\n}\n'
    )
    assert encode(CHAIN) == encode(decode(encode(CHAIN)))


def test_compression_is_a_key_of_compressed_backups_only() -> None:
    manifest = Manifest(DISK, (entry(0), entry(1, 0, compression=CompressionType.ZSTD)))
    plain, packed = json.loads(encode(manifest))["backups"]
    assert ("compression" in plain, packed["compression"]) == (False, "zstd")
    assert decode(encode(manifest)) == manifest


def test_names_stand_as_people_write_them() -> None:
    reason = Reason("first", "früher gab es keine Sicherung")
    manifest = Manifest(DISK, (entry(0, reason=reason),))
    assert "früher" in encode(manifest).decode()
    assert decode(encode(manifest)) == manifest


@pytest.mark.parametrize(
    "bad",
    [
        {"file": "../x"},
        {"sequence": -1},
        {"granularity": 1000},
        {"sha256": "?"},
        {"trust": Trust.UNTRUSTED},
        {"parent": "b7"},
        {"disk_size": 2**63},
    ],
)
def test_an_entry_that_could_not_be_read_back_is_not_written(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"manifest backups\[0\]"):
        encode(Manifest(DISK, (entry(0, **bad),)))


def test_a_name_that_is_no_utf_8_is_not_written() -> None:
    with pytest.raises(InvalidArgument, match="manifest: expected UTF-8"):
        encode(Manifest(DiskRef("lone \udc80", UUID(int=1))))


# --- fields ---

BIG = 2**63


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("id", [None, "", 1, "a\nb", "x" * 1024, "\udc80", ["b0"]]),
        ("sequence", [None, -1, 0.0, "0", True, BIG]),
        ("file", ["", ".", "..", "a/b", "/etc/passwd", "../a", "a\0b", "x" * 256, "nbd:a", 5, None]),
        ("parent", ["b0", "b9", "", 0, False]),
        ("type_requested", ["Full", "", 1, None, [], {}]),
        ("type_actual", ["none", True]),
        ("reason", [{}, "late", {"code": "a"}, {"code": "a", "words": ""}, []]),
        ("time_ns", [1.5, -1, "now", BIG]),
        ("checkpoint", [None, [], {}, {"uuid": "x", "name": "c"}, {"uuid": str(UUID(int=1)), "name": ""}]),
        ("epoch", ["", 7, str(UUID(int=10)).upper().replace("0", "A"), UUID(int=1).hex, "urn:x"]),
        ("disk_size", [-1, BIG, True, 1e3]),
        ("granularity", [0, 1, 256, 513, 65537, 2**32, True, "65536"]),
        ("cluster_size", [0, 256, 65535, 4 << 20, None]),
        ("trust", ["untrusted", "EXACT", None, 1]),
        ("bytes_changed", [-1, None, BIG]),
        ("bytes_zero", [-1, "0", False]),
        ("bytes_stored", [-1, 0.5]),
        ("compression", ["", "lz4", "ZSTD", None, 1, ["zstd"]]),
        ("sha256", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, 0, None]),
    ],
)
def test_a_field_that_lies_is_refused_by_its_place(field: str, values: list[object]) -> None:
    assert values
    for value in values:
        bent = tree()
        bent["backups"][0][field] = value
        with pytest.raises(FormatError) as refused:
            decoded(bent)
        assert refused.value.place.startswith(f"manifest backups[0].{field}"), value


def test_every_field_must_be_there() -> None:
    fields = tree()["backups"][1]
    assert {*fields, "compression", "chunks"} == {field.name for field in dataclasses.fields(BackupEntry)}
    for field in fields:
        bent = tree()
        del bent["backups"][1][field]
        with pytest.raises(FormatError) as refused:
            decoded(bent)
        assert refused.value.place == f"manifest backups[1].{field}"
        assert refused.value.found == "none"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("format_version", None),
        ("format_version", 0),
        ("format_version", True),
        ("format_version", 1.0),
        ("disk", "sda"),
        ("disk.name", {"uuid": str(UUID(int=1))}),
        ("disk.uuid", {"name": "sda", "uuid": "1"}),
        ("backups", {}),
        ("backups[0]", [7]),
    ],
)
def test_the_frame_must_be_right_too(place: str, value: object) -> None:
    bent = tree()
    bent[place.partition(".")[0].partition("[")[0]] = value
    with pytest.raises(FormatError) as refused:
        decoded(bent)
    assert refused.value.place == f"manifest {place}"


def test_a_newer_version_is_refused_whatever_else_it_has() -> None:
    with pytest.raises(FormatError, match="expected 1 to 3, found 4; use a newer lmdbitmap"):
        decode(b'{"format_version": 4, "disks": []}')


def test_keys_that_version_1_does_not_know_are_ignored() -> None:
    known = decoded(tree())
    bent = tree()
    bent["tool"], bent["disk"]["serial"], bent["backups"][0]["ratio"] = {"name": "x"}, 5, 0.5
    assert decoded(bent) == known


def test_another_type_than_requested_needs_its_reason() -> None:
    other = entry(0, type_requested=BackupType.INCREMENTAL)
    with pytest.raises(InvalidArgument, match=r"backups\[0\]\.reason"):
        encode(Manifest(DISK, (other,)))
    told = Manifest(DISK, (dataclasses.replace(other, reason=TOLD),))
    assert decode(encode(told)) == told


# --- bytes that are no manifest ---


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "an object"),
        (b"null", "an object"),
        (b"{}", "format_version"),
        (b"\xff{}", "UTF-8, found another byte at offset 0"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b'\xef\xbb\xbf{"format_version": 1}', "JSON"),
        (b'{"format_version": NaN}', "finite numbers, found NaN"),
        (b'{"format_version": -Infinity}', "finite numbers"),
        (b'{"format_version": 1e400}', "an integer"),
        (b'{"format_version": 1, "format_version": 1}', "once, found 'format_version' 2 times"),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "at most 20 digits, found one of 5000"),
        (b'{"x": ' + b"9" * 1_000_000 + b"}", "at most 20 digits"),
        (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested"),
        (b'{"x":' * 200_000, "nested"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_manifest_are_refused(data: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said) as refused:
        decode(data)
    assert len(str(refused.value)) < 400


def test_a_manifest_over_the_limit_is_refused_before_it_is_parsed() -> None:
    data = encode(CHAIN)
    assert decode(data, max_bytes=len(data)) == CHAIN
    with pytest.raises(FormatError, match=f"at most {len(data) - 1} bytes"):
        decode(data, max_bytes=len(data) - 1)
    with pytest.raises(FormatError, match="at most"):
        decode(bytes(MAX_MANIFEST_BYTES + 1))


def test_a_complaint_shows_little_of_a_huge_value() -> None:
    bent = tree()
    bent["backups"][0]["sha256"] = "\x1b" * 100_000
    with pytest.raises(FormatError) as refused:
        decoded(bent)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 300


# --- chains ---


@pytest.mark.parametrize(
    ("place", "backups"),
    [
        ("backups[1].id", (entry(0), entry(1, 0, id="b0"))),
        ("backups[1].file", (entry(0), entry(1, 0, file="0000.qcow2"))),
        ("backups[1].sequence", (entry(0), entry(1, 0, sequence=0))),
        ("backups[0].parent", (entry(0, 0),)),
        ("backups[0].parent", (entry(0, 1), entry(1, 0))),
        ("backups[1].parent", (entry(0), entry(1, 7))),
        ("backups[1].parent", (entry(0), entry(1, type_actual=BackupType.INCREMENTAL, reason=TOLD))),
        ("backups[1].parent", (entry(0), entry(1, 0, type_actual=BackupType.FULL, reason=TOLD))),
    ],
)
def test_a_chain_that_would_not_hold_is_refused(place: str, backups: tuple[BackupEntry, ...]) -> None:
    with pytest.raises(InvalidArgument, match=rf"manifest {place}".replace("[", r"\[")):
        encode(Manifest(DISK, backups))


@pytest.mark.parametrize(
    ("wanted", "chain"),
    [
        ("b0", ["b0"]),
        ("b2", ["b0", "b1", "b2"]),
        ("b4", ["b0", "b1", "b4"]),
        ("b3", ["b3"]),
        ("b5", ["b3", "b5"]),
    ],
)
def test_the_chain_to_a_backup_begins_with_its_full_one(wanted: str, chain: list[str]) -> None:
    assert [found.id for found in chain_to(CHAIN, wanted)] == chain


def test_the_chain_to_an_unknown_backup_is_not_found() -> None:
    with pytest.raises(NotFound, match="disk sda has no backup b9"):
        chain_to(CHAIN, "b9")


def numbered(*numbers: int) -> Manifest:
    return Manifest(DISK, tuple(entry(number, id=str(number)) for number in numbers))


@pytest.mark.parametrize(
    ("manifest", "named"),
    [
        (Manifest(DISK), "one of none"),
        (numbered(7), "the only one, 7"),
        (numbered(7, 8), "one of 7, 8"),
        (numbered(1, 2, 3), "one of 1 to 3"),
        (numbered(*range(7, 2000)), "one of 7 to 1999"),
        (numbered(1, 2, 4), "one of 1, 2, 4"),
        (numbered(1, 3, *range(5, 2000)), "one of 1, 3, 5, 6, 7, 8, 9, 10, 11, 12, …, 1999"),
        (Manifest(DISK, (entry(0, id="x" * 99),)), f"the only one, {'x' * 40}"),
    ],
)
def test_whoever_names_an_unknown_backup_is_told_of_those_there_are(manifest: Manifest, named: str) -> None:
    with pytest.raises(NotFound) as refused:
        chain_to(manifest, "0")
    assert refused.value.next_step == f"name {named}; `lmdbitmap ls REPO` tells of each"


TIMES = [("b0", 100), ("b1", 200), ("2023-11-15", 150), ("b3", 300)]
"""Of backups, in seconds; the clock was put back once."""
BEGAN = 1_700_000_000
"""At 22:13:20 on 2023-11-14, UTC."""


@pytest.mark.parametrize(
    ("at", "found"),
    [
        (None, "b3"),
        ("b1", "b1"),
        ("9", "9"),
        ("2023-11-15", "2023-11-15"),
        ("2023-11-16", "b3"),
        ("2023-11-14 22:15:00", "b0"),
        ("2023-11-14T22:16:39Z", "2023-11-15"),
        ("2023-11-14 22:16:40", "2023-11-15"),
        ("2023-11-14 22:18:20", "b3"),
        ("2023-11-14 22:18:20.0", "b3"),
        ("2023-11-14 22:18:19", "2023-11-15"),
    ],
)
def test_a_time_is_that_of_the_newest_backup_not_later(at: str | None, found: str) -> None:
    """The newest is the one that was made last, whatever the clock said; and what is an id is no time."""
    backups = [entry(index, id=name, time_ns=(BEGAN + s) * 10**9) for index, (name, s) in enumerate(TIMES)]
    assert id_at(Manifest(DISK, tuple(backups)), at, timezone.utc) == found


def test_a_time_before_all_backups_is_not_found() -> None:
    with pytest.raises(NotFound, match=r"^disk sda has no backup as old as 2020-01-01; name one of b0, b1"):
        id_at(CHAIN, "2020-01-01")


@pytest.mark.parametrize("at", ["yesterday", "2023-11", "29.11.2026", "-1", "b9", ""])
def test_what_is_neither_a_number_nor_a_time_is_told_so(at: str) -> None:
    """Whoever writes a time in another form has to see which one is understood."""
    said = f"^disk sda has no backup '{at}', which is neither a number nor a time; write a time like '2026"
    with pytest.raises(NotFound, match=said):
        id_at(CHAIN, at)


@pytest.mark.parametrize("at", [3, datetime(2026, 11, 29)])
def test_what_is_no_text_is_told_so(at: Any) -> None:
    with pytest.raises(InvalidArgument, match="is not the text of a backup's id or of a time; name "):
        id_at(CHAIN, at)


def test_even_a_hand_made_cycle_ends() -> None:
    cycle = Manifest(DISK, (entry(0, 1), entry(1, 0)))
    with pytest.raises(NotFound, match="no backup b1"):
        chain_to(cycle, "b0")


# --- digests of chunks, which older manifests do not have ---

CHUNKS = ChunkDigests("0000.qcow2.01234567.digests", 1 << 20, "f" * 64)


def test_an_entry_without_digests_of_chunks_is_written_as_it_always_was() -> None:
    assert b"chunks" not in encode(CHAIN)
    assert decode(encode(CHAIN)).backups[0].chunks is None


def test_digests_of_chunks_may_stand_for_the_whole_image_in_version_2() -> None:
    made = Manifest(DISK, (entry(0), entry(1, 0, sha256=None, chunks=CHUNKS)))
    text = json.loads(encode(made))
    assert (text["format_version"], "sha256" in text["backups"][1]) == (2, False)
    assert decode(encode(made)) == made
    assert [entry.digest for entry in made.backups] == [entry(0).sha256, CHUNKS.sha256]


def test_version_1_has_a_digest_of_every_image() -> None:
    text = json.loads(encode(Manifest(DISK, (entry(0, sha256=None, chunks=CHUNKS),))))
    with pytest.raises(FormatError, match=r"manifest backups\[0\]\.sha256: expected a value, found none"):
        decode(json.dumps({**text, "format_version": 1}).encode())


def test_an_image_that_nothing_vouches_for_is_refused() -> None:
    text = json.loads(encode(Manifest(DISK, (entry(0, sha256=None, chunks=CHUNKS),))))
    del text["backups"][0]["chunks"]
    with pytest.raises(FormatError, match=r"manifest backups\[0\]\.chunks: expected digests of chunks"):
        decode(json.dumps(text).encode())


def test_digests_of_chunks_are_read_back() -> None:
    made = Manifest(DISK, (entry(0, chunks=CHUNKS), entry(1, 0)))
    assert decode(encode(made)) == made
    assert json.loads(encode(made))["backups"][0]["chunks"] == {
        "file": CHUNKS.file, "chunk_size": CHUNKS.chunk_size, "sha256": CHUNKS.sha256,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("file", "../x"),
        ("chunk_size", 2048),
        ("chunk_size", 5000),
        ("chunk_size", 128 << 20),
        ("sha256", "F" * 64),
    ],
)
def test_digests_of_chunks_that_cannot_be_are_refused(name: str, value: object) -> None:
    text = json.loads(encode(Manifest(DISK, (entry(0, chunks=CHUNKS),))))
    text["backups"][0]["chunks"][name] = value
    with pytest.raises(FormatError, match=rf"manifest backups\[0\]\.chunks\.{name}: expected "):
        decode(json.dumps(text).encode())


# --- digests of another algorithm, which version 3 knows ---

OTHERS = dataclasses.replace(CHUNKS, algorithm=DigestAlgorithm.BLAKE3)


def test_digests_of_sha256_are_written_as_they_always_were() -> None:
    made = Manifest(DISK, (entry(0, sha256=None, chunks=CHUNKS),))
    assert json.loads(encode(made))["format_version"] == 2
    assert b"algorithm" not in encode(made)


@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_one_backup_with_other_digests_makes_it_version_3(sha256: str | None) -> None:
    """Older programs refuse that; of version 2 they would take the digests for SHA-256, and call images damaged."""
    made = Manifest(DISK, (entry(0), entry(1, 0, chunks=CHUNKS), entry(2, 1, sha256=sha256, chunks=OTHERS)))
    text = json.loads(encode(made))
    assert text["format_version"] == 3
    assert ["algorithm" in backup.get("chunks", {}) for backup in text["backups"]] == [False, False, True]
    assert text["backups"][2]["chunks"]["algorithm"] == "blake3"
    assert decode(encode(made)) == made
    assert [each.digest_algorithm.value for each in made.backups] == ["sha256", "sha256", "blake3"]


def test_when_the_last_such_backup_goes_older_programs_read_it_again() -> None:
    made = Manifest(DISK, (entry(0, sha256=None, chunks=CHUNKS), entry(1, 0, sha256=None, chunks=OTHERS)))
    assert [made.format_version, dataclasses.replace(made, backups=made.backups[:1]).format_version] == [3, 2]


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("value", ["sha512", "BLAKE3", "", None, 3, ["blake3"], "blake3 "])
def test_an_algorithm_that_nobody_knows_is_refused_and_never_guessed(version: int, value: object) -> None:
    text = json.loads(encode(Manifest(DISK, (entry(0, chunks=OTHERS),))))
    text["backups"][0]["chunks"]["algorithm"] = value
    place = r"manifest backups\[0\]\.chunks\.algorithm: expected one of sha256, blake3, found "
    with pytest.raises(FormatError, match=place) as refused:
        decode(json.dumps({**text, "format_version": version}).encode())
    assert "restore the manifest from a copy" in refused.value.next_step


def test_what_an_entry_says_of_its_digests_counts_in_any_version() -> None:
    made = Manifest(DISK, (entry(0, chunks=OTHERS),))
    text = json.loads(encode(made))
    assert decode(json.dumps({**text, "format_version": 2}).encode()) == made
    text["backups"][0]["chunks"]["algorithm"] = "sha256"
    [read] = decode(json.dumps(text).encode()).backups
    assert read.chunks == CHUNKS


def test_the_document_tells_of_every_key() -> None:
    document = (Path(__file__).resolve().parents[2] / "docs" / "backup.md").read_text()
    tables = document.split("## manifest.json")[1].split("\n## ")[0]
    keys = [each.name for kind in (Manifest, BackupEntry, ChunkDigests) for each in dataclasses.fields(kind)]
    assert len(keys) > 20
    assert [key for key in keys if f"`{key}`" not in tables] == []
