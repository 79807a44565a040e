"""Runs the steps of a study side by side: each a launch in a process group of its own, taken up where it was cut,
recorded when it failed, and done by one process at a time, whoever else works on the same folder."""

import fcntl
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import psutil

from noisycond.errors import writing
from noisycond.run_folder import write_atomically
from noisycond.study.planning import Plan, Step
from noisycond.study.results import RunRecord, record_of


logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
POLL = 0.2  # seconds between looks at a process
# What a training leaves at its end: a pipeline's index, or an adapter's card.
_LEFT_BY_TRAINING = ("model_index.json", "README.md")


@dataclass(frozen=True)
class Launcher:
    """How a step is launched.

    Attributes:
        words: after `accelerate launch`. environment: of every launch. slots: for each run side by side what its
            environment has beyond that (its devices).
    """

    words: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    slots: tuple[dict[str, str], ...] = ({},)

    def command(self, step: Step) -> list[str]:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *self.words]
        return [*launcher, str(ROOT / f"{step.script}.py"), *step.words]


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

    def state(self) -> str:
        """In a few words: "clean, seed 0: training, step 120 of 500"."""
        if self.step is None:
            return f"{self.plan.run}: beginning"
        if self.waiting:
            return f"{self.plan.run}: {self.step.script} runs in another process"
        if not self.step.is_training:
            return f"{self.plan.run}: evaluating, {time.monotonic() - self.since:.0f} s"
        done = _last_step(self.step.folder / "log.jsonl")
        return f"{self.plan.run}: {self.step.script}, step {done}" + (
            f" of {self.step.steps}" if self.step.steps else ""
        )


class Runner:
    """Runs plans side by side, as many as the launcher has slots.

    Args:
        folder: the study's; logs are written to `logs/` there. records: the folder of results.
        refused: by the label of a cell the sentence with which a script refuses its settings.
        retries: how often a run that failed is tried again. keep_images: whether drawn images and features stay when
            a run's result is recorded. samples_at: see [`noisycond.study.results.record_of`].
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
        self._stop = threading.Event()
        self._kill = threading.Event()

    def stop(self) -> None:
        """Asks trainings to save a checkpoint and end; a second call ends them at once."""
        (self._kill if self._stop.is_set() else self._stop).set()

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    def run(self, plans: Sequence[Plan], look: Callable[["Runner", RunRecord | None], None]) -> None:
        """Runs what is not recorded yet.

        Args:
            look: called about twice a second with None, and after each run with its record, from the calling thread.

        Raises:
            InputError: a result cannot be written; the other runs are stopped.
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
        slot, attempts = slots.get(), 0
        state = self.running[plan.run.name] = Running(plan)
        try:
            while True:
                attempts += 1
                try:
                    self._do(plan, state, slot)
                    record = record_of(plan, attempts=attempts, samples_at=self.samples_at(plan))
                    break
                except Failed as failure:
                    if failure.final or attempts > self.retries:
                        record = record_of(plan, attempts=attempts, reason=failure.reason)
                        break
                    logger.warning("%s: %s Trying again.", plan.run, failure.reason)
            with writing(f"--results_dir {self.records}", f"the result of {plan.run}"):
                record.save(self.records)
            if record.status == "done" and not self.keep_images:
                _remove_images(plan)
            return record
        except Stopped:
            return None
        finally:
            del self.running[plan.run.name]
            slots.put(slot)

    def _do(self, plan: Plan, state: Running, slot: dict) -> None:
        sentence = self.refused.get(str(plan.run.cell))
        if sentence is not None:
            raise Failed(sentence, final=True)
        for step in plan.steps:
            state.step, state.since = step, time.monotonic()
            step.folder.parent.mkdir(parents=True, exist_ok=True)
            with self._alone(step, state) as lock:
                if not step.marker.exists():
                    self._launch(step, slot, lock)

    @contextmanager
    def _alone(self, step: Step, state: Running):
        """Holds the lock of a step. What it launches inherits the lock, so that a launch that outlives its study, one
        that was killed, is waited for and not disturbed."""
        path = step.folder.with_name(step.folder.name + ".lock")
        with path.open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    state.waiting = True
                    if self._stop.wait(POLL):
                        raise Stopped from None
            state.waiting = False
            yield file

    def _launch(self, step: Step, slot: dict, lock) -> None:
        """Launches a step, waits for it, and marks it as done."""
        log = self.folder / "logs" / f"{step.folder.name}-{step.script}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                self.launcher.command(step),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.launcher.environment | slot,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
            )
            self._wait(process)
        if process.returncode != 0 and not self._stop.is_set():
            raise Failed(*reason_of(log, process.returncode))
        if process.returncode != 0 or not _ended(step):
            if self._stop.is_set():
                raise Stopped
            raise Failed(f"{step.script}.py was stopped before its end (log: {log}).", final=False)
        seconds = round(time.monotonic() - begun, 1)
        write_atomically(step.marker, json.dumps({"command": step.command(), "seconds": seconds}) + "\n")

    def _wait(self, process: subprocess.Popen) -> None:
        """Until the process has ended and, where it was asked to stop, everything that it launched."""
        asked = killed = False
        while process.poll() is None or (asked and _group_lives(process.pid)):
            if self._stop.is_set() and not asked:
                asked = _ask_to_stop(process.pid)
            elif asked and process.poll() is not None:  # what was launched while it was asked
                _signal(process.pid, signal.SIGTERM)
            if self._kill.is_set() and not killed:
                _signal(process.pid, signal.SIGKILL)
                killed = True
            time.sleep(POLL)


