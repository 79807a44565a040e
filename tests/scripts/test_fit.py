"""The loop with a toy model: losses that are not finite, on one process and on two."""

import json
import subprocess

import pytest
from forking import Program
from launching import ROOT


TOY = ROOT / "tests/helpers/fit_toy.py"


def run(folder, batch_size: int, bad_steps: str, processes: int = 1, *more) -> subprocess.CompletedProcess:
    with Program(TOY, folder, batch_size, bad_steps, *more, processes=processes) as program:
        return program.finish(timeout=120)


def results(done: subprocess.CompletedProcess) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda state: state["rank"])


@pytest.mark.parametrize("processes", [1, 2])
def test_steps_that_are_not_finite_are_skipped_by_all(tmp_path, processes):
    states = results(run(tmp_path / "run", 8 // processes, "2,3,6", processes))
    assert len(states) == processes
    assert all(state["steps"] == list(range(11)) and state["step"] == 8 for state in states)  # nothing is drawn twice
    assert len({state["weight"] for state in states}) == 1 and 0.1 < states[0]["weight"] < 2
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    saved = json.loads((tmp_path / "run/checkpoint-8/trainer_state.json").read_text())
    assert saved["step"] == 8 and saved["attempted_step"] == 11


def test_too_many_in_a_row_end_the_run_on_all_processes(tmp_path):
    done = run(tmp_path / "run", 4, "5,6,7", processes=2)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "3 losses in a row were not finite" in errors[0] and "after step 5" in errors[0]


def test_data_that_fails_in_another_process_ends_the_run_on_all(tmp_path):
    done = run(tmp_path / "run", 4, "", 2, "3")
    assert done.returncode != 0 and "[rank0]: Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: there is no more data here."]
