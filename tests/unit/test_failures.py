"""Failures of one of several are set aside; what ends the run is not."""

from __future__ import annotations

import errno

import pytest

from lmdbitmap.errors import Busy, LmdbitmapError, StorageError
from lmdbitmap.work.failures import Failures


def fail(error: BaseException) -> None:
    raise error


def test_what_fails_is_set_aside_under_its_name() -> None:
    failures, busy = Failures(), Busy("held", next_step="wait")
    with failures.of("a"):
        fail(busy)
    with failures.of("b"):
        pass
    assert failures.errors == {"a": busy}
    assert ("a" in failures, "b" in failures) == (True, False)


def test_a_refusal_of_the_system_is_set_aside_in_our_words() -> None:
    failures = Failures()
    with failures.of("a"):
        fail(OSError(errno.ENOSPC, "full", "/place"))
    error = failures.errors["a"]
    assert isinstance(error, StorageError)
    assert error.place == "/place"


@pytest.mark.parametrize("other", [ZeroDivisionError, KeyboardInterrupt])
def test_what_is_nobodys_failure_is_raised(other: type[BaseException]) -> None:
    failures = Failures()
    with pytest.raises(other), failures.of("a"):
        raise other
    assert failures.errors == {}


@pytest.mark.parametrize("error", [LmdbitmapError("x", next_step="y"), OSError(errno.EIO, "x")])
def test_at_once_means_at_once(error: Exception) -> None:
    failures = Failures(at_once=True)
    with pytest.raises(type(error)) as raised, failures.of("a"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("error", [Busy("x", next_step="y"), OSError(errno.EIO, "x"), KeyboardInterrupt()])
def test_what_a_listener_raises_is_never_set_aside(error: BaseException) -> None:
    def cancel(done: int, total: int) -> None:
        raise error

    failures = Failures()
    listener = failures.heeding(cancel)
    assert listener is not None
    with pytest.raises(type(error)) as raised, failures.of("a"):
        listener(1, 2)
    assert raised.value is error


def test_without_a_listener_nothing_listens() -> None:
    assert Failures().heeding(None) is None
