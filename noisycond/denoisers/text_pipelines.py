"""Existing text-to-image pipelines: taken apart to be trained further, and put together again for the export.

Letters: B examples, C latent channels, h × w their size, R the resolution, L tokens, D and P as in text.py.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
import transformers
from diffusers import (
    DiffusionPipeline,
    ModelMixin,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from noisycond.cards import public_name
from noisycond.denoisers.class_pipelines import declared_class_name
from noisycond.denoisers.conditional import ConditionalDenoiser
from noisycond.denoisers.presets import Preset
from noisycond.denoisers.text import (
    LDM_MAX_LENGTH,
    MaskedTextEncoder,
    PairedTextEncoder,
    TextEmbedding,
    TextEncoder,
    Tokenizing,
)
from noisycond.denoisers.unet import UNetBackbone
from noisycond.errors import InputError, in_one_line, require
from noisycond.first_stage import FirstStage, peek_first_stage, taken_from
from noisycond.noise_schedule import schedule_of_scheduler
from noisycond.perturbation import ConditionEmbeddingPerturbation
from noisycond.pipelines import LDMTextToImagePipeline


# The factor that diffusers' own LDMTextToImagePipeline takes every first stage to have.
STOCK_LDM_FACTOR = 8
FLAG = "--pretrained_model_name_or_path"


class SizedUNetBackbone(UNetBackbone):
    """SDXL's U-Net: beside the tokens it reads the pooled embedding, and the sizes of the image, which are those of
    images of R × R that nothing was cropped off: (R, R, 0, 0, R, R), as its pipeline asks for by default."""

    @classmethod
    def around(cls, model: UNet2DConditionModel, resolution: int) -> "SizedUNetBackbone":
        backbone = super().around(model)
        backbone.resolution = resolution
        return backbone

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, embedding: TextEmbedding) -> torch.Tensor:
        """Noisy latents [B, C, h, w], timesteps int64 [B] and text embeddings to a prediction [B, C, h, w]."""
        side, pooled = float(self.resolution), embedding.pooled
        sizes = torch.tensor([side, side, 0.0, 0.0, side, side], dtype=pooled.dtype, device=pooled.device)
        added = {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}
        return self.model(noisy, timesteps, embedding.sequence, added_cond_kwargs=added, return_dict=False)[0]


class PixArtBackbone(nn.Module):
    """PixArt-α's transformer, which leaves padding out by the mask, and where it asks for it reads the image's size R
    and aspect ratio 1."""

    model_class = PixArtTransformer2DModel
    shard_units = ("BasicTransformerBlock",)

    def __init__(self, model: PixArtTransformer2DModel, resolution: int):
        super().__init__()
        self.model, self.resolution = model, resolution

    @classmethod
    def around(cls, model: PixArtTransformer2DModel, resolution: int) -> "PixArtBackbone":
        return cls(model, resolution)

    @staticmethod
    def check(config: dict, latent_size: int, num_classes: int = 0) -> None:
        """Raises InputError where patches do not fit the latents."""
        patch_size = config["patch_size"]
        require(
            latent_size % patch_size == 0,
            f"--resolution: the latents are {latent_size} pixels wide, which is no multiple of the denoiser's patch "
            f"size {patch_size}.",
        )

    @property
    def dim(self) -> int:
        """D, the dimension of the condition embedding."""
        return self.model.config.caption_channels

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, embedding: TextEmbedding) -> torch.Tensor:
        """Noisy latents [B, C, h, w], timesteps int64 [B] and text embeddings to a prediction [B, C or 2C, h, w]."""
        added = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            ones = torch.ones(len(noisy), 2, dtype=embedding.sequence.dtype, device=noisy.device)
            added = {"resolution": ones * self.resolution, "aspect_ratio": ones[:, :1]}
        return self.model(
            noisy,
            embedding.sequence,
            timesteps,
            added_cond_kwargs=added,
            encoder_attention_mask=embedding.mask,
            return_dict=False,
        )[0]


def lower_and_stripped(caption: str) -> str:
    """What PixArt-α's `encode_prompt` does to a prompt first."""
    return caption.lower().strip()


# A family's text encoder: (tokenizers or None, models, index of the pipeline, name, trained) → TextEncoder.
MakeText = Callable[[list | None, list[PreTrainedModel], dict, str, bool], TextEncoder]


