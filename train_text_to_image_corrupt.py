#!/usr/bin/env python
"""Trains a text-to-image latent diffusion model with caption corruption and condition embedding perturbation: from
scratch (LDM with a BERT that is trained along), or from an existing pipeline, whole or by LoRA.

accelerate launch train_text_to_image_corrupt.py                        # a miniature on captioned handwritten digits
accelerate launch train_text_to_image_corrupt.py --recipe ldm_4_cc3m --corruption_ratio 0.025
accelerate launch train_text_to_image_corrupt.py --pretrained_model_name_or_path PIPELINE --use_lora \
    --dataset_name DATASET --corruption_ratio 0.025
"""

import sys
from dataclasses import dataclass
from pathlib import Path


try:
    import torch

    from noisycond import checkpoints, dry_run, hardware, trainer
    from noisycond.arguments import (
        FirstStageArguments,
        HubArguments,
        LoopArguments,
        MemoryArguments,
        ObjectiveArguments,
        PerturbationArguments,
        parse_arguments,
    )
    from noisycond.begin import begin
    from noisycond.captions import CaptionTally
    from noisycond.data.caption_options import CaptionCorruptionArguments, CaptionDataArguments
    from noisycond.data.opening import open_batches, open_training_data
    from noisycond.data.rewriting import rewrite_captions, rewritings_file
    from noisycond.data.streams import require_ids
    from noisycond.data.text_cache import reading
    from noisycond.denoisers.text_options import TextModelArguments
    from noisycond.errors import one_sentence_errors
    from noisycond.evaluation.in_training import TextEvaluationArguments, TrainingEvaluation, evaluation_prompts
    from noisycond.noise_schedule import build_objective
    from noisycond.objective import DiffusionObjective
    from noisycond.processes import on_main
    from noisycond.run_folder import claim
    from noisycond.text_conditional import (
        PromptGridArguments,
        build,
        cache_texts,
        draw_samples,
        export,
        frozen_fingerprint,
        grid_prompts,
        keep_captions,
        looking,
        mask_word_of,
        open_text_model,
        peek_text_model,
        text_conditions,
    )
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; in the checkout, run: pip install -e .")


@dataclass
class TextToImageArguments(
    CaptionDataArguments,
    TextModelArguments,
    FirstStageArguments,
    CaptionCorruptionArguments,
    PerturbationArguments,
    PromptGridArguments,
    ObjectiveArguments,
    MemoryArguments,
    LoopArguments,
    TextEvaluationArguments,
    HubArguments,
):
    """The flags of the script; each group says what its own mean."""


def rehearse(args: TextToImageArguments) -> None:
    """Prints what the run would take, without data or GPU; see [`noisycond.dry_run`]."""
    model, of_text, of_latents = peek_text_model(args)
    build_objective(args, model.name, model.preset)
    data = dry_run.open_what_is_here(args)
    with torch.device("meta"):
        denoiser = build(args, model)
    encoders = sum(parameter.numel() for parameter in denoiser.encoder.parameters())
    if args.cache_text_embeddings:
        denoiser.encoder.park()
    channels, size = model.preset.latent_channels, args.resolution // model.preset.factor
    facts = {
        "text encoder": f"{encoders:,}, {'trained along' if args.train_text_encoder else 'frozen'} ({of_text})",
        "latents": f"{channels} × {size} × {size} ({of_latents})",
    }
    dry_run.report(args, denoiser, data, facts, model.first_stage)


def make_compute_loss(args: TextToImageArguments, first_stage, objective: DiffusionObjective, tally, null: dict):
    """The loss per example: encode, drop the caption, add noise, predict, compare. Captions come corrupted."""

    def compute_loss(denoiser, batch: dict, keys: torch.Tensor) -> torch.Tensor:
        latents = first_stage.latents_of(batch, keys)
        condition = text_conditions(args, tally, null, batch, keys)
        examples = objective.noise(latents, keys)
        return objective.loss(denoiser(examples.noisy, examples.timesteps, condition, keys), examples)

    return compute_loss


def parse(argv: list[str] | None = None) -> TextToImageArguments:
    """The arguments of a command line; None takes that of the process."""
    return parse_arguments(TextToImageArguments, argv, default_recipe="digits_text")


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.dry_run:
        return rehearse(args)
    run, accelerator, repo_id = begin(args)

    model, objective, noise_schedule = open_text_model(args)
    first_stage = model.first_stage
    data = open_training_data(args, mask_word=mask_word_of(model.text))
    if args.streaming and args.cep_gamma > 0 and args.cep_mode == "fixed":
        require_ids(data.source, "--cep_mode fixed")
    prompts = grid_prompts(args, data)
    denoiser = build(args, model)
    if args.enable_xformers_memory_efficient_attention:
        hardware.enable_xformers(denoiser.backbone.model)

    evaluation = None
    if args.eval_steps:
        evaluation = TrainingEvaluation(args, prompts=evaluation_prompts(args))
        on_main(accelerator, lambda: evaluation.prepare(accelerator.device))

    rewrite_captions(args, data, rewritings_file(args, data), accelerator)
    facts = data.facts | {
        "first_stage": first_stage.fingerprint,
        "mixed_precision": hardware.precision_of(args),
        "denoiser": {name: value for name, value in denoiser.backbone.model.config.items() if name[0] != "_"},
        "noise_schedule": noise_schedule,
        "frozen": frozen_fingerprint(denoiser),
        "tokens": reading(model.text),
    }
    first_stage.to(accelerator.device)
    texts = cache_texts(args, data, denoiser.encoder, accelerator) if args.cache_text_embeddings else model.text
    batches = open_batches(args, data, accelerator, first_stage, texts.encode)
    facts |= trainer.facts(args, batches)
    on_main(accelerator, lambda: checkpoints.check_space(args, denoiser))
    resume_from = claim(run, args, facts, Path(__file__).name, accelerator)  # from here on the folder is this run's
    on_main(accelerator, lambda: keep_captions(args, data, run))
    trainer.announce(args, accelerator, data.images, denoiser, batches)

    def draw(pipeline, step: int) -> None:
        draw_samples(pipeline, args, prompts, run.samples / f"step-{step:07d}.png")

    tally = CaptionTally()
    result = trainer.fit(
        denoiser,
        batches,
        make_compute_loss(args, first_stage, objective, tally, texts.null()),
        args,
        accelerator=accelerator,
        run=run,
        bad_images=data.bad_images,
        resume_from=resume_from,
        tallies={"corruption": tally},
        looks=[
            (looking(model, denoiser, draw), args.validation_steps),
            (looking(model, denoiser, lambda pipeline, step: evaluation(pipeline)), args.eval_steps),
        ],
        learning_rates={"encoder.": args.text_encoder_learning_rate or args.learning_rate},
    )
    if result.stopped_by is None:
        on_main(
            accelerator,
            lambda: export(model.assemble(denoiser), denoiser, args, run, prompts, result, repo_id, evaluation),
        )
    trainer.finish(accelerator, result, run)


if __name__ == "__main__":
    main()
