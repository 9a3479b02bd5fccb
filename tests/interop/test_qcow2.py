"""Both ways with QEMU: what we write passes its check and reads the same, what it writes we read or refuse."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lmdbitmap.errors import FormatError
from lmdbitmap.geometry import ceil_div
from lmdbitmap.qcow2 import (
    CompressingWriter,
    Kind,
    MappedRun,
    Qcow2Reader,
    Qcow2Writer,
    chain_extents,
    chain_read_into,
)
from lmdbitmap.qcow2.compression import chosen
from tests.helpers.qcow2_model import DiskFile
from tests.helpers.support import make_raw_image, requires, run, spawn, wait_for_socket

pytestmark = [requires("qemu-img"), requires("qemu-io"), requires("qemu-nbd")]

MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40


class Change(NamedTuple):
    """Data or zeroes written to [offset, offset + length)."""

    offset: int
    length: int
    zero: bool = False


class Layer(NamedTuple):
    size: int
    changes: list[Change]


def write_chain(folder: Path, layers: list[Layer], cluster_bits: int = 16) -> tuple[list[Path], list[Path]]:
    """Images and raw truths, oldest first; changes are rounded outward to clusters."""
    randomness = random.Random(7)
    images: list[Path] = []
    truths: list[Path] = []
    truth = bytearray()
    for number, layer in enumerate(layers):
        truth = bytearray(truth.ljust(layer.size, b"\0")[: layer.size])
        image = folder / f"{number}.qcow2"
        backing_file = images[-1].name if images else None
        write_layer(image, layer, cluster_bits, backing_file, truth, randomness)
        images.append(image)
        truths.append(make_raw_image(folder / f"{number}.raw", layer.size, [(0, bytes(truth))]))
    return images, truths


def write_layer(
    path: Path,
    layer: Layer,
    cluster_bits: int,
    backing_file: str | None,
    truth: bytearray,
    randomness: random.Random,
) -> None:
    with DiskFile(path, create=True) as sink:
        writer = Qcow2Writer(sink, size=layer.size, cluster_bits=cluster_bits, backing_file=backing_file)
        end = 0
        for change in layer.changes:
            start = max(change.offset >> cluster_bits << cluster_bits, end)
            end = min(ceil_div(change.offset + change.length, 1 << cluster_bits) << cluster_bits, layer.size)
            data = bytes(end - start) if change.zero else randomness.randbytes(end - start)
            truth[start:end] = data
            if change.zero:
                writer.write_zeroes(start, end - start)
            else:
                writer.write(start, data)
        assert writer.finish() == path.stat().st_size


def check(image: Path) -> None:
    """`qemu-img check` exits with 2 for corruptions and with 3 for leaks."""
    report = json.loads(run("qemu-img", "check", "--output=json", image).stdout)
    found = {key: report.get(key, 0) for key in ("corruptions", "leaks", "check-errors")}
    assert found == {"corruptions": 0, "leaks": 0, "check-errors": 0}


def info(image: Path) -> Any:
    return json.loads(run("qemu-img", "info", "--output=json", image).stdout)


def qemu_map(image: Path) -> Any:
    return json.loads(run("qemu-img", "map", "--output=json", image).stdout)


def raw_copy(image: Path) -> bytes:
    """All the bytes of an image and its backing files, as QEMU reads them."""
    copy = image.with_name("copy.raw")
    run("qemu-img", "convert", "-O", "raw", image, copy)
    return copy.read_bytes()


def our_copy(*images: Path) -> bytes:
    """All the bytes of a chain, newest first, as we read them."""
    with contextlib.ExitStack() as stack:
        readers = [Qcow2Reader(stack.enter_context(DiskFile(image))) for image in images]
        buffer = bytearray(readers[0].size)
        chain_read_into(readers, memoryview(buffer), 0)
    return bytes(buffer)


# --- QEMU reads what we write ---


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
@pytest.mark.parametrize("size", [0, 1, 512, 3 * MIB, 5_000_001])
def test_a_full_image_is_sound_and_identical(tmp_path: Path, cluster_bits: int, size: int) -> None:
    third = size // 3
    changes = [Change(0, third), Change(2 * third, size - 2 * third)] if size > MIB else [Change(0, size)]
    [image], [truth] = write_chain(tmp_path, [Layer(size, changes)], cluster_bits)
    check(image)
    run("qemu-img", "compare", image, truth)
    padded = truth.read_bytes().ljust(ceil_div(size, 512) * 512, b"\0")
    assert raw_copy(image) == our_copy(image) == padded


def test_info_says_what_we_wrote(tmp_path: Path) -> None:
    images, _ = write_chain(tmp_path, [Layer(1_000_001, []), Layer(1_000_001, [])], cluster_bits=12)
    said = info(images[1])
    assert (said["format"], said["virtual-size"], said["cluster-size"]) == ("qcow2", 1_000_448, 4096)
    assert (said["backing-filename"], said["backing-filename-format"]) == ("0.qcow2", "qcow2")
    features = said["format-specific"]["data"]
    assert {name: features[name] for name in ("compat", "refcount-bits", "corrupt", "extended-l2")} == {
        "compat": "1.1",
        "refcount-bits": 16,
        "corrupt": False,
        "extended-l2": False,
    }


def test_qemu_cuts_a_size_that_is_no_multiple_of_a_sector(tmp_path: Path) -> None:
    """Why ours is rounded up: QEMU would lose the disk's last bytes."""
    image = tmp_path / "cut.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "1000001")
    assert info(image)["virtual-size"] == 1_000_448
    with image.open("r+b") as file:
        file.seek(24)
        file.write(struct.pack(">Q", 1_000_001))
    assert info(image)["virtual-size"] == 999_936


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_bits", [9, 10, 12, 16, 21])
def test_a_compressed_image_is_sound_and_identical(
    tmp_path: Path, compression: str, cluster_bits: int
) -> None:
    data = texts(7 * MIB + 300)
    image = compressed_image(tmp_path / "c.qcow2", [(0, data)], len(data), compression, cluster_bits)
    truth = make_raw_image(tmp_path / "c.raw", len(data), [(0, data)])
    check(image)
    run("qemu-img", "compare", image, truth)
    assert raw_copy(image) == our_copy(image) == data.ljust(ceil_div(len(data), 512) * 512, b"\0")
    said = info(image)
    assert said["format-specific"]["data"]["compression-type"] == compression
    mapped = qemu_map(image)
    with DiskFile(image) as source:
        reader = Qcow2Reader(source)
        packed = [found.kind is Kind.COMPRESSED for found in reader.extents(0, reader.size)]
    assert any(packed) is any(
        entry.get("compressed", False) or "offset" not in entry for entry in mapped if entry["data"]
    )
    assert any(packed) is (cluster_bits > 9)


