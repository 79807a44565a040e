"""A launch that asks for what is not there gets one sentence; the configurations in recipes/ are the launcher's."""

import os
import subprocess
from datetime import timedelta

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from launching import ROOT

from noisycond import hardware
from noisycond.arguments import LoopArguments
from noisycond.errors import InputError


CONFIGS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")


def test_processes_of_every_script_wait_long_for_the_main_one(monkeypatch):
    class Made(Exception):
        pass

    def make(**options):
        raise Made(options)

    monkeypatch.setattr(hardware, "Accelerator", make)
    waits = []
    for factory, args in ((hardware.make_sampling_accelerator, None), (hardware.make_accelerator, LoopArguments())):
        with pytest.raises(Made) as made:
            factory(args)
        waits += [handler.timeout for handler in made.value.args[0]["kwargs_handlers"]]
    assert waits == [timedelta(hours=2)] * 2


@NO_GPU
@pytest.mark.parametrize(
    "environment, words",
    [
        ({"LOCAL_WORLD_SIZE": str(CORES + 2)}, [f"asks for {CORES + 2} processes", f"no GPU and {CORES} CPU cores"]),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ["GPUs 0,1", "none here"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["FSDP", "needs GPUs"]),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["DeepSpeed", "needs GPUs"]),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, ["fp8", "bf16"]),
    ],
)
def test_devices_that_are_not_there(refused, tmp_path, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sentence = refused("train_class_cond", "--output_dir", tmp_path / "run")
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("environment", [{}, {"LOCAL_WORLD_SIZE": "2"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_what_is_there(monkeypatch, environment):
    """Two processes go on any machine, by gloo."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hardware.check_launch(on_gpu=False)


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"LOCAL_WORLD_SIZE": "1000"}, "1000 processes"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
            "SHARDED_STATE_DICT",
        ),
    ],
)
def test_with_gpus(monkeypatch, environment, words):
    """The checks that come after a GPU was found; the count of GPUs is the machine's."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as caught:
        hardware.check_launch(on_gpu=True)
    assert words in str(caught.value)


# Configurations


def test_there_are_configurations():
    assert {path.stem for path in CONFIGS} == {"one_gpu", "one_node", "two_nodes", "fsdp", "deepspeed_zero2"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_is_the_launcher_s(path):
    config = load_config_from_file(str(path))
    stored = yaml.safe_load(path.read_text())
    assert (config.num_processes, config.num_machines) == (stored["num_processes"], stored["num_machines"])
    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(path), "train_class_cond.py"])
    args, _, _ = _validate_launch_command(args)
    assert args.num_processes == stored["num_processes"] and args.mixed_precision == "bf16"
    assert args.use_fsdp == (path.stem == "fsdp") and args.use_deepspeed == (path.stem == "deepspeed_zero2")
    # A key of a sub-table that the launcher does not know would be passed over in silence.
    for table, prefix in (("fsdp_config", ""), ("deepspeed_config", "")):
        for key, value in stored.get(table, {}).items():
            assert str(getattr(args, prefix + key)).lower() == str(value).lower(), key


def test_the_sharding_configuration_is_one_we_support(monkeypatch):
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = launch_command_parser().parse_args(
        ["--config_file", str(ROOT / "recipes/accelerate/fsdp.yaml"), "--main_process_port", "0", "x.py"]
    )
    args, _, _ = _validate_launch_command(args)
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    hardware.check_launch(on_gpu=True)


def test_the_job_script_is_a_shell_s():
    script = ROOT / "recipes/slurm/train.sbatch"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    assert "#SBATCH --signal=TERM@" in text  # without "B:", which would signal the shell alone
    assert "--resume_from_checkpoint latest" in text and "scontrol requeue" in text
