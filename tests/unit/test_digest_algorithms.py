"""Digests by name: what they compute, and what is said where their package is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lmdbitmap.copying import digest_algorithms
from lmdbitmap.copying.digest_algorithms import DIGEST_BYTES, DigestAlgorithm, named, new_hasher
from lmdbitmap.errors import InvalidArgument, NotFound

SHA256, BLAKE3 = DigestAlgorithm

OF_ABC = {
    SHA256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    BLAKE3: "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85",
}
"""From FIPS 180 and from the authors of BLAKE3."""


def forget_blake3(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed: Python itself refuses to import it."""
    monkeypatch.setitem(sys.modules, "blake3", None)


@pytest.mark.parametrize("algorithm", DigestAlgorithm)
def test_a_digest_is_that_of_the_standard_in_one_piece_or_many(algorithm: DigestAlgorithm) -> None:
    whole, pieces = new_hasher(algorithm), new_hasher(algorithm)
    whole.update(b"abc")
    for piece in (b"a", bytearray(b"b"), memoryview(b"c"), b""):
        pieces.update(piece)
    assert whole.digest() == pieces.digest() == bytes.fromhex(OF_ABC[algorithm])
    assert len(whole.digest()) == DIGEST_BYTES


def test_they_are_known_by_name_and_no_other_is() -> None:
    assert [named("sha256"), named("blake3")] == [SHA256, BLAKE3]
    for name in ("", "SHA256", "md5", "blake2"):
        with pytest.raises(InvalidArgument, match=f"{name!r} is no kind of digest; choose sha256 or blake3"):
            named(name)


def test_the_fastest_is_blake3_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert digest_algorithms.fastest() is BLAKE3
    forget_blake3(monkeypatch)
    assert digest_algorithms.fastest() is SHA256


def test_a_missing_package_is_told_with_what_needs_it_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest_algorithms.require(BLAKE3, "here")
    forget_blake3(monkeypatch)
    digest_algorithms.require(SHA256, "here")
    wanted = "expected the package blake3, which BLAKE3 digests need, found none; "
    with pytest.raises(NotFound) as refused:
        digest_algorithms.require(BLAKE3, "here", instead="leave it")
    assert str(refused.value) == f"here: {wanted}run: pip install 'lmdbitmap[fast]', or leave it"
    with pytest.raises(NotFound) as refused:
        named("blake3")
    assert str(refused.value) == f"digest blake3: {wanted}run: pip install 'lmdbitmap[fast]'"


def test_the_package_is_not_imported_before_a_digest_is_wanted() -> None:
    code = (
        "import sys, lmdbitmap\n"
        "from lmdbitmap.backups import backup\n"
        "from lmdbitmap.copying import digest_algorithms as known\n"
        "from lmdbitmap.repository import verify\n"
        "from lmdbitmap.restoring import restore\n"
        "known.new_hasher(known.DigestAlgorithm.SHA256)\n"
        "print('blake3' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("False\n", "")
