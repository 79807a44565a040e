#!/usr/bin/env python
"""Distils a latent diffusion model into one that draws in a few steps (latent consistency distillation), with
corruption and condition embedding perturbation on the student's conditions.

accelerate launch train_lcm_distill.py                                  # the class-conditional miniature on digits
accelerate launch train_lcm_distill.py --recipe digits_text_lcm         # the text-to-image miniature
accelerate launch train_lcm_distill.py --pretrained_teacher_model runs/ldm-4-in1k --train_data_dir imagenet/train
accelerate launch train_lcm_distill.py --recipe lcm_sd15_cc3m/cep_u     # LCM-v1.5 of Stable Diffusion 1.5
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


try:
    import torch
    from torch.func import functional_call

    from noisycond import checkpoints, dry_run, hardware, trainer
    from noisycond.arguments import (
        CorruptionArguments,
        FirstStageArguments,
        HubArguments,
        LoopArguments,
        LoRAArguments,
        MemoryArguments,
        PerturbationArguments,
        StreamArguments,
        flag,
    )
    from noisycond.begin import begin
    from noisycond.cards import (
        UNKNOWN_PLACE,
        distillation_card,
        distilled_call,
        loading_code,
        lora_loading_code,
        public_name,
    )
    from noisycond.class_conditional import ClassTeaching, SampleGridArguments
    from noisycond.condition_kinds import CAPTIONS, LABELS, Started, parse_by_kind
    from noisycond.data.caption_options import CaptionCorruptionArguments, CaptionDataArguments
    from noisycond.denoisers.text_options import TextCacheArguments
    from noisycond.distillation import ConsistencyDistillation, guidance_embedding, guided
    from noisycond.errors import one_sentence_errors, require
    from noisycond.evaluation.in_training import EvaluationArguments, TextEvaluationArguments
    from noisycond.export import export_pipeline
    from noisycond.lora import how_to_load, save_lora
    from noisycond.processes import on_main
    from noisycond.results import LORA, leave_results
    from noisycond.run_folder import RunFolder, claim
    from noisycond.sharding import Layout
    from noisycond.teachers import DOING, Teaching
    from noisycond.text_conditional import PromptGridArguments, TextTeaching
    from noisycond.training_state import AveragedWeights, require_whole_average
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


@dataclass
class LCMArguments(
    FirstStageArguments, PerturbationArguments, LoRAArguments, MemoryArguments, LoopArguments, HubArguments
):
    """The flags of the distillation itself; those of data, corruption, sample grids and evaluation are added by what
    the teacher takes as a condition."""

    pretrained_teacher_model: str | None = flag(
        None,
        "The pipeline to distil, a folder or Hub id; its first stage is used unless another is named. Of a "
        "text-to-image one there are the flags of captions instead of those of labels: name it with --help to see "
        "them.",
    )
    teacher_revision: str | None = flag(None, "The revision of the teacher on the Hub.")
    teacher_condition: Literal["clean", "corrupted"] = flag(
        "clean", "Which condition guides the teacher where the student's is corrupted: the true one, or the same."
    )
    num_ddim_timesteps: int = flag(50, "Steps of the DDIM solver over all noise levels; must divide their number.")
    w_min: float = flag(5.0, "The teacher's guidance strength w is drawn from here on; the guidance scale is w + 1.")
    w_max: float = flag(15.0, "The largest w.")
    loss_type: Literal["l2", "huber"] = flag("l2", "The distance of the student's output from its target.")
    huber_c: float = flag(0.001, "c of the Huber loss √(error² + c²) - c.")
    unet_time_cond_proj_dim: int = flag(256, "The dimension of the guidance embedding that the student's U-Net gets.")
    timestep_scaling_factor: float = flag(10.0, "Scales timesteps in the boundary scalings c_skip and c_out.")
    ema_decay: float = flag(0.95, "Decay of the moving average, which is the target network and what is exported.")
    conditioning_dropout_prob: float = flag(0.0, "Share of examples distilled without their condition.")
    validation_guidance_scale: float | None = flag(
        None, "Guidance scale of the sample grids; the default is the middle of those distilled."
    )
    validation_inference_steps: int = flag(4, "Sampling steps of the sample grids.")

    def __post_init__(self):
        require(
            0 <= self.w_min <= self.w_max < float("inf"),
            f"--w_min is {self.w_min} and --w_max {self.w_max}, but w must run upwards from 0 (no guidance) or more.",
        )
        if self.validation_guidance_scale is None:  # LoRA has the guidance in its weights
            self.validation_guidance_scale = 1.0 if self.use_lora else 1 + (self.w_min + self.w_max) / 2
        super().__post_init__()
        require(
            self.pretrained_teacher_model is not None,
            "--pretrained_teacher_model is needed: the folder or Hub id of the pipeline to distil.",
        )
        require(
            self.teacher_revision is None or not Path(self.pretrained_teacher_model).is_dir(),
            f"--teacher_revision has no effect on a folder, {self.pretrained_teacher_model}; leave it off.",
        )
        for name in ("num_ddim_timesteps", "huber_c", "timestep_scaling_factor"):
            value = getattr(self, name)
            require(0 < value < float("inf"), f"--{name} is {value}, but it must be positive.")
        require(
            self.loss_type == "huber" or self.huber_c == 0.001,
            f"--huber_c has no effect with --loss_type {self.loss_type}; say --loss_type huber.",
        )
        require(
            self.unet_time_cond_proj_dim >= 4,
            f"--unet_time_cond_proj_dim is {self.unet_time_cond_proj_dim}, but it must be at least 4.",
        )
        require(
            self.teacher_condition == "clean" or self.corruption_ratio > 0,
            "--teacher_condition corrupted has no effect without --corruption_ratio.",
        )
        require(
            self.validation_inference_steps <= self.num_ddim_timesteps,
            f"--validation_inference_steps is {self.validation_inference_steps}, but a student draws in at most "
            f"--num_ddim_timesteps, {self.num_ddim_timesteps}.",
        )
        require(
            not self.use_lora or self.unet_time_cond_proj_dim == 256,
            "--unet_time_cond_proj_dim has no effect with --use_lora: the U-Net stays the teacher's, which embeds no "
            "guidance; leave it off.",
        )


@dataclass
class ClassLCMArguments(LCMArguments, StreamArguments, CorruptionArguments, SampleGridArguments, EvaluationArguments):
    """Of a class-conditional teacher."""


@dataclass
class TextLCMArguments(
    LCMArguments,
    CaptionDataArguments,
    TextCacheArguments,
    CaptionCorruptionArguments,
    PromptGridArguments,
    TextEvaluationArguments,
):
    """Of a text-to-image teacher."""

    def __post_init__(self):
        super().__post_init__()
        require(
            not self.use_lora or self.pretrained_vae_model_name_or_path is None,
            "--pretrained_vae_model_name_or_path does not go with --use_lora: the adapters are for the teacher's own "
            "pipeline, with its first stage; leave it off.",
        )


TEACHINGS: dict[type[LCMArguments], type[Teaching]] = {
    ClassLCMArguments: ClassTeaching,
    TextLCMArguments: TextTeaching,
}
STARTED = Started(
    flag="pretrained_teacher_model",
    revision="teacher_revision",
    classes={LABELS: ClassLCMArguments, CAPTIONS: TextLCMArguments},
    recipes={LABELS: "digits_lcm", CAPTIONS: "digits_text_lcm"},
    miniatures={
        "digits_lcm": ("runs/digits-ldm", "train_class_cond.py --recipe digits_ldm"),
        "digits_text_lcm": ("runs/digits-text", "train_text_to_image_corrupt.py --recipe digits_text"),
    },
    doing=DOING,
)


def rehearse(args: LCMArguments) -> None:
    """Prints what the run would take, without the teacher's weights, data or GPU; see [`noisycond.dry_run`]."""
    teaching = TEACHINGS[type(args)].peek(args)
    with torch.device("meta"):
        student = teaching.student()
    weights = sum(parameter.numel() for parameter in teaching.teacher.parameters())
    latents, size = teaching.latents, teaching.latent_size
    facts = {
        "teacher": f"{weights:,} parameters, frozen, {4 * weights / 1e9:.3f} GB beside the memory below",
        **teaching.sizes(),
        "latents": f"{latents.channels} × {size} × {size} ({latents.why})",
    }
    dry_run.report(args, student, teaching.data, facts, teaching.first_stage)


