"""QEMU as the oracle for what leaves the store: exports of tracked writes, and merged bitmaps of any granularity."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

import pytest

from lmdbitmap import export
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import Geometry
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import standalone
from lmdbitmap.tracker.standalone import Operation
from tests.conftest import RawImage
from tests.helpers.support import requires
from tests.helpers.tracked import TrackedDisk
from tests.interop.test_flat_file import Qemu, qemu_serving, random_changes

pytestmark = [requires("qemu-storage-daemon", "7.0"), requires("qemu-io")]

SIZE = 67 * 65536 + 512


def write(disk: Filter, changes: list[tuple[str, int, int]]) -> None:
    """The same as `Qemu.write`."""
    for verb, offset, length in changes:
        if verb == "write":
            disk.pwrite(b"x" * length, offset)
        elif verb == "discard":
            disk.discard(offset, length)
        else:
            disk.write_zeroes(offset, length)


def digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(4096)
        return hashlib.sha256(file.read()).hexdigest()


def qemu_digest(qemu: Qemu, name: str) -> str:
    digest: str = qemu.order("x-debug-block-dirty-bitmap-sha256", node="disk", name=name)["sha256"]
    return digest


@pytest.mark.parametrize("granularity_bits", [9, 12, 16])
def test_exports_of_tracked_writes_are_what_qemu_tracked(
    raw_image: RawImage, tmp_path: Path, granularity_bits: int
) -> None:
    compared = 0
    tracked = TrackedDisk(tmp_path, SIZE, granularity_bits).clean()
    with closing(tracked), qemu_serving(raw_image(SIZE, name="theirs.raw"), tmp_path) as qemu:
        qemu.order("block-dirty-bitmap-add", node="disk", name="ours", granularity=1 << granularity_bits)
        for seed in range(3):
            changes = random_changes(SIZE, seed, count=5)
            qemu.write(changes)
            with tracked.attach() as disk:
                write(disk, changes)
                disk.checkpoint(f"c{seed}")
            export.export_changes(tracked.changes("start"), tmp_path / "x.dbm")
            assert digest_of(tmp_path / "x.dbm") == qemu.digest()
            compared += 1
    assert compared == 3


@pytest.mark.parametrize(("target_bits", "source_bits"), [(16, 16), (16, 12), (12, 16), (9, 16)])
def test_merged_bitmaps_are_what_qemu_merges(
    raw_image: RawImage, tmp_path: Path, target_bits: int, source_bits: int
) -> None:
    with (
        Store.create(str(tmp_path / "store")) as store,
        qemu_serving(raw_image(SIZE), tmp_path) as qemu,
    ):
        for seed, name, granularity_bits in ((1, "target", target_bits), (2, "source", source_bits)):
            qemu.order("block-dirty-bitmap-add", node="disk", name=name, granularity=1 << granularity_bits)
            changes = random_changes(SIZE, seed, count=4)
            qemu.write(changes)
            qemu.order("block-dirty-bitmap-disable", node="disk", name=name)
            keep(store, name, Geometry(SIZE, granularity_bits), changes)
            export.export_bitmap(store, name, tmp_path / "x.dbm")
            assert digest_of(tmp_path / "x.dbm") == qemu_digest(qemu, name)
        qemu.order("block-dirty-bitmap-merge", node="disk", target="target", bitmaps=["source"])
        standalone.combine(store, "target", Operation.OR, ["source"])
        export.export_bitmap(store, "target", tmp_path / "x.dbm")
        assert digest_of(tmp_path / "x.dbm") == qemu_digest(qemu, "target")


def keep(store: Store, name: str, geometry: Geometry, changes: list[tuple[str, int, int]]) -> None:
    blocks = sorted(
        {block for _, offset, length in changes for block in geometry.blocks_outward(offset, length)}
    )

    def change(writer: Writer) -> None:
        runs = ((block, block + 1) for block in blocks)
        standalone.create(writer, name, geometry, standalone.dirt_of_runs(runs, geometry))

    store.update(change)
