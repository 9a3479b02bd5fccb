"""What is stored compressed and what is not, where it lies, and that threads change neither."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence

import pytest

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.interfaces import Buffer
from lmdbitmap.qcow2 import (
    CompressingWriter,
    CompressionType,
    Kind,
    MappedRun,
    Qcow2Reader,
    Qcow2Writer,
    chain_read_into,
)
from lmdbitmap.qcow2.compressing import PIECE_BYTES, PIECES_PER_WORKER
from lmdbitmap.qcow2.compression import chosen, compressor
from lmdbitmap.work.crew import Spared, none_spared
from tests.helpers.qcow2_model import MemoryFile, naive_chain_read, structure_problems, u64
from tests.helpers.spared import EACH

CLUSTER = 4096
Ranges = Sequence[tuple[int, bytes | int]]

both = pytest.mark.parametrize("compression", ["zlib", "zstd"])


def texts(clusters: int, cluster_size: int = CLUSTER, seed: int = 1) -> bytes:
    """Clusters of which each shrinks to another length, some to none."""
    randomness = random.Random(seed)
    lengths = (randomness.randrange(cluster_size + 1) for _ in range(clusters))
    return b"".join(randomness.randbytes(length).ljust(cluster_size, b"-") for length in lengths)


def image(
    size: int,
    ranges: Ranges,
    compression: str = "zlib",
    *,
    cluster_bits: int = 12,
    backing_file: str | None = None,
    workers: int = 3,
    spared: Spared = none_spared,
) -> MemoryFile:
    """A finished image; a range is (offset, data) or (offset, length of zeroes)."""
    sink, chosen_one = MemoryFile(), chosen(compression)
    writer = Qcow2Writer(
        sink,
        size=size,
        cluster_bits=cluster_bits,
        backing_file=backing_file,
        compression_type=chosen_one.type,
    )
    with CompressingWriter(writer, chosen_one, workers=workers, spared=spared) as compressing:
        for offset, content in ranges:
            if isinstance(content, int):
                compressing.write_zeroes(offset, content)
            else:
                compressing.write(offset, content)
        assert compressing.finish() == sink.size
    return sink


def runs(file: MemoryFile) -> list[MappedRun]:
    reader = Qcow2Reader(file)
    return list(reader.extents(0, reader.size))


def contents(file: MemoryFile) -> bytes:
    reader = Qcow2Reader(file)
    buffer = bytearray(reader.size)
    chain_read_into([reader], memoryview(buffer), 0)
    return bytes(buffer)


@both
@pytest.mark.parametrize("cluster_bits", [9, 10, 12, 16, 21])
def test_a_compressed_image_is_sound_and_reads_back(compression: str, cluster_bits: int) -> None:
    size = (5 << cluster_bits) + 100
    data = texts(5, 1 << cluster_bits) + b"x" * 100
    file = image(size, [(0, data)], compression, cluster_bits=cluster_bits)
    assert structure_problems(bytes(file.content)) == []
    assert contents(file)[:size] == naive_chain_read([bytes(file.content)])[:size] == data
    assert contents(file)[size:].strip(b"\0") == b""


@both
def test_only_what_saves_a_sector_is_compressed(compression: str) -> None:
    """512 bytes are more than what the two differ by in any one step."""
    data = texts(200)
    compress = compressor(chosen(compression))
    saves = [
        len(compress(data[start : start + CLUSTER])) <= CLUSTER - 512
        for start in range(0, len(data), CLUSTER)
    ]
    assert 20 < sum(saves) < 180
    kinds = [
        run.kind
        for run in runs(image(len(data), [(0, data)], compression))
        for _ in range(run.length // CLUSTER)
    ]
    assert kinds == [Kind.COMPRESSED if saved else Kind.DATA for saved in saves]


def test_compressed_clusters_lie_byte_to_byte_over_borders_of_host_clusters() -> None:
    data = b"".join(os.urandom(1500).ljust(CLUSTER, b"-") for _ in range(40))
    compress, found = compressor(chosen("zlib")), runs(image(len(data), [(0, data)]))
    ends = [run.host_offset + len(compress(data[run.offset : run.end])) for run in found]
    assert [run.host_offset for run in found] == [CLUSTER, *ends[:-1]]
    assert any(
        run.host_offset // CLUSTER != (end - 1) // CLUSTER for run, end in zip(found, ends, strict=True)
    )


def test_compressed_clusters_fill_up_their_host_cluster_after_data_that_stands_as_it_is() -> None:
    small, solid = b"-" * CLUSTER, os.urandom(CLUSTER)
    first, plain, second = runs(image(3 * CLUSTER, [(0, small + solid + small)]))
    assert (first.host_offset, plain.host_offset) == (CLUSTER, 2 * CLUSTER)
    assert first.host_offset < second.host_offset < 2 * CLUSTER


def test_neighbours_that_do_not_shrink_go_with_one_write() -> None:
    solid = os.urandom(8 * CLUSTER)
    file = image(9 * CLUSTER, [(0, solid + b"-" * CLUSTER)])
    assert (CLUSTER, 8 * CLUSTER) in file.writes
    assert runs(file)[0] == MappedRun(0, 8 * CLUSTER, Kind.DATA, CLUSTER)


def test_the_header_names_zstd_and_does_not_name_zlib() -> None:
    headers = [Qcow2Reader(image(0, [], compression)).header for compression in ("zlib", "zstd")]
    assert [(header.incompatible_features, header.compression_type) for header in headers] == [(0, 0), (8, 1)]


@both
def test_zeroes_gaps_and_data_come_in_the_order_of_the_disk(compression: str) -> None:
    ranges: list[tuple[int, bytes | int]] = [
        (CLUSTER, texts(3)),
        (5 * CLUSTER, 2 * CLUSTER),
        (7 * CLUSTER, b"-" * CLUSTER),
        (9 * CLUSTER, CLUSTER),
    ]
    file = image(12 * CLUSTER, ranges, compression, backing_file="full")
    below = os.urandom(12 * CLUSTER)
    expected = bytearray(below)
    for offset, content in ranges:
        data = bytes(content) if isinstance(content, int) else content
        expected[offset : offset + len(data)] = data
    full = image(12 * CLUSTER, [(0, below)])
    assert naive_chain_read([bytes(file.content), bytes(full.content)]) == expected
    assert structure_problems(bytes(file.content)) == []


@both
def test_however_many_workers_there_are_the_image_is_the_same(compression: str) -> None:
    data = texts(3 * PIECE_BYTES // CLUSTER + 5)
    made = [image(len(data), [(0, data)], compression, workers=workers).content for workers in (1, 2, 7)]
    made += [image(len(data), [(0, data)], compression, spared=spared).content for spared in EACH.values()]
    assert made == made[:1] * 6


def test_the_buffer_can_be_used_again_at_once() -> None:
    sink, buffer = MemoryFile(), bytearray(b"a" * CLUSTER)
    with CompressingWriter(Qcow2Writer(sink, size=50 * CLUSTER, cluster_bits=12), chosen("zlib")) as writer:
        for number in range(50):
            buffer[:] = bytes([number]) * CLUSTER
            writer.write(number * CLUSTER, buffer)
        buffer[:] = bytes(CLUSTER)
        writer.finish()
    assert contents(sink) == b"".join(bytes([number]) * CLUSTER for number in range(50))


def test_not_more_pieces_are_under_way_than_the_workers_may_have() -> None:
    sink, piece = MemoryFile(), os.urandom(PIECE_BYTES)
    with CompressingWriter(
        Qcow2Writer(sink, size=40 * PIECE_BYTES, cluster_bits=12), chosen("zlib"), workers=2
    ) as writer:
        for number in range(40):
            writer.write(number * PIECE_BYTES, piece)
            assert len(sink.writes) >= number + 1 - 2 * PIECES_PER_WORKER
        writer.finish()
    assert len(sink.writes) > 40


def test_a_sink_that_fails_is_told_of_and_threads_end_with_the_block() -> None:
    class Full(MemoryFile):
        def pwrite(self, data: Buffer, offset: int) -> None:
            raise OSError(28, "No space left on device")

    writer = Qcow2Writer(Full(), size=40 * PIECE_BYTES, cluster_bits=12)
    with CompressingWriter(writer, chosen("zlib")) as compressing:
        compressing.write(0, b"-" * PIECE_BYTES)
        with pytest.raises(OSError, match="No space"):
            compressing.finish()
    with pytest.raises(KeyboardInterrupt), CompressingWriter(writer, chosen("zlib")) as compressing:
        raise KeyboardInterrupt
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("compress")]


def test_a_range_out_of_order_is_refused_at_the_latest_by_the_finish() -> None:
    sink = MemoryFile()
    with CompressingWriter(Qcow2Writer(sink, size=4 * CLUSTER, cluster_bits=12), chosen("zlib")) as writer:
        writer.write(CLUSTER, b"-" * CLUSTER)
        writer.write(CLUSTER, b"-" * CLUSTER)
        with pytest.raises(InvalidArgument, match="ascending"):
            writer.finish()


@pytest.mark.parametrize("share", [0.1, 0.6, 1.0])
def test_refcounts_are_exact_over_many_refcount_blocks(share: float) -> None:
    """Of 1 KiB clusters: a block counts 512 of them."""
    randomness = random.Random(2)
    clusters = [randomness.randbytes(400 if randomness.random() < share else 1024) for _ in range(3000)]
    data = b"".join(cluster.ljust(1024, b"-") for cluster in clusters)
    file = image(len(data), [(0, data)], cluster_bits=10)
    assert structure_problems(bytes(file.content)) == []
    assert contents(file) == data


def test_refcount_blocks_are_written_as_the_file_grows_and_are_not_kept() -> None:
    """Memory is what would end large backups otherwise."""
    sink = MemoryFile()
    writer = Qcow2Writer(sink, size=20_000 * 1024, cluster_bits=10)
    for number in range(20_000):
        writer.write_compressed(number * 1024, bytes(300))
        assert len(writer._shared) <= 512 + 2
    assert sink.size > 10 * 512 * 1024
    writer.finish()
    assert structure_problems(bytes(sink.content)) == []


def test_thousands_of_compressed_clusters_share_a_host_cluster() -> None:
    size = 3200 << 16
    file = image(
        size, [(start, b"-" * (1 << 20)) for start in range(0, size, 1 << 20)], "zstd", cluster_bits=16
    )
    block = u64(file.content, u64(file.content, 48))
    assert int.from_bytes(file.content[block + 2 : block + 4], "big") > 2000
    assert structure_problems(bytes(file.content)) == []


@pytest.mark.parametrize("offset", [-CLUSTER, 1, CLUSTER + 5, 2 * CLUSTER])
def test_a_compressed_cluster_off_the_disk_or_between_clusters_is_refused(offset: int) -> None:
    writer = Qcow2Writer(MemoryFile(), size=CLUSTER + 5, cluster_bits=12)
    with pytest.raises(InvalidArgument, match="whole clusters"):
        writer.write_compressed(offset, b"x")


class Far(MemoryFile):
    """Keeps nothing but where the writes went."""

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.writes.append((offset, len(data)))


@pytest.mark.parametrize(
    ("host_offset", "is_far"), [((1 << 49) - (4 << 30), False), ((1 << 49) - (1 << 30), True)]
)
def test_farther_out_than_an_entry_can_say_data_stands_as_it_is(host_offset: int, is_far: bool) -> None:
    sink = Far()
    writer = Qcow2Writer(sink, size=1 << 51, cluster_bits=21)
    writer._file_end = host_offset
    writer._refcount_blocks.extend([0] * (1 << 8))
    with CompressingWriter(writer, chosen("zlib")) as compressing:
        compressing.write(0, b"-" * (2 << 20))
        compressing._place_down_to(0)
    assert ((host_offset, 2 << 20) in sink.writes) is is_far
    assert writer.compression_type is CompressionType.ZLIB
