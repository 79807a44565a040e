"""What the scripts share that teach a frozen base to follow control images: flags, loss, sample grids, the check that
the control is not ignored, and what a run leaves behind.

Letters: B examples.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ControlNetModel, DiffusionPipeline

from noisycond import checkpoints, dry_run, hardware, sampling, trainer
from noisycond.arguments import (
    CorruptionArguments,
    DataArguments,
    FirstStageArguments,
    HubArguments,
    LoopArguments,
    MemoryArguments,
    PerturbationArguments,
    SNRArguments,
    ValidationArguments,
    flag,
)
from noisycond.bases import BASES, DOING, FLAG, Base, Shown
from noisycond.begin import begin
from noisycond.cards import UNKNOWN_PLACE, distilled_call, personalization_card, public_name
from noisycond.condition_kinds import CAPTIONS, LABELS, Started
from noisycond.control_check import ControlCheck
from noisycond.control_pipelines import (
    AdapterFacts,
    assemble,
    controlling,
    loading_code,
    local_places,
    save_adapter,
)
from noisycond.data.batches import Batches
from noisycond.data.caption_options import CaptionCorruptionArguments, CaptionDataArguments
from noisycond.data.controls import CONTROL_ANNOTATORS
from noisycond.denoisers.control import ControlledUNet
from noisycond.denoisers.text_options import TextCacheArguments
from noisycond.errors import InputError, in_one_line, require, writing
from noisycond.evaluation.in_training import (
    ControlEvaluationArguments,
    EvaluationArguments,
    TextEvaluationArguments,
    TrainingEvaluation,
)
from noisycond.pictures import control_grid
from noisycond.processes import on_main
from noisycond.results import leave_results, looking
from noisycond.run_folder import RunFolder, claim
from noisycond.trainer import FitResult


logger = logging.getLogger(__name__)
MakeBackbone = Callable[[Base], ControlledUNet]  # makes what is trained, around the base's U-Net


@dataclass
class PersonalizationArguments(
    FirstStageArguments,
    PerturbationArguments,
    ValidationArguments,
    SNRArguments,
    MemoryArguments,
    LoopArguments,
    HubArguments,
):
    """The flags that all personalizations have; those of data, corruption and evaluation are added by what the base
    takes as a condition."""

    pretrained_model_name_or_path: str | None = flag(
        None,
        "The base, which is frozen: a folder or Hub id of a class-conditional LDM, of an LDM that draws from prompts, "
        "or of Stable Diffusion 1.x or 2.x. For one that draws from prompts there are the flags of captions instead "
        "of those of labels: name it with --help to see them.",
    )
    revision: str | None = flag(None, "The revision of the base on the Hub.")
    control_column: str = flag(
        "canny",
        "The dataset's column of control images, each of its image's size; prepare_dataset.py makes them. Digits have "
        "`canny` and `mask`.",
    )
    num_validation_images: int = flag(4, "Images per control in the sample grids.")
    control_check_steps: int = flag(
        100,
        "Every so many steps compare the losses with an image's own and with another's control, and warn where "
        "they are alike; 0 does not.",
    )

    def __post_init__(self):
        super().__post_init__()
        require(
            self.pretrained_model_name_or_path is not None,
            f"{FLAG} is needed: the folder or Hub id of the pipeline to control.",
        )
        require(
            self.revision is None or not Path(self.pretrained_model_name_or_path).is_dir(),
            f"--revision has no effect on a folder, {self.pretrained_model_name_or_path}; leave it off.",
        )
        for name, least in (("num_validation_images", 1), ("control_check_steps", 0)):
            require(
                getattr(self, name) >= least, f"--{name} is {getattr(self, name)}, but it must be at least {least}."
            )
        require(
            not getattr(self, "streaming", False),
            "--streaming and --train_shards do not go with control images, which are read beside each image; write "
            "the dataset with prepare_dataset.py and name it with --dataset_name.",
        )


@dataclass
class ClassPersonalizationArguments(
    PersonalizationArguments, DataArguments, CorruptionArguments, ControlEvaluationArguments, EvaluationArguments
):
    """Of a class-conditional base."""

    base_class_names: str | None = flag(
        None,
        "What the base's labels mean, for a base that does not say or says it otherwise than the dataset: a file with "
        "a class name per line, in the order of its labels. The dataset's classes may be some of them.",
    )


@dataclass
class TextPersonalizationArguments(
    PersonalizationArguments,
    CaptionDataArguments,
    TextCacheArguments,
    CaptionCorruptionArguments,
    ControlEvaluationArguments,
    TextEvaluationArguments,
):
    """Of a base that draws from prompts."""


def started(
    recipes: dict[str, str],
    of_labels: type[PersonalizationArguments] = ClassPersonalizationArguments,
    of_captions: type[PersonalizationArguments] = TextPersonalizationArguments,
) -> Started:
    """How a script's command line says its base.

    Args:
        recipes: the miniatures on digits, by kind. of_labels, of_captions: the script's arguments, by kind.
    """
    return Started(
        flag=FLAG.removeprefix("--"),
        revision="revision",
        classes={LABELS: of_labels, CAPTIONS: of_captions},
        recipes=recipes,
        miniatures={
            recipes[LABELS]: ("runs/digits-ldm", "train_class_cond.py --recipe digits_ldm"),
            recipes[CAPTIONS]: ("runs/digits-text", "train_text_to_image_corrupt.py --recipe digits_text"),
        },
        doing=DOING,
    )


def base_class(args: PersonalizationArguments) -> type[Base]:
    """Which kind of base the arguments are for."""
    return BASES[CAPTIONS if isinstance(args, CaptionDataArguments) else LABELS]


def rehearse(args: PersonalizationArguments, make_backbone: MakeBackbone) -> None:
    """Prints what the run would take, without the base's weights, data or GPU; see [`noisycond.dry_run`]."""
    base = base_class(args).peek(args)
    with torch.device("meta"):
        backbone = make_backbone(base)
        denoiser = base.denoiser(backbone)
    size = args.resolution // base.factor
    frozen = sum(parameter.numel() for parameter in base.unet.parameters())
    facts = {
        "base": f"{frozen:,} parameters, frozen",
        "what is trained": type(backbone.model).__name__,
        **base.sizes(),
        "latents": f"{base.unet.config.in_channels} × {size} × {size} ({base.why_latents})",
    }
    dry_run.report(args, denoiser, base.data, facts, base.first_stage)


