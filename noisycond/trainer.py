"""The one training loop: data → loss → backward → finite check → step → EMA → log → checkpoint → validate.

It knows neither prediction type nor architecture; a script hands it a module, batches and a loss per example [B].
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from noisycond.arguments import LoopArguments
from noisycond.data.batches import Batches
from noisycond.data.images import BadImages, LabelledImages
from noisycond.data.shard_names import public_settings
from noisycond.processes import on_main
from noisycond.run_folder import RunFolder
from noisycond.sharding import Layout
from noisycond.signals import StopSignals
from noisycond.training_state import AveragedWeights, ComputeLoss, Tally, TrainingState


logger = logging.getLogger(__name__)
Look = Callable[[int], dict | None]


@dataclass
class FitResult:
    """How training ended: the last step, the signal that stopped it before the end (or None), the tallies' totals."""

    step: int
    stopped_by: str | None
    totals: dict[str, dict]


def steps_to_train(args: LoopArguments, num_examples: int | None, global_batch_size: int) -> int:
    """Optimizer steps of a run: --max_train_steps, always given for a stream, or --num_train_epochs times the data."""
    return args.max_train_steps or -(-args.num_train_epochs * num_examples // global_batch_size)


def fit(
    denoiser: nn.Module,
    batches: Batches,
    compute_loss: ComputeLoss,
    args: LoopArguments,
    *,
    accelerator: Accelerator,
    run: RunFolder,
    bad_images: BadImages,
    resume_from: Path | None = None,
    tallies: dict[str, Tally] | None = None,
    looks: Sequence[tuple[Look | None, int]] = (),
    learning_rates: Mapping[str, float] = MappingProxyType({}),
    average: AveragedWeights | None = None,
) -> FitResult:
    """Trains until --max_train_steps, or until a signal asks to stop; the main process's denoiser ends with
    the averaged weights, whole.

    Args:
        denoiser: what is trained, checkpointed and averaged.
        batches: this process's data.
        compute_loss: `(prepared denoiser, batch, keys int64 [B]) → loss float32 [B]`. It must call the module it is
            given: the raw one would bypass the synchronization of gradients.
        run: the output folder, opened.
        bad_images: counts the unreadable images that batches report.
        resume_from: a verified checkpoint, see [`noisycond.run_folder.claim`].
        tallies: counts that are logged and saved.
        looks: what is done every so many steps (0: never) on the main process, with the step, while the denoiser has
            the averaged weights: drawing samples, evaluating. A dict that one returns is logged.
        learning_rates: of parameters whose names start with a prefix, by prefix, instead of --learning_rate.
        average: is given the averaged weights, for a `compute_loss` that reads them; not where weights are sharded.

    Raises:
        InputError: too many non-finite losses or unreadable images, no space left, or an average of sharded weights
            was asked for.
    """
    max_steps = steps_to_train(args, batches.num_examples, batches.global_batch_size)
    state = TrainingState(denoiser, args, max_steps, accelerator, tallies or {}, batches, learning_rates, average)
    if resume_from is not None:
        state.load(resume_from)
    progress, saved_at = state.progress, state.progress.step
    has_looked = on_main(accelerator, lambda: run.cut_log(progress.step))
    if resume_from is not None and not has_looked:  # the run before ended between its checkpoint and its looks
        _look(state, run, looks)
    state.prepared.train()
    with StopSignals() as stop, _bar(state) as bar:
        stream = batches.starting_at(progress.attempted_step)
        while progress.step < max_steps and state.stopped_by is None:
            row = state.train_step(stream, compute_loss, stop, bad_images)
            if row is None:
                continue
            bar.update()
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            if progress.step % args.logging_steps == 0:
                _log(state, run, row)
            if args.checkpointing_steps and progress.step % args.checkpointing_steps == 0:
                state.save()
                saved_at = progress.step
            if state.stopped_by is None:
                _look(state, run, looks)
        if saved_at != progress.step:
            state.save()
        totals = state.totals()
    state.keep_averaged_weights()
    accelerator.wait_for_everyone()
    state.close()
    return FitResult(progress.step, state.stopped_by if progress.step < max_steps else None, totals)


def _log(state: TrainingState, run: RunFolder, row: dict) -> None:
    for name, summary in state.totals().items():
        row |= {f"{name}_{key}": value for key, value in summary.items() if isinstance(value, (int, float))}
    state.accelerator.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])
    if state.accelerator.is_main_process:
        run.log(row)


