"""What the scripts that train on class labels share: flags of the sample grids, the condition of a batch, the
corruption, and what a run leaves behind.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from noisycond import randomness, sampling
from noisycond.arguments import ValidationArguments, flag
from noisycond.cards import loading_code
from noisycond.corruption import LabelCorruption
from noisycond.data.class_groups import read_class_groups
from noisycond.data.opening import TrainingData
from noisycond.data.streams import require_ids
from noisycond.errors import require
from noisycond.evaluation.in_training import TrainingEvaluation
from noisycond.export import export_pipeline
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
    if args.streaming and args.corruption_ratio > 0 and args.corruption_mode == "fixed":
        require_ids(data.source, "--corruption_mode fixed")
    if args.streaming and args.cep_gamma > 0 and args.cep_mode == "fixed":
        require_ids(data.source, "--cep_mode fixed")
    groups = read_class_groups(args.class_groups, class_names) if args.class_groups else None
    corruption = LabelCorruption(
        args.corruption_ratio, len(class_names), seed=args.seed, groups=groups, mode=args.corruption_mode
    )
    return corruption, groups


def label_conditions(
    args, corruption: LabelCorruption, null_class: int, batch: dict, keys: torch.Tensor
) -> tuple[dict, dict]:
    """The conditions of a batch of B examples: as the denoiser is trained with them, and as the data has them.

    Of both, the same examples lose their condition (--conditioning_dropout_prob).

    Args:
        corruption: counts the batch. null_class: the label of no condition. keys [B]: int64, this step's keys.

    Returns:
        Twice what [`noisycond.denoisers.ConditionalDenoiser`] takes: `class_labels` and `index`, int64 [B].
    """
    labels = corruption(batch["class_labels"], batch["index"], batch["epoch"])
    corruption.count(batch["class_labels"], labels)
    dropped = randomness.bernoulli(args.seed, Purpose.CONDITION_DROPOUT, keys, args.conditioning_dropout_prob)
    corrupted, true = (
        {"class_labels": each.masked_fill(dropped, null_class), "index": batch["index"]}
        for each in (labels, batch["class_labels"])
    )
    return corrupted, true


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
    code: str | None = None,
    write: Callable[[], None] | None = None,
) -> None:
    """Writes the last sample grid and what else a run leaves behind; see [`noisycond.results.leave_results`].

    Args:
        code: how to load it; by default as [`noisycond.cards.loading_code`] says.
        write: writes what was trained; by default the pipeline with the card.
    """
    draw_samples(pipeline, args, len(class_names), run.samples / "final.png")
    leave_results(
        pipeline,
        args,
        run,
        result,
        write=write or (lambda: export_pipeline(pipeline, run.path, class_names, card)),
        how_to_load=code or loading_code(pipeline, run.path),
        evaluation=evaluation,
        repo_id=repo_id,
    )
