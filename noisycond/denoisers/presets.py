"""Names to architectures: the registry that `--denoiser` reads, configuration files and pretrained folders.

Letters: K classes, C latent channels, S the latent size.
"""

import inspect
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel

from noisycond.denoisers.conditional import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.dit import DiTBackbone, check_exportable
from noisycond.errors import InputError, closest
from noisycond.perturbation import ConditionEmbeddingPerturbation


@dataclass(frozen=True)
class Preset:
    """An architecture and the noise schedule it is trained with.

    Attributes:
        config: arguments of the diffusers model, without what the first stage decides (channels and size).
        learned_variance: whether the model predicts a variance too, in C more channels.
        beta_schedule, beta_start, beta_end: as diffusers' schedulers name them.
        prediction_type: what pretrained weights predict; None leaves the choice.
    """

    config: dict = field(default_factory=dict)
    learned_variance: bool = True
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    prediction_type: str | None = None


def _dit(layers: int, width: int, heads: int, patch_size: int = 2) -> dict:
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": patch_size,
    }


# Table 1 of arXiv:2212.09748. The miniature is ours.
PRESETS: dict[str, Preset] = {
    "dit-xl-2": Preset(_dit(28, 1152, 16)),
    "dit-l-2": Preset(_dit(24, 1024, 16)),
    "dit-b-2": Preset(_dit(12, 768, 12)),
    "dit-s-2": Preset(_dit(12, 384, 6)),
    "dit-mini": Preset(_dit(4, 128, 4), learned_variance=False),
}


@dataclass
class DenoiserSource:
    """What `--denoiser` named.

    Attributes:
        preset: architecture and noise schedule.
        folder: where pretrained weights are loaded from (with the subfolder), or None.
        id2label: class names of the pretrained pipeline, where it has them.
    """

    preset: Preset
    folder: str | None = None
    subfolder: str | None = None
    id2label: dict[int, str] | None = None


def find_denoiser(name: str) -> DenoiserSource:
    """A preset by name, a configuration file (JSON), or a pretrained folder or Hub id of a DiT or its pipeline.

    Raises:
        InputError: none of these, or a configuration this trainer cannot train.
    """
    if name in PRESETS:
        return DenoiserSource(PRESETS[name])
    if name.endswith(".json"):
        return DenoiserSource(_preset_from_config(name, _read_json(name)))
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/"))
    if not Path(name).is_dir() and not looks_like_hub_id:
        raise InputError(
            f"--denoiser {name}: neither a preset ({', '.join(PRESETS)}) nor a JSON file or folder"
            f"{closest(name, PRESETS)}."
        )
    for subfolder in ("transformer", None):
        options = {} if subfolder is None else {"subfolder": subfolder}
        try:
            config = DiTTransformer2DModel.load_config(name, **options)
        except OSError:
            continue
        preset = _with_noise_schedule(_preset_from_config(name, config), name)
        return DenoiserSource(preset, name, subfolder, _id2label(name))
    raise InputError(f"--denoiser {name}: found no configuration of a DiTTransformer2DModel there.")


def _read_json(path: str) -> dict:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--denoiser {path}: cannot be read as JSON ({error}).") from error
    if not isinstance(config, dict):
        raise InputError(f"--denoiser {path}: expected a JSON object with the model's configuration.")
    return config


