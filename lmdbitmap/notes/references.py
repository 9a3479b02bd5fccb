"""What a note or a manifest says of a checkpoint in a store, and of why something was done differently."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    """A checkpoint in a store, which is there as long as it is held."""

    uuid: UUID
    name: str


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something differs from what was asked for: `code` for programs, `words` for people."""

    code: str
    words: str
