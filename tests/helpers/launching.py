"""Scripts of the repo root: as modules, and launched as a user launches them."""

import gc
import importlib.util
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]


def load_script(name: str):
    """A script of the repo root as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def forget_accelerate() -> None:
    """accelerate keeps its state in the process: this drops it."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def call(name: str, *argv):
    """Calls a script's main in this process: call("train_class_cond", "--seed", 1)."""
    forget_accelerate()
    main = load_script(name).main
    # A run collects garbage at its end; what was imported before need not be walked through every time.
    gc.collect()
    gc.freeze()
    return main([str(word) for word in argv])


def launch_command(name: str, *argv, processes: int = 1) -> list[str]:
    """The command line a user types."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    if processes > 1:  # the launcher's name for several processes; without a GPU they run on CPU
        launcher += ["--multi_gpu", "--main_process_port", "0"]  # any free port: tests run side by side
    return [*launcher, str(ROOT / f"{name}.py"), *map(str, argv)]


def launch(name: str, *argv, processes: int = 1, **options) -> subprocess.CompletedProcess:
    """Launches a script and waits for it."""
    command = launch_command(name, *argv, processes=processes)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)
