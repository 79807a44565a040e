#!/usr/bin/env python
"""Distils a latent diffusion model into one that draws in a few steps (latent consistency distillation), with
corruption and condition embedding perturbation on the student's conditions.

accelerate launch train_lcm_distill.py                                  # the class-conditional miniature on digits
accelerate launch train_lcm_distill.py --pretrained_teacher_model runs/ldm-4-in1k --train_data_dir imagenet/train
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


try:
    import torch
    from torch.func import functional_call

    from noisycond import checkpoints, class_conditional, dry_run, hardware, hub, teachers, trainer
    from noisycond.arguments import (
        CorruptionArguments,
        FirstStageArguments,
        HubArguments,
        LoopArguments,
        PerturbationArguments,
        StreamArguments,
        flag,
        parse_arguments,
    )
    from noisycond.cards import (
        UNKNOWN_PLACE,
        distillation_card,
        distilled_call,
        loading_code,
        lora_loading_code,
        public_name,
    )
    from noisycond.class_conditional import SampleGridArguments, draw_samples, label_conditions, open_corruption
    from noisycond.data.corruption_map import save_corruption_map
    from noisycond.data.opening import open_batches, open_training_data
    from noisycond.denoisers.text_options import DEFAULT_RANK
    from noisycond.distillation import ConsistencyDistillation, guidance_embedding, guided
    from noisycond.errors import one_sentence_errors, require
    from noisycond.evaluation.in_training import EvaluationArguments, TrainingEvaluation
    from noisycond.export import class_pipeline
    from noisycond.first_stage import FirstStage, open_first_stage, state_hash
    from noisycond.lora import add_lora, how_to_load, save_lora
    from noisycond.perturbation import ConditionEmbeddingPerturbation
    from noisycond.processes import on_main
    from noisycond.run_folder import RunFolder, claim
    from noisycond.sharding import Layout
    from noisycond.training_state import AveragedWeights, require_whole_average
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


@dataclass
class LCMArguments(
    StreamArguments,
    FirstStageArguments,
    CorruptionArguments,
    PerturbationArguments,
    LoopArguments,
    SampleGridArguments,
    EvaluationArguments,
    HubArguments,
):
    pretrained_teacher_model: str | None = flag(
        None, "The pipeline to distil, a folder or Hub id; its first stage is used unless another is named."
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
    use_lora: bool = flag(
        False, "Train low-rank adapters of the teacher's U-Net (LCM-LoRA), without an embedding of the guidance."
    )
    rank: int = flag(DEFAULT_RANK, "Rank of the LoRA matrices.")
    lora_alpha: float | None = flag(None, "α of LoRA, whose updates are scaled by α/rank; the default is the rank.")
    lora_target_modules: list[str] = flag(
        [], "Modules that get LoRA, by the ends of their names; the default is to_k, to_q, to_v and to_out.0."
    )
    timestep_scaling_factor: float = flag(10.0, "Scales timesteps in the boundary scalings c_skip and c_out.")
    ema_decay: float = flag(0.95, "Decay of the moving average, which is the target network and what is exported.")
    conditioning_dropout_prob: float = flag(0.0, "Share of examples distilled without their condition.")
    validation_guidance_scale: float | None = flag(
        None, "Guidance scale of the sample grids; the default is the middle of those distilled."
    )
    validation_inference_steps: int = flag(4, "Sampling steps of the sample grids.")
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass to save memory.")
    enable_xformers_memory_efficient_attention: bool = flag(False, "Use the attention of xformers.")

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
            not self.cache_latents or self.center_crop or self.dataset_name == "digits",
            "--cache_latents needs --center_crop: a random crop is another image every epoch.",
        )
        self._check_lora()

    def _check_lora(self) -> None:
        if not self.use_lora:
            for name, default in (("rank", DEFAULT_RANK), ("lora_alpha", None), ("lora_target_modules", [])):
                require(getattr(self, name) == default, f"--{name} has no effect without --use_lora; add it.")
            return
        require(
            self.unet_time_cond_proj_dim == 256,
            "--unet_time_cond_proj_dim has no effect with --use_lora: the U-Net stays the teacher's, which embeds no "
            "guidance; leave it off.",
        )
        require(self.rank > 0, f"--rank is {self.rank}, but it must be positive.")
        require(
            self.lora_alpha is None or 0 < self.lora_alpha < float("inf"),
            f"--lora_alpha is {self.lora_alpha}, but it must be a positive number.",
        )


def make_student(args: LCMArguments, teacher, latent_size: int):
    """The teacher's copy that is trained, with an embedding of the guidance or with LoRA, and CEP."""
    student = teachers.make_student(
        teacher,
        latent_size,
        None if args.use_lora else args.unet_time_cond_proj_dim,
        perturbation=ConditionEmbeddingPerturbation(args.cep_gamma, args.cep_type, args.seed),
        fixed=args.cep_mode == "fixed",
        perturb_null=args.cep_perturb_null,
        embedding_dropout=args.embedding_dropout,
        label_smoothing=args.label_smoothing,
        seed=args.seed,
    )
    if args.use_lora:
        add_lora(student, args.rank, args.lora_alpha, args.lora_target_modules)
    if args.gradient_checkpointing:
        student.backbone.model.enable_gradient_checkpointing()
    return student


