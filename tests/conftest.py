"""Fixtures shared by all tests: scripts called in process, and one model trained as a user trains it."""

import gc
import os
from pathlib import Path

import pytest
from launching import call, forget_accelerate, launch


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory):
    """Latent caches of the test run lie in its own folder, not in the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


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
def trained(tmp_path_factory) -> Path:
    """The output folder of the embedded default, trained once per test run as `make demo` trains it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    # On one core: the other one runs another test, and two threads take half as much time again of both.
    done = launch("train_class_cond", "--output_dir", folder, "--cpu_threads_per_process", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def text_folders(tmp_path_factory):
    """A folder with a small text-to-image pipeline of every family, by its name."""
    import text_pipelines  # takes long

    root = tmp_path_factory.mktemp("text_pipelines")
    for kind in text_pipelines.FAMILIES:
        text_pipelines.make(kind).save_pretrained(root / kind)
    return root
