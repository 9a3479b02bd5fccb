"""Errors: the class says what the caller does next, the message is one sentence that says it too."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from collections.abc import Callable

import pytest

from lmdbitmap import errors
from lmdbitmap.backups.result import BackupsFailed
from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    SomeFailed,
    StorageError,
    Untrusted,
    error_from_os,
    os_errors_at,
)
from lmdbitmap.repository.prune import PrunesFailed
from lmdbitmap.repository.transfer import CopiesFailed
from lmdbitmap.storage.lmdb_errors import CommitInDoubt


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        (InvalidArgument, ValueError),
        (NotFound, LookupError),
        (AlreadyExists, Exception),
        (Untrusted, Exception),
        (Busy, Exception),
    ],
)
def test_message_is_the_problem_and_the_next_step(kind: type[LmdbitmapError], base: type[Exception]) -> None:
    error = kind("it is broken", next_step="mend it")
    assert str(error) == "it is broken; mend it"
    assert (error.problem, error.next_step) == ("it is broken", "mend it")
    assert isinstance(error, LmdbitmapError)
    assert isinstance(error, base)


def test_format_error_names_place_expectation_and_finding() -> None:
    error = FormatError("x.dbm", expected="a magic", found=b"\0", next_step="look")
    assert str(error) == "x.dbm: expected a magic, found b'\\x00'; look"
    assert (error.place, error.expected, error.found) == ("x.dbm", "a magic", b"\0")


def test_storage_error_carries_the_systems_number_and_words() -> None:
    error = StorageError("/x", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), next_step="free some")
    assert (error.errno, str(error)) == (errno.ENOSPC, f"/x: {os.strerror(errno.ENOSPC)}; free some")
    assert isinstance(error, OSError)
    assert error.strerror == os.strerror(errno.ENOSPC)
    assert str(StorageError("/x", OSError(errno.ENOSPC, ""), next_step="free some")) == str(error)
    assert "made up" in str(StorageError("/x", OSError("made up"), next_step="think"))


def test_storage_error_says_what_its_cause_says() -> None:
    """What we raise ourselves says more than its number does."""
    error = StorageError(
        "disk 'sda'", OSError(errno.ESHUTDOWN, "it is detached"), next_step="attach it again"
    )
    assert (error.errno, str(error)) == (errno.ESHUTDOWN, "disk 'sda': it is detached; attach it again")


def test_the_kernels_log_is_named_only_for_an_error_of_the_kernel() -> None:
    kernels = OSError(errno.EIO, os.strerror(errno.EIO))
    assert "dmesg" in error_from_os("/x", kernels).next_step
    ours = OSError(errno.EIO, "the image ends at byte 512 or before: it was cut while it was open")
    assert str(error_from_os("/x", ours)) == f"/x: {ours.strerror}; mend the cause and try again"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOENT, NotFound),
        (errno.ENOTDIR, NotFound),
        (errno.EBUSY, Busy),
        (errno.EAGAIN, Busy),
        (errno.ENOSPC, StorageError),
        (errno.EIO, StorageError),
        (errno.EROFS, StorageError),
        (errno.EXDEV, StorageError),
        (None, StorageError),
    ],
)
def test_refusal_of_the_system_is_told_by_what_to_do_next(
    code: int | None, kind: type[LmdbitmapError]
) -> None:
    cause = OSError("no number") if code is None else OSError(code, "x")
    error = error_from_os("/place", cause)
    assert type(error) is kind
    assert "/place" in error.problem
    assert error.next_step
    with pytest.raises(kind) as raised, os_errors_at("/place"):
        raise cause
    assert raised.value.__cause__ is cause


def test_errors_that_are_ours_and_those_that_are_nobodys_pass() -> None:
    ours = StorageError("/inner", OSError(errno.EIO, "x"), next_step="look")
    with pytest.raises(StorageError) as raised, os_errors_at("/outer"):
        raise ours
    assert raised.value is ours
    with pytest.raises(ZeroDivisionError), os_errors_at("/outer"):
        raise ZeroDivisionError


BUSY = Busy("it is held", next_step="wait")


@pytest.mark.parametrize(
    "error",
    [
        NotFound("it is lost", next_step="look"),
        FormatError("x.dbm", expected="a magic", found=b"\0", next_step="look"),
        StorageError("/x", OSError(errno.ENOSPC, "whatever"), next_step="free some"),
        StorageError("/x", OSError("made up"), next_step="think"),
        SomeFailed("some failed", [BUSY], next_step="see each"),
        BackupsFailed([], {"sda": BUSY, "sdb": NotFound("it is lost", next_step="look")}),
        PrunesFailed([], {"sda": BUSY}),
        CopiesFailed([], {"sda": BUSY}),
        CommitInDoubt("/x", OSError(errno.EIO, "whatever"), next_step="think"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    "copied", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy]
)
def test_a_copy_is_the_same_in_all_that_can_be_asked(
    error: LmdbitmapError, copied: Callable[[LmdbitmapError], LmdbitmapError]
) -> None:
    """As a pool of processes makes one, which breaks, or hangs, where that fails."""
    other = copied(error)
    assert type(other) is type(error)
    assert (str(other), other.args, repr(vars(other))) == (str(error), error.args, repr(vars(error)))
    if isinstance(error, OSError):
        assert isinstance(other, OSError)
        assert (other.errno, other.strerror) == (error.errno, error.strerror)


def test_every_class_is_in_the_table_of_the_module() -> None:
    kinds = [name for name, value in vars(errors).items() if isinstance(value, type)]
    ours = [name for name in kinds if issubclass(getattr(errors, name), LmdbitmapError)]
    assert len(ours) == 10
    assert all(f"`{name}`" in str(errors.__doc__) for name in ours if name != "LmdbitmapError")
