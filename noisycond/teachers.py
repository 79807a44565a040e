"""Teachers of a distillation, pipelines with a U-Net, and the student that starts from one.

Letters: B examples, K classes, D the embedding dimension, S the latent size.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from torch import nn

from noisycond.condition_kinds import LABELS, require_kind
from noisycond.data.batches import Batches
from noisycond.data.opening import TrainingData
from noisycond.denoisers import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.class_pipelines import (
    ClassPipelineSource,
    declared_class_name,
    find_class_pipeline,
    frozen_denoiser,
    open_class_pipeline,
    pipeline_index,
)
from noisycond.denoisers.unet import UNetBackbone
from noisycond.errors import InputError, in_one_line, require
from noisycond.evaluation.in_training import TrainingEvaluation
from noisycond.first_stage import FirstStage
from noisycond.lora import add_lora
from noisycond.objective import PREDICTION_TYPES
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.run_folder import RunFolder
from noisycond.training_state import Tally


FLAG = "--pretrained_teacher_model"
DOING = "distilled"


@dataclass
class Latents:
    """Channels and factor of the latents, and where they come from, in words."""

    channels: int
    factor: int
    why: str


class Teaching(ABC):
    """What of a distillation depends on what its teacher takes as a condition: data, conditions, samples, export.

    Attributes:
        args: those of the script.
        data: the training data; None where it is not on this machine (dry run).
        teacher: frozen and in eval mode; on the meta device in a dry run.
        first_stage: the autoencoder; None of one that is not on this machine (dry run). latents: of it.
        scheduler: what a student samples with, with the teacher's noise schedule.
        prediction_type: what teacher and student predict.
        tally: counts what happened to the conditions.
        class_names: K names, of a class-conditional teacher. prompts: of the sample grids, else.
    """

    args: object
    data: TrainingData | None
    teacher: ConditionalDenoiser
    first_stage: FirstStage | None
    latents: Latents
    scheduler: LCMScheduler
    prediction_type: str
    tally: Tally
    class_names: list[str] | None = None
    prompts: Sequence[str] | None = None

    def student(self) -> ConditionalDenoiser:
        """The teacher's copy that is trained, with an embedding of the guidance or with LoRA, and CEP.

        Raises:
            InputError: there is nothing that LoRA could adapt.
        """
        args = self.args
        student = self.copied(
            None if args.use_lora else args.unet_time_cond_proj_dim,
            perturbation=ConditionEmbeddingPerturbation(args.cep_gamma, args.cep_type, args.seed),
            fixed=args.cep_mode == "fixed",
            perturb_null=args.cep_perturb_null,
        )
        if args.use_lora:
            add_lora(student, args.rank, args.lora_alpha, args.lora_target_modules)
        if args.gradient_checkpointing:
            student.backbone.model.enable_gradient_checkpointing()
        return student

    @property
    def latent_size(self) -> int:
        """S."""
        return self.args.resolution // self.latents.factor

    @property
    @abstractmethod
    def facts(self) -> dict:
        """What a resumed run must share beside its flags, its data and the noise schedule, as JSON values."""

    @abstractmethod
    def sizes(self) -> dict[str, str]:
        """Lines of a dry run, name to text."""

    @abstractmethod
    def copied(self, time_cond_proj_dim: int | None, **options) -> ConditionalDenoiser:
        """A student as [`copied_unet`] says; the options are those of [`ConditionalDenoiser`]."""

    @abstractmethod
    def evaluation(self) -> TrainingEvaluation:
        """Of the images that a student draws."""

    @abstractmethod
    def batches(self, accelerator: Accelerator) -> Batches:
        """The training batches; all that is frozen goes to the accelerator's device."""

    @abstractmethod
    def keep(self, run: RunFolder) -> None:
        """Writes into the run's folder what it keeps of its data."""

    @abstractmethod
    def conditions(self, batch: dict, keys: torch.Tensor) -> tuple[dict, dict, dict]:
        """The student's, the teacher's and the null conditions of a batch of B examples, as [`ConditionalDenoiser`]
        takes them; counts the batch.

        Args:
            keys [B]: int64, this step's keys.
        """

    @abstractmethod
    def pipeline(self, student: ConditionalDenoiser) -> DiffusionPipeline:
        """The pipeline with the weights that the student has now; of LoRA the teacher's with its adapters."""

    @abstractmethod
    def draw(self, pipeline: DiffusionPipeline, path: Path) -> None:
        """Draws a sample grid and saves it as a PNG."""


def require_prediction_type(name: str, prediction_type: str) -> None:
    """Raises InputError for what a distillation cannot follow."""
    require(
        prediction_type in PREDICTION_TYPES,
        f"{FLAG} {name}: it predicts {prediction_type!r}, but must predict one of {', '.join(PREDICTION_TYPES)}.",
    )