def compressed_image(
    path: Path,
    ranges: list[tuple[int, bytes]],
    size: int,
    compression: str,
    cluster_bits: int = 16,
    backing_file: str | None = None,
) -> Path:
    kind = chosen(compression)
    with DiskFile(path, create=True) as sink:
        writer = Qcow2Writer(
            sink, size=size, cluster_bits=cluster_bits, backing_file=backing_file, compression_type=kind.type
        )
        with CompressingWriter(writer, kind) as compressing:
            for offset, data in ranges:
                compressing.write(offset, data)
            assert compressing.finish() == path.stat().st_size
    return path


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_images_stay_sound_when_qemu_writes_into_them(tmp_path: Path, compression: str) -> None:
    """It gives compressed clusters up one by one, and counts on the refcounts of those that they share."""
    data, news = texts(5 * MIB), texts(2 * MIB, seed=5)
    compressed_image(tmp_path / "0.qcow2", [(0, data)], len(data), compression)
    top = compressed_image(tmp_path / "1.qcow2", [(MIB, news)], len(data), compression, 12, "0.qcow2")
    expected = bytearray(data)
    expected[MIB : 3 * MIB] = news
    assert raw_copy(top) == our_copy(top, tmp_path / "0.qcow2") == expected
    for offset in range(MIB, 3 * MIB, 130_000):
        free = offset + 2 * MIB & ~4095
        run("qemu-io", "-c", f"write -P 7 {offset} 5000", "-c", f"write -c -P 8 {free} 4096", top)
        expected[offset : offset + 5000] = b"\x07" * 5000
        expected[free : free + 4096] = b"\x08" * 4096
    check(top)
    assert raw_copy(top) == our_copy(top, tmp_path / "0.qcow2") == expected


CHAIN = [
    Layer(6 * MIB + 300, [Change(0, 2 * MIB), Change(3 * MIB, 3 * MIB + 300)]),
    Layer(6 * MIB + 300, [Change(MIB, 70_000), Change(4 * MIB, MIB, zero=True)]),
    Layer(6 * MIB + 300, []),
    Layer(4 * MIB + 5000, [Change(2 * MIB, 1, zero=True), Change(3 * MIB + 9, 1)]),
    Layer(9 * MIB, [Change(4 * MIB, 300), Change(7 * MIB, MIB)]),
    Layer(9 * MIB, [Change(0, 9 * MIB, zero=True)]),
    Layer(9 * MIB, [Change(8 * MIB, MIB)]),
]
"""Full, changed, empty, shrunk, grown, all zero, changed again."""


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_every_layer_of_a_resized_chain_is_sound_and_identical(tmp_path: Path, cluster_bits: int) -> None:
    images, truths = write_chain(tmp_path, CHAIN, cluster_bits)
    assert len(images) == len(CHAIN)
    for number, (image, truth) in enumerate(zip(images, truths, strict=True)):
        check(image)
        ours = our_copy(*images[number::-1])
        assert ours[: truth.stat().st_size] == truth.read_bytes()
        assert raw_copy(image) == ours


