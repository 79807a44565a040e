"""Runs train_class_cond.py, several times in a row, sharded by FSDP or DeepSpeed's ZeRO on CPU processes.

    train_sharded.py fsdp|zero JSON        a list of argument lists, or a folder name to remove before the next

accelerate engages them on GPUs alone. Here its state is told, after the processes have found each other by gloo, what
it is; everything from there on (preparing, clipping, saving, loading) is accelerate's and ours as on GPUs.
"""

import json
import os
import shutil
import sys

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from launching import load_script

from noisycond import hardware


KIND = sys.argv[1]
VARIABLE = {"fsdp": "ACCELERATE_USE_FSDP", "zero": "ACCELERATE_USE_DEEPSPEED"}[KIND]
make_accelerator = hardware.make_accelerator


def make_sharding_accelerator(args):
    os.environ.pop(VARIABLE, None)
    accelerator = make_accelerator(args)
    os.environ[VARIABLE] = "true"
    if KIND == "fsdp":
        distributed_type = DistributedType.FSDP
        plugins = {
            "fsdp_plugin": FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                state_dict_type="sharded_state_dict",
                cpu_ram_efficient_loading=False,
            )
        }
    else:
        distributed_type = DistributedType.DEEPSPEED
        plugins = {"deepspeed_plugins": DeepSpeedPlugin(zero_stage=2)}
        plugins["deepspeed_plugins"].set_mixed_precision("no")
        accelerator.deepspeed_engine_wrapped = None
    PartialState._shared_state["distributed_type"] = distributed_type
    AcceleratorState._shared_state.update(distributed_type=distributed_type, **plugins)
    if KIND == "zero":
        hardware.set_up_deepspeed(accelerator, args)
    return accelerator


def forget_accelerate() -> None:
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState._shared_state.clear()


hardware.make_accelerator = make_sharding_accelerator
# The runs share one group of processes; each would end it.
PartialState.destroy_process_group = lambda self, group=None: None
for task in json.loads(sys.argv[2]):
    if isinstance(task, str):
        if os.environ["RANK"] == "0":  # which alone looks for checkpoints
            shutil.rmtree(task)
    else:
        forget_accelerate()
        load_script("train_class_cond").main(task)
torch.distributed.destroy_process_group()