def _preset_from_config(name: str, config: dict) -> Preset:
    class_name = config.get("_class_name", "DiTTransformer2DModel")
    # `facebook/DiT-XL-2-256` still goes by the class's first name.
    if class_name not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise InputError(f"--denoiser {name}: a {class_name} cannot be trained here, only a DiTTransformer2DModel.")
    known = set(inspect.signature(DiTTransformer2DModel).parameters)
    unknown = sorted(key for key in config if not key.startswith("_") and key not in known)
    if unknown and class_name == "DiTTransformer2DModel":
        raise InputError(f"--denoiser {name}: unknown key {unknown[0]!r}{closest(unknown[0], known)}.")
    channels, out_channels = config.get("in_channels"), config.get("out_channels")
    if channels is None and out_channels is not None:
        raise InputError(f"--denoiser {name}: it has out_channels, {out_channels}, but no in_channels; give both.")
    out_channels = out_channels or channels
    if channels is not None and out_channels not in (channels, 2 * channels):
        raise InputError(
            f"--denoiser {name}: out_channels is {out_channels}, but must equal in_channels ({channels}) or twice "
            "that (a learned variance)."
        )
    kept = {key: value for key, value in config.items() if key in known and key != "out_channels"}
    return Preset(kept, learned_variance=channels is not None and out_channels == 2 * channels)


def _with_noise_schedule(preset: Preset, name: str) -> Preset:
    """The preset with noise schedule and prediction type of the pretrained pipeline's scheduler, where it has one."""
    try:
        config = DDIMScheduler.load_config(name, subfolder="scheduler")
    except OSError:
        return preset
    known = ("beta_schedule", "beta_start", "beta_end", "prediction_type")
    return replace(preset, **{key: config[key] for key in known if key in config})


def _id2label(name: str) -> dict[int, str] | None:
    try:
        names = DiffusionPipeline.load_config(name).get("id2label")
    except OSError:
        return None
    return {int(label): title for label, title in names.items()} if isinstance(names, dict) else None


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
        source: from [`find_denoiser`].
        class_names: K names.
        latent_channels: C; latent_size: S.
        The others go to [`ConditionalDenoiser`] and [`ClassEncoder`].

    Raises:
        InputError: the latent size is not a multiple of the patch size, a configuration or pretrained model has other
            channels, size or classes, or there are more classes than its pipeline can hold.
    """
    check_exportable(len(class_names))
    config = dict(source.preset.config)
    for key, value, what in (("in_channels", latent_channels, "channels"), ("sample_size", latent_size, "size")):
        if config.get(key, value) != value:
            raise InputError(
                f"--denoiser: its configuration has {key} {config[key]}, but the latents of this first stage and "
                f"--resolution have {what} {value}."
            )
        config[key] = value
    if latent_size % config.get("patch_size", 2):
        raise InputError(
            f"--resolution: the latents are {latent_size} pixels wide, which is no multiple of the denoiser's patch "
            f"size {config.get('patch_size', 2)}."
        )
    config["out_channels"] = latent_channels * (2 if source.preset.learned_variance else 1)
    try:
        backbone = DiTBackbone(**config)
    except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"--denoiser: diffusers cannot build it ({' '.join(str(error).split())}).") from error
    encoder = ClassEncoder(len(class_names), backbone.dim, embedding_dropout, label_smoothing, seed)
    if source.folder is not None:
        _load_pretrained(source, backbone, encoder, class_names)
    return ConditionalDenoiser(encoder, backbone, perturbation, fixed_perturbation, perturb_null)


def _load_pretrained(source: DenoiserSource, backbone: DiTBackbone, encoder: ClassEncoder, class_names: list[str]):
    if source.id2label is not None:
        theirs = [source.id2label.get(label) for label in range(len(class_names))]
        if theirs != class_names or len(source.id2label) != len(class_names):
            raise InputError(
                f"--denoiser {source.folder}: it was trained on other classes ({len(source.id2label)}: "
                f"{', '.join(map(str, list(source.id2label.values())[:5]))}, …) than the dataset has "
                f"({len(class_names)}: {', '.join(class_names[:5])}, …)."
            )
    options = {} if source.subfolder is None else {"subfolder": source.subfolder}
    try:
        stock = DiTTransformer2DModel.from_pretrained(source.folder, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"--denoiser {source.folder}: cannot be loaded ({' '.join(str(error).split())}).") from error
    table = backbone.load_stock(stock, len(class_names))
    with torch.no_grad():
        encoder.table.weight.copy_(table)
