"""What a launch of a study says to accelerate, and what it shares with others."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from noisycond.errors import InputError
from noisycond.study import launching
from noisycond.study.launching import Launcher, cpu_launcher, gpu_launcher, launch_words
from noisycond.study.planning import Step


STEP = Step("show", Path("out"), ("--seed", "1"), "0123456789")
# As `accelerate config` writes it, of someone who trains on two machines.
CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2}
dynamo_config: {dynamo_backend: INDUCTOR}
mixed_precision: fp16
gpu_ids: '0'
machine_rank: 1
main_process_ip: 10.0.0.1
main_process_port: 1234
num_machines: 2
num_processes: 16
"""
SHOW = """
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "environment": dict(os.environ)}))
"""


def test_a_launch_is_as_the_study_says_whatever_accelerate_is_configured_for(tmp_path, monkeypatch):
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text(CONFIG)
    monkeypatch.setattr(launching, "ROOT", tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    around = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_PORT": "9", "ACCELERATE_MIXED_PRECISION": "x"}
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    launcher = Launcher({"OURS": "1"})
    slot = {"CUDA_VISIBLE_DEVICES": "4"}
    done = subprocess.run(
        launcher.command(STEP), env=launcher.environment_in(slot), capture_output=True, text=True, check=True
    )
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["argv"] == ["--seed", "1"]
    found = shown["environment"]
    assert (found["OURS"], found["CUDA_VISIBLE_DEVICES"]) == ("1", "4")
    assert (found["ACCELERATE_MIXED_PRECISION"], found["ACCELERATE_DYNAMO_BACKEND"]) == ("no", "NO")
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_FSDP"} & found.keys()


def test_several_processes_are_one_launch_of_a_kind():
    assert "--multi_gpu" not in launch_words(STEP)
    several = launch_words(dataclasses.replace(STEP, processes=2))
    assert several[several.index("--num_processes") + 1] == "2" and "--multi_gpu" in several
    for words in (("--use-fsdp",), ("--config_file=fsdp.yaml",), ("--cpu",)):  # accelerate takes one kind alone
        asked = launch_words(dataclasses.replace(STEP, processes=2, launch=words))
        assert "--multi_gpu" not in asked and asked[-1] == words[0]


def test_launchers_share_what_there_is(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpu = cpu_launcher(8, 1, 2)
    assert len(cpu.slots) == 2 and cpu.environment["OMP_NUM_THREADS"] == "4"
    several = cpu_launcher(8, 2)
    assert len(several.slots) == 4 and several.environment["OMP_NUM_THREADS"] == "1"
    gpu = gpu_launcher(["0", "1", "2", "3", "5"], 2)
    assert gpu.slots == ({"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"})
    assert len(gpu_launcher(["0", "1"], 1, 1).slots) == 1


def test_more_runs_than_there_are_gpus_for_are_refused():
    with pytest.raises(InputError, match="--jobs is 3, but a run has 2 GPUs .* there are 5 here: at most 2"):
        gpu_launcher(["0", "1", "2", "3", "5"], 2, 3)
