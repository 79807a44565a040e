"""Trained weights to a pipeline folder that stock diffusers loads."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffusers import DDIMScheduler, DiffusionPipeline, DiTPipeline
from huggingface_hub import ModelCard

from noisycond.denoisers import ConditionalDenoiser
from noisycond.denoisers.dit import DiTBackbone
from noisycond.first_stage import FirstStage
from noisycond.objective import DiffusionObjective
from noisycond.pipelines import LDMClassToImagePipeline


def sampling_scheduler(objective: DiffusionObjective, noise_schedule: dict) -> DDIMScheduler:
    """The DDIM scheduler of a training objective. It does not clip x_0, which would be wrong for latents.

    Args:
        noise_schedule: beta_schedule, beta_start and beta_end by diffusers' names.
    """
    return DDIMScheduler(
        num_train_timesteps=len(objective.betas),
        prediction_type=objective.prediction_type,
        clip_sample=False,
        **noise_schedule,
    )


def class_pipeline(
    denoiser: ConditionalDenoiser, first_stage: FirstStage, scheduler: DDIMScheduler
) -> DiTPipeline | LDMClassToImagePipeline:
    """The pipeline of a class-conditional denoiser with the weights it has now: stock for a DiT, ours for a U-Net."""
    exported = denoiser.backbone.export(denoiser.encoder.table.weight)
    if isinstance(denoiser.backbone, DiTBackbone):
        pipeline = DiTPipeline(exported, first_stage.model, scheduler)
    else:
        unet, class_embedder = exported
        pipeline = LDMClassToImagePipeline(unet, class_embedder, scheduler, first_stage.model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(first_stage.model.device)


def export_pipeline(
    pipeline: DiffusionPipeline, folder: Path, class_names: Sequence[str] | None, card: ModelCard | None = None
) -> None:
    """Writes a pipeline folder, safetensors only: every component is written aside first and then moved into place,
    the index last, so that an interrupted export leaves no folder that half loads.

    Args:
        folder: may hold other files (checkpoints, logs), which stay.
        class_names: go into `model_index.json` as `id2label`, which the stock pipeline reads and does not write; None
            leaves it as the pipeline writes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    making = folder / ".export.tmp"
    shutil.rmtree(making, ignore_errors=True)
    pipeline.save_pretrained(making, safe_serialization=True)
    index_file = making / "model_index.json"
    index = json.loads(index_file.read_text())
    if class_names is not None:
        index["id2label"] = {str(label): name for label, name in enumerate(class_names)}
    index_file.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if card is not None:
        card.save(making / "README.md")
    (folder / "model_index.json").unlink(missing_ok=True)
    for path in sorted(making.iterdir(), key=lambda path: path.name == "model_index.json"):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    making.rmdir()
