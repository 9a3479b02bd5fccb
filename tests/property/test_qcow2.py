"""Random chains against a naive model of bytes, and images with lying bytes: `FormatError`, or reads in bounds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from tests.helpers.qcow2_model import (
    MemoryFile,
    compressed_image,
    deflated,
    naive_chain_read,
    structure_problems,
)

MAX_CLUSTERS = 200
"""Of 512 bytes: L2 tables map 64 of them, so that disks have up to four."""


class Step(NamedTuple):
    skipped: int
    clusters: int
    zero: bool


class Layer(NamedTuple):
    size: int
    steps: list[Step]


steps = st.lists(
    st.builds(
        Step,
        st.integers(0, 5) | st.integers(0, 100),
        st.integers(0, 5) | st.integers(60, 140),
        st.booleans(),
    ),
    max_size=12,
)
layers = st.builds(Layer, st.integers(0, MAX_CLUSTERS * 512), steps)
chains = st.lists(layers, min_size=1, max_size=4)
"""Oldest first: the first is the full image."""


def write_chain(
    chain: list[Layer], cluster_bits: int, randomness: random.Random, *, compressed: bool = False
) -> tuple[list[bytes], bytes]:
    """The images, newest first, and what the newest must read as."""
    images: list[bytes] = []
    truth = b""
    for layer in chain:
        write = write_compressed_layer if compressed and randomness.random() < 0.8 else write_layer
        image, truth = write(layer, cluster_bits, truth, bool(images), randomness)
        images.insert(0, image)
    return images, truth


def write_layer(
    layer: Layer, cluster_bits: int, below: bytes, has_backing: bool, randomness: random.Random
) -> tuple[bytes, bytes]:
    sink = MemoryFile()
    backing_file = "parent" if has_backing else None
    writer = Qcow2Writer(sink, size=layer.size, cluster_bits=cluster_bits, backing_file=backing_file)
    truth = put_steps(layer, writer, writer, below, randomness.randbytes)
    assert writer.finish() == sink.size
    return bytes(sink.content), truth


def write_compressed_layer(
    layer: Layer, cluster_bits: int, below: bytes, has_backing: bool, randomness: random.Random
) -> tuple[bytes, bytes]:
    """The same with data of which some clusters shrink, with zlib or zstd."""

    def data_of(length: int) -> bytes:
        parts = (
            randomness.randbytes(randomness.randrange(9000)) + b"-" * randomness.randrange(9000)
            for _ in range(99)
        )
        return b"".join(itertools.chain(parts, [bytes(length)]))[:length]

    sink, compression = MemoryFile(), chosen(randomness.choice(("zlib:1", "zstd:1")))
    backing_file = "parent" if has_backing else None
    writer = Qcow2Writer(
        sink,
        size=layer.size,
        cluster_bits=cluster_bits,
        backing_file=backing_file,
        compression_type=compression.type,
    )
    with CompressingWriter(writer, compression, workers=2) as compressing:
        truth = put_steps(layer, writer, compressing, below, data_of)
        assert compressing.finish() == sink.size
    return bytes(sink.content), truth


def put_steps(
    layer: Layer,
    writer: Qcow2Writer,
    target: Qcow2Writer | CompressingWriter,
    below: bytes,
    data_of: Callable[[int], bytes],
) -> bytes:
    """Give the steps to `target`; what the image must read as."""
    cluster_size = writer.cluster_size
    truth = bytearray(below.ljust(writer.image_size, b"\0")[: writer.image_size])
    cluster = 0
    for step in layer.steps:
        offset = min(
            (cluster + step.skipped) * cluster_size, ceil_div(layer.size, cluster_size) * cluster_size
        )
        offset = min(offset, layer.size)
        end = min(offset + step.clusters * cluster_size, layer.size)
        data = bytes(end - offset) if step.zero else data_of(end - offset)
        if step.zero:
            target.write_zeroes(offset, end - offset)
        else:
            target.write(offset, data)
        padded = min(ceil_div(end, cluster_size) * cluster_size, writer.image_size) if data else end
        truth[offset:padded] = data.ljust(padded - offset, b"\0")
        cluster = ceil_div(end, cluster_size)
    return bytes(truth)


@given(chains, st.integers(9, 11), st.randoms(use_true_random=False))
def test_a_chain_reads_as_the_model_says_and_its_structure_is_sound(
    chain: list[Layer], cluster_bits: int, randomness: random.Random
) -> None:
    images, truth = write_chain(chain, cluster_bits, randomness)
    assert [structure_problems(image) for image in images] == [[]] * len(images)
    assert naive_chain_read(images) == truth
    readers = [Qcow2Reader(MemoryFile(image)) for image in images]
    buffer = bytearray(b"?" * len(truth))
    chain_read_into(readers, memoryview(buffer), 0)
    assert buffer == truth


@given(chains, st.integers(10, 13), st.randoms(use_true_random=False), st.data())
def test_a_compressed_chain_reads_as_the_model_says_in_whole_and_in_part(
    chain: list[Layer], cluster_bits: int, randomness: random.Random, data: st.DataObject
) -> None:
    images, truth = write_chain(chain, cluster_bits, randomness, compressed=True)
    assert [structure_problems(image) for image in images] == [[]] * len(images)
    assert naive_chain_read(images) == truth
    readers = [Qcow2Reader(MemoryFile(image)) for image in images]
    for _ in range(3):
        offset = data.draw(st.integers(0, len(truth)))
        length = data.draw(st.integers(0, len(truth) - offset))
        buffer = bytearray(b"?" * length)
        chain_read_into(readers, memoryview(buffer), offset)
        assert buffer == truth[offset : offset + length]
        assert_seamless(list(chain_extents(readers, offset, length)), offset, length)


@given(chains, st.randoms(use_true_random=False), st.data())
def test_extents_of_any_range_have_no_gap_and_agree_with_the_bytes(
    chain: list[Layer], randomness: random.Random, data: st.DataObject
) -> None:
    images, truth = write_chain(chain, 9, randomness)
    readers = [Qcow2Reader(MemoryFile(image)) for image in images]
    offset = data.draw(st.integers(0, len(truth)))
    length = data.draw(st.integers(0, len(truth) - offset))
    own, resolved = list(readers[0].extents(offset, length)), list(chain_extents(readers, offset, length))
    for found in (own, resolved):
        assert_seamless(found, offset, length)
    assert [run for run in resolved if run.kind is Kind.UNALLOCATED] == []
    expected = b"".join(
        images[run.layer][run.host_offset :][: run.length] if run.kind is Kind.DATA else bytes(run.length)
        for run in resolved
    )
    assert expected == truth[offset : offset + length]


def assert_seamless(found: list[MappedRun], offset: int, length: int) -> None:
    """The runs cover the range without a gap, none is empty, and none could have been joined."""
    position = offset
    for run in found:
        assert run.offset == position
        assert run.length > 0
        position = run.end
    assert position == offset + length
    assert not any(found[index].continues(found[index - 1]) for index in range(1, len(found)))


def one_image() -> bytes:
    """Data, zeroes, gaps, a shared table and a backing name, in 512-byte clusters."""
    randomness = random.Random(5)
    chain = [
        Layer(300 * 512, [Step(0, 3, False)]),
        Layer(300 * 512, [Step(2, 9, False), Step(3, 7, True), Step(30, 200, True), Step(1, 9, False)]),
    ]
    return write_chain(chain, 9, randomness)[0][0]


IMAGE = one_image()

mutations = st.lists(
    st.tuples(
        st.integers(0, 143) | st.integers(0, len(IMAGE) - 1),
        st.binary(min_size=1, max_size=9) | st.sampled_from([b"\xff" * 8, bytes(8), b"\0" * 7 + b"\1"]),
    ),
    min_size=1,
    max_size=6,
)


def read_everything(content: bytes) -> int:
    """Runs read before the image was refused, if it was; `MemoryFile` fails on a read out of bounds."""
    found = 0
    try:
        reader = Qcow2Reader(MemoryFile(content))
        buffer = memoryview(bytearray(4096))
        for run in reader.extents(0, reader.size):
            reader.fill(buffer[: min(run.length, len(buffer))], run)
            found += 1
    except FormatError:
        pass
    return found


def test_the_image_to_be_damaged_reads_well() -> None:
    assert read_everything(IMAGE) == 9


COMPRESSED_IMAGE = compressed_image([deflated(b"a" * n + bytes(4096 - n)) for n in range(1, 9)])


@given(mutations)
def test_lying_bytes_of_a_compressed_image_raise_format_error_or_read_in_bounds(
    changes: list[tuple[int, bytes]],
) -> None:
    content = bytearray(COMPRESSED_IMAGE)
    for offset, raw in changes:
        place = offset % 144 if offset % 3 else 8192 + offset % 64
        content[place : place + len(raw)] = raw
    read_everything(bytes(content))
    assert read_everything(COMPRESSED_IMAGE) == 8


@given(mutations)
def test_lying_bytes_raise_format_error_or_read_in_bounds(changes: list[tuple[int, bytes]]) -> None:
    content = bytearray(IMAGE)
    for offset, raw in changes:
        content[offset : offset + len(raw)] = raw
    read_everything(bytes(content))


@given(st.integers(0, len(IMAGE) - 1))
def test_a_truncated_image_is_refused_at_once(length: int) -> None:
    with pytest.raises(FormatError):
        Qcow2Reader(MemoryFile(IMAGE[:length]))


@given(st.binary(max_size=2000))
def test_arbitrary_bytes_raise_format_error(content: bytes) -> None:
    assert read_everything(b"QFI\xfb\0\0\0\3" + content) == 0
