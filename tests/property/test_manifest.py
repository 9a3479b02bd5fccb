"""Any manifest that can be written reads back the same; any other bytes are a `FormatError` and nothing else."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.copying.digest_algorithms import DigestAlgorithm
from lmdbitmap.errors import FormatError
from lmdbitmap.extents import Trust
from lmdbitmap.notes.references import CheckpointRef, Reason
from lmdbitmap.qcow2 import CompressionType
from lmdbitmap.repository.manifest import (
    BackupEntry,
    BackupType,
    ChunkDigests,
    DiskRef,
    Manifest,
    chain_to,
    decode,
    encode,
)

uuids = st.uuids()
sizes = st.integers(0, 2**63 - 1)
texts = st.text(min_size=1, max_size=40).filter(str.isprintable)
file_names = texts.filter(lambda text: not set(text) & {"/", ":"} and text not in (".", ".."))
types = st.sampled_from(BackupType)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
chunk_sizes = st.sampled_from([1 << bits for bits in range(12, 27)])
chunks = st.builds(ChunkDigests, file_names, chunk_sizes, digests, st.sampled_from(DigestAlgorithm))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    ids = draw(st.lists(texts, unique=True, max_size=6))
    files = draw(st.lists(file_names, unique=True, min_size=len(ids), max_size=len(ids)))
    sequences = sorted(draw(st.sets(sizes, min_size=len(ids), max_size=len(ids))))
    backups = [draw(entries(number, ids, files[number], sequences[number])) for number in range(len(ids))]
    released = draw(st.lists(st.builds(CheckpointRef, uuids, texts), max_size=3).map(tuple))
    return Manifest(DiskRef(draw(texts), draw(uuids)), tuple(backups), released=released)


@st.composite
def entries(draw: st.DrawFn, number: int, ids: list[str], file: str, sequence: int) -> BackupEntry:
    actual = draw(types) if number else BackupType.FULL
    requested = draw(types)
    reasons = st.builds(Reason, texts, texts)
    sha256 = draw(st.none() | digests)
    return BackupEntry(
        id=ids[number],
        sequence=sequence,
        file=file,
        parent=None if actual is BackupType.FULL else draw(st.sampled_from(ids[:number])),
        type_requested=requested,
        type_actual=actual,
        reason=draw(reasons if requested is not actual else reasons | st.none()),
        time_ns=draw(sizes),
        checkpoint=CheckpointRef(draw(uuids), draw(texts)),
        epoch=draw(uuids),
        disk_size=draw(sizes),
        granularity=1 << draw(st.integers(9, 31)),
        cluster_size=1 << draw(st.integers(9, 21)),
        trust=draw(st.sampled_from([Trust.EXACT, Trust.SUPERSET])),
        bytes_changed=draw(sizes),
        bytes_zero=draw(sizes),
        bytes_stored=draw(sizes),
        sha256=sha256,
        chunks=draw(chunks if sha256 is None else st.none() | chunks),
        compression=draw(st.sampled_from([None, *CompressionType])),
    )


@given(manifests())
def test_a_manifest_reads_back_the_same_and_encodes_to_the_same_bytes(manifest: Manifest) -> None:
    data = encode(manifest)
    assert decode(data) == manifest
    assert encode(decode(data)) == data
    kinds = [entry["chunks"].get("algorithm") for entry in json.loads(data)["backups"] if "chunks" in entry]
    assert (json.loads(data)["format_version"] == 3) == ("blake3" in kinds)


@given(manifests())
def test_a_chain_is_what_following_parents_finds(manifest: Manifest) -> None:
    by_id = {entry.id: entry for entry in manifest.backups}
    for entry in manifest.backups:
        naive = [entry]
        while (parent := naive[0].parent) is not None:
            naive.insert(0, by_id[parent])
        assert chain_to(manifest, entry.id) == tuple(naive)
        assert naive[0].type_actual is BackupType.FULL


def base() -> Manifest:
    full = BackupEntry(
        "b0", 0, "0.qcow2", None, BackupType.FULL, BackupType.FULL, Reason("first", "no earlier backup"), 5,
        CheckpointRef(UUID(int=3), "c"), UUID(int=4), 1, 512, 512, Trust.EXACT, 1, 0, 4096, "0" * 64,
    )  # fmt: skip
    return Manifest(DiskRef("sda", UUID(int=1)), (full,))


DATA = encode(base())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def refused_or_whole(data: bytes) -> bool:
    """Whether `data` is refused; what is not refused can be written and read again."""
    try:
        manifest = decode(data)
    except FormatError:
        return True
    assert decode(encode(manifest)) == manifest
    return False


@given(st.data(), json_values)
def test_any_value_in_any_place_is_refused_or_read(data: st.DataObject, value: object) -> None:
    whole = json.loads(DATA)
    part: Any = whole
    while True:
        key = data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        if not isinstance(part[key], (dict, list)) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    part[key] = value
    refused_or_whole(json.dumps(whole).encode())


@given(st.integers(0, len(DATA)), st.integers(0, 20), st.binary(max_size=12))
def test_any_change_of_bytes_is_refused_or_read(offset: int, removed: int, added: bytes) -> None:
    refused_or_whole(DATA[:offset] + added + DATA[offset + removed :])


@given(st.integers(0, len(DATA) - 2))
def test_any_truncation_is_refused(length: int) -> None:
    assert refused_or_whole(DATA[:length])


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert refused_or_whole(data)