def _ldm_text(tokenizers, models, index, name, trained) -> TextEncoder:
    known = getattr(models[0].config, "max_position_embeddings", None) or LDM_MAX_LENGTH
    lengths = [min(LDM_MAX_LENGTH, tokenizer.model_max_length, known) for tokenizer in tokenizers or ()]
    return TextEncoder(models, Tokenizing(tokenizers, lengths) if tokenizers else None, name, trained)


def _clip_text(tokenizers, models, index, name, trained) -> TextEncoder:
    masked = bool(getattr(models[0].config, "use_attention_mask", False))
    return TextEncoder(models, _own_lengths(tokenizers, masked), name, trained)


def _paired_text(tokenizers, models, index, name, trained) -> TextEncoder:
    zero_null = index.get(
        "force_zeros_for_empty_prompt", _default(StableDiffusionXLPipeline, "force_zeros_for_empty_prompt")
    )
    return PairedTextEncoder(models, _own_lengths(tokenizers), name, trained, zero_null=zero_null)


def _pixart_text(tokenizers, models, index, name, trained) -> TextEncoder:
    length = inspect.signature(PixArtAlphaPipeline.encode_prompt).parameters["max_sequence_length"].default
    encode = Tokenizing(tokenizers, [length], masked=True, prepare=lower_and_stripped) if tokenizers else None
    return MaskedTextEncoder(models, encode, name, trained)


def _own_lengths(tokenizers: list | None, masked: bool = False) -> Tokenizing | None:
    if not tokenizers:
        return None
    return Tokenizing(tokenizers, [tokenizer.model_max_length for tokenizer in tokenizers], masked)


def _default(kind: type, name: str):
    return inspect.signature(kind.__init__).parameters[name].default


@dataclass(frozen=True)
class Family:
    """Pipelines of one class.

    Attributes:
        title: for messages. pipeline: the class. backbone: around the denoiser, which stands at `denoiser`.
        make_text: around the text encoders, which stand at `encoders`, with tokenizers at `tokenizers`.
        first_stage: where that stands. sized: whether the backbone is told the resolution.
    """

    title: str
    pipeline: type[DiffusionPipeline]
    backbone: type[UNetBackbone] | type[PixArtBackbone]
    make_text: MakeText
    denoiser: str = "unet"
    encoders: tuple[str, ...] = ("text_encoder",)
    tokenizers: tuple[str, ...] = ("tokenizer",)
    first_stage: str = "vae"
    sized: bool = False


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        "Stable Diffusion 1.x and 2.x", StableDiffusionPipeline, UNetBackbone, _clip_text
    ),
    "StableDiffusionXLPipeline": Family(
        "Stable Diffusion XL",
        StableDiffusionXLPipeline,
        SizedUNetBackbone,
        _paired_text,
        encoders=("text_encoder", "text_encoder_2"),
        tokenizers=("tokenizer", "tokenizer_2"),
        sized=True,
    ),
    "LDMTextToImagePipeline": Family(
        "LDM", LDMTextToImagePipeline, UNetBackbone, _ldm_text, encoders=("bert",), first_stage="vqvae"
    ),
    "PixArtAlphaPipeline": Family(
        "PixArt-α", PixArtAlphaPipeline, PixArtBackbone, _pixart_text, denoiser="transformer", sized=True
    ),
}


@dataclass
class TextPipeline:
    """A text-to-image pipeline, taken apart.

    Attributes:
        name: as it was given. family: which it is of.
        text: its text encoders. backbone: its denoiser. first_stage: its autoencoder.
        preset: noise schedule and prediction type of its scheduler. scheduler_config: of that, without private
            entries.
        pipeline: as it was opened; None of one that is only looked at (dry run).
    """

    name: str
    family: Family
    text: TextEncoder
    backbone: nn.Module
    first_stage: FirstStage
    preset: Preset
    scheduler_config: dict
    pipeline: DiffusionPipeline | None

    def denoiser(
        self,
        *,
        perturbation: ConditionEmbeddingPerturbation | None = None,
        fixed_perturbation: bool = False,
        perturb_null: bool = True,
        embedding_dropout: float = 0.0,
        seed: int = 0,
    ) -> ConditionalDenoiser:
        """What is trained; the arguments are those of [`noisycond.denoisers.build_text_denoiser`]."""
        self.text.embedding_dropout, self.text.seed = embedding_dropout, seed
        return ConditionalDenoiser(self.text, self.backbone, perturbation, fixed_perturbation, perturb_null)

    def assemble(self, denoiser: ConditionalDenoiser) -> DiffusionPipeline:
        """The pipeline with the weights that the denoiser has now, in copies: the class, the scheduler and all parts
        that are not trained as they were opened; float32, on the first stage's device."""
        trained = {self.family.denoiser: denoiser.backbone.model}
        if denoiser.encoder.is_trained:
            trained |= dict(zip(self.family.encoders, denoiser.encoder.models, strict=True))
        pipeline = copy.copy(self.pipeline)  # registers parts of its own
        copies = {slot: copy.deepcopy(model).float().eval() for slot, model in trained.items()}
        pipeline.register_modules(**copies)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(self.first_stage.model.device)


