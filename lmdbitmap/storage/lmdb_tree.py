"""The tree of pages in an LMDB file, examined without LMDB, which trusts it.

A damaged page can crash the process that reads it: this module finds it first.
"""

from __future__ import annotations

import os
import struct


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

    Left out are pages that are merely lost for use, and the count of overflow pages: our files have these only in the
    list of free pages, and a right count is reported as wrong. Raises `ValueError` for a file that is not LMDB's.
    """
    from lmdb import verify  # slow to import, and not needed for a store that others have open

    try:
        found: list[str] = verify.verify(data_path, subdir=False)  # type: ignore[no-untyped-call]
    except verify.VerifyError as error:
        raise ValueError(str(error)) from error
    except (struct.error, IndexError) as error:
        return [str(error)]
    return [problem for problem in found if "overflow" not in problem and "leak" not in problem]


def data_path_of(path: str) -> str:
    return os.path.join(path, "data.mdb")
