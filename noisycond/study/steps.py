"""What stands on disk of a study's step: whether it is done, and how long it took over all its launches."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path

from noisycond.run_folder import write_atomically
from noisycond.study.planning import Step


# What a training leaves at its end: a pipeline's index, or an adapter's card.
_LEFT_BY_TRAINING = ("model_index.json", "README.md")
_NOTED = 5.0  # seconds between notes of the time, of which a kill loses the last


def has_ended(step: Step) -> bool:
    """Whether what a step leaves at its end is there."""
    names = _LEFT_BY_TRAINING if step.is_training else ("metrics.json",)
    return any((step.folder / name).exists() for name in names)


def is_done(step: Step) -> bool:
    """Whether a step ended well and left what it should: a marker may be cut, or be of a folder that is gone."""
    return _marked(step) is not None and has_ended(step)


def mark_done(step: Step, seconds: float) -> None:
    """Writes the marker of a step that ended well."""
    write_atomically(step.marker, json.dumps({"command": step.command(), "seconds": round(seconds, 1)}) + "\n")
    _notes(step).unlink(missing_ok=True)


def seconds_of(step: Step) -> float | None:
    """How long a step took, or has taken so far; None where nothing is known of it."""
    marked = _marked(step)
    return marked if marked is not None else _number(_read(_notes(step)))


class Clock:
    """Counts the seconds of a step, from a launch on, with those of the launches before that were cut."""

    def __init__(self, step: Step):
        self.notes = _notes(step)
        self.before = _number(_read(self.notes)) or 0.0
        self.begun = self.noted = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    def tick(self) -> None:
        """To be called often; writes the time down now and then."""
        if time.monotonic() - self.noted > _NOTED:
            self.note()

    def note(self) -> None:
        """Writes the time down; where that fails some seconds are lost, which is not worth a run."""
        self.noted = time.monotonic()
        with suppress(OSError):
            write_atomically(self.notes, f"{self.seconds:.1f}\n")


def _notes(step: Step) -> Path:
    return step.folder.with_name(step.folder.name + ".seconds")


def _marked(step: Step) -> float | None:
    """The seconds of a whole marker."""
    said = _read(step.marker)
    return _number(said.get("seconds")) if isinstance(said, dict) else None


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # not there, or cut
        return None


def _number(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value >= 0 else None
