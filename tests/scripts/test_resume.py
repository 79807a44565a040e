"""Stopping and going on: killed, signalled and cut runs end bit for bit as one that was never touched."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forking import Program, finished, started
from safetensors.torch import load_file


FLAGS = ["--max_train_steps", "40", "--checkpointing_steps", "10", "--report_to", "none"]
FLAGS += ["--checkpoints_total_limit", "4", "--corruption_ratio", "0.1", "--save_corruption_map"]
FLAGS += ["--lr_warmup_steps", "10"]
FLAGS += ["--validation_images_per_class", "1", "--validation_inference_steps", "2", "--cpu_threads_per_process", "1"]


@pytest.fixture
def finish(script, caplog):
    """Runs to the end and returns what was said; one process is this one."""

    def run(folder, *argv, processes: int = 1) -> str:
        if processes == 1:
            caplog.clear()
            script("train_class_cond", *FLAGS, "--output_dir", folder, *argv)
            return caplog.text
        done = finished("train_class_cond", *FLAGS, "--output_dir", folder, *argv, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    return run


def start(folder, *argv, processes: int = 1) -> Program:
    return started("train_class_cond", *FLAGS, "--output_dir", folder, *argv, processes=processes)


def steps_logged(folder: Path) -> int:
    log = folder / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_step(program: Program, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 180
    while steps_logged(folder) < step and program.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_at(step: int, folder: Path, *argv, processes: int = 1) -> None:
    with start(folder, *argv, processes=processes) as program:
        wait_for_step(program, folder, step)
    assert steps_logged(folder) < 40


def assert_same(one: Path, other: Path) -> None:
    """Weights, average, optimizer, counts and each logged loss, bit for bit."""
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    assert steps_logged(one) == 40
    for name in ("model.safetensors", "ema.safetensors"):
        mine, theirs = load_file(one / "checkpoint-40" / name), load_file(other / "checkpoint-40" / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    mine, theirs = (torch.load(folder / "checkpoint-40/optimizer.bin", weights_only=True) for folder in (one, other))
    assert mine["param_groups"] == theirs["param_groups"]
    for number, state in mine["state"].items():
        assert all(torch.equal(value, theirs["state"][number][key]) for key, value in state.items())
    mine, theirs = (json.loads((folder / "checkpoint-40/trainer_state.json").read_text()) for folder in (one, other))
    assert mine == theirs
    assert (one / "corruption.json").read_text() == (other / "corruption.json").read_text()


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run that was never touched, in a process of its own."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = finished("train_class_cond", *FLAGS, "--output_dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_killed_after_step_20_and_at_random_moments(straight, finish, tmp_path):
    folder, draw = tmp_path / "run", random.Random(0)
    kill_at(20, folder)
    kill_at(steps_logged(folder) + draw.randrange(1, 8), folder, "--resume_from_checkpoint", "latest")
    kill_at(min(38, steps_logged(folder) + draw.randrange(1, 8)), folder, "--resume_from_checkpoint", "latest")
    said = finish(folder, "--resume_from_checkpoint", "latest")
    assert "Resuming from" in said
    assert_same(straight, folder)


def test_sigterm_to_the_trainer_saves_and_leaves_cleanly(straight, finish, tmp_path):
    folder = tmp_path / "run"
    with start(folder) as program:
        wait_for_step(program, folder, 13)
        for _ in range(5):  # a repeated signal must not interrupt the save
            program.signal(signal.SIGTERM)
            time.sleep(0.02)
        done = program.finish(timeout=120)
    said = done.stderr
    assert done.returncode == 0 and "Traceback" not in said
    stopped = steps_logged(folder)
    assert 13 <= stopped < 40
    assert f"Stopped by SIGTERM after step {stopped}" in said and "--resume_from_checkpoint latest" in said
    assert (folder / f"checkpoint-{stopped}").is_dir()
    assert not (folder / "model_index.json").exists()
    finish(folder, "--resume_from_checkpoint", "latest")
    assert_same(straight, folder)


def test_ctrl_c_to_the_process_group(straight, finish, tmp_path):
    folder = tmp_path / "run"
    with start(folder, "--dataloader_num_workers", "1") as program:
        wait_for_step(program, folder, 8)
        program.signal(signal.SIGINT)
        time.sleep(0.05)
        program.signal(signal.SIGINT)
        said = program.finish(timeout=120).stderr
    assert "Stopped by SIGINT" in said
    stopped = steps_logged(folder)
    assert (folder / f"checkpoint-{stopped}").is_dir()
    finish(folder, "--resume_from_checkpoint", "latest")
    assert_same(straight, folder)


def test_two_processes_that_accumulate_resume_exactly_and_equal_one_with_the_same_global_batch(
    straight, finish, tmp_path
):
    quarter = ["--train_batch_size", "16", "--gradient_accumulation_steps", "2"]
    finish(tmp_path / "two", *quarter, processes=2)
    kill_at(20, tmp_path / "cut", *quarter, processes=2)
    finish(tmp_path / "cut", *quarter, "--resume_from_checkpoint", "latest", processes=2)
    assert_same(tmp_path / "two", tmp_path / "cut")

    one, two = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (straight, tmp_path / "two")
    )
    assert [(row["step"], row["lr"]) for row in one] == [(row["step"], row["lr"]) for row in two]
    assert len({row["lr"] for row in one}) > 35  # the schedule is felt
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-2)):
        values = np.array([[row[name] for row in rows] for rows in (one, two)])
        assert np.abs(values[0] / values[1] - 1).max() < tolerance, name
    averages = [load_file(folder / "checkpoint-40/ema.safetensors") for folder in (straight, tmp_path / "two")]
    assert max((averages[0][name] - averages[1][name]).abs().max().item() for name in averages[0]) < 1e-3
    for name in ("corruption.json", "corruption_map.csv"):
        assert (straight / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_damaged_checkpoint_is_passed_over(straight, finish, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoint-40")
    weights = folder / "checkpoint-30/optimizer.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    said = finish(folder, "--resume_from_checkpoint", "latest")
    assert "damaged" in said and "optimizer.bin has 1000 bytes" in said and "checkpoint-20" in said
    assert_same(straight, folder)