def make_compute_loss(base: Base, objective):
    """The loss per example: encode, drop the condition, add noise, predict with the control, compare."""

    def compute_loss(denoiser, batch: dict, keys: torch.Tensor) -> torch.Tensor:
        latents = base.first_stage.latents_of(batch, keys)
        condition = base.conditions(batch, keys) | {"control": batch["control"]}
        examples = objective.noise(latents, keys)
        return objective.loss(denoiser(examples.noisy, examples.timesteps, condition, keys), examples)

    return compute_loss


def draw_control_grid(pipeline: DiffusionPipeline, args, shown: Shown, path: Path, turned: int = 0) -> None:
    """Draws a row per control: the control, the image it was made from, and results; saved as a PNG.

    Args:
        turned: which other row's condition each row is drawn with, counted from its own (0).
    """
    per_row, rows = args.num_validation_images, len(shown.controls)
    order = [row for row in range(rows) for _ in range(per_row)]
    images = sampling.sample_all(
        pipeline,
        [shown.conditions[(row + turned) % rows] for row in order],
        seed=args.seed,
        guidance_scale=args.validation_guidance_scale,
        num_inference_steps=args.validation_inference_steps,
        controls=[shown.controls[row] for row in order],
    )
    results = [images[first : first + per_row] for first in range(0, len(images), per_row)]
    with writing(f"--output_dir {args.output_dir}", path.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        control_grid(shown.controls, shown.targets, results, scale=max(1, 64 // images[0].width)).save(path)


def export(
    pipeline: DiffusionPipeline,
    args: PersonalizationArguments,
    base: Base,
    run: RunFolder,
    shown: Shown,
    result: FitResult,
    repo_id: str | None,
    evaluation: TrainingEvaluation | None,
) -> None:
    """Writes the last sample grids and what else a run leaves behind: of the pipeline what was trained, not the
    base."""
    adapter = controlling(pipeline)
    other = args.pretrained_vae_model_name_or_path
    draw_control_grid(pipeline, args, shown, run.samples / "final.png")
    if len(shown.controls) > 1:
        draw_control_grid(pipeline, args, shown, run.samples / "other_conditions.png", turned=1)
    facts = AdapterFacts(
        base=public_name(args.pretrained_model_name_or_path),
        revision=args.revision,
        condition=base.condition,
        kind="controlnet" if isinstance(adapter, ControlNetModel) else "t2i_adapter",
        control_column=args.control_column,
        annotator=args.control_column if args.control_column in CONTROL_ANNOTATORS else None,
        class_names=base.class_names,
        resolution=args.resolution,
        first_stage=None if other is None else public_name(other),
        base_weights=base.unet_hash,
    )
    local = local_places(base=args.pretrained_model_name_or_path, first_stage=other)
    if repo_id is not None and "base" in local:
        logger.warning(
            "The card of %s names the base %s, which is a folder here: push that too, and write its id into the card.",
            repo_id,
            facts.base,
        )

    def code(base_name: str, location: str | Path, first_stage: str | None) -> str:
        first = shown.conditions[0]
        condition = (
            f"prompt={json.dumps(first, ensure_ascii=False)}"
            if base.condition == CAPTIONS
            else f"class_labels=[{first}]"
        )
        size = "" if base.draws_at == args.resolution else f", height={args.resolution}, width={args.resolution}"
        call = f"{condition}{size}, {distilled_call(args)}"
        return loading_code(pipeline, base_name, location, call, args.revision, first_stage)

    card = personalization_card(
        pipeline,
        adapter,
        args,
        result,
        code(facts.base, repo_id or UNKNOWN_PLACE, facts.first_stage),
    )

    def write() -> None:
        save_adapter(adapter, pipeline, facts, local, run.path)
        card.save(run.path / "README.md")

    leave_results(
        pipeline,
        args,
        run,
        result,
        write=write,
        how_to_load=code(args.pretrained_model_name_or_path, run.path, local.get("first_stage", other)),
        evaluation=evaluation,
        repo_id=repo_id,
        left=type(adapter).__name__,
    )


def personalize(args: PersonalizationArguments, make_backbone: MakeBackbone, script: str) -> None:
    """A whole run.

    Args:
        make_backbone: makes what is trained. script: the file's name.

    Raises:
        InputError: something that flags name cannot be opened, or does not fit together.
    """
    if args.dry_run:
        return rehearse(args, make_backbone)
    run, accelerator, repo_id = begin(args)

    base = base_class(args).open(args, accelerator)
    data, objective = base.data, base.objective()
    backbone = make_backbone(base)
    denoiser = base.denoiser(backbone)
    if args.enable_xformers_memory_efficient_attention:
        for model in (backbone.unet, backbone.model):
            hardware.enable_xformers(model)
    shown: list[Shown] = []  # on the main process, which alone draws
    on_main(accelerator, lambda: shown.append(base.shown()))
    on_main(accelerator, lambda: _try_to_assemble(base, backbone))

    evaluation = None
    if args.eval_steps:
        evaluation = base.evaluation()
        on_main(accelerator, lambda: evaluation.prepare(accelerator.device))

    facts = data.facts | {
        "first_stage": base.first_stage.fingerprint,
        "mixed_precision": hardware.precision_of(args),
        "schedule": base.schedule,
        "adapter": {name: value for name, value in backbone.model.config.items() if name[0] != "_"},
        **base.facts,
    }
    batches = base.batches(accelerator)
    facts |= trainer.facts(args, batches)
    on_main(accelerator, lambda: checkpoints.check_space(args, denoiser))
    resume_from = claim(run, args, facts, script, accelerator)  # from here on the folder is this run's
    on_main(accelerator, lambda: base.keep(run))
    trainer.announce(args, accelerator, data.images, denoiser, batches)
    checks: list[ControlCheck] = []  # likewise
    if args.control_check_steps:
        on_main(accelerator, lambda: checks.append(ControlCheck(base, objective, _few(batches), accelerator)))

    def controlled() -> DiffusionPipeline:
        return assemble(base.pipeline, backbone.export_model())

    def draw(pipeline: DiffusionPipeline, step: int) -> None:
        draw_control_grid(pipeline, args, shown[0], run.samples / f"step-{step:07d}.png")

    result = trainer.fit(
        denoiser,
        batches,
        make_compute_loss(base, objective),
        args,
        accelerator=accelerator,
        run=run,
        bad_images=data.bad_images,
        resume_from=resume_from,
        tallies={"corruption": base.tally},
        looks=[
            (looking(controlled, draw, base.set_aside), args.validation_steps),
            (lambda step: checks[0](denoiser, step), args.control_check_steps),
            (looking(controlled, lambda pipeline, step: evaluation(pipeline), base.set_aside), args.eval_steps),
        ],
    )
    if result.stopped_by is None:
        on_main(accelerator, lambda: export(controlled(), args, base, run, shown[0], result, repo_id, evaluation))
    trainer.finish(accelerator, result, run)


def _few(batches: Batches) -> Iterator[dict]:
    """The first batches, without workers: they would load ahead what nobody reads."""
    quiet = copy.copy(batches)
    quiet.num_workers = 0
    return quiet.starting_at(0)


def _try_to_assemble(base: Base, backbone: ControlledUNet) -> None:
    """Before anything is trained: what is trained becomes a pipeline with its base."""
    try:
        assemble(base.pipeline, backbone.model)
    except ValueError as error:
        raise InputError(f"{FLAG} {base.args.pretrained_model_name_or_path}: {in_one_line(error)}") from error
