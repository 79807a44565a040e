"""Sharded over two processes by gloo (FSDP and, where it is installed, DeepSpeed's ZeRO): training, average,
checkpoints and export as on one process."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from forking import Program
from launching import ROOT
from safetensors.torch import load_file

from noisycond.denoisers import build_denoiser, find_denoiser


EXPORTED = "transformer/diffusion_pytorch_model.safetensors"
HELPER = ROOT / "tests/helpers/train_sharded.py"
FLAGS = ["--gradient_accumulation_steps", "2", "--lr_warmup_steps", "2", "--checkpointing_steps", "3"]
FLAGS += ["--checkpoints_total_limit", "5", "--corruption_ratio", "0.5"]


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def largest_difference(one: Path, other: Path) -> float:
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys()
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)


def train(kind: str, folder: Path, tiny_denoiser: str) -> Path:
    """Sharded runs: `straight`, `cut` (its second half resumed) and `plain` (without an average), in one launch."""
    base = ["--denoiser", tiny_denoiser, "--train_batch_size", "4", "--max_train_samples", "96", *FLAGS]
    base += ["--max_train_steps", "6", "--report_to", "none", "--validation_images_per_class", "1"]
    base += ["--validation_inference_steps", "2", "--cpu_threads_per_process", "1", "--output_dir"]
    tasks = [
        [*base, str(folder / "straight"), "--validation_steps", "3"],
        [*base, str(folder / "cut")],
        str(folder / "cut/checkpoint-6"),
        [*base, str(folder / "cut"), "--resume_from_checkpoint", "latest"],
        [*base, str(folder / "plain"), "--use_ema", "false"],
    ]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    with Program(HELPER, kind, json.dumps(tasks), processes=2, environment=environment) as program:
        done = program.finish()
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_denoiser) -> Path:
    return train("fsdp", tmp_path_factory.mktemp("fsdp"), tiny_denoiser)


@pytest.fixture
def alone(script, tiny, tmp_path):
    """The same on one process with the same global batch."""

    def run(*argv) -> Path:
        script("train_class_cond", *tiny, *FLAGS, *argv)
        return tmp_path / "run"

    return run


def assert_equal(one: Path, sharded: Path, tolerance: float) -> None:
    assert [row["lr"] for row in log(one)] == [row["lr"] for row in log(sharded)]
    for name in ("loss", "grad_norm"):
        values = np.array([[row[name] for row in log(folder)] for folder in (one, sharded)])
        assert np.abs(values[0] / values[1] - 1).max() < tolerance, name
    for name in ("checkpoint-3/ema.safetensors", "checkpoint-6/ema.safetensors", EXPORTED):
        assert largest_difference(one / name, sharded / name) < 1e-5
    assert (one / "corruption.json").read_text() == (sharded / "corruption.json").read_text()
    assert {path.name for path in (sharded / "samples").iterdir()} == {
        "step-0000003.png",
        "step-0000006.png",
        "final.png",
    }


def test_equals_one_process(runs, alone):
    assert_equal(alone(), runs / "straight", 1e-5)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero_equals_one_process_and_resumes(alone, tmp_path_factory, tiny_denoiser):
    runs = train("zero", tmp_path_factory.mktemp("zero"), tiny_denoiser)
    # DeepSpeed adds 1e-6 to the norm it clips by.
    assert_equal(alone(), runs / "straight", 1e-3)
    assert log(runs / "straight") == log(runs / "cut")
    assert largest_difference(runs / "straight" / EXPORTED, runs / "cut" / EXPORTED) == 0.0


def test_the_export_without_an_average_is_the_weights(runs, alone):
    one = alone("--use_ema", "false")
    assert largest_difference(one / EXPORTED, runs / "plain" / EXPORTED) < 1e-5
    assert largest_difference(runs / "straight" / EXPORTED, runs / "plain" / EXPORTED) > 1e-5


def test_resumes_bit_for_bit(runs):
    assert log(runs / "straight") == log(runs / "cut")
    for name in ("checkpoint-6/ema.safetensors", EXPORTED):
        assert largest_difference(runs / "straight" / name, runs / "cut" / name) == 0.0


def test_checkpoints_are_sharded_and_another_kind_of_launch_is_told(runs, script, refused, tiny):
    names = {path.name for path in (runs / "straight/checkpoint-6").iterdir()}
    assert {"pytorch_model_fsdp_0", "optimizer_0", "ema.safetensors", "manifest.json"} <= names
    assert "model.safetensors" not in names and "optimizer.bin" not in names
    words = [*FLAGS, "--output_dir", runs / "straight", "--resume_from_checkpoint", "latest"]
    sentence = refused("train_class_cond", *tiny, *words)
    assert "sharding was 'fsdp' and is None" in sentence


@pytest.mark.parametrize("name, channels", [("ldm-mini", 3), ("dit-mini", 4)])
def test_what_is_gathered_at_a_time_is_in_the_model(name, channels):
    denoiser = build_denoiser(find_denoiser(name), class_names=["a"], latent_channels=channels, latent_size=8)
    classes = [type(module).__name__ for module in denoiser.modules()]
    assert denoiser._no_split_modules and all(classes.count(unit) > 1 for unit in denoiser._no_split_modules)
