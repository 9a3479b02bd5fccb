"""`qemu:dirty-bitmap:CHECKPOINT` as nbdinfo, qemu-img and a client of our own read it, over a served, living disk."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from lmdbitmap.filter import Filter
from lmdbitmap.nbd.server.contexts import MAX_DESCRIPTORS
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.storage import schema
from tests.helpers.nbd_raw import BLOCK_STATUS, REQ_ONE, SET_META_CONTEXT, STRUCTURED_REPLY, RawClient, string
from tests.helpers.support import requires, run
from tests.helpers.tracked import NAME, TrackedDisk

BLOCK = 512
BLOCKS = 300_000
SIZE = BLOCKS * BLOCK - 100
"""The last block is short, and there are more blocks than one reply can describe."""
LIST_META_CONTEXT = 9
EIO = 5

pytestmark = [requires("nbdinfo"), requires("qemu-img")]


class House(NamedTuple):
    """A served disk, clean since checkpoint `start`."""

    tracked: TrackedDisk
    disk: Filter
    server: Server

    @property
    def uri(self) -> str:
        return self.server.uris[0]

    def client(self) -> RawClient:
        return RawClient.connect(self.uri.partition("socket=")[2])


@pytest.fixture(params=schema.DURABILITIES)
def house(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[House]:
    with closing(TrackedDisk(tmp_path, SIZE, 9, request.param).clean()) as tracked, tracked.attach() as disk:
        server = Server({NAME: disk})
        server.listen_unix(str(tmp_path / "nbd.sock"))
        server.start()
        yield House(tracked, disk, server)
        assert server.stop()


def context(checkpoint: str) -> str:
    return f"qemu:dirty-bitmap:{checkpoint}"


def joined(statuses: list[tuple[int, int]], offset: int = 0) -> list[tuple[int, int, int]]:
    """(offset, length, status) with equal neighbours joined."""
    found: list[tuple[int, int, int]] = []
    for length, status in statuses:
        if found and found[-1][2] == status:
            found[-1] = (found[-1][0], found[-1][1] + length, status)
        else:
            found.append((offset, length, status))
        offset += length
    return found


def nbdinfo_map(uri: str, name: str) -> list[tuple[int, int, int]]:
    told = json.loads(run("nbdinfo", f"--map={name}", "--json", uri).stdout)
    assert [entry["description"] for entry in told] == [("clean", "dirty")[entry["type"]] for entry in told]
    return joined([(entry["length"], entry["type"]) for entry in told])


def as_map(dirty_blocks: set[int]) -> list[tuple[int, int, int]]:
    lengths = [min(BLOCK, SIZE - block * BLOCK) for block in range(BLOCKS)]
    return joined([(length, int(block in dirty_blocks)) for block, length in enumerate(lengths)])


def test_every_checkpoint_is_a_context_that_says_what_changed_since_it(house: House) -> None:
    chosen, since = random.Random(1), {"start": set[int]()}
    for name in ("monday", "tuesday", None):
        blocks = [chosen.randrange(BLOCKS) for _ in range(500)]
        assert house.disk.lane().write_many([(block * BLOCK, memoryview(b"x")) for block in blocks]) == {}
        for dirty in since.values():
            dirty.update(blocks)
        if name is not None:
            house.disk.checkpoint(name)
            since[name] = set()
    assert {nbdinfo_map(house.uri, context(name)) == as_map(dirty) for name, dirty in since.items()} == {True}
    assert len(since) == 3


def test_more_extents_than_one_reply_holds_are_asked_for_again(house: House) -> None:
    every_other = set(range(0, BLOCKS, 2))
    pattern = bytes([0b01010101]) * 512
    house.disk.mark_regions(((region, pattern) for region in range(BLOCKS // 4096)), house.disk.disk.geometry)
    for block in range(BLOCKS // 4096 * 4096, BLOCKS, 2):
        house.disk.mark(block * BLOCK, 1)
    assert BLOCKS > MAX_DESCRIPTORS
    assert nbdinfo_map(house.uri, context("start")) == as_map(every_other)
    with house.client() as client:
        ids = client.go(NAME, contexts=[context("start")])
        [statuses] = client.do(BLOCK_STATUS, 0, SIZE).statuses.values()
        assert (len(ids), len(statuses)) == (1, MAX_DESCRIPTORS)


def test_any_part_and_several_contexts_can_be_asked_at_once(house: House) -> None:
    house.disk.pwrite(b"x" * 3 * BLOCK, 10 * BLOCK)
    house.disk.checkpoint("monday")
    house.disk.pwrite(b"x", SIZE - 1)
    names = [context("start"), "base:allocation", context("monday")]
    with house.client() as client:
        ids = client.go(NAME, contexts=[*names, context("nothing"), "qemu:dirty-bitmap:", "qemu:"])
        assert set(ids) == set(names)
        reply = client.do(BLOCK_STATUS, 11 * BLOCK + 5, 4 * BLOCK)
        assert set(reply.statuses) == set(ids.values())
        assert reply.statuses[ids[context("start")]] == [(2 * BLOCK - 5, 1), (2 * BLOCK + 5, 0)]
        assert joined(reply.statuses[ids[context("monday")]]) == [(0, 4 * BLOCK, 0)]
        one = client.do(BLOCK_STATUS, SIZE - BLOCK, BLOCK, flags=REQ_ONE).statuses[ids[context("monday")]]
        assert one == [(100, 0)]
        rest = client.do(BLOCK_STATUS, SIZE - BLOCK + 100, BLOCK - 100).statuses
        assert rest[ids[context("monday")]] == [(BLOCK - 100, 1)]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ([], ["base:allocation", "monday", "start"]),
        (["qemu:"], ["monday", "start"]),
        (["qemu:dirty-bitmap:"], ["monday", "start"]),
        (["qemu:dirty-bitmap:monday", "x-other:", "base:"], ["base:allocation", "monday"]),
        (["qemu:dirty-bitmap:nothing", "qemu:allocation-depth"], []),
    ],
)
def test_contexts_are_listed_by_name_and_by_wildcard(
    house: House, query: list[str], found: list[str]
) -> None:
    house.disk.checkpoint("monday")
    with house.client() as client:
        client.greet()
        client.ask(STRUCTURED_REPLY)
        asked = string(NAME) + len(query).to_bytes(4, "big") + b"".join(map(string, query))
        told = [data[4:].decode() for kind, data in client.ask(LIST_META_CONTEXT, asked) if kind == 4]
    assert sorted(name.removeprefix("qemu:dirty-bitmap:") for name in told if "epoch-1" not in name) == found


def test_what_cannot_be_known_is_an_error_and_never_clean(house: House) -> None:
    """The checkpoint is forgotten, made anew under its name, or of an older epoch."""
    house.disk.checkpoint("monday")
    house.disk.checkpoint("tuesday")
    with house.client() as client:
        [number] = client.go(NAME, contexts=[context("monday")]).values()
        assert client.do(BLOCK_STATUS, 0, SIZE).statuses == {number: [(SIZE, 0)]}
        house.disk.forget("monday")
        assert client.do(BLOCK_STATUS, 0, SIZE).error == EIO
        house.disk.checkpoint("monday")
        assert client.do(BLOCK_STATUS, 0, SIZE).error == EIO
    with house.client() as client:
        [number] = client.go(NAME, contexts=[context("monday")]).values()
        assert client.do(BLOCK_STATUS, 0, SIZE).statuses == {number: [(SIZE, 0)]}
        house.disk.start_epoch("it must be so")
        assert client.do(BLOCK_STATUS, 0, SIZE).error == EIO
        assert client.do(BLOCK_STATUS, 0, SIZE).error == EIO
    with house.client() as client:
        assert client.go(NAME, contexts=[context("monday")]) == {}


def test_lost_track_is_all_dirty(house: House) -> None:
    with house.client() as client:
        [number] = client.go(NAME, contexts=[context("start")]).values()
        house.disk._tracking.voucher.lose_track("the store is full")
        assert client.do(BLOCK_STATUS, 5, 4096).statuses == {number: [(4096, 1)]}


def test_selection_without_structured_replies_or_of_a_wildcard_selects_nothing(house: House) -> None:
    with house.client() as client:
        client.greet()
        asked = string(NAME) + b"\0\0\0\1" + string("qemu:dirty-bitmap:start")
        assert client.ask(SET_META_CONTEXT, asked)[-1][0] > 1 << 31
        client.ask(STRUCTURED_REPLY)
        wild = string(NAME) + b"\0\0\0\1" + string("qemu:dirty-bitmap:")
        assert client.ask(SET_META_CONTEXT, wild) == [(1, b"")]


def test_qemu_img_reads_the_bitmap_as_it_reads_its_own(house: House) -> None:
    """`x-dirty-bitmap` shows dirty as `data: false`; and what it makes up behind the end, to a whole sector, too."""
    house.disk.pwrite(b"x", 100 * BLOCK)
    house.disk.pwrite(b"x" * BLOCK * 8, 5000 * BLOCK)
    path = house.uri.partition("socket=")[2]
    options = (
        f"driver=nbd,export={NAME},server.type=unix,server.path={path},x-dirty-bitmap={context('start')}"
    )
    told = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options).stdout)
    dirty = [
        (entry["start"], entry["length"]) for entry in told if not entry["data"] and entry["start"] < SIZE
    ]
    assert dirty == [(100 * BLOCK, BLOCK), (5000 * BLOCK, 8 * BLOCK)]
