"""What is fuzzed. A target takes bytes and raises for a defect only.

A defect is any error but the documented one, a round trip that breaks, or a promise that does not hold: what is
damaged is dirty, what is accepted is written again alike, pieces of a stream do what the stream does. A hang
and an allocation out of proportion are defects too; the runner sets the limits that make them fail.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.diffs import rbd_diff
from tests.fuzz.far_answers import far_answers
from tests.fuzz.far_server import far_server, uris
from tests.fuzz.flat_files import flat_file, flat_import
from tests.fuzz.images import qcow2
from tests.fuzz.manifests import manifest_bytes
from tests.fuzz.notes import notes
from tests.fuzz.records import store_records
from tests.fuzz.sizes import sizes
from tests.fuzz.streams import control_lines, handshake
from tests.fuzz.transmission import requests

CORPUS = Path(__file__).parent / "corpus"


class Target(NamedTuple):
    """`runs` is how many inputs `make fuzz` gives it when nobody says otherwise."""

    check: Callable[[bytes], None]
    runs: int


TARGETS = {
    "flat-file": Target(flat_file, 550_000),
    "flat-import": Target(flat_import, 50_000),
    "records": Target(store_records, 1_200_000),
    "qcow2": Target(qcow2, 600_000),
    "manifest": Target(manifest_bytes, 550_000),
    "notes": Target(notes, 300_000),
    "rbd-diff": Target(rbd_diff, 500_000),
    "handshake": Target(handshake, 700_000),
    "requests": Target(requests, 600_000),
    "far-server": Target(far_server, 300_000),
    "far-answers": Target(far_answers, 300_000),
    "uris": Target(uris, 200_000),
    "control": Target(control_lines, 400_000),
    "sizes": Target(sizes, 1_000_000),
}


def corpus_of(target: str) -> list[Path]:
    return sorted((CORPUS / target).iterdir())
