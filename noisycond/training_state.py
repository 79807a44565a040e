"""What a training run consists of at any moment: weights, their average, optimizer, schedule, counts; and one step of
it. Everything here is saved in a checkpoint and taken up again.
"""

import copy
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import nn

from noisycond import checkpoints
from noisycond.arguments import LoopArguments
from noisycond.data.images import BadImages
from noisycond.errors import InputError, require
from noisycond.processes import on_all
from noisycond.randomness import step_keys
from noisycond.sharding import shard_of, shards, value, whole
from noisycond.signals import StopSignals


logger = logging.getLogger(__name__)
ComputeLoss = Callable[[nn.Module, dict, torch.Tensor], torch.Tensor]


class Tally(Protocol):
    """Counts that accumulate over the examples seen: kept per process, summed for logs, saved with checkpoints."""

    counts: torch.Tensor

    def summary(self, counts: torch.Tensor) -> dict:
        """Plain values for a log or a JSON file."""


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: optimizer steps taken. attempted_step: those and the skipped ones; data and draws are keyed by it.
        nonfinite_steps: skipped steps in a row.
    """

    step: int = 0
    attempted_step: int = 0
    nonfinite_steps: int = 0


class Average(EMAModel):
    """diffusers' moving average with its update in one pass over memory instead of three."""

    @torch.no_grad()
    def step(self, parameters: list[torch.Tensor]) -> None:
        """Moves the average towards the parameters, which all require a gradient."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        torch._foreach_lerp_(self.shadow_params, parameters, 1.0 - self.cur_decay_value)


class AveragedWeights:
    """The moving average of a run's weights as it stands, for a loss that is computed with it; filled by
    [`TrainingState`].

    Attributes:
        weights: parameter's name in the denoiser → its average; none before the run is set up, nor in one without
            an average.
    """

    def __init__(self):
        self.weights: dict[str, torch.Tensor] = {}


class TrainingState:
    """What [`noisycond.trainer.fit`] works on.

    Args:
        denoiser: what is trained; where it is sharded, a copy of it is, and it takes up the whole weights on the main
            process when they are asked for. max_steps: optimizer steps of the whole run. tallies: named counts.
            batches: the data, whose place is saved too. learning_rates: see [`parameter_groups`]. average: is given
            the moving average.

    Parameters that are not trained (`requires_grad` is False) come from elsewhere, so no checkpoint holds them.

    Raises:
        InputError: an average is asked for and the weights are sharded.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        args: LoopArguments,
        max_steps: int,
        accelerator: Accelerator,
        tallies,
        batches,
        learning_rates: Mapping[str, float] = MappingProxyType({}),
        average: AveragedWeights | None = None,
    ):
        self.batches = batches
        self.denoiser, self.args, self.accelerator, self.tallies = denoiser, args, accelerator, tallies
        # DeepSpeed steps within the last backward pass, and passes over what is not finite by itself.
        self.steps_itself = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if average is not None:
            require_whole_average(self.sharded)
        trained = (copy.deepcopy(denoiser) if self.sharded else denoiser).to(accelerator.device)
        self.max_steps, self.progress = max_steps, Progress()
        # Agreed on by all processes, unlike what each of them receives; see train_step.
        self.stopped_by: str | None = None
        self.names = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
        groups = parameter_groups(trained, args.learning_rate, learning_rates)
        self.optimizer = make_optimizer(groups, args, accelerator.num_processes)
        # Not prepared by accelerate, which would step it once per process: here one optimizer step is one step.
        self.lr_schedule = get_scheduler(
            args.lr_scheduler,
            self.optimizer,
            step_rules=args.lr_step_rules,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=max_steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        if args.torch_compile:
            trained.compile()
        self.prepared, self.optimizer = accelerator.prepare(trained, self.optimizer)
        # Sharding replaces the parameters, so they are taken here and not before.
        self.parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
        self.ema = Average(shards(self.parameters), decay=args.ema_decay, foreach=True) if args.use_ema else None
        self.average = average
        self._show_average()
        self.batch: dict | None = None  # the last one, which takes the place of one that cannot be had
        self._hooks = []
        if not self.sharded:
            self._hooks = [
                accelerator.register_save_state_pre_hook(self._unwrapped_weights),
                accelerator.register_load_state_pre_hook(self._load_unwrapped_weights),
            ]

    def train_step(
        self, batches: Iterator[dict], compute_loss: ComputeLoss, stop: StopSignals, bad: BadImages
    ) -> dict | None:
        """One attempted optimizer step.

        Returns:
            The values to log, or None where the step was skipped because loss or gradient was not finite.

        Raises:
            InputError: on every process, where the batches raised one on any.
        """
        accelerator, progress = self.accelerator, self.progress
        if self.batch is None:
            first: list[dict] = []
            on_all(accelerator, lambda: first.append(next(batches)))
            batches = itertools.chain(first, batches)
        # Loss, wish to stop, unreadable images and an error travel together: one reduction per step.
        report, new_bad, problem = torch.zeros(4, dtype=torch.float64, device=accelerator.device), [], None
        for _ in range(self.args.gradient_accumulation_steps):
            try:
                self.batch = self.batch if problem else next(batches)
            except InputError as error:  # the step goes on, for the other processes wait within it for this one
                problem = str(error)
            batch = _to_device(self.batch, accelerator.device)
            keys = step_keys(progress.attempted_step, batch["position"])
            with accelerator.accumulate(self.prepared):
                loss = compute_loss(self.prepared, batch, keys).mean()
                accelerator.backward(loss)
            report[0] += loss.detach().double() / self.args.gradient_accumulation_steps
            new_bad += batch.get("bad_images", [])
        report[1:] = torch.tensor([stop.received is not None, len(new_bad), problem is not None])
        report = accelerator.reduce(report, reduction="sum").tolist()
        loss = report[0] / accelerator.num_processes
        if report[1]:
            self.stopped_by = stop.received or "a signal to another process"
        if report[3]:
            raise InputError(next(sentence for sentence in gather_object([problem]) if sentence is not None))
        if report[2]:
            bad.add(gather_object(new_bad), quiet=not accelerator.is_main_process)

        grad_norm = value(accelerator.clip_grad_norm_(self.parameters, self.args.max_grad_norm or float("inf")))
        grad_norm = math.nan if grad_norm is None else float(grad_norm)
        progress.attempted_step += 1
        learning_rate = self.lr_schedule.get_last_lr()[0]
        scaled, finite = accelerator.scaler is not None, math.isfinite(loss)
        stepped = finite and (scaled or self.steps_itself or math.isfinite(grad_norm))
        if not finite:
            self.optimizer.zero_grad()
        if stepped or scaled:  # a gradient scaler must see the step it is to skip, or it never lowers its scale
            self.optimizer.step()
            stepped = stepped and not accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()
        if not stepped:
            # A scaler that is still finding its scale skips steps too: with a finite loss that is no failure.
            self._skip(loss, grad_norm, counts=not (scaled and finite))
            return None
        progress.step, progress.nonfinite_steps = progress.step + 1, 0
        self.lr_schedule.step()
        if self.ema is not None:
            self.ema.step(shards(self.parameters))
        return {"step": progress.step, "loss": loss, "lr": learning_rate, "grad_norm": grad_norm}

    def _skip(self, loss: float, grad_norm: float, counts: bool) -> None:
        self.progress.nonfinite_steps += counts
        if self.accelerator.is_main_process:
            logger.warning("Skipping a step: the loss is %s and the gradient norm %s.", loss, grad_norm)
        if self.progress.nonfinite_steps >= self.args.max_nonfinite_steps:
            last = checkpoints.newest_whole(Path(self.args.output_dir))
            raise InputError(
                f"{self.progress.nonfinite_steps} losses in a row were not finite (--max_nonfinite_steps), after step "
                f"{self.progress.step}: lower --learning_rate or --max_grad_norm"
                + (f"; {last.name} is from before." if last else ".")
            )

    def totals(self) -> dict[str, dict]:
        """The tallies' summaries, summed over the processes."""
        return {name: tally.summary(self._total(tally)) for name, tally in self.tallies.items()}

    def _total(self, tally: Tally) -> torch.Tensor:
        return self.accelerator.reduce(tally.counts.to(self.accelerator.device), reduction="sum").cpu()

    @contextmanager
    def averaged_weights(self):
        """Within it the main process's denoiser has the averaged weights. All processes take part."""
        if self.sharded:
            self._gather()
        elif self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.sharded:
                self.denoiser.cpu()
            elif self.ema is not None:
                self.ema.restore(self.parameters)

    def keep_averaged_weights(self) -> None:
        """Leaves the main process's denoiser with the averaged weights. All processes take part."""
        if self.sharded:
            self._gather()
        elif self.ema is not None:
            self.ema.copy_to(self.parameters)

    @torch.no_grad()
    def _gather(self) -> None:
        """The whole weights, averaged where there is an average, into the main process's denoiser."""
        own = dict(self.denoiser.named_parameters())
        for name, tensor in self._whole(self.ema.shadow_params if self.ema else shards(self.parameters)):
            own[name].copy_(tensor)
        if self.accelerator.is_main_process:
            self.denoiser.to(self.accelerator.device)

    def _whole(self, held: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and whole tensors on the main process, nothing on the others, which must run through it too."""
        for name, shard, parameter in zip(self.names, held, self.parameters, strict=True):
            tensor = whole(shard, parameter)
            if self.accelerator.is_main_process:
                yield name, tensor.cpu() if self.sharded else tensor

    def save(self) -> None:
        """Saves a checkpoint of this step."""
        counts = {name: self._total(tally).tolist() for name, tally in self.tallies.items()}
        state = {**asdict(self.progress), "lr_schedule": self.lr_schedule.state_dict(), "tallies": counts}
        state["batches"] = self.batches.state()

        def write(folder: Path) -> None:
            self.accelerator.save_state(str(folder))
            average = dict(self._whole(self.ema.shadow_params)) if self.ema is not None else {}
            if self.accelerator.is_main_process:
                if self.ema is not None:
                    state["ema_step"] = self.ema.optimization_step
                    save_file(average, folder / "ema.safetensors")
                (folder / "trainer_state.json").write_text(json.dumps(state))

        limit = self.args.checkpoints_total_limit
        checkpoints.save(Path(self.args.output_dir), self.progress.step, self.accelerator, write, limit)

    def load(self, folder: Path) -> None:
        """Takes up a checkpoint."""
        self.accelerator.load_state(str(folder))
        state = json.loads((folder / "trainer_state.json").read_text())
        self.progress = Progress(state["step"], state["attempted_step"], state["nonfinite_steps"])
        self.batches.load_state(state.get("batches"))
        self.lr_schedule.load_state_dict(state["lr_schedule"])
        if self.ema is not None:
            shadow = load_file(folder / "ema.safetensors")
            self.ema.shadow_params = [
                shard_of(shadow[name], parameter) for name, parameter in zip(self.names, self.parameters, strict=True)
            ]
            self.ema.optimization_step = state["ema_step"]
            self._show_average()
        for name, tally in self.tallies.items():
            total = torch.tensor(state["tallies"][name])
            tally.counts = total if self.accelerator.is_main_process else torch.zeros_like(total)

    def _show_average(self) -> None:
        # Updates are made in place, so this is needed where the average is made or read anew.
        if self.average is not None and self.ema is not None:
            self.average.weights = dict(zip(self.names, self.ema.shadow_params, strict=True))

    def _unwrapped_weights(self, models: list, weights: list, output_dir: str) -> None:
        # Without the wrapper's prefix, so that another number of processes can resume.
        weights[:] = []
        for model in map(self.accelerator.unwrap_model, models):
            # Tied weights under their first name alone: safetensors refuses a tensor that comes twice.
            left_out = frozen_names(model) | tied_names(model).keys()
            weights.append({name: tensor for name, tensor in model.state_dict().items() if name not in left_out})

    def _load_unwrapped_weights(self, models: list, input_dir: str) -> None:
        while models:
            model = self.accelerator.unwrap_model(models.pop())
            frozen = frozen_names(model)
            held = {name: tensor for name, tensor in model.state_dict().items() if name in frozen}
            state = held | load_file(Path(input_dir) / "model.safetensors")
            model.load_state_dict(state | {name: state[first] for name, first in tied_names(model).items()})

    def close(self) -> None:
        """Lets go of the accelerator's hooks, so that another run in this process can use it."""
        for hook in self._hooks:
            hook.remove()
        self.accelerator.free_memory()


def require_whole_average(sharded: bool) -> None:
    """Raises InputError where the weights are sharded, for a loss that is computed with their average."""
    require(
        not sharded,
        "This training compares with the moving average of the weights at every step, so every process must hold them "
        "whole: launch it without FSDP and DeepSpeed.",
    )


def _to_device(batch: dict, device: torch.device) -> dict:
    return {
        name: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for name, value in batch.items()
    }


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are not trained."""
    # Tied ones under each of their names.
    return {name for name, value in model.named_parameters(remove_duplicate=False) if not value.requires_grad}


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names under which a parameter comes again → its first name."""
    first: dict[int, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    names = [(name, first.setdefault(id(value), name)) for name, value in parameters]
    return {name: earlier for name, earlier in names if name != earlier}


def parameter_groups(model: nn.Module, learning_rate: float, others: Mapping[str, float]) -> list[dict]:
    """The trained parameters by learning rate, as an optimizer takes them; those with the common one come first.

    Args:
        others: learning rates of parameters whose names start with a prefix, by prefix.
    """
    groups: dict[float, list[nn.Parameter]] = {learning_rate: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = (rate for prefix, rate in others.items() if name.startswith(prefix))
            groups.setdefault(next(own, learning_rate), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items() if parameters]


def make_optimizer(groups: list[dict], args: LoopArguments, num_processes: int) -> torch.optim.Optimizer:
    """AdamW with the run's settings, in 8 bits where asked; `--scale_lr` multiplies the learning rates by the global
    batch size."""
    factor = args.train_batch_size * args.gradient_accumulation_steps * num_processes if args.scale_lr else 1
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class

        options = {}
    else:
        # On CPU torch goes through the tensors one by one in Python unless told otherwise; the bits are the same.
        optimizer_class, options = torch.optim.AdamW, {"foreach": True}
    return optimizer_class(
        [group | {"lr": group["lr"] * factor} for group in groups],
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **options,
    )
