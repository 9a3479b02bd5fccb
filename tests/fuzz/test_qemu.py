"""Where our reader and QEMU both accept an image, honest or not, they read the same bytes."""

from __future__ import annotations

import random
from pathlib import Path

from lmdbitmap.errors import FormatError
from lmdbitmap.qcow2 import Qcow2Reader, chain_read_into
from tests.fuzz.images import SMALL_DISK, images_of
from tests.fuzz.inputs import changed, chosen_seed
from tests.fuzz.targets import corpus_of
from tests.helpers.qcow2_model import MemoryFile
from tests.helpers.support import requires, run

pytestmark = requires("qemu-img")

HONEST = {"empty-disk", "full", "zlib-clusters", "zstd-clusters"}
CHANGES = 30
"""Changed images that our reader accepts, each of which QEMU is asked about."""


def contents_of(image: bytes) -> bytes | None:
    """What a full image of a small disk reads as; None where it is refused, or stands on another."""
    try:
        reader = Qcow2Reader(MemoryFile(image))
        if reader.backing_file is not None or reader.size > SMALL_DISK or reader.size % 512:
            return None
        buffer = bytearray(reader.size)
        chain_read_into([reader], memoryview(buffer), 0)
    except FormatError:
        return None
    return bytes(buffer)


def contents_by_qemu(image: bytes, folder: Path) -> bytes | None:
    path, raw = folder / "image.qcow2", folder / "image.raw"
    path.write_bytes(image)
    done = run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw, check=False)
    return raw.read_bytes() if done.returncode == 0 else None


def test_honest_images_of_the_corpus_pass_the_check_of_qemu(tmp_path: Path) -> None:
    checked = 0
    for path in corpus_of("qcow2"):
        [image, *_] = images_of(path.read_bytes())[2]
        if path.name in HONEST:
            (tmp_path / path.name).write_bytes(image)
            run("qemu-img", "check", "-f", "qcow2", tmp_path / path.name)
            assert contents_of(image) == contents_by_qemu(image, tmp_path)
            checked += 1
    assert checked == len(HONEST)


def test_changed_images_that_both_accept_read_the_same(tmp_path: Path) -> None:
    seed = chosen_seed()
    randomness = random.Random(seed)
    inputs = [path.read_bytes() for path in corpus_of("qcow2")]
    compared = asked = 0
    while asked < CHANGES:
        image = images_of(changed(randomness.choice(inputs), randomness.choice(inputs), randomness))[2][-1]
        ours = contents_of(image)
        if ours is not None:
            asked += 1
            theirs = contents_by_qemu(image, tmp_path)
            assert theirs in (None, ours), f"seed {seed}: {image.hex()}"
            compared += theirs is not None
    assert compared > 0
