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

    from noisycond import checkpoints, dry_run, hardware, trainer
    from noisycond.arguments import (
        CorruptionArguments,
        FirstStageArguments,
        HubArguments,
        LoopArguments,
        MemoryArguments,
        ObjectiveArguments,
        PerturbationArguments,
        StreamArguments,
        flag,
        parse_arguments,
    )
    from noisycond.begin import begin
    from noisycond.cards import class_conditional_card
    from noisycond.class_conditional import (
        SampleGridArguments,
        draw_samples,
        export,
        label_conditions,
        open_corruption,
    )
    from noisycond.data.corruption_map import save_corruption_map
    from noisycond.data.opening import open_batches, open_training_data
    from noisycond.denoisers import build_denoiser, find_denoiser
    from noisycond.errors import one_sentence_errors, require
    from noisycond.evaluation.in_training import EvaluationArguments, TrainingEvaluation
    from noisycond.export import class_pipeline, sampling_scheduler
    from noisycond.first_stage import open_first_stage
    from noisycond.noise_schedule import build_objective
    from noisycond.objective import DiffusionObjective
    from noisycond.perturbation import ConditionEmbeddingPerturbation
    from noisycond.processes import on_main
    from noisycond.run_folder import claim
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


@dataclass
class ClassCondArguments(
    StreamArguments,
    FirstStageArguments,
    CorruptionArguments,
    PerturbationArguments,
    SampleGridArguments,
    ObjectiveArguments,
    MemoryArguments,
    LoopArguments,
    EvaluationArguments,
    HubArguments,
):
    denoiser: str = flag("dit-mini", "A preset (ldm-4, ldm-mini, dit-xl-2, dit-l-2, dit-b-2, dit-s-2, dit-mini), a "
                         "config JSON, or a pretrained folder or Hub id to continue from.")  # fmt: skip


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
        latents = first_stage.latents_of(batch, keys)
        condition, _ = label_conditions(args, corruption, null_class, batch, keys)
        examples = objective.noise(latents, keys)
        return objective.loss(denoiser(examples.noisy, examples.timesteps, condition, keys), examples)

    return compute_loss


def parse(argv: list[str] | None = None) -> ClassCondArguments:
    """The arguments of a command line; None takes that of the process."""
    return parse_arguments(ClassCondArguments, argv, default_recipe="digits_dit_mini")


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.dry_run:
        return rehearse(args)
    run, accelerator, repo_id = begin(args)

    require(args.pretrained_vae_model_name_or_path is not None, "--pretrained_vae_model_name_or_path is needed.")
    first_stage = open_first_stage(args.pretrained_vae_model_name_or_path, args.seed)
    source = find_denoiser(args.denoiser)
    data = open_training_data(args)
    class_names = data.source.class_names
    corruption, groups = open_corruption(args, data)
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

    def finish():
        exported = pipeline()
        card = class_conditional_card(exported, args, class_names, result, repo_id)
        export(exported, args, run, class_names, result, card, repo_id, evaluation)

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
        on_main(accelerator, finish)
    trainer.finish(accelerator, result, run)


if __name__ == "__main__":
    main()