@contextmanager
def locked(folder: Path):
    """A context that one process at a time is in, whoever else works on the folder."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def reason_of(log: Path, status: int) -> tuple[str, bool]:
    """Why a launch failed, by its log.

    Returns:
        One sentence, and whether it is a script's own about its settings, so that another try is in vain.
    """
    lines = [line.strip() for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if said:
        return said[-1], "no space left" not in said[-1]
    # The launcher adds a traceback of its own, which says nothing.
    ours = [line for line in lines if line and "CalledProcessError" not in line]
    raised = [line for line in ours if re.match(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b.*", line)]
    last = raised[-1] if raised else (ours[-1] if ours and not raised else "nothing was printed")
    if status < 0:
        last = f"ended by {signal.Signals(-status).name}; last: {last}"
    return f"{last[:300]} (status {status}, log: {log})", False


def cpu_launcher(words: str, cores: int, processes: int, jobs: int | None = None) -> Launcher:
    """For runs side by side on CPU, which share its cores.

    Args:
        words: for `accelerate launch`, as on a command line. processes: of each run. jobs: how many runs; by default
            as many as have a core for each process.
    """
    jobs = jobs or max(1, cores // processes)
    threads = str(max(1, cores // (jobs * processes)))
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}
    # Threads of one run that wait must not take the core of another.
    return Launcher(_launch_words(words, processes), threads | {"GOMP_SPINCOUNT": "0"}, ({},) * jobs)


def gpu_launcher(words: str, devices: Sequence[str], processes: int, jobs: int | None = None) -> Launcher:
    """For runs side by side, each on GPUs of its own.

    Args:
        devices: as CUDA_VISIBLE_DEVICES names them. processes: of each run, each with a GPU. jobs: at most so many
            runs.
    """
    groups = [devices[first : first + processes] for first in range(0, len(devices) - processes + 1, processes)]
    slots = tuple({"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[:jobs])
    return Launcher(_launch_words(words, processes), {}, slots)


def _launch_words(words: str, processes: int) -> tuple[str, ...]:
    given = shlex.split(words)
    if not any(word.split("=")[0] in ("--num_processes", "--config_file") for word in given):
        given += ["--num_processes", str(processes)]
        given += ["--multi_gpu"] if processes > 1 and "--multi_gpu" not in given else []
    if not any(word.split("=")[0] == "--main_process_port" for word in given):
        given += ["--main_process_port", "0"]  # any free one: there may be several runs
    return tuple(given)


def _ended(step: Step) -> bool:
    if step.is_training:
        return any((step.folder / name).exists() for name in _LEFT_BY_TRAINING)
    return (step.folder / "metrics.json").exists()


def _remove_images(plan: Plan) -> None:
    for name in ("images", "features"):
        shutil.rmtree(plan.steps[-1].folder / name, ignore_errors=True)


def _ask_to_stop(launcher: int) -> bool:
    """SIGTERM to what a launcher has launched: of several processes, the launcher would kill those that still save
    half a minute after it got the signal itself. Before it has launched something it has nothing to save.

    Returns:
        Whether there was someone to ask.
    """
    try:
        children = psutil.Process(launcher).children()
        for child in children:
            child.terminate()
        if not children:
            os.kill(launcher, signal.SIGTERM)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    return True


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _last_step(log: Path) -> int:
    """The last step in a training's log; 0 where there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):  # cut
            continue
    return 0
