#!/usr/bin/env python
"""Trains a class-conditional latent diffusion model with label corruption and condition embedding perturbation.

accelerate launch train_class_cond.py                                   # a miniature on handwritten digits
accelerate launch train_class_cond.py --recipe dit_xl_2_in1k --corruption_ratio 0.025
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path


try:
    import torch

    from noisycond import LabelCorruption, checkpoints, dry_run, hardware, hub, randomness, sampling, trainer
    from noisycond.arguments import (
        CorruptionArguments,
        FirstStageArguments,
        HubArguments,
        LoopArguments,
        ObjectiveArguments,
        PerturbationArguments,
        StreamArguments,
        ValidationArguments,
        flag,
        parse_arguments,
    )
    from noisycond.cards import class_conditional_card, loading_code
    from noisycond.data.class_groups import read_class_groups
    from noisycond.data.corruption_map import save_corruption_map
    from noisycond.data.opening import open_batches, open_training_data
    from noisycond.data.streams import require_ids
    from noisycond.denoisers import build_denoiser, find_denoiser
    from noisycond.errors import one_sentence_errors, require
    from noisycond.evaluation.in_training import EvaluationArguments, TrainingEvaluation
    from noisycond.export import class_pipeline, export_pipeline, sampling_scheduler
    from noisycond.first_stage import open_first_stage
    from noisycond.noise_schedule import build_objective
    from noisycond.objective import DiffusionObjective
    from noisycond.perturbation import ConditionEmbeddingPerturbation
    from noisycond.processes import on_main
    from noisycond.randomness import Purpose
    from noisycond.results import draw_grid, leave_results
    from noisycond.run_folder import RunFolder, claim
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


@dataclass
class ClassCondArguments(
    StreamArguments,
    FirstStageArguments,
    CorruptionArguments,
    PerturbationArguments,
    ValidationArguments,
    ObjectiveArguments,
    LoopArguments,
    EvaluationArguments,
    HubArguments,
):
    denoiser: str = flag("dit-mini", "A preset (ldm-4, ldm-mini, dit-xl-2, dit-l-2, dit-b-2, dit-s-2, dit-mini), a "
                         "config JSON, or a pretrained folder or Hub id to continue from.")  # fmt: skip
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass to save memory.")
    enable_xformers_memory_efficient_attention: bool = flag(False, "Use the attention of xformers.")
    validation_images_per_class: int = flag(10, "Images per class in the sample grids, of at most 10 classes.")

    def __post_init__(self):
        super().__post_init__()
        require(
            not (self.cep_gamma > 0 and self.conditioning_dropout_prob == 1.0),
            "--cep_gamma perturbs the condition embedding, but with --conditioning_dropout_prob 1 the model is "
            "unconditional; lower one of them.",
        )
        require(
            not self.cache_latents or self.center_crop or self.dataset_name == "digits",
            "--cache_latents needs --center_crop: a random crop is another image every epoch.",
        )
        require(self.validation_images_per_class > 0, "--validation_images_per_class must be positive.")


def build(args: ClassCondArguments, source, class_names: list[str], latent_channels: int, factor: int):
    """The denoiser to train, for latents of this many channels and a first stage of this factor."""
    require(
        args.resolution % factor == 0,
        f"--resolution is {args.resolution}, but must be a multiple of the first stage's factor {factor}.",
    )
    denoiser = build_denoiser(
        source,
        class_names=class_names,
        latent_channels=latent_channels,
        latent_size=args.resolution // factor,
        perturbation=ConditionEmbeddingPerturbation(args.cep_gamma, args.cep_type, args.seed),
        fixed_perturbation=args.cep_mode == "fixed",
        perturb_null=args.cep_perturb_null,
        embedding_dropout=args.embedding_dropout,
        label_smoothing=args.label_smoothing,
        seed=args.seed,
    )
    if args.gradient_checkpointing:
        denoiser.backbone.model.enable_gradient_checkpointing()
    return denoiser


def rehearse(args: ClassCondArguments) -> None:
    """Prints what the run would take, without data or GPU; see [`noisycond.dry_run`]."""
    source = find_denoiser(args.denoiser)
    build_objective(args, args.denoiser, source.preset)
    data = dry_run.open_what_is_here(args)
    first_stage, channels, factor, why = dry_run.latents_of(args, source.preset)
    with torch.device("meta"):
        denoiser = build(args, replace(source, folder=None), dry_run.class_names_of(args, data), channels, factor)
    size, table = args.resolution // factor, denoiser.encoder.table.weight
    facts = {
        "condition embedding": f"{table.numel():,} ({len(table)} rows of {table.shape[1]}, the null class last)",
        "latents": f"{channels} × {size} × {size} ({why})",
    }
    dry_run.report(args, denoiser, data, facts, first_stage)


def make_compute_loss(args: ClassCondArguments, first_stage, objective: DiffusionObjective, corruption, null_class):
    """The loss per example: encode, corrupt and drop the label, add noise, predict, compare."""

    def compute_loss(denoiser, batch: dict, keys: torch.Tensor) -> torch.Tensor:
        moments = batch["moments"] if "moments" in batch else first_stage.moments(batch["pixel_values"])
        latents = first_stage.latents(moments, keys)
        labels = corruption(batch["class_labels"], batch["index"], batch["epoch"])
        corruption.count(batch["class_labels"], labels)
        dropped = randomness.bernoulli(args.seed, Purpose.CONDITION_DROPOUT, keys, args.conditioning_dropout_prob)
        condition = {"class_labels": labels.masked_fill(dropped, null_class), "index": batch["index"]}
        examples = objective.noise(latents, keys)
        return objective.loss(denoiser(examples.noisy, examples.timesteps, condition, keys), examples)

    return compute_loss


def draw_samples(pipeline, args: ClassCondArguments, num_classes: int, path: Path) -> None:
    """Draws a sample grid, a row per class, and saves it as a PNG."""
    per_class = args.validation_images_per_class
    draw_grid(pipeline, sampling.class_rows(num_classes, per_class), per_class, args, path)


def export(
    pipeline, args: ClassCondArguments, run: RunFolder, class_names: list[str], result, repo_id, evaluation
) -> None:
    """Writes what a run leaves behind; see [`noisycond.results.leave_results`]."""
    draw_samples(pipeline, args, len(class_names), run.samples / "final.png")
    card = class_conditional_card(pipeline, args, class_names, result, repo_id)
    leave_results(
        pipeline,
        args,
        run,
        result,
        write=lambda: export_pipeline(pipeline, run.path, class_names, card),
        how_to_load=loading_code(pipeline, run.path),
        evaluation=evaluation,
        repo_id=repo_id,
    )


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(ClassCondArguments, argv, default_recipe="digits_dit_mini")
    if args.dry_run:
        return rehearse(args)
    run = RunFolder(args.output_dir)
    accelerator = hardware.make_accelerator(args)
    on_main(accelerator, lambda: run.check(args))
    repo_id = on_main(accelerator, lambda: hub.check(args))

    require(args.pretrained_vae_model_name_or_path is not None, "--pretrained_vae_model_name_or_path is needed.")
    first_stage = open_first_stage(args.pretrained_vae_model_name_or_path, args.seed)
    source = find_denoiser(args.denoiser)
    data = open_training_data(args)
    class_names = data.source.class_names
    require(
        args.corruption_ratio == 0 or len(class_names) > 1,
        f"--corruption_ratio {args.corruption_ratio} needs at least two classes, but the dataset has one.",
    )
    if args.streaming and args.corruption_ratio > 0 and args.corruption_mode == "fixed":
        require_ids(data.source, "--corruption_mode fixed")
    if args.streaming and args.cep_gamma > 0 and args.cep_mode == "fixed":
        require_ids(data.source, "--cep_mode fixed")
    groups = read_class_groups(args.class_groups, class_names) if args.class_groups else None
    corruption = LabelCorruption(
        args.corruption_ratio, len(class_names), seed=args.seed, groups=groups, mode=args.corruption_mode
    )
    objective, noise_schedule = build_objective(args, args.denoiser, source.preset)
    denoiser = build(args, source, class_names, first_stage.latent_channels, first_stage.factor)
    if args.enable_xformers_memory_efficient_attention:
        hardware.enable_xformers(denoiser.backbone.model)

    evaluation = None
    if args.eval_steps:
        evaluation = TrainingEvaluation(args, class_names)
        on_main(accelerator, lambda: evaluation.prepare(accelerator.device))

    facts = data.facts | {
        "first_stage": first_stage.fingerprint,
        "mixed_precision": hardware.precision_of(args),
        "class_groups": groups,
        "denoiser": {name: value for name, value in denoiser.backbone.model.config.items() if name[0] != "_"},
        "noise_schedule": noise_schedule,
    }
    first_stage.to(accelerator.device)
    batches = open_batches(args, data, accelerator, first_stage)
    facts |= trainer.facts(args, batches)
    on_main(accelerator, lambda: checkpoints.check_space(args, denoiser))
    resume_from = claim(run, args, facts, Path(__file__).name, accelerator)  # from here on the folder is this run's
    if args.save_corruption_map:
        on_main(accelerator, lambda: save_corruption_map(corruption, data.source, run.path / "corruption_map.csv"))
    trainer.announce(args, accelerator, data.images, denoiser, batches)

    def pipeline():
        return class_pipeline(denoiser, first_stage, sampling_scheduler(objective, noise_schedule))

    result = trainer.fit(
        denoiser,
        batches,
        make_compute_loss(args, first_stage, objective, corruption, denoiser.encoder.null_class),
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
    )
    if result.stopped_by is None:
        on_main(accelerator, lambda: export(pipeline(), args, run, class_names, result, repo_id, evaluation))
    trainer.finish(accelerator, result, run)


if __name__ == "__main__":
    main()
