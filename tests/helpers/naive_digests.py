"""Digests of chunks, each of bytes that are there at once: what the code that reads a file in threads must find."""

from __future__ import annotations

import hashlib

from blake3 import blake3

from lmdbitmap.copying.digest_algorithms import DigestAlgorithm


def naive_digest(algorithm: DigestAlgorithm, data: bytes) -> bytes:
    return blake3(data).digest() if algorithm is DigestAlgorithm.BLAKE3 else hashlib.sha256(data).digest()


def naive_digests(algorithm: DigestAlgorithm, content: bytes, chunk_size: int) -> bytes:
    chunks = [content[start : start + chunk_size] for start in range(0, len(content), chunk_size)]
    return b"".join(naive_digest(algorithm, chunk) for chunk in chunks)