@pytest.mark.parametrize("top", [0, 1, 3, 4, 6])
def test_map_agrees_with_our_extents_to_the_byte(tmp_path: Path, top: int) -> None:
    images, _ = write_chain(tmp_path, CHAIN, cluster_bits=12)
    with contextlib.ExitStack() as stack:
        readers = [Qcow2Reader(stack.enter_context(DiskFile(image))) for image in images[top::-1]]
        ours = [found for found in chain_extents(readers, 0, readers[0].size) if found.kind is Kind.DATA]
    theirs = [
        MappedRun(entry["start"], entry["length"], Kind.DATA, entry["offset"], entry["depth"])
        for entry in qemu_map(images[top])
        if entry["data"]
    ]
    assert ours
    assert ours == theirs


def test_qemu_nbd_serves_a_chain_of_ours(tmp_path: Path) -> None:
    images, truths = write_chain(tmp_path, CHAIN[:2])
    socket = tmp_path / "nbd.sock"
    with spawn("qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", socket, images[1]) as server:
        wait_for_socket(str(socket), server)
        run("qemu-img", "compare", "-f", "raw", f"nbd+unix:///?socket={socket}", truths[1])


def test_terabytes_of_zeroes_over_a_backing_file_are_sound_and_small(tmp_path: Path) -> None:
    size = 2 * TIB + 5 * MIB
    full, top = tmp_path / "full.qcow2", tmp_path / "top.qcow2"
    with DiskFile(full, create=True) as sink:
        Qcow2Writer(sink, size=size).finish()
    with DiskFile(top, create=True) as sink:
        writer = Qcow2Writer(sink, size=size, backing_file="full.qcow2")
        writer.write_zeroes(65536, size - 65536)
        assert writer.finish() < MIB
    check(top)
    [gap, zeroes] = qemu_map(top)
    assert (gap["depth"], zeroes["depth"]) == (1, 0)
    assert (zeroes["start"], zeroes["length"], zeroes["zero"]) == (65536, size - 65536, True)


def test_images_stay_sound_when_qemu_writes_into_shared_tables(tmp_path: Path) -> None:
    stretch = GIB // 2
    write_chain(tmp_path, [Layer(0, [])])
    top = tmp_path / "top.qcow2"
    with DiskFile(top, create=True) as sink:
        writer = Qcow2Writer(sink, size=3 * stretch, backing_file="0.qcow2")
        writer.write_zeroes(0, 3 * stretch)
        writer.finish()
    for number in range(3):
        run("qemu-io", "-c", f"write -P 7 {number * stretch} 64k", top)
        check(top)
    run("qemu-img", "resize", top, str(8 * stretch))
    check(top)
    [first, *others] = [entry for entry in qemu_map(top) if entry["data"]]
    assert [first["start"], *(entry["start"] for entry in others)] == [0, stretch, 2 * stretch]
    with DiskFile(top) as source:
        reader = Qcow2Reader(source)
        assert {found.kind for found in reader.extents(3 * stretch, 5 * stretch)} <= {
            Kind.ZERO,
            Kind.UNALLOCATED,
        }


def test_qemu_writes_into_an_increment_of_ours_and_it_stays_sound(tmp_path: Path) -> None:
    images, truths = write_chain(tmp_path, CHAIN[:2])
    top, expected = images[1], bytearray(truths[1].read_bytes().ljust(6 * MIB + 512, b"\0"))
    run("qemu-io", "-c", "write -P 9 1000000 100000", "-c", "write -z 5M 64k", "-c", "discard 0 1M", top)
    expected[1_000_000:1_100_000] = b"\x09" * 100_000
    expected[5 * MIB : 5 * MIB + 65536] = bytes(65536)
    check(top)
    theirs = raw_copy(top)
    assert theirs[MIB:] == expected[MIB:]
    assert our_copy(top, images[0]) == theirs


# --- we read what QEMU writes ---


def qemu_image(path: Path, options: str, *commands: str, size: str = "5M") -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    if commands:
        run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)
    return path


WRITES = (
    "write -P 1 0 100000",
    "write -P 2 1M 1M",
    "write -z 1100k 300k",
    "write -z -u 64k 64k",
    "write -P 3 4M 1k",
)


