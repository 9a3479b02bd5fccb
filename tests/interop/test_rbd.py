"""Ceph's own tools take our streams, and we take theirs. `rbd merge-diff` needs no cluster."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.streams.rbd_diff import Head
from lmdbitmap.streams.restore import apply_stream
from lmdbitmap.streams.stream import stream_backup
from tests.helpers import naive_rbd_diff
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.support import requires, run, spawn, wait_for_socket
from tests.helpers.tracked import NAME

KIB, MIB = 1 << 10, 1 << 20
SIZE = 9 * MIB + 700


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[BackedUpDisk]:
    made = BackedUpDisk(tmp_path, SIZE)
    yield made
    made.close()


def streamed(disk: BackedUpDisk, since: str | None, checkpoint: str, version: int = 1) -> Path:
    path = disk.folder / f"{since}-{checkpoint}.diff"
    with path.open("wb", buffering=0) as out:
        stream_backup(disk.store, NAME, out, since=since, checkpoint=checkpoint, version=version)
    return path


def apply(path: Path, target: Path | str) -> Head:
    with path.open("rb", buffering=0) as stream:
        return apply_stream(stream, target).head


def merged(first: Path, second: Path) -> Path:
    """By Ceph. Without a cluster it complains on stderr, and works."""
    out = first.with_name(f"{first.stem}+{second.stem}.diff")
    assert merge(first, second, out).returncode == 0
    return out


def merge(first: Path, second: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return run("rbd", "merge-diff", "--no-progress", first, second, out, check=False)


def lives_on(disk: BackedUpDisk, step: int) -> None:
    """Data, zeroes and another size: grown at the second step, shrunk at the third."""
    disk.resize({2: 12 * MIB + 3, 3: 5 * MIB + 513}.get(step, disk.disk().size))
    disk.write(bytes([step]) * (300 * KIB + 7), step * MIB)
    disk.write(bytes([step]) * 5, disk.disk().size - 5)
    disk.zero(step * MIB + 100 * KIB, 100 * KIB)


@requires("rbd")
def test_ceph_merges_our_streams_and_we_restore_what_it_wrote(disk: BackedUpDisk) -> None:
    lives_on(disk, 1)
    full = streamed(disk, None, "1")
    held = full
    for step in (2, 3, 4):
        lives_on(disk, step)
        held = merged(held, streamed(disk, str(step - 1), str(step)))
        out = disk.folder / f"{step}.raw"
        assert apply(held, out) == (1, disk.disk().size, None, str(step))
        assert out.read_bytes() == disk.content()
        stream = naive_rbd_diff.read(held.read_bytes())
        assert naive_rbd_diff.applied(stream, b"") == disk.content()


@requires("rbd")
def test_diffs_that_ceph_merged_are_one_diff(disk: BackedUpDisk) -> None:
    lives_on(disk, 1)
    target = disk.folder / "target.raw"
    apply(streamed(disk, None, "1"), target)
    lives_on(disk, 2)
    first = streamed(disk, "1", "2")
    lives_on(disk, 3)
    second = streamed(disk, "2", "3")
    assert apply(merged(first, second), target) == (1, disk.disk().size, "1", "3")
    assert target.read_bytes() == disk.content()


@requires("rbd")
def test_ceph_sees_that_two_streams_do_not_follow_on_each_other(disk: BackedUpDisk) -> None:
    paths = [streamed(disk, None, "1"), streamed(disk, None, "2"), streamed(disk, "1", "3")]
    merged(paths[0], paths[2])
    refused = merge(paths[1], paths[2], disk.folder / "none")
    assert refused.returncode != 0
    assert "must be equal with the second FROM" in refused.stderr


@requires("rbd")
def test_version_2_is_for_images_and_none_of_cephs_diff_commands_takes_it(disk: BackedUpDisk) -> None:
    """As docs/streams.md says; the day this fails it can say better."""
    paths = [streamed(disk, None, "1", version=2), streamed(disk, "1", "2", version=2)]
    refused = merge(paths[0], paths[1], disk.folder / "none")
    assert refused.returncode != 0
    assert "invalid banner" in refused.stderr


@requires("qemu-nbd")
def test_an_nbd_export_is_brought_up_to_date(disk: BackedUpDisk) -> None:
    """Behind it is qcow2 that held something else before."""
    disk.resize(9 * MIB)
    image, socket = disk.folder / "far.qcow2", disk.folder / "far.sock"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "9M")
    with served(image, socket) as uri:
        lives_on(disk, 1)
        run("qemu-io", "-f", "raw", "-c", "write -q -P 170 0 9M", uri)
        apply(streamed(disk, None, "1"), uri)
        disk.write(b"x" * MIB, 4 * MIB)
        disk.zero(MIB, 50 * KIB)
        apply(streamed(disk, "1", "2"), uri)
    out = disk.folder / "read-back.raw"
    run("qemu-img", "convert", "-O", "raw", image, out)
    assert out.read_bytes() == disk.content()


@requires("qemu-nbd")
def test_an_nbd_export_of_another_size_is_refused(disk: BackedUpDisk) -> None:
    image, socket = disk.folder / "far.raw", disk.folder / "far.sock"
    image.write_bytes(b"x" * MIB)
    with (
        served(image, socket) as uri,
        pytest.raises(LmdbitmapError, match="has 1048576 bytes, and the stream"),
    ):
        apply(streamed(disk, None, "1"), uri)
    assert image.read_bytes() == b"x" * MIB


@contextlib.contextmanager
def served(image: Path, socket: Path) -> Iterator[str]:
    with spawn("qemu-nbd", "-t", "-f", image.suffix[1:], "-k", str(socket), str(image)) as child:
        wait_for_socket(socket, child)
        yield f"nbd+unix:///?socket={socket}"
