"""Fixtures shared by all tests: scripts called in process, and one model trained as a user trains it."""

import os
from pathlib import Path

import pytest
from launching import launch, load_script


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def own_caches(tmp_path_factory):
    """Latent caches of the test run lie in its own folder, not in the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps its state in the process; every test starts without."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def script():
    """Calls a script's main in process: script("train_class_cond", "--seed", 1)."""

    def call(name: str, *argv):
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return load_script(name).main([str(word) for word in argv])

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
    done = launch("train_class_cond", "--output_dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
