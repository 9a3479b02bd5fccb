"""A sample of the damages of bit_rot.py, the rest is `make torture`; and that the laboratory sees what it looks for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.bit_rot import DAMAGES, make, quick_place, verdict_of, verdicts
from tests.helpers.support import PATIENCE_SECONDS, run

SAMPLE = 30
SEED = 20


def test_no_damaged_page_makes_a_written_block_clean() -> None:
    with quick_place() as folder:
        said = list(verdicts(SEED, SAMPLE, folder))
    told = [verdict_of(verdict) for _, verdict in said]
    assert len(told) == SAMPLE
    assert len({kind for kind, _ in said}) > len(DAMAGES) // 2
    assert {"right", "refused"} <= set(told)
    assert "silent" not in told, [verdict for _, verdict in said if verdict_of(verdict) == "silent"]


@pytest.fixture
def sound() -> Iterator[Path]:
    with quick_place() as folder:
        make(folder / "sound")
        yield folder / "sound"


def test_undamaged_store_is_right(sound: Path) -> None:
    """Otherwise every verdict would be of the laboratory, not of the damage."""
    assert judged(sound) == "right"


@pytest.mark.parametrize("blinded", ["tallies", "pages and stamps"])
def test_laboratory_sees_a_loss_that_the_product_does_not(sound: Path, blinded: str) -> None:
    """A lost record with the tallies made to fit is what damage would do to a product without them."""
    lose = f"""
import lmdb
from lmdbitmap.storage import schema, tally
with lmdb.open({str(sound / "store" / "lmdb")!r}, max_dbs=16) as environment:
    regions, tallies = (environment.open_db(name) for name in (b"regions", b"tallies"))
    with environment.begin(write=True) as txn:
        cursor = txn.cursor(db=regions)
        assert cursor.last()
        key, value = cursor.item()
        cursor.delete()
        if {blinded == "tallies"}:
            group = tally.group_key("regions", key)
            known = tally.decode(group, txn.get(group, db=tallies))
            left = known.minus(tally.of([(key, value)]))
            txn.put(group, tally.encode(group, left), db=tallies)
        txn.put(tally.STAMP_KEY, tally.encode(tally.STAMP_KEY, tally.Tally(txn.id())), db=tallies)
"""
    run(sys.executable, "-c", lose)
    assert verdict_of(judged(sound)) == ("silent" if blinded == "tallies" else "dirty")


def judged(folder: Path) -> str:
    """In a process of its own: LMDB may end it."""
    script = f"""
import json, logging
from pathlib import Path
from tests.crash.bit_rot import judge
logging.disable()
folder = Path({str(folder)!r})
print(judge(folder, json.loads((folder / "truth").read_text())))
"""
    return run(sys.executable, "-c", script, timeout=3 * PATIENCE_SECONDS).stdout.strip()
