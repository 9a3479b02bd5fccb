"""Which compressions there are, what they make of a cluster, and what is said where the library is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zlib

import pytest

from lmdbitmap.errors import InvalidArgument, NotFound
from lmdbitmap.qcow2 import Compression, CompressionType
from lmdbitmap.qcow2.compression import chosen, compressor, decompressed

ZLIB, ZSTD = CompressionType
CLUSTER = 65536


@pytest.mark.parametrize(
    ("text", "kind", "level"),
    [("zlib", ZLIB, 6), ("zlib:1", ZLIB, 1), ("zlib:9", ZLIB, 9), ("zstd", ZSTD, 3), ("zstd:22", ZSTD, 22)],
)
def test_a_compression_is_named_with_or_without_its_level(
    text: str, kind: CompressionType, level: int
) -> None:
    assert chosen(text) == Compression(kind, level)


@pytest.mark.parametrize(
    "text",
    ["", "lz4", "ZLIB", "zlib:", "zlib:0", "zlib:10", "zlib:-1", "zlib:x", "zlib: 1", "zlib:²", "zstd:23", "zstd:0003",
     "zstd:3:3", ":3", "zlib:" + "9" * 5000],
)  # fmt: skip
def test_anything_else_is_refused_with_what_there_is(text: str) -> None:
    with pytest.raises(InvalidArgument, match="choose zlib or zstd"):
        chosen(text)


@pytest.mark.parametrize("text", ["zlib:1", "zlib:9", "zstd:1", "zstd:19"])
@pytest.mark.parametrize("length", [1024, CLUSTER, 2 << 20])
def test_what_was_compressed_decompresses(text: str, length: int) -> None:
    compression = chosen(text)
    data = os.urandom(length // 2) + bytes(length - length // 2)
    packed = compressor(compression)(data)
    assert len(packed) < length
    assert decompressed(compression.type, packed, length) == data
    assert decompressed(compression.type, packed + b"\xff" * 500, length) == data
    assert decompressed(compression.type, packed, length + 1) is None
    assert decompressed(compression.type, packed[:-1], length + 1) is None


def test_zlib_streams_keep_to_the_window_that_qemu_has() -> None:
    """4 KiB: what repeats after more than that is stored again."""
    far = os.urandom(8192) * 2
    packed = compressor(chosen("zlib:9"))(far)
    assert len(packed) > len(far)
    assert zlib.decompress(packed, -12) == far


@pytest.mark.parametrize("kind", [ZLIB, ZSTD])
def test_many_threads_share_a_compressor(kind: CompressionType) -> None:
    compress = compressor(chosen(kind.value))
    clusters = [os.urandom(9) * 1000 for _ in range(40)]
    packed: dict[int, bytes] = {}

    def work(first: int) -> None:
        for number in range(first, len(clusters), 4):
            packed[number] = compress(clusters[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [decompressed(kind, packed[number], 9000) for number in range(40)] == clusters


def test_without_the_library_zstd_is_refused_with_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = compressor(chosen("zstd"))(bytes(CLUSTER))
    for package in ("backports", "compression"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NotFound, match=r"run: pip install 'lmdbitmap\[zstd\]'$"):
        chosen("zstd")
    with pytest.raises(NotFound, match="zstd needs a library"):
        decompressed(ZSTD, packed, CLUSTER)
    assert chosen("zlib").type is ZLIB


def test_zstd_is_not_loaded_before_it_is_needed() -> None:
    code = (
        "import sys, lmdbitmap.backups.backup, lmdbitmap.restoring.restore;"
        "from lmdbitmap.qcow2.compression import chosen;"
        "chosen('zlib'); print('zlib' in sys.modules, [name for name in sys.modules if 'zstd' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("True []\n", "")
