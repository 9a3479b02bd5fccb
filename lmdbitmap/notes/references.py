"""What a note or a manifest says of a checkpoint that is kept elsewhere, and of why something was done otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A checkpoint that is kept elsewhere: in a store, as long as somebody holds it."""

    uuid: UUID
    name: str


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is not as it was asked for: `code` for programs, `words` for people."""

    code: str
    words: str
