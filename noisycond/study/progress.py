"""A study while it runs: bars where someone watches a terminal, lines where the output goes to a file."""

import statistics
import sys
import time

from tqdm import tqdm

from noisycond.study.records import RunRecord
from noisycond.study.running import Runner


class Progress:
    """What is done, what runs now, and how long the rest may take.

    Args:
        total: runs of the study that were asked for. done: those that were done before. slots: runs side by side.
    """

    def __init__(self, total: int, done: int, slots: int):
        self.left, self.slots, self.failed = total - done, slots, 0
        self.took: list[float] = []  # of the runs that were done here
        self.is_watched = sys.stderr.isatty()
        self.total = tqdm(
            total=total, initial=done, desc="study", unit="run", disable=not self.is_watched, bar_format="{l_bar}{bar}"
            "| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )  # fmt: skip
        self.lines = [
            tqdm(bar_format="  {desc}", position=1 + slot, leave=False, disable=not self.is_watched)
            for slot in range(slots)
        ]
        self._looked = 0.0

    def __call__(self, runner: Runner, record: RunRecord | None) -> None:
        self.took = runner.took
        for note in runner.notes():
            _say(note)
        if record is not None:
            self._count(record)
        now = time.monotonic()
        if self.is_watched and (record is not None or now - self._looked > 1):
            self._looked = now
            states = [running.state() for running in list(runner.running.values())]
            for line, state in zip(self.lines, [*states, *[""] * self.slots], strict=False):
                line.set_description_str(state)
            self.total.set_postfix_str(self._rest() + (", stopping" if runner.is_stopping else ""))

    def close(self) -> None:
        for line in (*self.lines, self.total):
            line.close()

    def _count(self, record: RunRecord) -> None:
        self.left -= 1
        seconds = sum(record.seconds.values())
        self.failed += record.status == "failed"
        block = f"{record.block}, " if record.block else ""
        outcome = f"done in {seconds:.0f} s" if record.status == "done" else f"FAILED: {record.reason}"
        _say(f"{block}{record.cell}, seed {record.seed}: {outcome}; {self._rest()}")
        self.total.update()

    def _rest(self) -> str:
        words = f"{self.left} to go"
        if self.took and self.left:
            minutes = statistics.fmean(self.took) * self.left / self.slots / 60
            words += f", about {minutes:.0f} min" if minutes < 120 else f", about {minutes / 60:.1f} h"
        return words + (f", {self.failed} failed" if self.failed else "")


def _say(line: str) -> None:
    """Prints a line between the bars."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
