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

from noisycond.data.batches import Batches
from noisycond.data.opening import TrainingData
from noisycond.denoisers import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.presets import Preset
from noisycond.denoisers.unet import UNetBackbone
from noisycond.errors import InputError, in_one_line, require
from noisycond.evaluation.in_training import TrainingEvaluation
from noisycond.first_stage import FirstStage
from noisycond.lora import add_lora
from noisycond.objective import PREDICTION_TYPES
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.pipelines import LDMClassToImagePipeline
from noisycond.run_folder import RunFolder
from noisycond.training_state import Tally


FLAG = "--pretrained_teacher_model"
# What the teachers that can be distilled take as a condition, by the class that their index names.
KINDS = {
    "LDMClassToImagePipeline": "class labels",
    "StableDiffusionPipeline": "captions",
    "LDMTextToImagePipeline": "captions",
}


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


@dataclass
class TeacherSource:
    """What `--pretrained_teacher_model` named, by its configuration alone.

    Attributes:
        name, revision: a folder or Hub id, and its revision there.
        unet: the U-Net's configuration. scheduler: that of the pipeline's scheduler.
        class_names: of K classes; None where the pipeline does not name them.
    """

    name: str
    revision: str | None
    unet: dict
    scheduler: dict
    class_names: list[str] | None = None

    def latents_of(self, resolution: int) -> Preset:
        """Channels and factor of the latents by the U-Net's configuration, where the first stage is not at hand."""
        return Preset(
            latent_channels=self.unet["in_channels"], factor=max(1, resolution // (self.unet.get("sample_size") or 1))
        )

    @property
    def prediction_type(self) -> str:
        return self.scheduler.get("prediction_type", "epsilon")


def _index(name: str, revision: str | None) -> dict:
    at = {} if revision is None else {"revision": revision}
    try:
        return DiffusionPipeline.load_config(name, **at)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{FLAG} {name}: neither a folder nor a Hub id of a pipeline ({in_one_line(error)})."
        ) from error


def kind_of_teacher(name: str, revision: str | None = None) -> str | None:
    """What a pipeline, a folder or Hub id, takes as a condition, by its index: `class labels` or `captions`; None
    where there is no index.

    Raises:
        InputError: it cannot be a teacher here.
    """
    try:
        index = _index(name, revision)
    except InputError:
        return None
    kind = _class_name(index)
    require(
        kind in KINDS,
        f"{FLAG} {name}: a {kind} cannot be distilled here, only a U-Net of one condition: {', '.join(KINDS)}.",
    )
    return KINDS[kind]


def require_kind(name: str, class_name: str, kind: str) -> None:
    """Raises InputError unless a pipeline of this class can be a teacher and takes this kind of condition."""
    require(KINDS.get(class_name) == kind, f"{FLAG} {name}: a {class_name} cannot be distilled here by its {kind}.")


def _class_name(index: Mapping) -> str:
    declared = index.get("_class_name")
    return declared[-1] if isinstance(declared, (list, tuple)) else declared


def require_prediction_type(name: str, prediction_type: str) -> None:
    """Raises InputError for what a distillation cannot follow."""
    require(
        prediction_type in PREDICTION_TYPES,
        f"{FLAG} {name}: it predicts {prediction_type!r}, but must predict one of {', '.join(PREDICTION_TYPES)}.",
    )


def find_teacher(name: str, revision: str | None = None) -> TeacherSource:
    """The class-conditional pipeline of that name, a folder or Hub id, by its configurations.

    Raises:
        InputError: there is none, or it cannot be a teacher here.
    """
    at = {} if revision is None else {"revision": revision}
    index = _index(name, revision)
    require_kind(name, _class_name(index), "class labels")
    try:
        unet = UNet2DConditionModel.load_config(name, subfolder="unet", **at)
        scheduler = LCMScheduler.load_config(name, subfolder="scheduler", **at)
    except OSError as error:
        raise InputError(f"{FLAG} {name}: its U-Net or scheduler is missing ({in_one_line(error)}).") from error
    require(
        unet.get("time_cond_proj_dim") is None,
        f"{FLAG} {name}: its U-Net was distilled itself (time_cond_proj_dim {unet.get('time_cond_proj_dim')}) and has "
        "no path to follow; name the model it was distilled from.",
    )
    names = index.get("id2label")
    names = [str(names[label]) for label in sorted(names, key=int)] if isinstance(names, dict) else None
    source = TeacherSource(name, revision, unet, scheduler, names)
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


def check_data(source: TeacherSource, class_names: list[str]) -> None:
    """Raises InputError where the teacher knows other classes than the dataset has."""
    theirs = source.class_names
    require(
        theirs is None or theirs == class_names,
        f"{FLAG} {source.name}: it was trained on other classes ({len(theirs or ())}: "
        f"{', '.join((theirs or [])[:5])}, …) than the dataset has ({len(class_names)}: "
        f"{', '.join(class_names[:5])}, …).",
    )


def open_teacher(source: TeacherSource, class_names: list[str]) -> tuple[ConditionalDenoiser, nn.Module | None]:
    """The teacher, frozen and in eval mode, and its pipeline's first stage (None where it has none).

    Raises:
        InputError: it cannot be opened, or knows other classes than the dataset has.
    """
    check_data(source, class_names)
    try:
        pipeline = LDMClassToImagePipeline.from_pretrained(source.name, revision=source.revision)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{FLAG} {source.name}: diffusers cannot open it ({in_one_line(error)}).") from error
    known = pipeline.class_embedder.null_class
    require(
        known == len(class_names),
        f"{FLAG} {source.name}: it knows {known} classes, but the dataset has {len(class_names)}.",
    )
    teacher = empty_teacher(source, len(class_names))
    teacher.backbone.model.load_state_dict(pipeline.unet.state_dict())
    teacher.encoder.table.load_state_dict(pipeline.class_embedder.embedding.state_dict())
    return teacher.eval().requires_grad_(False), pipeline.vqvae


def empty_teacher(source: TeacherSource, num_classes: int) -> ConditionalDenoiser:
    """The teacher with new weights."""
    known = {name: value for name, value in source.unet.items() if not name.startswith("_")}
    backbone = UNetBackbone(**known)
    return ConditionalDenoiser(ClassEncoder(num_classes, backbone.dim), backbone)


def check_latents(name: str, unet: Mapping, first_stage: FirstStage, resolution: int) -> None:
    """Raises InputError where the latents of this first stage at this resolution do not fit the teacher's U-Net, of
    this configuration."""
    channels, factor = first_stage.latent_channels, first_stage.factor
    require(
        unet.get("in_channels") == channels,
        f"{FLAG} {name}: its U-Net takes latents of {unet.get('in_channels')} channels, but those of the first stage "
        f"have {channels}.",
    )
    require(
        resolution % factor == 0,
        f"--resolution is {resolution}, but must be a multiple of the first stage's factor {factor}.",
    )
    UNetBackbone.check(unet, resolution // factor, 0)


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
