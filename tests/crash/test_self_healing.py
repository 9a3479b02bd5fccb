"""After any trouble the next command of any kind works, and nobody cleans up by hand.

First a store whose environment is damaged or gone: whoever opens it makes it anew, with all of its disks. Then every
state that trouble leaves behind, and what each verb does in it; docs/store.md has the table.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import lmdb
import pytest

from lmdbitmap.errors import AlreadyExists, FormatError, NotFound, StorageError
from lmdbitmap.extents import Trust
from lmdbitmap.storage import creating, environment, lmdb_tree, owner_file, presence, salvage, schema, tally
from lmdbitmap.storage.lmdb_errors import DamagedStore
from lmdbitmap.storage.salvage import SALVAGED
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import chain, session
from lmdbitmap.upkeep.check import check_store
from lmdbitmap.upkeep.findings import Gravity
from tests.crash.dying import Death, Deaths
from tests.crash.lives import ROT
from tests.helpers.backed_up import INCREMENTAL, RESCAN, BackedUpDisk
from tests.helpers.support import make_raw_image, run, spawn
from tests.helpers.tracked import NAME, quick_folder

BLOCK = 4096
SIZE = 64 * BLOCK + 512


@pytest.fixture
def tracked() -> Iterator[BackedUpDisk]:
    """Backed up once, and written to since."""
    with quick_folder() as folder, closing(BackedUpDisk(folder, SIZE)) as tracked:
        tracked.write(b"old", 0)
        tracked.backup()
        tracked.write(b"new", 9 * BLOCK)
        yield tracked


# --- a store that is damaged ---


def data_of(path: str) -> Path:
    return Path(path, "lmdb", "data.mdb")


def overwrite(path: str, content: bytes | bytearray) -> None:
    data_of(path).write_bytes(content)


def cut_in_half(path: str) -> None:
    os.truncate(data_of(path), data_of(path).stat().st_size // 2)


def zero_pages(path: str) -> None:
    """All but the meta pages."""
    with data_of(path).open("r+b") as file:
        file.seek(2 * 4096)
        file.write(bytes(data_of(path).stat().st_size - 2 * 4096))


def take_away(path: str) -> None:
    shutil.rmtree(os.path.join(path, "lmdb"))


def change(path: str, database: str, key: bytes, value: bytes | None) -> None:
    """Behind our back, so that no tally knows of it."""
    with lmdb.open(os.path.join(path, "lmdb"), max_dbs=16, create=False) as theirs:
        found, tallies = (theirs.open_db(name.encode(), create=False) for name in (database, "tallies"))
        with theirs.begin(write=True) as txn:
            assert txn.delete(key, db=found) if value is None else txn.put(key, value, db=found)
            txn.put(tally.STAMP_KEY, tally.encode(tally.STAMP_KEY, tally.Tally(txn.id())), db=tallies)


def lose_a_database(path: str) -> None:
    with (
        lmdb.open(os.path.join(path, "lmdb"), max_dbs=16, create=False) as theirs,
        theirs.begin(write=True) as txn,
    ):
        txn.drop(theirs.open_db(b"checkpoints", txn=txn))


DAMAGES: dict[str, Callable[[str], None]] = {
    "garbage": lambda path: overwrite(path, ROT),
    "empty": lambda path: overwrite(path, b""),
    "zeroes": lambda path: overwrite(path, bytes(20 * 4096)),
    "cut": cut_in_half,
    "zeroed pages": zero_pages,
    "no file": lambda path: data_of(path).unlink(),
    "no folder": take_away,
    "header lost": lambda path: change(path, "meta", b"store", None),
    "description lost": lambda path: change(path, "disks", describe(path).uuid.bytes, None),
    "description damaged": lambda path: change(path, "disks", describe(path).uuid.bytes, b"rot"),
    "database lost": lose_a_database,
}


def describe(path: str) -> Disk:
    [disk] = salvage.known_disks(path)
    return disk


def damaged(tracked: BackedUpDisk, damage: str) -> None:
    tracked.store.close()
    DAMAGES[damage](tracked.store.path)


def reopened(tracked: BackedUpDisk) -> Store:
    tracked.store = Store.open(tracked.store.path)
    return tracked.store


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_store_is_made_anew_with_its_disks(
    tracked: BackedUpDisk, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = tracked.disk()
    damaged(tracked, damage)
    reopened(tracked)
    after = tracked.disk()
    for field in ("uuid", "name", "image", "size", "granularity_bits", "durability", "policy", "created_ns"):
        assert getattr(after, field) == getattr(before, field), field
    assert (after.epoch_number, after.epoch_reason) == (2, SALVAGED)
    assert tracked.changes().standing == (Trust.UNTRUSTED, SALVAGED)
    assert len(tracked.stored_dirt()) == before.geometry.block_count
    assert caplog.text.count("the store was made anew with its disks (sda)") == 1
    backs_up_as_ever(tracked)


def backs_up_as_ever(tracked: BackedUpDisk) -> None:
    """The next backup is a rescan that says why, and the one after it an increment."""
    entry = tracked.backup()
    assert (entry.type_actual, entry.reason and entry.reason.words) == (RESCAN, SALVAGED)
    assert tracked.restored() == tracked.content()
    tracked.write(b"later", 20 * BLOCK)
    assert tracked.backup().type_actual is INCREMENTAL
    assert tracked.restored() == tracked.content()
    assert {finding.gravity for finding in check_store(tracked.store)} <= {Gravity.NOTE}


def test_damaged_store_is_kept_and_check_says_so(tracked: BackedUpDisk) -> None:
    damaged(tracked, "garbage")
    notes = [finding for finding in check_store(reopened(tracked)) if finding.gravity is Gravity.NOTE]
    [kept] = Path(tracked.store.path).glob("lmdb.damaged-*")
    assert (kept / "data.mdb").read_bytes() == ROT
    assert [note.place for note in notes] == [str(kept)]
    assert "remove it once you do not want to look at it" in notes[0].next_step


def test_store_that_is_damaged_again_at_once_keeps_both(tracked: BackedUpDisk) -> None:
    for _ in range(2):
        damaged(tracked, "garbage")
        reopened(tracked)
    assert len(list(Path(tracked.store.path).glob("lmdb.damaged-*"))) == 2


def test_everything_of_several_disks_is_put_back(tracked: BackedUpDisk) -> None:
    image = make_raw_image(tracked.folder / "other.raw", 3 * BLOCK)
    session.add(
        tracked.store, "sdb", str(image), granularity_bits=9, durability=schema.DEFERRED, policy=schema.STRICT
    )
    damaged(tracked, "garbage")
    with reopened(tracked).read() as reader:
        found = [
            (disk.name, disk.size, disk.granularity_bits, disk.durability, disk.policy)
            for disk in reader.disks()
        ]
    assert found[1] == ("sdb", 3 * BLOCK, 9, schema.DEFERRED, schema.STRICT)
    assert [disk[0] for disk in found] == [NAME, "sdb"]


def test_image_that_grew_is_put_back_as_it_is_now(tracked: BackedUpDisk) -> None:
    tracked.resize(2 * SIZE)
    damaged(tracked, "garbage")
    reopened(tracked)
    backs_up_as_ever(tracked)
    assert tracked.disk().size == 2 * SIZE


def test_disk_that_is_added_where_the_environment_is_gone_finds_the_others(tracked: BackedUpDisk) -> None:
    damaged(tracked, "no folder")
    Path(tracked.store.path, "sda.dbm").touch()  # what is kept beside it is no reason to name another folder
    with closing(Store.create(tracked.store.path)) as tracked.store, tracked.store.read() as reader:
        assert [disk.name for disk in reader.disks()] == [NAME]
    with pytest.raises(AlreadyExists):
        session.add(reopened(tracked), NAME, str(tracked.image), granularity_bits=12)


def test_owner_file_from_before_descriptions_gets_one_at_the_next_attach(tracked: BackedUpDisk) -> None:
    path = tracked.store.owner_path(tracked.disk().uuid)
    os.truncate(path, 8192)
    assert owner_file.description(path) is None
    tracked.write(b"newer", 0)
    damaged(tracked, "garbage")
    reopened(tracked)
    backs_up_as_ever(tracked)


@pytest.mark.parametrize("offset", [8192, 8200, 8204, 8300, 16380])
def test_damaged_description_is_none_and_hides_no_other(
    tracked: BackedUpDisk, offset: int, caplog: pytest.LogCaptureFixture
) -> None:
    other = session.add(
        tracked.store, "sdb", str(make_raw_image(tracked.folder / "other.raw", BLOCK)), granularity_bits=9
    )
    with open(tracked.store.owner_path(tracked.disk().uuid), "r+b") as file:
        file.seek(offset)
        file.write(b"\xff")
    damaged(tracked, "garbage")
    with reopened(tracked).read() as reader:
        assert [disk.uuid for disk in reader.disks()] == [other.uuid]
    assert "1 disk could not be put back" in caplog.text


def test_damaged_store_without_its_folders_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "store")
    Store.create(path).close()
    overwrite(path, ROT)
    for name in creating.FOLDERS:
        os.rmdir(os.path.join(path, name))
    Store.open(path).close()
    assert "made anew with its disks (none)" in caplog.text


def test_of_two_descriptions_of_one_name_or_image_the_newest_counts(tracked: BackedUpDisk) -> None:
    """What a death in the middle of an `rm` can leave."""
    disk = tracked.disk()
    for older in (replace(disk, name="older"), replace(disk, image="/older")):
        older = replace(schema.portrait(older), uuid=uuid4(), created_ns=1)
        owner_file.create(tracked.store.owner_path(older.uuid), description=schema.encode(older))
    assert [known.uuid for known in salvage.known_disks(tracked.store.path)] == [disk.uuid]


# --- what is not healed ---


def test_environment_of_another_program_beside_our_disks_is_left_alone(tracked: BackedUpDisk) -> None:
    """It is sound: somebody put it there, and may be using it."""
    damaged(tracked, "no folder")
    with (
        lmdb.open(os.path.join(tracked.store.path, "lmdb"), max_dbs=4) as theirs,
        theirs.begin(write=True) as txn,
    ):
        txn.put(b"key", b"value")
    before = data_of(tracked.store.path).read_bytes()
    with pytest.raises(FormatError, match="another program's environment"):
        reopened(tracked)
    assert data_of(tracked.store.path).read_bytes() == before


def test_garbage_that_was_no_store_of_ours_is_left_alone(tmp_path: Path) -> None:
    data = tmp_path / "lmdb" / "data.mdb"
    data.parent.mkdir()
    data.write_bytes(ROT)
    with pytest.raises(FormatError, match="name another folder"):
        Store.open(str(tmp_path))
    assert data.read_bytes() == ROT
    assert list(tmp_path.glob("lmdb*")) == [tmp_path / "lmdb"]


def test_folder_without_disks_is_no_store_that_was_lost(tmp_path: Path) -> None:
    (tmp_path / "owners").mkdir()
    with pytest.raises(NotFound):
        Store.open(str(tmp_path))


# --- others ---

HOLDER = """
import sys
from lmdbitmap.store import Store
store = Store.open(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_store_that_somebody_has_open_is_left_to_him_and_says_what_to_do(tracked: BackedUpDisk) -> None:
    tracked.store.close()
    waiting = f"import time\n{HOLDER.replace('sys.stdin.read()', 'time.sleep(600)')}"
    with spawn(sys.executable, "-c", waiting, tracked.store.path) as holder:
        holder.wait_for_line("^open$")
        with data_of(tracked.store.path).open("r+b") as file:
            file.write(bytes(8192))
        with pytest.raises(FormatError, match="stop and start every program that uses the store"):
            reopened(tracked)
        assert list(Path(tracked.store.path).glob("lmdb.damaged-*")) == []
    reopened(tracked)
    backs_up_as_ever(tracked)


@pytest.mark.parametrize("open_it", [Store.open, Store.create])
def test_store_that_is_gone_is_made_anew_once_nobody_has_it_open(
    tracked: BackedUpDisk, open_it: Callable[[str], Store]
) -> None:
    """What a process wrote to a file without a name would be lost."""
    path = tracked.store.path
    tracked.store.close()
    waiting = f"import time\n{HOLDER.replace('sys.stdin.read()', 'time.sleep(600)')}"
    with spawn(sys.executable, "-c", waiting, path) as holder:
        holder.wait_for_line("^open$")
        take_away(path)
        with pytest.raises(FormatError, match="stop and start every program that uses the store"):
            open_it(path)
        assert creating.environment_file(path) is None
    open_it(path).close()
    reopened(tracked)
    backs_up_as_ever(tracked)


def test_many_that_open_it_at_once_heal_it_once(tracked: BackedUpDisk) -> None:
    damaged(tracked, "garbage")
    script = "import sys; from lmdbitmap.store import Store; print(Store.open(sys.argv[1]).uuid)"
    with ExitStack() as stack:
        children = [
            stack.enter_context(spawn(sys.executable, "-c", script, tracked.store.path)) for _ in range(5)
        ]
        said = {child.wait_for_line("^[0-9a-f-]{36}$").group() for child in children}
    assert said == {str(reopened(tracked).uuid)}
    assert len(list(Path(tracked.store.path).glob("lmdb.damaged-*"))) == 1


def test_whoever_comes_second_finds_it_healed_and_leaves_it(tracked: BackedUpDisk) -> None:
    """He saw the damage too, and had to wait for his turn."""
    damaged(tracked, "garbage")
    looked_at = creating.environment_file(tracked.store.path)
    healed = reopened(tracked).uuid
    tracked.store.close()
    seen = DamagedStore(tracked.store.path, expected="a store", found="garbage")
    salvage.heal(tracked.store.path, seen, looked_at)
    assert reopened(tracked).uuid == healed


def test_server_whose_store_is_damaged_lets_its_guest_write_and_heals_when_it_starts_again(
    tracked: BackedUpDisk,
) -> None:
    disk = tracked.attach()
    with tracked.store._environment.transaction(write=True) as txn:
        txn.put(tally.STAMP_KEY, b"rot", db=tracked.store._environment.databases["tallies"])
    disk.pwrite(b"guest", 30 * BLOCK)
    assert disk.standing().reason is not None
    with pytest.raises(FormatError, match="stop and start every program that uses the store"):
        tracked.disk()
    disk.detach()
    tracked.store.close()
    reopened(tracked)
    entry = tracked.backup()
    assert entry.type_actual is RESCAN
    assert entry.reason is not None
    assert "tracking failed" in entry.reason.words
    assert tracked.restored() == tracked.content()
    assert tracked.content()[30 * BLOCK :][:5] == b"guest"


# --- deaths ---


def test_death_while_healing_is_healed_by_the_next_command(deaths: Deaths) -> None:
    kept = 0
    for death in deaths("healing"):
        path = death.folder / "store"
        with closing(Store.open(str(path))) as store, store.read() as reader:
            disk = chain.find_disk(reader, NAME)
        assert (disk.epoch_number, disk.epoch_reason) == (2, SALVAGED), death
        assert [data.read_bytes() == ROT for data in path.glob("lmdb.damaged-*/data.mdb")] == [True], death
        kept += 1
        is_left_to_nobody(death)
    assert kept > 5


def is_left_to_nobody(death: Death) -> None:
    left = {name.partition("-")[0] for name in os.listdir(death.folder / "store")}
    assert "lmdb.new" not in left, death
    assert left <= {
        "README",
        ".nobackup",
        "control",
        "owners",
        "syncs",
        "holds",
        "lmdb",
        "lmdb.damaged",
        "users",
        "newest",
    }, death


# --- a file too large to be looked through each time ---

SHORT_LIFE = """
import os, sys
from lmdbitmap.storage import environment
environment.LOOKED_THROUGH_BYTES = 0
from lmdbitmap.store import Store
store = Store.open(sys.argv[1])
store.close() if sys.argv[2] == "well" else None
os._exit(0)
"""


def live_shortly(path: str, end: str) -> None:
    run(sys.executable, "-c", SHORT_LIFE, path, end)


@pytest.mark.parametrize(("ends", "looks"), [(["dies", "dies"], True), (["dies", "well", "dies"], False)])
def test_large_store_is_looked_through_once_its_openers_die_young(
    tracked: BackedUpDisk, monkeypatch: pytest.MonkeyPatch, ends: list[str], looks: bool
) -> None:
    """A damaged page of LMDB's own may be what they die of, again and again."""
    monkeypatch.setattr(environment, "LOOKED_THROUGH_BYTES", 0)
    looked: list[str] = []
    problems = lmdb_tree.structural_problems

    def look(data_path: str) -> list[str]:
        looked.append(data_path)
        return problems(data_path)

    monkeypatch.setattr(lmdb_tree, "structural_problems", look)
    path = tracked.store.path
    tracked.close()
    for end in ends:
        live_shortly(path, end)
    with closing(Store.open(path)):
        assert bool(looked) is looks
    with closing(Store.open(path)):  # the last one ended well
        assert bool(looked) is looks


def point_to_a_page(data: bytearray, bitmap_id: int) -> None:
    """LMDB takes the armed mask of a record for the number of a page."""
    data[data.rindex(schema.region_key(bitmap_id, 1)) - 4] = 1


def spoil_branches(data: bytearray, bitmap_id: int) -> None:
    for page in range(2 * 4096, len(data), 4096):
        data[page + 10] |= 0x10 * (data[page + 10] == 1)


def cut_branches(data: bytearray, bitmap_id: int) -> None:
    for page in range(2 * 4096, len(data), 4096):
        data[page + 13] ^= 2 * (data[page + 10] == 1)


@pytest.mark.parametrize("spoil", [point_to_a_page, spoil_branches, cut_branches])
def test_large_store_is_looked_through_once_lmdb_came_upon_damage(
    tracked: BackedUpDisk, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[bytearray, int], None]
) -> None:
    """The error says that it is made anew when all programs are stopped and started."""
    monkeypatch.setattr(environment, "LOOKED_THROUGH_BYTES", 0)
    with tracked.store.read() as reader:
        bitmap_id = reader.checkpoints(tracked.disk().uuid)[-1].bitmap_id

    def put(writer: Writer) -> None:
        for region in range(1, 60):
            writer.put_region(bitmap_id, region, 1 << 60, schema.ALL_CLEAN_BITS)

    tracked.store.update(put)
    tracked.store.close()
    data = bytearray(data_of(tracked.store.path).read_bytes())
    spoil(data, bitmap_id)
    overwrite(tracked.store.path, data)
    with (
        reopened(tracked),
        pytest.raises((FormatError, StorageError), match="made anew"),
        tracked.store.read() as reader,
    ):
        list(reader.regions(bitmap_id))
    reopened(tracked)
    backs_up_as_ever(tracked)


def test_large_store_with_a_wrong_root_is_not_called_another_programs(
    tracked: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both meta pages give the page of the databases' names; here, that of another leaf."""
    monkeypatch.setattr(environment, "LOOKED_THROUGH_BYTES", 0)
    with tracked.store.read() as reader:
        record = schema.region_key(reader.checkpoints(tracked.disk().uuid)[-1].bitmap_id, 0)
    tracked.store.close()
    data = bytearray(data_of(tracked.store.path).read_bytes())
    for root in (128, 4096 + 128):
        data[root : root + 8] = (data.rindex(record) // 4096).to_bytes(8, "little")
    overwrite(tracked.store.path, data)
    reopened(tracked)
    backs_up_as_ever(tracked)


def test_large_store_is_looked_through_once_more_if_that_was_interrupted(
    tracked: BackedUpDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take minutes, and a service manager's patience may be shorter."""
    monkeypatch.setattr(environment, "LOOKED_THROUGH_BYTES", 0)
    looked: list[str] = []

    def interrupted(path: str) -> None:
        looked.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "require_sound_tree", interrupted)
    path = tracked.store.path
    tracked.close()
    Path(path, presence.USERS).write_bytes(bytes([presence.SICK]))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Store.open(path)
    assert len(looked) == 2
