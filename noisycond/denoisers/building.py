"""From what `--denoiser` named to the module that is trained.

Letters: K classes, C latent channels, S the latent size.
"""

import torch
from torch import nn

from noisycond.denoisers.conditional import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.presets import DenoiserSource, Preset
from noisycond.denoisers.text import TextEncoder
from noisycond.errors import InputError, in_one_line, require
from noisycond.perturbation import ConditionEmbeddingPerturbation


def build_denoiser(
    source: DenoiserSource,
    *,
    class_names: list[str],
    latent_channels: int,
    latent_size: int,
    perturbation: ConditionEmbeddingPerturbation | None = None,
    fixed_perturbation: bool = False,
    perturb_null: bool = True,
    embedding_dropout: float = 0.0,
    label_smoothing: float = 0.0,
    seed: int = 0,
) -> ConditionalDenoiser:
    """The denoiser to train.

    Args:
        source: from [`noisycond.denoisers.find_denoiser`].
        class_names: K names.
        latent_channels: C; latent_size: S.
        The others go to [`ConditionalDenoiser`] and [`ClassEncoder`].

    Raises:
        InputError: the latents do not fit the architecture, a configuration or pretrained model has other channels,
            size or classes, or there are more classes than its pipeline can hold.
    """
    backbone = _backbone(source.preset, latent_channels, latent_size, len(class_names))
    encoder = ClassEncoder(
        len(class_names), backbone.dim, embedding_dropout, label_smoothing, seed, backbone.embedding_std
    )
    if source.folder is not None:
        _load_pretrained(source, backbone, encoder, class_names)
    return ConditionalDenoiser(encoder, backbone, perturbation, fixed_perturbation, perturb_null)


def build_text_denoiser(
    source: DenoiserSource,
    text: TextEncoder,
    *,
    latent_channels: int,
    latent_size: int,
    perturbation: ConditionEmbeddingPerturbation | None = None,
    fixed_perturbation: bool = False,
    perturb_null: bool = True,
    embedding_dropout: float = 0.0,
    seed: int = 0,
) -> ConditionalDenoiser:
    """The text-conditional denoiser to train from scratch, or from a U-Net's weights.

    Args:
        source: from [`noisycond.denoisers.find_text_denoiser`].
        text: from [`noisycond.denoisers.text.open_text_encoder`]; embedding dropout is set on it.
        latent_channels: C; latent_size: S.
        The others go to [`ConditionalDenoiser`].

    Raises:
        InputError: the latents or the text encoder do not fit the architecture, or its weights cannot be loaded.
    """
    backbone = _backbone(source.preset, latent_channels, latent_size)
    require(
        backbone.dim == text.dim,
        f"--text_encoder {text.name} gives embeddings of {text.dim} numbers, but the denoiser attends to "
        f"embeddings of {backbone.dim} (cross_attention_dim); name one that fits.",
    )
    if source.folder is not None:
        try:
            backbone.load_model(source.folder, source.subfolder)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"--denoiser {source.folder}: cannot be loaded ({in_one_line(error)}).") from error
    text.embedding_dropout, text.seed = embedding_dropout, seed
    return ConditionalDenoiser(text, backbone, perturbation, fixed_perturbation, perturb_null)


def _backbone(preset: Preset, latent_channels: int, latent_size: int, num_classes: int = 0) -> nn.Module:
    config = dict(preset.config)
    preset.backbone.check(config, latent_size, num_classes)
    if preset.backbone.fits_any_size:
        config.pop("sample_size", None)
    for key, value, what in (("in_channels", latent_channels, "channels"), ("sample_size", latent_size, "size")):
        if config.get(key, value) != value:
            raise InputError(
                f"--denoiser: its configuration has {key} {config[key]}, but the latents of this first stage and "
                f"--resolution have {what} {value}."
            )
        config[key] = value
    config["out_channels"] = latent_channels * (2 if preset.learned_variance else 1)
    try:
        return preset.backbone(**config)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"--denoiser: diffusers cannot build it ({' '.join(str(error).split())}).") from error


def _load_pretrained(source: DenoiserSource, backbone: nn.Module, encoder: ClassEncoder, class_names: list[str]):
    if source.id2label is not None:
        theirs = [source.id2label.get(label) for label in range(len(class_names))]
        if theirs != class_names or len(source.id2label) != len(class_names):
            raise InputError(
                f"--denoiser {source.folder}: it was trained on other classes ({len(source.id2label)}: "
                f"{', '.join(map(str, list(source.id2label.values())[:5]))}, …) than the dataset has "
                f"({len(class_names)}: {', '.join(class_names[:5])}, …)."
            )
    try:
        table = backbone.load(source.folder, source.subfolder, len(class_names))
    except InputError as error:
        raise InputError(f"--denoiser {source.folder}: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"--denoiser {source.folder}: cannot be loaded ({' '.join(str(error).split())}).") from error
    if table is not None:
        with torch.no_grad():
            encoder.table.weight.copy_(table)
