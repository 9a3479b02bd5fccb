"""How much a verb that copies gives way to the guests, whose requests need the same processors; and how patient it is.

It does so once the point in time is taken: until then it may be a guest that waits for it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import click

from lmdbitmap.cli.options import Function, Seconds, Session, size


def polite(function: Function) -> Function:
    """Add the options that say how much; the verb gets them as `nice` and `speed_limit`, bytes a second or None."""
    return _nice(_speed_limit(function))


def owner_limited(function: Function) -> Function:
    """Add the option for how patient the verb itself is; it gets it as `owner_limit`, in seconds."""
    return click.option(
        "--owner-limit",
        metavar="SECONDS",
        type=Seconds(),
        default=60.0,
        show_default=True,
        help="How long the process that serves a disk may send nothing of it before this fails.",
    )(function)


def waiting(for_whom: str) -> Callable[[Function], Function]:
    """Add the option for how long others are waited for; the verb gets it as `lock_wait`, in seconds."""
    return click.option(
        "--lock-wait",
        metavar="SECONDS",
        type=Seconds(may_be_0=True),
        default=0.0,
        help=f"How long to wait for {for_whom} before this fails with exit code 4. [default: not at all]",
    )


def _speed_limit(function: Function) -> Function:
    return click.option(
        "--speed-limit",
        type=size,
        metavar="SIZE",
        help="Read no more than that a second, 1M at least.",
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
    """When `moment` is over a process of our own gives way, and so do the threads that it starts from then on.

    Only where the disks are `served`: then their server changes the store for us in the end. What we change ourselves
    is not to be done slowly, as guests of other disks may wait for the store meanwhile. It is asked when `moment` is
    over: whoever had a disk at first may have been waited for.
    """
    with moment:
        yield
    if asked.owns_process and served():
        os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), niceness))
