"""Fixtures shared by all tests: scripts called in process, and one model trained as a user trains it."""

import gc
import os
from pathlib import Path

import pytest
from filelock import FileLock
from launching import call, forget_accelerate, launch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory):
    """Latent caches of the test run lie in its own folder, not in the user's, and so does the code of pipelines that
    processes of its own open."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))


@pytest.fixture(autouse=True, scope="session")
def melted():
    """What `script` froze is melted in the end: some libraries report what the interpreter does not collect."""
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Every test starts and ends without accelerate's state."""
    forget_accelerate()
    yield
    forget_accelerate()


@pytest.fixture
def accelerator():
    """An accelerator on CPU, one process."""
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture
def one_thread():
    """One thread: models too small for more, and bits that do not depend on the machine's cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def script():
    """Calls a script's main in process: script("train_class_cond", "--seed", 1)."""
    return call


@pytest.fixture
def refused(script, capsys):
    """Calls a script that must refuse its input; returns the one sentence it prints."""

    def call(name: str, *argv) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            script(name, *argv)
        printed = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in printed if line.startswith("error: ")]
        assert leaving.value.code == 2
        assert len(errors) == 1 and "Traceback" not in "\n".join(printed), printed
        return errors[0].removeprefix("error: ")

    return call


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Makes a folder once per test run, whichever worker comes first: once(name, make) calls make(folder), and the
    other workers wait for it. The folder is not to be written to."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder_of(name: str, make) -> Path:
        folder, made = root / "once" / name, root / "once" / f"{name}.made"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(root / "once" / f"{name}.lock"):
            if not made.exists():
                make(folder)
                made.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def trained(once) -> Path:
    """The output folder of the embedded default, trained once per test run as `make demo` trains it."""

    def train(folder):
        # On one core: the other one runs another test, and two threads take half as much time again of both.
        done = launch("train_class_cond", "--output_dir", folder, "--cpu_threads_per_process", 1)
        assert done.returncode == 0, done.stderr[-3000:]

    return once("trained", train)


@pytest.fixture(scope="session")
def text_folders(once):
    """A folder with a small text-to-image pipeline of every family, by its name."""
    import text_pipelines  # takes long

    def make(folder):
        for kind in text_pipelines.FAMILIES:
            text_pipelines.make(kind).save_pretrained(folder / kind)

    return once("text_pipelines", make)