def _look(state: TrainingState, run: RunFolder, looks: Sequence[tuple[Look | None, int]]) -> None:
    """Does what is due at this step."""
    accelerator, step = state.accelerator, state.progress.step
    due = [look for look, every in looks if look and every and step % every == 0]
    if not due:
        return

    def act() -> None:
        state.denoiser.eval()
        for look in due:
            row = look(step)
            if row:
                numbers = {f"eval_{name}": value for name, value in row.items() if isinstance(value, (int, float))}
                accelerator.log(numbers, step=step)  # trackers draw numbers; the choices behind them stand in the file
                run.log_evaluation({"step": step} | row)
        run.note_looks(step)

    with state.averaged_weights() if accelerator.is_main_process or state.sharded else nullcontext():
        on_main(accelerator, act)
    state.prepared.train()


def _bar(state: TrainingState) -> tqdm:
    begun, is_here = state.progress.step, state.accelerator.is_local_main_process
    return tqdm(
        total=state.max_steps, initial=begun, desc="training", unit="step", disable=not is_here, dynamic_ncols=True
    )


def facts(args: LoopArguments, batches: Batches) -> dict:
    """What a resumed run must share beside its flags, as JSON values: the global batch size, the number of steps
    where the learning rate depends on it, and how checkpoints are sharded."""
    shared = {"global_batch_size": batches.global_batch_size, "sharding": Layout.of_this_launch().of_checkpoints}
    if args.lr_scheduler not in ("constant", "constant_with_warmup", "piecewise_constant"):
        shared["optimizer_steps"] = steps_to_train(args, batches.num_examples, batches.global_batch_size)
    return shared


def announce(
    args: LoopArguments, accelerator: Accelerator, images: LabelledImages, denoiser: nn.Module, batches: Batches
):
    """Starts the trackers and logs once what matters: dataset, parameters, effective batch, steps."""
    if args.report_to != "none":
        simple = {
            name: value for name, value in public_settings(args).items() if isinstance(value, (bool, int, float, str))
        }
        accelerator.init_trackers("noisycond", config=simple)
    steps = steps_to_train(args, batches.num_examples, batches.global_batch_size)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters() if parameter.requires_grad)
    if args.inferred:
        values = ", ".join(f"{name} {value}" for name, value in args.inferred.items())
        logger.info("Values of the recipe %s that are our reading [inferred]: %s.", args.recipe, values)
    classes = len(images.source.class_names)
    logger.info("%s%s.", images.describe(), f" in {classes} classes" if classes else "")
    logger.info("%.2f M trainable parameters on %s.", parameters / 1e6, accelerator.device)
    logger.info(
        "%d steps of %d examples (%d per process × %d accumulated × %d processes)%s.",
        steps,
        batches.global_batch_size,
        args.train_batch_size,
        args.gradient_accumulation_steps,
        accelerator.num_processes,
        f", {steps * batches.global_batch_size / batches.num_examples:.1f} epochs" if batches.num_examples else "",
    )


def finish(accelerator: Accelerator, result: FitResult, run: RunFolder) -> None:
    """Closes the trackers, and says how to go on where a signal stopped the run."""
    if result.stopped_by is not None:
        logger.info(
            "Stopped by %s after step %d; continue with --resume_from_checkpoint latest --output_dir %s.",
            result.stopped_by,
            result.step,
            run.path,
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
