"""Lives are recorded, and the power is cut: `python -m tests.crash.power_cut.trial SEED QUOTA LIFE,LIFE,… [FLAW]`.

Run as a process of its own, because a store that is not sound could take its reader with it. Prints lines of JSON:
`at` before each state, `tally` after each life, and at last `failed` if something was lost.
"""

from __future__ import annotations

import json
import random
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.crash.power_cut.disk_states import Choice, DiskState, History, Instant, choices
from tests.crash.power_cut.judging import Judge
from tests.crash.power_cut.recording import Recording, record
from tests.crash.power_cut.stage import reboot
from tests.crash.power_cut.strace import NEVER
from tests.crash.power_cut.truth import Truth

PATIENCE_S = 30
"""For one state. A store that is not sound may be walked for ever, and not in Python: then SIGALRM ends us."""
RANDOM_CHOICES = 6
"""At each moment, beside the systematic ones."""
_TOLD_OPERATIONS = 8


@dataclass
class Tally:
    """What became of one life."""

    life: str
    cases: int = 0
    """States at moments that were judged; no two of a life are alike in both."""
    states: int = 0
    """Disk states among them that differ."""
    moments: int = 0
    trust: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    ways: dict[str, int] = field(default_factory=dict)
    clean_blocks: int = 0


class Lost(AssertionError):
    """A power cut would have lost something."""


@dataclass(frozen=True)
class Case:
    moment: int
    words: str
    choice: Choice

    def __str__(self) -> str:
        return f"tick {self.moment}, on the disk: {self.words}"


def recorded(lives: list[str], root: Path, flaw: str = "") -> Iterator[tuple[str, Recording]]:
    """Each life's own recording; one process lives them all."""
    command = [sys.executable, "-m", "tests.crash.power_cut.lives", str(root), ",".join(lives)]
    whole = record(command + [flaw] * bool(flaw), root)
    begun = {m.told["name"]: m.tick for m in whole.milestones if m.told["what"] == "life"}
    ended = {m.told["name"]: m.tick for m in whole.milestones if m.told["what"] == "lived"}
    for life in lives:
        yield life, whole.between(begun[life], ended[life], life)


def tried(life: str, recording: Recording, seed: str, quota: int) -> Tally:
    """Judge `quota` states of a life, or all there are. Raises `Lost`."""
    history = History(recording)
    truth = Truth(recording, history)
    for complaint in truth.complaints():
        raise Lost(f"life {life!r}: {complaint}")
    judge, tally = Judge(truth), Tally(life)
    states, moments, seen = set(), set(), set()
    for case, state in _states(history, truth, f"{seed} {life}", quota):
        key = state.digest, _told_until(recording, case.moment)
        if key in seen:
            continue
        seen.add(key)
        _judge(judge, case, state, life, recording)
        states.add(state.digest)
        moments.add(case.moment)
        if len(seen) == quota:
            break
    tally.cases, tally.states, tally.moments = len(seen), len(states), len(moments)
    tally.trust, tally.reasons, tally.ways = dict(judge.trust), dict(judge.reasons), dict(judge.ways)
    tally.clean_blocks = judge.clean_blocks
    return tally


def _states(history: History, truth: Truth, seed: str, quota: int) -> Iterator[tuple[Case, DiskState]]:
    """In an order that the seed decides; the same state may come more than once."""
    ticks = moments(history, truth)
    cases = [
        Case(moment, words, choice)
        for moment in ticks
        for words, choice in choices(Instant(history, moment), seed, RANDOM_CHOICES)
    ]
    random.Random(seed).shuffle(cases)
    # several of one moment at a time would be quicker, and would be fewer moments in a small sample
    for case in cases:
        yield case, Instant(history, case.moment).state(case.choice)


def moments(history: History, truth: Truth) -> list[int]:
    """Every tick at which something began, returned or was told, once youth is over."""
    ticks = {tick for operation in history.operations for tick in (operation.begin, operation.end)}
    ticks |= {milestone.tick for milestone in truth.recording.milestones}
    return sorted(tick for tick in ticks if truth.born <= tick < NEVER)


def _told_until(recording: Recording, moment: int) -> int:
    return sum(milestone.tick <= moment for milestone in recording.milestones)


def _judge(judge: Judge, case: Case, state: DiskState, life: str, recording: Recording) -> None:
    print(json.dumps({"at": f"life {life!r}, {case}"}), flush=True)
    signal.alarm(PATIENCE_S)
    try:
        judge.judge(state, case.moment, random.Random(str(case)))
    except Exception as error:
        raise Lost(
            f"life {life!r}, {case}: {type(error).__name__}: {error}\n{_around(recording, case.moment)}"
        ) from error
    finally:
        signal.alarm(0)


def _around(recording: Recording, moment: int) -> str:
    """The last things that had begun, for whoever wants to know why."""
    before = [
        (op.begin, index, str(op)) for index, op in enumerate(recording.operations) if op.begin <= moment
    ]
    told = [(m.tick, -1, str(m.told)) for m in recording.milestones if m.tick <= moment]
    last = sorted(before + told)[-_TOLD_OPERATIONS:]
    return "\n".join(
        f"  {tick} {f'#{index} ' if index >= 0 else ''}{words[:200]}" for tick, index, words in last
    )


def main(seed: str, quota: str, lives: str, flaw: str = "") -> int:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="lmdbitmap-test-") as folder:
        root = Path(folder, "root")
        root.mkdir()
        try:
            recordings = list(recorded(lives.split(","), root, flaw))
            reboot()
            for life, recording in recordings:
                print(json.dumps({"tally": asdict(tried(life, recording, seed, int(quota)))}), flush=True)
        except AssertionError as lost:
            print(json.dumps({"failed": str(lost)}), flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
