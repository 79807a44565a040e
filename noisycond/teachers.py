"""The teacher of a distillation, a class-conditional pipeline with a U-Net, and the student that starts from it.

Letters: K classes, D the embedding dimension, S the latent size.
"""

from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from torch import nn

from noisycond.denoisers import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.presets import Preset
from noisycond.denoisers.unet import UNetBackbone
from noisycond.errors import InputError, in_one_line, require
from noisycond.first_stage import FirstStage
from noisycond.objective import PREDICTION_TYPES
from noisycond.pipelines import LDMClassToImagePipeline


FLAG = "--pretrained_teacher_model"


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


def find_teacher(name: str, revision: str | None = None) -> TeacherSource:
    """The pipeline of that name, a folder or Hub id, by its configurations.

    Raises:
        InputError: there is none, or it cannot be a teacher here.
    """
    at = {} if revision is None else {"revision": revision}
    try:
        index = DiffusionPipeline.load_config(name, **at)
    except OSError as error:
        raise InputError(
            f"{FLAG} {name}: neither a folder nor a Hub id of a pipeline ({in_one_line(error)})."
        ) from error
    declared = index.get("_class_name")
    kind = declared[-1] if isinstance(declared, (list, tuple)) else declared
    require(
        kind == LDMClassToImagePipeline.__name__,
        f"{FLAG} {name}: a {kind} cannot be distilled here, only a {LDMClassToImagePipeline.__name__} (a "
        "class-conditional U-Net).",
    )
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
    require(
        source.prediction_type in PREDICTION_TYPES,
        f"{FLAG} {name}: it predicts {source.prediction_type!r}, but must predict one of "
        f"{', '.join(PREDICTION_TYPES)}.",
    )
    return source


def lcm_scheduler(source: TeacherSource, num_ddim_timesteps: int, timestep_scaling: float) -> LCMScheduler:
    """The student's scheduler: the teacher's noise schedule, timesteps on the solver's grid, no clipping of x_0, which
    would be wrong for latents.

    Raises:
        InputError: --num_ddim_timesteps does not divide the teacher's timesteps.
    """
    scheduler = LCMScheduler.from_config(
        source.scheduler,
        original_inference_steps=num_ddim_timesteps,
        timestep_scaling=timestep_scaling,
        clip_sample=False,
        thresholding=False,
    )
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
    return _denoiser(source.unet, num_classes)


def check_latents(source: TeacherSource, first_stage: FirstStage, resolution: int) -> None:
    """Raises InputError where the latents of this first stage at this resolution do not fit the teacher."""
    channels, factor = first_stage.latent_channels, first_stage.factor
    require(
        source.unet.get("in_channels") == channels,
        f"{FLAG} {source.name}: its U-Net takes latents of {source.unet.get('in_channels')} channels, but those of "
        f"the first stage have {channels}.",
    )
    require(
        resolution % factor == 0,
        f"--resolution is {resolution}, but must be a multiple of the first stage's factor {factor}.",
    )
    UNetBackbone.check(source.unet, resolution // factor, 0)


def make_student(
    teacher: ConditionalDenoiser, latent_size: int, time_cond_proj_dim: int | None, **options
) -> ConditionalDenoiser:
    """A copy of the teacher to train: its U-Net learns, the class embedding stays the teacher's.

    Args:
        latent_size: S, what the student's pipeline draws by itself. time_cond_proj_dim: the dimension of the embedding
            of guidance. Its projection, which has no bias, starts at 0, so that the student starts as its teacher
            without guidance. None: no such embedding.
        options: of [`_denoiser`].
    """
    config = dict(teacher.backbone.model.config) | {"sample_size": latent_size}
    student = _denoiser(config | {"time_cond_proj_dim": time_cond_proj_dim}, teacher.encoder.num_classes, **options)
    model = student.backbone.model
    state = teacher.backbone.model.state_dict()
    if time_cond_proj_dim is not None:
        projection = "time_embedding.cond_proj.weight"
        state |= {projection: torch.zeros_like(model.get_parameter(projection))}
    model.load_state_dict(state)
    student.encoder.load_state_dict(teacher.encoder.state_dict())
    student.encoder.requires_grad_(False)
    return student


def _denoiser(
    config: dict,
    num_classes: int,
    embedding_dropout: float = 0.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
    **options,
) -> ConditionalDenoiser:
    """A denoiser of new weights; the options are those of [`ClassEncoder`] and of [`ConditionalDenoiser`]."""
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    backbone = UNetBackbone(**known)
    encoder = ClassEncoder(num_classes, backbone.dim, embedding_dropout, label_smoothing, seed)
    return ConditionalDenoiser(encoder, backbone, **options)