def open_text_pipeline(
    name: str,
    *,
    resolution: int,
    train_text_encoder: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    seed: int = 0,
    flag: str = FLAG,
) -> TextPipeline:
    """The pipeline that a flag names, in float32.

    Args:
        name: a folder or a Hub id. resolution: R, of the images to train on.
        train_text_encoder: whether its text encoders are trained along. seed: of the first stage's draws.
        flag: for messages.

    Raises:
        InputError: nothing there can be opened, it is of no family that can be trained here, or it was trained in a
            way that cannot be continued here.
    """
    index = _index(flag, name, revision, local=False)
    family = _family(flag, name, index)
    try:
        pipeline = family.pipeline.from_pretrained(name, revision=revision, variant=variant, torch_dtype=torch.float32)
    except Exception as error:  # diffusers and transformers raise whatever their parts raise
        raise InputError(f"{flag} {name}: cannot be opened ({in_one_line(error)}).") from error
    pipeline = _of_its_class(pipeline, index)
    pipeline.register_to_config(_name_or_path=public_name(name))
    vae = getattr(pipeline, family.first_stage)
    first_stage = _asked(flag, name, lambda: taken_from(vae, vae.config, name, seed))
    text = family.make_text(
        [getattr(pipeline, slot) for slot in family.tokenizers],
        [getattr(pipeline, slot) for slot in family.encoders],
        index,
        name,
        train_text_encoder,
    )
    model = getattr(pipeline, family.denoiser)
    model.register_to_config(_name_or_path=public_name(name))
    return _asked(
        flag,
        name,
        lambda: _taken_apart(name, family, model, text, first_stage, pipeline.scheduler, resolution, pipeline),
    )


def peek_text_pipeline(
    name: str,
    *,
    resolution: int,
    train_text_encoder: bool = False,
    revision: str | None = None,
    flag: str = FLAG,
) -> TextPipeline:
    """As [`open_text_pipeline`], but on the meta device and without tokenizers, from the configurations that lie on
    this machine.

    Raises:
        InputError: as there, or they do not lie here; the network is not asked.
    """
    index = _index(flag, name, revision, local=True)
    family = _family(flag, name, index)
    options = {"revision": revision, "local_files_only": True}
    try:
        config = family.backbone.model_class.load_config(name, subfolder=family.denoiser, **options)
        scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(name, subfolder="scheduler", **options)
        with torch.device("meta"):
            model = family.backbone.model_class.from_config(config)
            encoders = [_empty_encoder(name, slot, index[slot][1], options) for slot in family.encoders]
    except Exception as error:
        raise InputError(f"{flag} {name}: cannot be opened ({in_one_line(error)}).") from error
    text = family.make_text(None, encoders, index, name, train_text_encoder)
    first_stage = _asked(flag, name, lambda: peek_first_stage(name))
    return _asked(
        flag, name, lambda: _taken_apart(name, family, model, text, first_stage, scheduler, resolution, None)
    )


def _empty_encoder(name: str, slot: str, class_name: str, options: dict) -> PreTrainedModel:
    kind = LDMBertModel if class_name == LDMBertModel.__name__ else getattr(transformers, class_name)
    config_class = kind.config_class or AutoConfig
    return kind(config_class.from_pretrained(name, subfolder=slot, **options))


def _index(flag: str, name: str, revision: str | None, local: bool) -> dict:
    try:
        return dict(DiffusionPipeline.load_config(name, revision=revision, local_files_only=local))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{flag} {name}: no folder or Hub id of a pipeline, with its model_index.json ({in_one_line(error)})."
        ) from error


