"""Runs the steps of a study side by side: each taken up where it was cut, recorded when it failed, and done by one
process at a time, whoever else works on the same folder."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

from noisycond.errors import InputError, in_one_line, writing
from noisycond.study import locks, logs, steps
from noisycond.study.launching import POLL, Launch, Launcher
from noisycond.study.planning import Plan, Step
from noisycond.study.records import RunRecord, record_of


logger = logging.getLogger(__name__)


class Failed(Exception):
    """A step did not end well.

    Attributes:
        reason: one sentence. final: whether trying again is in vain, because the settings are refused.
    """

    def __init__(self, reason: str, final: bool):
        super().__init__(reason)
        self.reason, self.final = reason, final


class Stopped(Exception):
    """The study was asked to stop."""


@dataclass
class Running:
    """What is known of a run that is under way, for a view of it."""

    plan: Plan
    step: Step | None = None
    since: float = 0.0
    waiting: bool = False
    begun: float = field(default_factory=time.monotonic)

    def state(self) -> str:
        """In a few words: "clean, seed 0: training, step 120 of 500"."""
        if self.step is None:
            return f"{self.plan.run}: beginning"
        if self.waiting:
            return f"{self.plan.run}: {self.step.script} runs in another process"
        if not self.step.is_training:
            return f"{self.plan.run}: evaluating, {time.monotonic() - self.since:.0f} s"
        done = logs.last_step(self.step.folder / "log.jsonl")
        return f"{self.plan.run}: {self.step.script}, step {done}" + (
            f" of {self.step.steps}" if self.step.steps else ""
        )


class Runner:
    """Runs plans side by side, as many as the launcher has slots.

    Args:
        folder: the study's; logs are written to `logs/` there. records: the folder of results.
        refused: by the label of a cell the sentence with which a script refuses its settings.
        retries: how often a run that failed is tried again. keep_images: whether drawn images and features stay when
            a run's result is recorded. samples_at: see [`noisycond.study.records.record_of`].

    Attributes:
        running: by the names of runs what is under way. took: seconds of each run that was done here.
    """

    def __init__(
        self,
        folder: Path,
        records: Path,
        launcher: Launcher,
        refused: dict[str, str] | None = None,
        retries: int = 1,
        keep_images: bool = False,
        samples_at: Callable[[Plan], float | None] = lambda plan: None,
    ):
        self.folder, self.records, self.launcher = folder, records, launcher
        self.refused, self.retries, self.keep_images = refused or {}, retries, keep_images
        self.samples_at = samples_at
        self.running: dict[str, Running] = {}
        self.took: list[float] = []
        self._notes: SimpleQueue[str] = SimpleQueue()
        self._stop = threading.Event()
        self._kill = threading.Event()

    def stop(self) -> None:
        """Asks trainings to save a checkpoint and end; a second call ends them at once."""
        (self._kill if self._stop.is_set() else self._stop).set()

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    def notes(self) -> Iterator[str]:
        """Sentences for whoever watches, that came since this was called last."""
        while True:
            try:
                yield self._notes.get_nowait()
            except Empty:
                return

    def run(self, plans: Sequence[Plan], look: Callable[["Runner", RunRecord | None], None]) -> None:
        """Runs what is not recorded yet.

        Args:
            look: called about twice a second with None, and after each run with its record, from the calling thread.

        Raises:
            InputError: a result or log cannot be written; the other runs are stopped.
        """
        slots: SimpleQueue[dict] = SimpleQueue()
        for slot in self.launcher.slots:
            slots.put(slot)
        with ThreadPoolExecutor(len(self.launcher.slots)) as pool:
            pending: set[Future] = {pool.submit(self._attempt, plan, slots) for plan in plans}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                    for record in (future.result() for future in done):
                        if record is not None:
                            look(self, record)
                    look(self, None)
            except BaseException:  # a full disk, say: what else runs saves what it has
                self._stop.set()
                raise

    def _attempt(self, plan: Plan, slots: SimpleQueue) -> RunRecord | None:
        """Does a run; None where the study was stopped before it ended."""
        if self._stop.is_set():
            return None
        slot = slots.get()
        state = self.running[plan.run.name] = Running(plan)
        try:
            record = self._try(plan, state, slot)
            if record.status == "done":
                self.took.append(time.monotonic() - state.begun)
            return record
        except Stopped:
            return None
        finally:
            del self.running[plan.run.name]
            slots.put(slot)

    def _try(self, plan: Plan, state: Running, slot: dict) -> RunRecord:
        """Does a run, again where it fails, and records how it came out."""
        attempts = 0
        while True:
            attempts += 1
            try:
                return self._do(plan, state, slot, attempts)
            except Failed as failure:
                reason = failure.reason
                if failure.final or attempts > self.retries:
                    break
                self._notes.put(f"{plan.run} failed and is tried again: {reason}")
            except (Stopped, InputError):
                raise
            except Exception as error:  # of one run, which must not end those beside it
                logger.debug("%s failed.", plan.run, exc_info=True)
                reason = f"{type(error).__name__}: {in_one_line(error)}"
                break
        record = record_of(plan, attempts, reason)
        self._save(plan, record)
        return record

    def _do(self, plan: Plan, state: Running, slot: dict, attempts: int) -> RunRecord:
        sentence = self.refused.get(str(plan.run.cell))
        if sentence is not None:
            raise Failed(sentence, final=True)
        *before, last = plan.steps
        for step in before:
            with self._done(step, state, slot):
                pass
        with self._done(last, state, slot):  # whoever waits for the lock finds the result and no half of the images
            record = record_of(plan, attempts, samples_at=self.samples_at(plan), warn=self._notes.put)
            self._save(plan, record)
            if not self.keep_images:
                _remove_images(plan)
        return record

    def _save(self, plan: Plan, record: RunRecord) -> None:
        with writing(f"--results_dir {self.records}", f"the result of {plan.run}"):
            record.save(self.records)

    @contextmanager
    def _done(self, step: Step, state: Running, slot: dict) -> Iterator[None]:
        """A context in which a step is done, and in the hands of this process."""
        state.step, state.since = step, time.monotonic()
        with self._alone(step, state) as lock:
            if not steps.is_done(step):
                self._launch(step, slot, lock)
            yield

    @contextmanager
    def _alone(self, step: Step, state: Running) -> Iterator[IO]:
        """Holds the lock of a step. The launcher inherits it, so that a launch that outlives its study, one that was
        killed, is waited for and not disturbed."""
        path = step.folder.with_name(step.folder.name + ".lock")
        with writing(f"--output_dir {self.folder}", path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a")
        with file:
            while not locks.take(file):
                state.waiting = True
                if self._stop.wait(POLL):
                    raise Stopped
            state.waiting = False
            yield file

    def _launch(self, step: Step, slot: dict, lock: IO) -> None:
        """Launches a step, waits for it, and marks it as done."""
        log = self.folder / "logs" / f"{step.folder.name}-{step.script}.log"
        clock = steps.Clock(step)
        with writing(f"--output_dir {self.folder}", log.name):
            log.parent.mkdir(parents=True, exist_ok=True)
            output = log.open("ab")
        with output:
            with writing(f"--output_dir {self.folder}", log.name):
                start = logs.begin_attempt(output, step.command())
            launch = Launch(self.launcher.command(step), self.launcher.environment_in(slot), output, lock)
            status = launch.wait(self._stop, self._kill, clock.tick)
        clock.note()
        if status != 0 and not self._stop.is_set():
            raise Failed(*logs.reason_of(log, status, start))
        if status != 0 or not steps.has_ended(step):
            if self._stop.is_set():
                raise Stopped
            raise Failed(f"{step.script}.py was stopped before its end (log: {log}).", final=False)
        with writing(f"--output_dir {self.folder}", step.marker.name):
            steps.mark_done(step, clock.seconds)


def _remove_images(plan: Plan) -> None:
    for name in ("images", "features"):
        shutil.rmtree(plan.steps[-1].folder / name, ignore_errors=True)
