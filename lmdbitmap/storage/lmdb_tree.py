"""The tree of pages in an LMDB file, examined without LMDB, which trusts it.

A damaged page can crash the process that reads it: this module finds it first.
"""

from __future__ import annotations

import os
import struct


def is_unsound(path: str) -> bool:
    """Whether the file is damaged, rather than of a kind that we do not know."""
    try:
        return bool(structural_problems(data_path_of(path)))
    except ValueError:
        return True
    except OSError:
        return False


def structural_problems(data_path: str) -> list[str]:
    """What is wrong with the tree of pages in a file that does not change; it is read without LMDB.

    A page that is only lost for use harms nobody, and the count of overflow pages, which we have in the list of free
    pages only, is known to be called wrong where it is right. Raises `ValueError` for what is no LMDB file at all.
    """
    from lmdb import verify  # longer to import than all the rest, and not needed for a store that is shared

    try:
        found: list[str] = verify.verify(data_path, subdir=False)  # type: ignore[no-untyped-call]
    except verify.VerifyError as error:
        raise ValueError(str(error)) from error
    except (struct.error, IndexError) as error:
        return [str(error)]
    return [problem for problem in found if "overflow" not in problem and "leak" not in problem]


def data_path_of(path: str) -> str:
    return os.path.join(path, "data.mdb")