def _family(flag: str, name: str, index: dict) -> Family:
    class_name = declared_class_name(index)
    family = FAMILIES.get(class_name)
    known = ", ".join(f"{known.title} ({kind})" for kind, known in FAMILIES.items())
    require(family, f"{flag} {name}: a {class_name} cannot be trained here, only {known}.")
    slots = (*family.encoders, *family.tokenizers, family.first_stage, family.denoiser, "scheduler")
    lacking = [slot for slot in slots if (index.get(slot) or [None])[0] is None]
    require(not lacking, f"{flag} {name}: this {class_name} has no {' and no '.join(lacking)}.")
    return family


def _of_its_class(pipeline: DiffusionPipeline, index: dict) -> DiffusionPipeline:
    """diffusers' own class for LDM, which needs no code of ours, where the folder names it and it draws images of the
    right size."""
    is_ours = isinstance(index["_class_name"], (list, tuple))
    if not isinstance(pipeline, LDMTextToImagePipeline) or is_ours:
        return pipeline
    # It also pads to one length, whatever the tokenizer allows.
    if pipeline.vae_scale_factor == STOCK_LDM_FACTOR and pipeline.max_tokens == LDM_MAX_LENGTH:
        return diffusers.LDMTextToImagePipeline(**pipeline.components)
    return pipeline


def _asked(flag: str, name: str, action: Callable):
    """What an action gives; an InputError of it names the flag."""
    try:
        return action()
    except InputError as error:
        sentence = str(error)
        raise InputError(sentence if sentence.startswith("--") else f"{flag} {name}: {sentence}") from error


def _taken_apart(
    name: str,
    family: Family,
    model: ModelMixin,
    text: TextEncoder,
    first_stage: FirstStage,
    scheduler: SchedulerMixin,
    resolution: int,
    pipeline: DiffusionPipeline | None,
) -> TextPipeline:
    config, channels = model.config, first_stage.latent_channels
    require(
        config.in_channels == channels,
        f"its denoiser takes {config.in_channels} channels, but its first stage has latents of {channels}, so it "
        "wants more than noisy latents (inpainting, for example), which cannot be trained here.",
    )
    learns_variance = family.backbone is PixArtBackbone and config.out_channels == 2 * channels
    require(
        config.out_channels == channels or learns_variance,
        f"its denoiser gives {config.out_channels} channels, but its first stage has latents of {channels}.",
    )
    _check_inputs(family, model, text)
    require(
        resolution % first_stage.factor == 0,
        f"--resolution is {resolution}, but must be a multiple of the first stage's factor {first_stage.factor}.",
    )
    family.backbone.check(dict(config), resolution // first_stage.factor, 0)
    backbone = family.backbone.around(model, resolution) if family.sized else family.backbone.around(model)
    require(
        backbone.dim == text.dim,
        f"its denoiser attends to embeddings of {backbone.dim} numbers, but its text encoder gives {text.dim}.",
    )
    preset = Preset(
        {key: value for key, value in config.items() if not key.startswith("_")},
        family.backbone,
        learns_variance,
        latent_channels=channels,
        factor=first_stage.factor,
        **schedule_of_scheduler(scheduler.config),
    )
    known = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return TextPipeline(name, family, text, backbone, first_stage, preset, known, pipeline)


def _check_inputs(family: Family, model: ModelMixin, text: TextEncoder) -> None:
    """Raises InputError where a U-Net wants conditions that this family's pipeline does not give it in training."""
    if not isinstance(model, UNet2DConditionModel):
        return
    config = model.config
    require(
        config.time_cond_proj_dim is None,
        "its U-Net embeds the guidance scale (time_cond_proj_dim): a distilled model, which cannot be trained here.",
    )
    added = "text_time" if family.sized else None
    for key, expected in (("addition_embed_type", added), ("class_embed_type", None), ("encoder_hid_dim_type", None)):
        require(
            config[key] == expected,
            f"its U-Net has {key} {config[key]}, but only {expected} of a "
            f"{family.pipeline.__name__} can be trained here.",
        )
    if family.sized:
        width = 6 * config.addition_time_embed_dim + text.pooled_dim  # six sizes
        require(
            width == config.projection_class_embeddings_input_dim,
            f"its U-Net embeds {config.projection_class_embeddings_input_dim} numbers of sizes and pooled text, but "
            f"its parts give {width}.",
        )