def find_teacher(name: str, revision: str | None = None) -> ClassPipelineSource:
    """The class-conditional pipeline of that name, a folder or Hub id, by its configurations.

    Raises:
        InputError: there is none, or it cannot be a teacher here.
    """
    require_kind(FLAG, name, declared_class_name(pipeline_index(name, revision, FLAG)), LABELS, DOING)
    source = find_class_pipeline(name, revision, FLAG)
    require_prediction_type(name, source.prediction_type)
    return source


def lcm_scheduler(theirs: Mapping, num_ddim_timesteps: int, timestep_scaling: float) -> LCMScheduler:
    """The student's scheduler: the teacher's noise schedule, timesteps on the solver's grid, no clipping of x_0, which
    would be wrong for latents.

    Args:
        theirs: the configuration of the teacher's scheduler.

    Raises:
        InputError: --num_ddim_timesteps does not divide the teacher's timesteps, or its noise schedule cannot be
            sampled with.
    """
    require(
        not theirs.get("rescale_betas_zero_snr"),
        f"{FLAG}: its scheduler rescales the betas to a signal-to-noise ratio of 0 (rescale_betas_zero_snr), from "
        "which no path starts; name another teacher.",
    )
    try:
        scheduler = LCMScheduler.from_config(
            theirs,
            original_inference_steps=num_ddim_timesteps,
            timestep_scaling=timestep_scaling,
            clip_sample=False,
            thresholding=False,
        )
    except (NotImplementedError, TypeError, ValueError) as error:
        raise InputError(f"{FLAG}: an LCMScheduler cannot have its noise schedule ({in_one_line(error)}).") from error
    total = scheduler.config.num_train_timesteps
    require(
        total % num_ddim_timesteps == 0,
        f"--num_ddim_timesteps is {num_ddim_timesteps}, but must divide the teacher's {total} timesteps.",
    )
    return scheduler


def check_data(source: ClassPipelineSource, class_names: list[str]) -> None:
    """Raises InputError where the teacher knows other classes than the dataset has."""
    theirs = source.class_names
    require(
        theirs is None or theirs == class_names,
        f"{FLAG} {source.name}: it was trained on other classes ({len(theirs or ())}: "
        f"{', '.join((theirs or [])[:5])}, …) than the dataset has ({len(class_names)}: "
        f"{', '.join(class_names[:5])}, …).",
    )


def open_teacher(source: ClassPipelineSource, class_names: list[str]) -> tuple[ConditionalDenoiser, nn.Module | None]:
    """The teacher, frozen and in eval mode, and its pipeline's first stage (None where it has none).

    Raises:
        InputError: it cannot be opened, or knows other classes than the dataset has.
    """
    check_data(source, class_names)
    pipeline = open_class_pipeline(source)
    known = pipeline.class_embedder.null_class
    require(
        known == len(class_names),
        f"{FLAG} {source.name}: it knows {known} classes, but the dataset has {len(class_names)}.",
    )
    return frozen_denoiser(source, pipeline), pipeline.vqvae


def copied_unet(
    teacher: UNet2DConditionModel, latent_size: int, time_cond_proj_dim: int | None
) -> UNet2DConditionModel:
    """A copy of the teacher's U-Net to train, in train mode.

    Args:
        latent_size: S, what the student's pipeline draws by itself. time_cond_proj_dim: the dimension of the embedding
            of guidance. Its projection, which has no bias, starts at 0, so that the student starts as its teacher
            without guidance. None: no such embedding, for adapters to the teacher as it is.
    """
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    state = {name: value.detach().clone() for name, value in teacher.state_dict().items()}
    if time_cond_proj_dim is not None:
        config |= {"sample_size": latent_size, "time_cond_proj_dim": time_cond_proj_dim}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    for name, value in unet.named_parameters():
        if name not in state:
            state[name] = torch.zeros(value.shape, device=teacher.device)
    unet.load_state_dict(state, assign=True)
    return unet.requires_grad_(True)


def make_student(
    teacher: ConditionalDenoiser,
    latent_size: int,
    time_cond_proj_dim: int | None,
    embedding_dropout: float = 0.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
    **options,
) -> ConditionalDenoiser:
    """A copy of a class-conditional teacher to train: its U-Net learns, the class embedding stays the teacher's.

    Args:
        latent_size, time_cond_proj_dim: see [`copied_unet`].
        embedding_dropout, label_smoothing, seed: of [`ClassEncoder`]. options: of [`ConditionalDenoiser`].
    """
    unet = copied_unet(teacher.backbone.model, latent_size, time_cond_proj_dim)
    known, dim = teacher.encoder.num_classes, teacher.backbone.dim
    encoder = ClassEncoder(known, dim, embedding_dropout, label_smoothing, seed)
    encoder.load_state_dict(teacher.encoder.state_dict())
    encoder.requires_grad_(False)
    return ConditionalDenoiser(encoder, UNetBackbone.around(unet), **options)
