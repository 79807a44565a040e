"""Weights spread over processes: what each of them holds, and the whole that all of them gather together.

FSDP (version 2) turns parameters into `DTensor`s, of which a process holds a shard. ZeRO's stages 1 and 2 leave the
parameters whole and shard the optimizer. Everything here leaves a parameter that is no `DTensor` as it is.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Layout:
    """How a launch divides the work.

    Attributes:
        processes: one per device. kind: `single`, `ddp` (every device holds all), `fsdp` or `zero`.
        stage: of DeepSpeed's ZeRO: from 1 on the optimizer state is sharded, from 2 on the gradients too.
    """

    processes: int = 1
    kind: str = "single"
    stage: int = 0

    @staticmethod
    def of_this_launch() -> "Layout":
        """As the launcher's environment says; one process without a launcher."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            return Layout(processes, "fsdp")
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
            return Layout(processes, "zero", int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")))
        return Layout(processes, "ddp" if processes > 1 else "single")

    @property
    def of_checkpoints(self) -> str | None:
        """What a checkpoint of this launch can be taken up by: None by any launch that shards nothing, FSDP's by any
        number of processes, ZeRO's by as many."""
        return {"fsdp": "fsdp", "zero": f"zero {self.stage} × {self.processes}"}.get(self.kind)

    def share(self, parameter: torch.Tensor) -> int:
        """Elements of a parameter on the first device where it is sharded: FSDP cuts along the first dimension, ZeRO
        a flat list."""
        if self.kind == "fsdp":
            return math.ceil(len(parameter) / self.processes) * (parameter.numel() // max(1, len(parameter)))
        return math.ceil(parameter.numel() / self.processes)


def shards(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """What this process holds of the parameters, in their memory: a shard of each, or the parameter itself."""
    return [_local(parameter) if isinstance(parameter, DTensor) else parameter for parameter in parameters]


def _local(parameter: DTensor) -> torch.Tensor:
    # A view of its own: an average follows what requires a gradient, which a local tensor does not say.
    return parameter.detach().to_local().detach().requires_grad_(parameter.requires_grad)


def whole(shard: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """The whole tensor whose shards are distributed as the parameter's. All processes take part."""
    if not isinstance(parameter, DTensor):
        return shard
    return DTensor.from_local(
        shard.detach(), parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()


def shard_of(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """This process's shard of a whole tensor that every process has, as the parameter is distributed."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    # Every process cuts its own, without a word to the others.
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def value(norm: torch.Tensor) -> torch.Tensor:
    """A reduced number, such as a norm over sharded gradients, as a plain tensor. All processes take part."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
