"""Tests beat by hand, once, and a busy machine may take seconds from there to their next write.

A beat vouches for what is written within two seconds after it, as a server beats twice in each. So who judges in a
test, or in a process that one starts to die, is more patient; tests of that very limit have the fixture `exact_grace`.
"""

from __future__ import annotations

from lmdbitmap.tracker import continuity

EXACT_GRACE_NS = continuity._BEAT_GRACE_NS
_PATIENT_GRACE_NS = 60 * 10**9


def let_beats_be_late() -> None:
    """In this process, from now on."""
    continuity._BEAT_GRACE_NS = _PATIENT_GRACE_NS
