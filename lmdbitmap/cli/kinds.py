"""The kinds of backup, with an option for each. Two different ones are refused, wherever each of them came from."""

from __future__ import annotations

import functools
from typing import Any, Final

import click

from lmdbitmap.cli.options import Function

KINDS: Final = {
    "full": "Copy everything.",
    "incremental": "Copy what changed since the last backup. If that is not known, compare the disk with that backup"
    " and copy what differs. [default]",
    "differential": "Copy what changed since the last full backup. If that is not known, copy everything.",
    "rescan": "Compare the disk with its last backup, whatever the bitmap says, and copy what differs.",
}
"""The name of each option, and its help."""


def of_a_kind(function: Function) -> Function:
    """Add the options; the verb gets one of `KINDS` as `kind`."""

    @functools.wraps(function)
    def with_kind(*arguments: Any, **options: Any) -> Any:
        wanted = [kind for kind in KINDS if options.pop(kind)]
        return function(*arguments, kind=_the_one(wanted), **options)

    decorated: Function = with_kind
    for kind, words in reversed(KINDS.items()):
        decorated = click.option(f"--{kind}", is_flag=True, help=words)(decorated)
    return decorated


def _the_one(wanted: list[str]) -> str:
    if len(wanted) > 1:
        named = " and ".join(f"--{kind}" for kind in wanted)
        raise click.UsageError(
            f"A backup is of one kind, and {named} ask for {len(wanted)}: leave all but one out."
        )
    return wanted[0] if wanted else "incremental"
