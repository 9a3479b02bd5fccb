"""The verb `holds`, and how other verbs show the holders of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import click

from lmdbitmap.backups import consumers
from lmdbitmap.backups.consumers import Holder
from lmdbitmap.cli.facts import reason_facts
from lmdbitmap.cli.options import Session, verb
from lmdbitmap.cli.output import say, say_json, say_table
from lmdbitmap.cli.sizes import format_time, iso_time
from lmdbitmap.notes.holds import Hold
from lmdbitmap.store import Store

_DIGITS = 8
"""How many digits of a uuid are shown to people."""
_NOTED_NOWHERE = {
    "person": "the person who made it",
    "tracker": "the tracker",
    "unknown": "a backup, a sync or a stream that left no note",
}


@verb(examples=["lmdbitmap holds sda", "lmdbitmap holds sda --lapse 400", "lmdbitmap holds sda --lapse 0"])
@click.argument("name")
@click.option(
    "--lapse", "days", metavar="DAYS", type=click.IntRange(min=0),
    help="From now on, the hold of a repository lapses if it was not used for that many days; 0 is never."
    " [default: 180]",
)  # fmt: skip
@click.pass_obj
def holds(asked: Session, name: str, days: int | None) -> None:
    """List the repositories that hold checkpoints of a disk.

    Each repository counts from its own checkpoint. The path shown is where the repository was last used; nothing is
    read there. A hold lapses after the given number of days without a backup: the next backup or checkpoint of the disk
    merges away what it held alone. If that repository is used again, its next backup is a rescan. `forget NAME
    --repository` does that by hand.
    """
    with Store.open(asked.store_path) as store:
        if days is not None:
            consumers.set_hold_lapse_days(store, name, days)
        found = consumers.holds_of(store, name)
        days = consumers.hold_lapse_days(store, name)
    if asked.as_json:
        say_json({"disk": name, "lapse_days": days, "holds": [hold_facts(hold) for hold in found]})
        return
    if found:
        say_table(("uuid", "last used", "holds", "repository"), map(_row, found))
        say("")
    say("holds do not lapse" if days == 0 else f"a hold lapses after {days} days without a backup")


def _row(hold: Hold) -> list[str]:
    words = [checkpoint.name for checkpoint in hold.checkpoints]
    if hold.under_way is not None:
        words.append(f"{hold.under_way.name or 'one to come'} (under way, or left by a run that died)")
    if hold.ended is not None:
        words = [f"nothing: {hold.ended.words}"]
    return [
        str(hold.holder)[:_DIGITS],
        format_time(hold.used_ns),
        ", ".join(words),
        "a stream" if hold.repository is None else hold.repository,
    ]


def hold_facts(hold: Hold) -> dict[str, object]:
    return {
        "uuid": str(hold.holder),
        "repository": hold.repository,
        "used": iso_time(hold.used_ns),
        "checkpoints": [checkpoint.name for checkpoint in hold.checkpoints],
        "under_way": None if hold.under_way is None else hold.under_way.name or None,
        "ended": reason_facts(hold.ended),
    }


def holder_words(holders: Iterable[Holder]) -> str:
    return "; ".join(map(_words, holders))


def _words(holder: Holder) -> str:
    used = "" if holder.used_ns is None else f", last used {format_time(holder.used_ns)}"
    if holder.kind == "repository":
        return f"repository {holder.place} ({str(holder.uuid)[:_DIGITS]}){used}"
    if holder.kind == "run":
        return f"a run under way, or one that died{used}"
    return _NOTED_NOWHERE.get(holder.kind) or f"copy {holder.place}"


def holder_facts(holder: Holder) -> dict[str, object]:
    return {
        "kind": holder.kind,
        "uuid": None if holder.uuid is None else str(holder.uuid),
        "place": holder.place,
        "used": None if holder.used_ns is None else iso_time(holder.used_ns),
    }
