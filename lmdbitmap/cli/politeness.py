"""How much a verb that copies gives way to the guests, who need the same processors, and how long it waits.

It gives way once the point in time is taken: until then a guest may be waiting for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import click

from lmdbitmap.cli.options import Function, Seconds, Session, size


def polite(function: Function) -> Function:
    """Add the options `nice` and `speed_limit`; the latter is bytes per second or None."""
    return _nice(_speed_limit(function))


def owner_limited(function: Function) -> Function:
    """Add the option `owner_limit`: how long the verb waits for a silent owner, in seconds."""
    return click.option(
        "--owner-limit",
        metavar="SECONDS",
        type=Seconds(),
        default=60.0,
        show_default=True,
        help="How long the process that serves a disk may send no data before the command fails.",
    )(function)


def waiting(for_whom: str) -> Callable[[Function], Function]:
    """Add the option `lock_wait`: how long the verb waits for other runs, in seconds."""
    return click.option(
        "--lock-wait",
        metavar="SECONDS",
        type=Seconds(may_be_0=True),
        default=0.0,
        help=f"How long to wait for {for_whom} before the command fails with exit code 4. [default: not at all]",
    )


def _speed_limit(function: Function) -> Function:
    return click.option(
        "--speed-limit",
        type=size,
        metavar="SIZE",
        help="Read at most this many bytes a second, 1M or more.",
    )(function)


def _nice(function: Function) -> Function:
    return click.option(
        "--nice",
        type=click.IntRange(0, 19),
        default=10,
        show_default=True,
        help="How far to give way to guests while copying, as nice(1) counts; 0 is not at all.",
    )(function)


@contextlib.contextmanager
def nice_after(
    moment: AbstractContextManager[object], niceness: int, asked: Session, *, served: Callable[[], bool]
) -> Iterator[None]:
    """Raise the process's niceness after `moment`, if it runs nothing else; threads started from then on inherit it.

    This is done only if the disks are `served`: then their server makes the final change of the store. If we make it
    ourselves, it must not be slow, because guests of other disks may wait for the store. `served` is called after
    `moment`, because a program that had a disk at first may have been waited for.
    """
    with moment:
        yield
    if asked.owns_process and served():
        os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), niceness))
