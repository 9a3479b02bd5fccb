"""The part of qcow2 version 3 that backups are made of: written in one pass, read back, stacked in chains.

One file is one restore point. Clusters may be compressed. Extended L2 entries, encryption and external data files are
neither written nor read. See docs/qcow2.md.
"""

from __future__ import annotations

from lmdbitmap.qcow2.chain import chain_extents, chain_read_into
from lmdbitmap.qcow2.compressing import CompressingWriter
from lmdbitmap.qcow2.compression import Compression
from lmdbitmap.qcow2.layout import (
    DEFAULT_CLUSTER_BITS,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    CompressionType,
    Header,
)
from lmdbitmap.qcow2.reader import Kind, MappedRun, Qcow2Reader, ReadableFile
from lmdbitmap.qcow2.writer import Qcow2Writer, WritableFile

__all__ = [
    "DEFAULT_CLUSTER_BITS",
    "MAX_CLUSTER_BITS",
    "MIN_CLUSTER_BITS",
    "CompressingWriter",
    "Compression",
    "CompressionType",
    "Header",
    "Kind",
    "MappedRun",
    "Qcow2Reader",
    "Qcow2Writer",
    "ReadableFile",
    "WritableFile",
    "chain_extents",
    "chain_read_into",
]
