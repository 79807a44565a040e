"""How the steps of a study are launched, and how all that a launch has started is stopped and awaited."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from noisycond.errors import require
from noisycond.study.planning import Step


ROOT = Path(__file__).resolve().parents[2]
# Stands in the place of the user's own configuration of accelerate, whose kind of launch no word can replace.
PLAIN_CONFIG = Path(__file__).with_name("accelerate.yaml")
POLL = 0.2  # seconds between looks at a process
TREE_POLL = 1.0  # seconds between looks at what it has started
GRACE = 30.0  # seconds that what is left of a launch has to save and leave
# What a launch that study.py itself is in has told its processes: these would be taken for one of them.
_OF_A_LAUNCH = r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(ACCELERATE|TORCHELASTIC)_.*"
# With these the kind of launch is another than --multi_gpu says.
_KINDS = ("--config_file", "--cpu", "--tpu", "--use_deepspeed", "--use_fsdp", "--use_megatron_lm", "--multi_gpu")


@dataclass(frozen=True)
class Launcher:
    """How a step is launched.

    Attributes:
        environment: of every launch, beyond that of this process. slots: for each run side by side what its
            environment has beyond that (its devices).
    """

    environment: dict[str, str] = field(default_factory=dict)
    slots: tuple[dict[str, str], ...] = ({},)

    def command(self, step: Step) -> list[str]:
        """Words of the launch of a step, which are the same whatever `accelerate config` has written."""
        return [
            *(sys.executable, "-m", "accelerate.commands.launch", *launch_words(step)),
            *(str(ROOT / f"{step.script}.py"), *step.words),
        ]

    def environment_in(self, slot: dict[str, str]) -> dict[str, str]:
        """The whole environment of a launch."""
        own = {name: value for name, value in os.environ.items() if not re.fullmatch(_OF_A_LAUNCH, name)}
        return own | self.environment | slot


def launch_words(step: Step) -> list[str]:
    """What `accelerate launch` is told of a step; what the study asks for comes last."""
    asked = {word.split("=")[0].replace("-", "_") for word in step.launch}
    several = step.processes > 1 and not asked & {kind.replace("-", "_") for kind in _KINDS}
    return [
        *("--config_file", str(PLAIN_CONFIG), "--num_processes", str(step.processes), "--num_machines", "1"),
        *(("--multi_gpu",) if several else ()),
        *("--gpu_ids", "all", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0"),  # any free one: there may be several runs
        *step.launch,
    ]


def cpu_launcher(cores: int, processes: int, jobs: int | None = None) -> Launcher:
    """For runs side by side on CPU, which share its cores.

    Args:
        processes: of each run. jobs: how many runs; by default as many as have a core for each process.
    """
    jobs = jobs or max(1, cores // processes)
    threads = str(max(1, cores // (jobs * processes)))
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads}
    # Threads of one run that wait must not take the core of another.
    return Launcher(threads | {"GOMP_SPINCOUNT": "0"}, ({},) * jobs)


def gpu_launcher(devices: Sequence[str], processes: int, jobs: int | None = None) -> Launcher:
    """For runs side by side, each on GPUs of its own.

    Args:
        devices: as CUDA_VISIBLE_DEVICES names them. processes: of each run, each with a GPU. jobs: how many runs; by
            default as many as there are GPUs for.

    Raises:
        InputError: more runs are asked for than there are GPUs for.
    """
    groups = [devices[first : first + processes] for first in range(0, len(devices) - processes + 1, processes)]
    each = "a GPU" if processes == 1 else f"{processes} GPUs"
    require(
        jobs is None or jobs <= len(groups),
        f"--jobs is {jobs}, but a run has {each} of its own and there are {len(devices)} here: at most {len(groups)}.",
    )
    return Launcher({}, tuple({"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups[:jobs]))


class Launch:
    """A launcher that runs, in a session of its own, and all that it has started, whatever session that is in.

    A launcher may be killed while what it started lives on and writes: torch's launcher gives each of several
    processes a session of its own, so that no signal to the group reaches them.

    Args:
        command: of the launcher. environment: whole. log: what it prints. lock: a file that the launcher keeps open.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: IO, lock: IO):
        self.launcher = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=(lock.fileno(),),
            start_new_session=True,
        )
        self.started: set[psutil.Process] = set()
        self._asked: set[psutil.Process] = set()
        self._looked = 0.0

    def wait(self, stop: threading.Event, kill: threading.Event, tick: Callable[[], None] = lambda: None) -> int:
        """Until the launcher has ended, and all that it started too where it did not end well or was stopped.

        Args:
            stop: set where trainings are to save and leave. kill: set where all is to end at once. tick: called often.

        Returns:
            The launcher's exit status.
        """
        try:
            while self.launcher.poll() is None:
                if time.monotonic() - self._looked > TREE_POLL:
                    self._look()
                if stop.is_set():
                    self._ask_to_stop()
                if kill.is_set():
                    self._look()
                    self._kill()
                tick()
                time.sleep(POLL)
        except BaseException:
            self._end(kill)
            raise
        if self.launcher.returncode != 0 or stop.is_set():
            self._end(kill)
        return self.launcher.returncode

    def _look(self) -> None:
        """Notes what has been started: the launcher's group, and the descendants of what was seen."""
        self._looked, children = time.monotonic(), {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                children.setdefault(process.ppid(), []).append(process)
                if os.getpgid(process.pid) == self.launcher.pid and process.pid != self.launcher.pid:
                    self.started.add(process)
        found = [process.pid for process in self.started if process.is_running()]
        found += [self.launcher.pid] if self.launcher.poll() is None else []
        while found:
            new = set(children.get(found.pop(), ())) - self.started
            self.started |= new
            found += [process.pid for process in new]

    def _ask_to_stop(self) -> None:
        """SIGTERM to what the launcher has started, once each: of several processes, it would kill those that still
        save half a minute after it got the signal itself. Before it has started something it has nothing to save."""
        with suppress(psutil.NoSuchProcess):
            children = set(psutil.Process(self.launcher.pid).children())
            if not children and not self._asked:
                self.launcher.terminate()
            _send(children - self._asked, signal.SIGTERM)
            self._asked |= children
            self.started |= children  # who may outlive the launcher before the next look

    def _kill(self) -> None:
        _send(self.started, signal.SIGKILL)
        if self.launcher.poll() is None:
            self.launcher.kill()

    def _end(self, kill: threading.Event) -> None:
        """Ends what is left, by SIGTERM and after a grace by SIGKILL, or at once where `kill` is set; awaits all."""
        asked, last = set(), time.monotonic() + GRACE
        while True:
            self._look()
            left = {process for process in self.started if _lives(process)}
            if not left and self.launcher.poll() is not None:
                return
            if kill.is_set() or time.monotonic() > last:
                self._kill()
            _send(left - asked, signal.SIGTERM)
            if self.launcher.poll() is None and not asked:
                self.launcher.terminate()
            asked |= left
            time.sleep(POLL)


def _send(processes: set[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.Error):  # it has gone
            process.send_signal(number)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
