"""The tree of pages in an LMDB file, examined without LMDB, which trusts it.

A damaged page can crash the process that reads it: this module finds it first.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence

_LONG_VALUE = re.compile(r"freeDB DB: overflow page \d+ header mp_pages (\d+) != OVPAGES\(\d+\)=(\d+)")
_PAGES_OF_VALUES = re.compile(r"freeDB DB: walked (\d+) overflow pages, record says (\d+)")
_LOST_FOR_USE = re.compile(r"\d+ page\(s\) are neither reachable nor in the freeDB")


def is_unsound(path: str) -> bool:
    """Return whether the file is damaged, as opposed to of an unknown kind."""
    try:
        return bool(structural_problems(data_path_of(path)))
    except ValueError:
        return True
    except OSError:
        return False


def structural_problems(data_path: str) -> list[str]:
    """Return what is wrong with the tree of pages in a file that does not change. It is read without LMDB.

    Left out are pages that are merely lost for use, and what `without_long_values` leaves out. Raises `ValueError` for
    a file that is not LMDB's.
    """
    from lmdb import verify  # slow to import, and not needed for a store that others have open

    try:
        found: list[str] = verify.verify(data_path, subdir=False)  # type: ignore[no-untyped-call]
    except verify.VerifyError as error:
        raise ValueError(str(error)) from error
    except (struct.error, IndexError) as error:
        return [str(error)]
    return without_long_values([problem for problem in found if not _LOST_FOR_USE.match(problem)])


def without_long_values(problems: Sequence[str]) -> list[str]:
    """Leave out values of the list of free pages that have more pages than they fill, as sound files have them.

    LMDB writes a shorter value in the place of a long one, and goes on counting all of its pages. So both counts must
    be too high by the same number: if they are not, a count is damaged, and pages in use would be taken for free.
    """
    long = [match for problem in problems if (match := _LONG_VALUE.match(problem))]
    totals = [match for problem in problems if (match := _PAGES_OF_VALUES.match(problem))]
    too_many = [int(match[1]) - int(match[2]) for match in long]
    if (
        sum(too_many) != sum(int(match[2]) - int(match[1]) for match in totals)
        or min(too_many, default=1) < 1
    ):
        return list(problems)
    harmless = {match.string for match in (*long, *totals)}
    return [problem for problem in problems if problem not in harmless]


def data_path_of(path: str) -> str:
    return os.path.join(path, "data.mdb")