def rehearse(args: LCMArguments) -> None:
    """Prints what the run would take, without the teacher's weights, data or GPU; see [`noisycond.dry_run`]."""
    source = teachers.find_teacher(args.pretrained_teacher_model, args.teacher_revision)
    teachers.lcm_scheduler(source, args.num_ddim_timesteps, args.timestep_scaling_factor)
    data = dry_run.open_what_is_here(args)
    args.pretrained_vae_model_name_or_path = args.pretrained_vae_model_name_or_path or args.pretrained_teacher_model
    first_stage, channels, factor, why = dry_run.latents_of(args, source.latents_of(args.resolution))
    class_names = dry_run.class_names_of(args, data)
    teachers.check_data(source, class_names)
    with torch.device("meta"):
        teacher = teachers.empty_teacher(source, len(class_names))
        student = make_student(args, teacher, args.resolution // factor)
    size = args.resolution // factor
    weights = sum(parameter.numel() for parameter in teacher.parameters())
    facts = {
        "teacher": f"{weights:,} parameters, frozen, {4 * weights / 1e9:.3f} GB beside the memory below",
        "latents": f"{channels} × {size} × {size} ({why})",
    }
    dry_run.report(args, student, data, facts, first_stage)


def make_distillation(args: LCMArguments, source: teachers.TeacherSource, scheduler) -> ConsistencyDistillation:
    """What the flags ask for, with the noise levels that the student's scheduler samples at."""
    return ConsistencyDistillation(
        scheduler.alphas_cumprod,
        source.prediction_type,
        args.num_ddim_timesteps,
        args.w_min,
        args.w_max,
        args.loss_type,
        args.huber_c,
        args.timestep_scaling_factor,
        args.input_perturbation,
        args.seed,
    )


def make_compute_loss(
    distillation: ConsistencyDistillation, first_stage, teacher, student, average, conditions, autocast
):
    """The loss per example: encode, add noise at a step of the solver's grid, let the teacher take that step, and
    compare the student's output before it with the averaged student's after it.

    Args:
        average: the target network's weights; while there are none, those of the student.
        conditions: `(batch, keys) → (student's, teacher's, null)`, conditions of [`ConditionalDenoiser`].
        autocast: a context of the run's precision.
    """
    dim = student.backbone.model.config.time_cond_proj_dim

    def compute_loss(denoiser, batch: dict, keys: torch.Tensor) -> torch.Tensor:
        latents = first_stage.latents_of(batch, keys)
        condition, told, null = conditions(batch, keys)
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


def make_label_conditions(args: LCMArguments, corruption, null_class: int):
    """The conditions of a batch, see [`make_compute_loss`]."""

    def conditions(batch: dict, keys: torch.Tensor) -> tuple[dict, dict, dict]:
        corrupted, true = label_conditions(args, corruption, null_class, batch, keys)
        null = true | {"class_labels": torch.full_like(true["class_labels"], null_class)}
        return corrupted, corrupted if args.teacher_condition == "corrupted" else true, null

    return conditions


def loading(pipeline, args: LCMArguments, location: str | Path, teacher: str) -> str:
    """How to load what a run leaves at a folder or Hub id, and to draw an image in few steps."""
    if not args.use_lora:
        return loading_code(pipeline, location, distilled_call(args))
    scheduler = f'LCMScheduler.from_pretrained("{location}", subfolder="scheduler")'
    load = f"from diffusers import LCMScheduler\n\npipeline.scheduler = {scheduler}\n{how_to_load(pipeline, location)}"
    return lora_loading_code(pipeline, teacher, load, None, distilled_call(args))


def export(pipeline, student, args: LCMArguments, run: RunFolder, class_names, result, repo_id, evaluation) -> None:
    """Writes what a run leaves behind: of LoRA the adapters and the scheduler, else the whole pipeline."""
    public = loading(pipeline, args, repo_id or UNKNOWN_PLACE, public_name(args.pretrained_teacher_model))
    card = distillation_card(pipeline, args, class_names, result, public)

    def write_lora() -> None:
        save_lora(pipeline, student, run.path)
        pipeline.scheduler.save_pretrained(run.path / "scheduler")
        card.save(run.path / "README.md")

    code = loading(pipeline, args, run.path, args.pretrained_teacher_model)
    write = write_lora if args.use_lora else None
    class_conditional.export(pipeline, args, run, class_names, result, card, repo_id, evaluation, code, write)


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(LCMArguments, argv, default_recipe="digits_lcm")
    require_whole_average(Layout.of_this_launch().kind in ("fsdp", "zero"))
    require(
        args.recipe != "digits_lcm" or "pretrained_teacher_model" in args.given or Path("runs/digits-ldm").is_dir(),
        "--pretrained_teacher_model runs/digits-ldm: the miniature's teacher is not there; train it with accelerate "
        "launch train_class_cond.py --recipe digits_ldm, or name another.",
    )
    if args.dry_run:
        return rehearse(args)
    run = RunFolder(args.output_dir)
    accelerator = hardware.make_accelerator(args)
    on_main(accelerator, lambda: run.check(args))
    repo_id = on_main(accelerator, lambda: hub.check(args))

    source = teachers.find_teacher(args.pretrained_teacher_model, args.teacher_revision)
    scheduler = teachers.lcm_scheduler(source, args.num_ddim_timesteps, args.timestep_scaling_factor)
    data = open_training_data(args)
    class_names = data.source.class_names
    corruption, groups = open_corruption(args, data)
    teacher, autoencoder = teachers.open_teacher(source, class_names)
    first_stage = open_first_stage_of(args, autoencoder)
    teachers.check_latents(source, first_stage, args.resolution)
    student = make_student(args, teacher, args.resolution // first_stage.factor)
    if args.enable_xformers_memory_efficient_attention:
        hardware.enable_xformers(student.backbone.model)

    evaluation = None
    if args.eval_steps:
        evaluation = TrainingEvaluation(args, class_names)
        on_main(accelerator, lambda: evaluation.prepare(accelerator.device))

    facts = data.facts | {
        "first_stage": first_stage.fingerprint,
        "mixed_precision": hardware.precision_of(args),
        "class_groups": groups,
        "teacher": state_hash(teacher),
        "noise_schedule": {name: value for name, value in scheduler.config.items() if name[0] != "_"},
    }
    first_stage.to(accelerator.device)
    teacher.to(accelerator.device)
    batches = open_batches(args, data, accelerator, first_stage)
    facts |= trainer.facts(args, batches)
    on_main(accelerator, lambda: checkpoints.check_space(args, student))
    resume_from = claim(run, args, facts, Path(__file__).name, accelerator)  # from here on the folder is this run's
    if args.save_corruption_map:
        on_main(accelerator, lambda: save_corruption_map(corruption, data.source, run.path / "corruption_map.csv"))
    trainer.announce(args, accelerator, data.images, student, batches)

    average = AveragedWeights()
    conditions = make_label_conditions(args, corruption, teacher.encoder.null_class)
    compute_loss = make_compute_loss(
        make_distillation(args, source, scheduler),
        first_stage,
        teacher,
        student,
        average,
        conditions,
        accelerator.autocast,
    )

    def pipeline():
        return class_pipeline(student, first_stage, scheduler)

    def finish():
        export(pipeline(), student, args, run, class_names, result, repo_id, evaluation)

    result = trainer.fit(
        student,
        batches,
        compute_loss,
        args,
        accelerator=accelerator,
        run=run,
        bad_images=data.bad_images,
        resume_from=resume_from,
        tallies={"corruption": corruption},
        looks=[
            (
                lambda step: draw_samples(pipeline(), args, len(class_names), run.samples / f"step-{step:07d}.png"),
                args.validation_steps,
            ),
            (evaluation and (lambda step: evaluation(pipeline())), args.eval_steps),
        ],
        average=average,
    )
    if result.stopped_by is None:
        on_main(accelerator, finish)
    trainer.finish(accelerator, result, run)


def open_first_stage_of(args: LCMArguments, autoencoder) -> FirstStage:
    """The first stage that the flags name, or else the teacher's own."""
    if args.pretrained_vae_model_name_or_path is not None:
        return open_first_stage(args.pretrained_vae_model_name_or_path, args.seed)
    require(
        autoencoder is not None,
        f"--pretrained_vae_model_name_or_path is needed: {args.pretrained_teacher_model} has no first stage.",
    )
    return FirstStage(autoencoder, args.seed)


if __name__ == "__main__":
    main()