def make_distillation(args: LCMArguments, teaching: Teaching) -> ConsistencyDistillation:
    """What the flags ask for, with the noise levels that the student's scheduler samples at."""
    return ConsistencyDistillation(
        teaching.scheduler.alphas_cumprod,
        teaching.prediction_type,
        args.num_ddim_timesteps,
        args.w_min,
        args.w_max,
        args.loss_type,
        args.huber_c,
        args.timestep_scaling_factor,
        args.input_perturbation,
        args.seed,
    )


def make_compute_loss(args: LCMArguments, teaching: Teaching, student, average: AveragedWeights, autocast):
    """The loss per example: encode, add noise at a step of the solver's grid, let the teacher take that step, and
    compare the student's output before it with the averaged student's after it.

    Args:
        average: the target network's weights; while there are none, those of the student.
        autocast: a context of the run's precision.
    """
    distillation, teacher = make_distillation(args, teaching), teaching.teacher
    dim = student.backbone.model.config.time_cond_proj_dim

    def compute_loss(denoiser, batch: dict, keys: torch.Tensor) -> torch.Tensor:
        latents = teaching.first_stage.latents_of(batch, keys)
        condition, told, null = teaching.conditions(batch, keys)
        step = distillation.draw(latents, keys)
        if dim is not None:
            condition = condition | {"guidance": guidance_embedding(step.w, dim)}
        prediction = denoiser(step.student_noisy, step.start, condition, keys)
        output = distillation.output(prediction, step.student_noisy, step.start)
        with torch.no_grad(), autocast():
            conditional, unconditional = (teacher(step.noisy, step.start, each) for each in (told, null))
            reached = distillation.solve(guided(conditional, unconditional, step.w), step)
            # The same keys: the target is perturbed as the student is.
            prediction = functional_call(student, average.weights, (reached, step.end, condition, keys))
            target = distillation.output(prediction, reached, step.end)
        return distillation.loss(output, target)

    return compute_loss


