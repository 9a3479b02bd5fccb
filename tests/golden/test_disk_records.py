"""Disk descriptions frozen when their schema was released: read for ever; the newest is still written so."""

from __future__ import annotations

import hashlib
from pathlib import Path
from uuid import UUID

import pytest

from lmdbitmap.interfaces import DeviceTrace, ImageIdentity
from lmdbitmap.storage import schema
from lmdbitmap.storage.schema import Disk

FOLDER = Path(__file__).parent
DIGESTS = {
    "disk-v1/attached-device": "e1d7077004729586274303ac22e34b3936b5cc2f56b6a84d2fb3ed782ead23ad",
    "disk-v1/detached-file": "9041998d0d4d7b89c8ca4ae68802f866a293ffe6bd8a9829a340bb94134600b3",
    "disk-v1/never-seen": "c0b69b20108c9f9a5dda7af1ad187a0f5c218d2320b6809747bb86f938e5e944",
    "disk-v2/attached-device": "92ad725f1f9902408e5a4a073b727d63b40e0f9dd05575002d1f29019e12da1c",
    "disk-v2/detached-file": "881691ffbfdc033b00fea43d15ae3f611d6e837bc8ab3efd9ddb1ff7eb38f9f0",
    "disk-v2/never-seen": "707a3caec15fcb1ef8e421875e417f8d8f71b55a7d1241d5a08b892b73c49819",
}
TRACE = DeviceTrace("44444444-4444-4444-8444-444444444444", 17, 123456, "LVM-example")
FILE = ImageIdentity(2049, 131, 1 << 30, 1_700_000_001_000_000_001)


def disk(name: str, trace: DeviceTrace | None) -> Disk:
    """What the record was written from; schema 1 knew no trace."""
    own: dict[str, dict[str, object]] = {
        "detached-file": {"identity": FILE},
        "attached-device": {
            "image": "/dev/vg0/sda", "identity": ImageIdentity(64768, 0, 1 << 30, 0, trace),
            "session": UUID("33333333-3333-4333-8333-333333333333"), "resizing_from": 1 << 29,
        },
        "never-seen": {"durability": "deferred", "policy": "strict"},
    }  # fmt: skip
    plain: dict[str, object] = {
        "image": "/srv/vm/sda.raw", "durability": "write-ahead", "policy": "guest-first", "identity": None,
        "session": None, "resizing_from": None,
    }  # fmt: skip
    return Disk(
        uuid=UUID("11111111-1111-4111-8111-111111111111"), name="sda", size=1 << 30, granularity_bits=16,
        epoch=UUID("22222222-2222-4222-8222-222222222222"), epoch_number=3,
        epoch_reason="the image was written while nobody tracked it", created_ns=1_700_000_000_123_456_789,
        next_sequence=9, **{**plain, **own[name]},  # type: ignore[arg-type]
    )  # fmt: skip


def test_every_frozen_record_is_as_it_was() -> None:
    found = {
        f"{path.parent.name}/{path.stem}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in FOLDER.glob("disk-v*/*")
    }
    assert found == DIGESTS


@pytest.mark.parametrize("place", DIGESTS)
def test_a_frozen_record_reads_as_what_it_was_written_from(place: str) -> None:
    version, name = place.split("/")
    record = (FOLDER / f"{place}.bin").read_bytes()
    wanted = disk(name, TRACE if version == "disk-v2" else None)
    assert schema.decode(Disk, record, place=place) == wanted
    assert (schema.encode(wanted) == record) == (version == "disk-v2")
