"""What the scripts that train on captions share: flags of the sample grids, the model from scratch or of an existing
pipeline, the condition of a batch, and what a run leaves behind.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from noisycond import randomness
from noisycond.arguments import ValidationArguments, flag
from noisycond.captions import CaptionTally
from noisycond.cards import loading_code, lora_loading_code, public_name, text_to_image_card
from noisycond.data.digit_captions import digit_prompts
from noisycond.data.opening import TrainingData
from noisycond.data.streams import RawExample, StreamSource
from noisycond.denoisers import ConditionalDenoiser, build_text_denoiser, find_text_denoiser
from noisycond.denoisers.presets import DenoiserSource, Preset
from noisycond.denoisers.text import TextEncoder, open_text_encoder
from noisycond.denoisers.text_pipelines import TextPipeline, open_text_pipeline
from noisycond.errors import require
from noisycond.evaluation.in_training import TrainingEvaluation
from noisycond.export import export_pipeline, sampling_scheduler
from noisycond.first_stage import FirstStage, open_first_stage
from noisycond.lora import add_lora, save_lora
from noisycond.objective import DiffusionObjective
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.pipelines import LDMTextToImagePipeline
from noisycond.randomness import Purpose
from noisycond.results import draw_grid, leave_results
from noisycond.run_folder import RunFolder
from noisycond.trainer import FitResult


SHOWN = 10  # prompts of a sample grid that nobody chose


@dataclass
class PromptGridArguments(ValidationArguments):
    validation_prompts: list[str] = flag(
        [], "Prompts of the sample grids, a row each; the default are ten, for digits in phrasings that no caption has,"
        " else the first captions."
    )  # fmt: skip
    num_validation_images: int = flag(4, "Images per prompt in the sample grids.")

    def __post_init__(self):
        super().__post_init__()
        require(
            self.num_validation_images > 0,
            f"--num_validation_images is {self.num_validation_images}, but it must be positive.",
        )
        require(all(self.validation_prompts), "--validation_prompts: one of them is empty.")