@pytest.mark.parametrize(
    "options",
    [
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "lazy_refcounts=on",
        "refcount_bits=1",
        "refcount_bits=64",
    ],
)
def test_an_image_of_qemu_reads_identical(tmp_path: Path, options: str) -> None:
    image = qemu_image(tmp_path / "theirs.qcow2", options, *WRITES)
    assert our_copy(image) == raw_copy(image)
    assert b"\x02" * 1000 in our_copy(image)


def test_a_chain_of_qemu_reads_identical(tmp_path: Path) -> None:
    bottom = qemu_image(tmp_path / "bottom.qcow2", "cluster_size=4096", *WRITES)
    top = tmp_path / "top.qcow2"
    backing = ["-b", bottom.name, "-F", "qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *backing, top, "7M")
    run("qemu-io", "-c", "write -P 5 1500000 5000", "-c", "write -z 0 64k", "-c", "write -P 6 6M 64k", top)
    with DiskFile(top) as source:
        reader = Qcow2Reader(source)
        assert (reader.backing_file, reader.backing_format) == ("bottom.qcow2", "qcow2")
    assert our_copy(top, bottom) == raw_copy(top)


def test_snapshots_and_bitmaps_beside_the_disk_are_ignored(tmp_path: Path) -> None:
    image = qemu_image(tmp_path / "theirs.qcow2", "cluster_size=4096", *WRITES)
    run("qemu-img", "snapshot", "-c", "before", image)
    run("qemu-img", "bitmap", "--add", image, "b0")
    run("qemu-io", "-c", "write -P 4 2M 1M", image)
    assert our_copy(image) == raw_copy(image)


def texts(length: int, seed: int = 3) -> bytes:
    """Bytes of which some compress well, some a little, some not at all, and some are zeroes."""
    randomness, parts, size = random.Random(seed), [], 0
    while size < length:
        part = randomness.choice(
            (randomness.randbytes(9) * 3000, randomness.randbytes(70_000), bytes(50_000), b"y" * 90_000)
        )
        parts.append(part[: randomness.randrange(1, len(part))])
        size += len(parts[-1])
    return b"".join(parts)[:length]


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", ["512", "4k", "64k", "2M"])
def test_compressed_clusters_of_qemu_read_identical(
    tmp_path: Path, compression: str, cluster_size: str
) -> None:
    raw = make_raw_image(tmp_path / "a.raw", 9 * MIB, [(4096, texts(6 * MIB)), (8 * MIB, b"end")])
    image = tmp_path / "c.qcow2"
    options = f"compression_type={compression},cluster_size={cluster_size}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
    with DiskFile(image) as source:
        reader = Qcow2Reader(source)
        assert reader.compression_type.value == compression
        assert Kind.COMPRESSED in {found.kind for found in reader.extents(0, reader.size)}
    assert our_copy(image) == raw_copy(image) == raw.read_bytes()


def test_plain_data_and_zeroes_over_compressed_clusters_of_qemu_read_identical(tmp_path: Path) -> None:
    raw = make_raw_image(tmp_path / "a.raw", 5 * MIB, [(0, texts(5 * MIB))])
    bottom, top = tmp_path / "bottom.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, bottom)
    run("qemu-io", *(word for command in WRITES[:3] for word in ("-c", command)), bottom)
    backing = ["-b", bottom.name, "-F", "qcow2", "-o", "cluster_size=4k"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *backing, top, "7M")
    run("qemu-io", "-c", "write -P 5 1500000 5000", "-c", "write -z 0 64k", "-c", "write -P 6 3M 9k", top)
    assert our_copy(bottom) == raw_copy(bottom)
    assert our_copy(top, bottom) == raw_copy(top)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("compat=0.10", "header version: expected 3, found 2"),
        ("extended_l2=on", "extended L2 entries"),
        ("data_file={folder}/data.raw", "external data file"),
        ("encrypt.format=aes,encrypt.key-secret=s", "not encrypted"),
    ],
)
def test_what_we_lack_is_refused_by_name(tmp_path: Path, options: str, said: str) -> None:
    image = tmp_path / "odd.qcow2"
    secret = ["--object", "secret,id=s,data=open"] if "encrypt" in options else []
    options = options.format(folder=tmp_path)
    run("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, image, "1M")
    with DiskFile(image) as source, pytest.raises(FormatError, match=said):
        Qcow2Reader(source)


def test_an_image_that_qemu_had_open_when_it_died_is_refused(tmp_path: Path) -> None:
    image = qemu_image(tmp_path / "lazy.qcow2", "lazy_refcounts=on")
    run("qemu-io", "-c", "write 0 64k", "-c", "sigraise 9", image, check=False)
    with DiskFile(image) as source, pytest.raises(FormatError, match="dirty: refcounts may be wrong"):
        Qcow2Reader(source)
