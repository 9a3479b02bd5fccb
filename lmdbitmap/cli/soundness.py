"""The verb `check`."""

from __future__ import annotations

import click

from lmdbitmap.cli.options import Session, verb
from lmdbitmap.cli.output import progress, say, say_json
from lmdbitmap.errors import LmdbitmapError, Untrusted
from lmdbitmap.store import Store
from lmdbitmap.upkeep.check import check_store
from lmdbitmap.upkeep.findings import Finding, Gravity


@verb(examples=["lmdbitmap check", "lmdbitmap check --json"])
@click.pass_obj
def check(asked: Session) -> None:
    """Check whether the store is sound, and if not say what to do.

    Nothing is changed, except that an unusable store is made anew, as by every verb that opens it. Exit code 1: the
    store is damaged; 3: it is sound, but a disk needs a full backup.
    """
    with (
        Store.open(asked.store_path) as store,
        progress("checking the store", shown=asked.shows_progress) as report,
    ):
        findings = check_store(store, report)
    if asked.as_json:
        say_json({"store": store.path, "sound": not _damaged(findings), "findings": [*map(_facts, findings)]})
    else:
        for finding in findings:
            say(f"{_WORDS[finding.gravity]}: {finding}")
        if not findings:
            say(f"{store.path}: sound")
    _judge(findings)


_WORDS = {Gravity.NOTE: "note", Gravity.DISTRUST: "full backup needed", Gravity.DAMAGE: "damage"}


def _facts(finding: Finding) -> dict[str, str]:
    return {
        "gravity": finding.gravity.name.lower(),
        "place": finding.place,
        "problem": finding.problem,
        "next_step": finding.next_step,
    }


def _damaged(findings: list[Finding]) -> bool:
    return any(finding.gravity is Gravity.DAMAGE for finding in findings)


def _judge(findings: list[Finding]) -> None:
    gravest = max((finding.gravity for finding in findings), default=Gravity.NOTE)
    if gravest is Gravity.DAMAGE:
        raise LmdbitmapError("the store is damaged", next_step="do what the findings say")
    if gravest is Gravity.DISTRUST:
        raise Untrusted(
            "the store is sound, but not every disk can be trusted", next_step="do what the findings say"
        )
