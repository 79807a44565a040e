"""What the scripts that train on class labels share: flags of the sample grids, the condition of a batch, the
corruption, what a run leaves behind, and what a class-conditional teacher teaches.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from torch import nn

from noisycond import dry_run, randomness, sampling, teachers
from noisycond.arguments import ValidationArguments, flag
from noisycond.cards import loading_code
from noisycond.corruption import LabelCorruption
from noisycond.data.batches import Batches
from noisycond.data.class_groups import read_class_groups
from noisycond.data.corruption_map import save_corruption_map
from noisycond.data.opening import TrainingData, open_batches, open_training_data
from noisycond.data.streams import require_ids
from noisycond.denoisers import ConditionalDenoiser
from noisycond.denoisers.class_pipelines import (
    ClassPipelineSource,
    check_latents,
    empty_denoiser,
    lacks_a_first_stage,
)
from noisycond.errors import InputError, require
from noisycond.evaluation.in_training import TrainingEvaluation
from noisycond.export import class_pipeline, export_pipeline
from noisycond.first_stage import FirstStage, open_first_stage, state_hash, taken_from
from noisycond.pipelines import LDMClassToImagePipeline
from noisycond.randomness import Purpose
from noisycond.results import draw_grid, leave_results
from noisycond.run_folder import RunFolder
from noisycond.trainer import FitResult


@dataclass
class SampleGridArguments(ValidationArguments):
    validation_images_per_class: int = flag(10, "Images per class in the sample grids, of at most 10 classes.")

    def __post_init__(self):
        super().__post_init__()
        require(self.validation_images_per_class > 0, "--validation_images_per_class must be positive.")


def open_corruption(args, data: TrainingData) -> tuple[LabelCorruption, list[list[int]] | None]:
    """The corruption of the labels that the flags ask for, and the class groups it keeps to.

    Raises:
        InputError: there are too few classes, the groups do not fit them, or a stream's examples cannot be told apart.
    """
    class_names = data.source.class_names
    require(
        args.corruption_ratio == 0 or len(class_names) > 1,
        f"--corruption_ratio {args.corruption_ratio} needs at least two classes, but the dataset has one.",
    )
    streaming = getattr(args, "streaming", False)
    if streaming and args.corruption_ratio > 0 and args.corruption_mode == "fixed":
        require_ids(data.source, "--corruption_mode fixed")
    if streaming and args.cep_gamma > 0 and args.cep_mode == "fixed":
        require_ids(data.source, "--cep_mode fixed")
    groups = read_class_groups(args.class_groups, class_names) if args.class_groups else None
    corruption = LabelCorruption(
        args.corruption_ratio, len(class_names), seed=args.seed, groups=groups, mode=args.corruption_mode
    )
    return corruption, groups


def label_conditions(
    args,
    corruption: LabelCorruption,
    null_class: int,
    batch: dict,
    keys: torch.Tensor,
    known_as: torch.Tensor | None = None,
) -> tuple[dict, dict]:
    """The conditions of a batch of B examples: as the denoiser is trained with them, and as the data has them.

    Of both, the same examples lose their condition (--conditioning_dropout_prob).

    Args:
        corruption: counts the batch. null_class: the label of no condition. keys [B]: int64, this step's keys.
        known_as [K]: int64, the denoiser's labels of the dataset's classes; None: the same.

    Returns:
        Twice what [`noisycond.denoisers.ConditionalDenoiser`] takes: `class_labels` and `index`, int64 [B].
    """
    labels = corruption(batch["class_labels"], batch["index"], batch["epoch"])
    corruption.count(batch["class_labels"], labels)
    dropped = randomness.bernoulli(args.seed, Purpose.CONDITION_DROPOUT, keys, args.conditioning_dropout_prob)
    known_as = None if known_as is None else known_as.to(labels.device)
    corrupted, true = (
        {
            "class_labels": (each if known_as is None else known_as[each]).masked_fill(dropped, null_class),
            "index": batch["index"],
        }
        for each in (labels, batch["class_labels"])
    )
    return corrupted, true


def first_stage_of(args, source: ClassPipelineSource, autoencoder: nn.Module | None) -> FirstStage:
    """The first stage that the flags name, or else the pipeline's own.

    Args:
        autoencoder: the pipeline's; None where it has none.

    Raises:
        InputError: there is none.
    """
    if args.pretrained_vae_model_name_or_path is not None:
        return open_first_stage(args.pretrained_vae_model_name_or_path, args.seed)
    require(autoencoder is not None, lacks_a_first_stage(source.name))
    return taken_from(autoencoder, dict(autoencoder.config), source.name, args.seed)


def peek_latents(args, source: ClassPipelineSource) -> tuple[FirstStage | None, int, int, str]:
    """As [`noisycond.dry_run.latents_of`], of the first stage that the flags name or else of the pipeline's own.

    Raises:
        InputError: there is none.
    """
    own = args.pretrained_vae_model_name_or_path or source.name
    try:
        return dry_run.latents_of(args, source.latents_of(args.resolution), own)
    except InputError:
        require(args.pretrained_vae_model_name_or_path is not None, lacks_a_first_stage(source.name))
        raise


def draw_samples(pipeline: DiffusionPipeline, args, num_classes: int, path: Path) -> None:
    """Draws a sample grid, a row per class, and saves it as a PNG."""
    per_class = args.validation_images_per_class
    draw_grid(pipeline, sampling.class_rows(num_classes, per_class), per_class, args, path)


def export(
    pipeline: DiffusionPipeline,
    args,
    run: RunFolder,
    class_names: list[str],
    result: FitResult,
    card: ModelCard,
    repo_id: str | None,
    evaluation: TrainingEvaluation | None,
) -> None:
    """Writes the last sample grid and what else a run leaves behind; see [`noisycond.results.leave_results`]."""
    draw_samples(pipeline, args, len(class_names), run.samples / "final.png")
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


class ClassTeaching(teachers.Teaching):
    """What a class-conditional teacher teaches; `args` with [`SampleGridArguments`] and `CorruptionArguments`.

    Attributes:
        groups: the class groups that corruption keeps to; None where there are none.
    """

    @classmethod
    def open(cls, args, accelerator: Accelerator) -> "ClassTeaching":
        """With the data, the teacher's weights and the first stage.

        Raises:
            InputError: one of them cannot be opened, or they do not fit together.
        """
        self, source = cls(), teachers.find_teacher(args.pretrained_teacher_model, args.teacher_revision)
        self._take(args, source)
        self.data = open_training_data(args)
        self.class_names = self.data.source.class_names
        self.tally, self.groups = open_corruption(args, self.data)
        self.teacher, autoencoder = teachers.open_teacher(source, self.class_names)
        self.first_stage = first_stage_of(args, source, autoencoder)
        check_latents(source.flag, source.name, source.unet, self.first_stage, args.resolution)
        self.latents = teachers.Latents(self.first_stage.latent_channels, self.first_stage.factor, "first stage")
        return self

    @classmethod
    def peek(cls, args) -> "ClassTeaching":
        """Without weights, data that is not here, or a first stage that is not here; see [`noisycond.dry_run`]."""
        self, source = cls(), teachers.find_teacher(args.pretrained_teacher_model, args.teacher_revision)
        self._take(args, source)
        self.data = dry_run.open_what_is_here(args)
        first_stage, *latents = peek_latents(args, source)
        self.first_stage, self.latents = first_stage, teachers.Latents(*latents)
        self.class_names = dry_run.class_names_of(args, self.data)
        teachers.check_data(source, self.class_names)
        with torch.device("meta"):
            self.teacher = empty_denoiser(source, len(self.class_names)).requires_grad_(False)
        return self

    def _take(self, args, source: ClassPipelineSource) -> None:
        self.args, self.prediction_type = args, source.prediction_type
        self.scheduler = teachers.lcm_scheduler(
            source.scheduler, args.num_ddim_timesteps, args.timestep_scaling_factor
        )

    @property
    def facts(self) -> dict:
        return {"class_groups": self.groups, "teacher": state_hash(self.teacher)}

    def sizes(self) -> dict[str, str]:
        return {}

    def copied(self, time_cond_proj_dim: int | None, **options) -> ConditionalDenoiser:
        args = self.args
        baselines = {name: getattr(args, name) for name in ("embedding_dropout", "label_smoothing", "seed")}
        return teachers.make_student(self.teacher, self.latent_size, time_cond_proj_dim, **baselines, **options)

    def evaluation(self) -> TrainingEvaluation:
        return TrainingEvaluation(self.args, self.class_names)

    def batches(self, accelerator: Accelerator) -> Batches:
        self.first_stage.to(accelerator.device)
        self.teacher.to(accelerator.device)
        return open_batches(self.args, self.data, accelerator, self.first_stage)

    def keep(self, run: RunFolder) -> None:
        if self.args.save_corruption_map:
            save_corruption_map(self.tally, self.data.source, run.path / "corruption_map.csv")

    def conditions(self, batch: dict, keys: torch.Tensor) -> tuple[dict, dict, dict]:
        null_class = self.teacher.encoder.null_class
        corrupted, true = label_conditions(self.args, self.tally, null_class, batch, keys)
        null = true | {"class_labels": torch.full_like(true["class_labels"], null_class)}
        return corrupted, corrupted if self.args.teacher_condition == "corrupted" else true, null

    def pipeline(self, student: ConditionalDenoiser) -> LDMClassToImagePipeline:
        return class_pipeline(student, self.first_stage, self.scheduler)

    def draw(self, pipeline: DiffusionPipeline, path: Path) -> None:
        draw_samples(pipeline, self.args, len(self.class_names), path)
