"""Programs in processes of their own that begin at once: forked from a server that has imported the libraries, which
takes ten seconds, longer than most tests need a process for. The package itself is imported by each process anew."""

import atexit
import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path

import torch
from launching import ROOT


# What the scripts and the pipelines' users import. Nothing of noisycond is among them.
LIBRARIES = [
    "torch",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "sklearn.datasets",
    "sklearn.svm",
    "datasets",
    "transformers",
    "accelerate",
    "diffusers.pipelines.dit.pipeline_dit",
    "peft",
    "torch_fidelity",
    "matplotlib.pyplot",
    "cv2",
    "webdataset",
]
OURS = {"", str(ROOT), str(Path(__file__).parent)}  # places from which something of ours can be imported
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(LIBRARIES)


def _become(file: str, words: list[str], environment: dict, folder: str, outputs: list[str], alone: bool) -> None:
    """What the forked process does: it leads a session of its own and runs the program as the interpreter does."""
    os.setsid()
    for descriptor, output in enumerate(outputs, start=1):
        opened = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[:] = [file, *words]
    if alone:
        sys.path[:] = [place for place in sys.path if place not in OURS]
        assert not any(name.partition(".")[0] in ("noisycond", "pipelines") for name in sys.modules)
    sys.path.insert(0, str(Path(file).parent))
    gc.freeze()  # the libraries need not be walked through
    if "OMP_NUM_THREADS" in environment:  # which torch read when the server began
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


class Program:
    """A program that runs on one or on several processes; those of several find each other as in a launch.

    What runs `alone` finds nothing of this checkout on its path. Its installation can be imported: the program forbids
    that itself.
    """

    def __init__(
        self, file, *argv, processes: int = 1, folder=ROOT, environment: Mapping | None = None, alone: bool = False
    ):
        self._outputs = tempfile.TemporaryDirectory()
        environment, words = dict(os.environ if environment is None else environment), [str(word) for word in argv]
        self.processes = []
        for rank, own in enumerate(_ranks(processes)):
            outputs = self._written_by(rank)
            for output in outputs:
                Path(output).touch()  # to be read of a process that is ended before it opens them, too
            arguments = (str(file), words, environment | own, str(folder), outputs, alone)
            self.processes.append(SERVER.Process(target=_become, args=arguments))
            self.processes[-1].start()

    def poll(self) -> int | None:
        """The exit status, None as long as a process runs: the first that is not 0, negative for a signal."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next(filter(None, codes), 0)

    def signal(self, number: int) -> None:
        """Sends a signal to the processes and to those that they started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def finish(self, timeout: float = 240) -> subprocess.CompletedProcess:
        """Waits for the end. Where one process of several fails, the others are ended, as by a launcher."""
        deadline = time.monotonic() + timeout
        while self.poll() is None and not any(process.exitcode for process in self.processes):
            running = [process.sentinel for process in self.processes if process.exitcode is None]
            assert wait(running, deadline - time.monotonic()), "not finished in time"
        status = next(filter(None, (process.exitcode for process in self.processes)), 0)
        for process in self.processes:
            process.join(10)
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        written = zip(*(self._written_by(rank) for rank in range(len(self.processes))), strict=True)
        said = ["".join(Path(file).read_text() for file in files) for files in written]
        return subprocess.CompletedProcess(self.processes[0].name, status, *said)

    def _written_by(self, rank: int) -> list[str]:
        """A process's own stdout and stderr: in one file, two processes could write into each other's lines."""
        return [os.path.join(self._outputs.name, f"{name}-{rank}") for name in ("stdout", "stderr")]

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join()
        self._outputs.cleanup()


def _ranks(count: int) -> list[dict[str, str]]:
    """What a launcher tells each process of several."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = (common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count))
    return [{name: str(value) for name, value in rank.items()} for rank in ranks]


def as_stranger(code: str, *argv, folder: Path) -> subprocess.CompletedProcess:
    """Runs the code in this folder as one who has the libraries and nothing of ours."""
    (folder / "stranger.py").write_text(code)
    with Program(folder / "stranger.py", *argv, folder=folder, alone=True) as program:
        return program.finish()


def started(name: str, *argv, processes: int = 1) -> Program:
    """A script of the repo root that has been started; a context that leaves nothing of it running."""
    return Program(ROOT / f"{name}.py", *argv, processes=processes)


def finished(name: str, *argv, processes: int = 1) -> subprocess.CompletedProcess:
    """Runs a script of the repo root to its end."""
    with started(name, *argv, processes=processes) as program:
        return program.finish()