def loading(pipeline, args: LCMArguments, teaching: Teaching, location: str | Path, teacher: str) -> str:
    """How to load what a run leaves at a folder or Hub id, and to draw an image in few steps."""
    condition = None if teaching.prompts is None else f'prompt="{teaching.prompts[0]}"'
    if not args.use_lora:
        return loading_code(pipeline, location, distilled_call(args), condition)
    scheduler = f'LCMScheduler.from_pretrained("{location}", subfolder="scheduler")'
    load = f"from diffusers import LCMScheduler\n\npipeline.scheduler = {scheduler}\n{how_to_load(pipeline, location)}"
    return lora_loading_code(pipeline, teacher, load, condition, distilled_call(args))


def export(args: LCMArguments, teaching: Teaching, student, run: RunFolder, result, repo_id, evaluation) -> None:
    """Writes what a run leaves behind: of LoRA the adapters and the scheduler, else the whole pipeline."""
    pipeline = teaching.pipeline(student)
    teaching.draw(pipeline, run.samples / "final.png")
    public = loading(pipeline, args, teaching, repo_id or UNKNOWN_PLACE, public_name(args.pretrained_teacher_model))
    card = distillation_card(pipeline, args, teaching.class_names, teaching.prompts, result, public)

    def write() -> None:
        if not args.use_lora:
            return export_pipeline(
                pipeline, run.path, teaching.class_names if teaching.prompts is None else None, card
            )
        save_lora(pipeline, student, run.path)
        pipeline.scheduler.save_pretrained(run.path / "scheduler")
        card.save(run.path / "README.md")

    code = loading(pipeline, args, teaching, run.path, args.pretrained_teacher_model)
    leave_results(
        pipeline,
        args,
        run,
        result,
        write=write,
        how_to_load=code,
        evaluation=evaluation,
        repo_id=repo_id,
        **LORA if args.use_lora else {},
    )


def parse(argv: list[str] | None = None) -> LCMArguments:
    """The arguments of a command line; None takes that of the process."""
    return parse_by_kind(argv, STARTED)


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    require_whole_average(Layout.of_this_launch().kind in ("fsdp", "zero"))
    if args.dry_run:
        return rehearse(args)
    run, accelerator, repo_id = begin(args)

    teaching = TEACHINGS[type(args)].open(args, accelerator)
    data, student = teaching.data, teaching.student()
    if args.enable_xformers_memory_efficient_attention:
        hardware.enable_xformers(student.backbone.model)

    evaluation = None
    if args.eval_steps:
        evaluation = teaching.evaluation()
        on_main(accelerator, lambda: evaluation.prepare(accelerator.device))

    facts = data.facts | {
        "first_stage": teaching.first_stage.fingerprint,
        "mixed_precision": hardware.precision_of(args),
        "noise_schedule": {name: value for name, value in teaching.scheduler.config.items() if name[0] != "_"},
        **teaching.facts,
    }
    batches = teaching.batches(accelerator)
    facts |= trainer.facts(args, batches)
    on_main(accelerator, lambda: checkpoints.check_space(args, student))
    resume_from = claim(run, args, facts, Path(__file__).name, accelerator)  # from here on the folder is this run's
    on_main(accelerator, lambda: teaching.keep(run))
    trainer.announce(args, accelerator, data.images, student, batches)

    average = AveragedWeights()
    result = trainer.fit(
        student,
        batches,
        make_compute_loss(args, teaching, student, average, accelerator.autocast),
        args,
        accelerator=accelerator,
        run=run,
        bad_images=data.bad_images,
        resume_from=resume_from,
        tallies={"corruption": teaching.tally},
        looks=[
            (
                lambda step: teaching.draw(teaching.pipeline(student), run.samples / f"step-{step:07d}.png"),
                args.validation_steps,
            ),
            (evaluation and (lambda step: evaluation(teaching.pipeline(student))), args.eval_steps),
        ],
        average=average,
    )
    if result.stopped_by is None:
        on_main(accelerator, lambda: export(args, teaching, student, run, result, repo_id, evaluation))
    trainer.finish(accelerator, result, run)


if __name__ == "__main__":
    main()
