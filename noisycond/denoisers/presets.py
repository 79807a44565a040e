"""Names to architectures: the registry that `--denoiser` reads, configuration files and pretrained folders."""

import inspect
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusers import DDIMScheduler, DiffusionPipeline

from noisycond.denoisers.dit import DiTBackbone
from noisycond.denoisers.unet import UNetBackbone
from noisycond.errors import InputError, closest, require
from noisycond.noise_schedule import named_schedule
from noisycond.pipelines import OriginalDiTPipeline


BACKBONES = (DiTBackbone, UNetBackbone)


@dataclass(frozen=True)
class Preset:
    """An architecture and the noise schedule it is trained with.

    Attributes:
        config: arguments of the diffusers model, without what the first stage decides (channels and size).
        backbone: the module that holds the diffusers model.
        learned_variance: whether the model predicts a variance too, in as many channels more.
        beta_schedule, beta_start, beta_end: as diffusers' schedulers name them.
        latent_channels, factor: of the first stage that the paper trains it with.
        prediction_type: what pretrained weights predict; None leaves the choice.
        num_train_timesteps: what pretrained weights were trained with; None leaves the choice.
        text_encoder: the text encoder that a text-conditional denoiser is trained with; None leaves the choice.
    """

    config: dict = field(default_factory=dict)
    backbone: type[DiTBackbone] | type[UNetBackbone] = DiTBackbone
    learned_variance: bool = True
    beta_schedule: str = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    latent_channels: int = 4
    factor: int = 8
    prediction_type: str | None = None
    num_train_timesteps: int | None = None
    text_encoder: str | None = None


def _dit(layers: int, width: int, heads: int, patch_size: int = 2) -> dict:
    return {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "patch_size": patch_size,
    }


def _ldm(widths: tuple[int, ...], dim: int, blocks_per_level: int, attention_heads: int, **others) -> Preset:
    """A U-Net that attends on every level but the first, with noise schedule and first stage of arXiv:2112.10752."""
    attending = len(widths) - 1
    config = {
        "block_out_channels": widths,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * attending,
        "up_block_types": ("CrossAttnUpBlock2D",) * attending + ("UpBlock2D",),
        "layers_per_block": blocks_per_level,
        "cross_attention_dim": dim,
        "attention_head_dim": attention_heads,  # diffusers' name for the number of heads
        **others,
    }
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    return Preset(config, UNetBackbone, learned_variance=False, latent_channels=3, factor=4, **schedule)


# DiT: Table 1 of arXiv:2212.09748. LDM-4: the class-conditional ImageNet model of arXiv:2112.10752 in its public
# configuration. The miniatures are ours.
PRESETS: dict[str, Preset] = {
    "dit-xl-2": Preset(_dit(28, 1152, 16)),
    "dit-l-2": Preset(_dit(24, 1024, 16)),
    "dit-b-2": Preset(_dit(12, 768, 12)),
    "dit-s-2": Preset(_dit(12, 384, 6)),
    "dit-mini": Preset(_dit(4, 128, 4), learned_variance=False, factor=4),
    "ldm-4": _ldm((192, 384, 576, 960), dim=512, blocks_per_level=2, attention_heads=1),
    "ldm-mini": _ldm((32, 64, 64), dim=64, blocks_per_level=1, attention_heads=1, norm_num_groups=16),
}
# Text-conditional: LDM-4 with a BERT that is trained along (arXiv:2405.20494), and a miniature of ours.
TEXT_PRESETS: dict[str, Preset] = {
    "ldm-4-text": replace(
        _ldm((192, 384, 576, 960), dim=768, blocks_per_level=2, attention_heads=1), text_encoder="bert-base-uncased"
    ),
    "ldm-mini-text": replace(PRESETS["ldm-mini"], text_encoder="digits-bert"),
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


def find_text_denoiser(name: str) -> DenoiserSource:
    """As [`find_denoiser`], of denoisers that attend to text: a text preset, or a U-Net.

    Raises:
        InputError: none of these, or a denoiser that reads one embedding per example.
    """
    source = find_denoiser(name, TEXT_PRESETS)
    require(
        source.preset.backbone is UNetBackbone,
        f"--denoiser {name}: a {source.preset.backbone.model_class.__name__} reads one embedding per example and "
        f"cannot attend to text; name a {UNetBackbone.model_class.__name__} (in a JSON file as _class_name) or one of "
        f"{', '.join(TEXT_PRESETS)}.",
    )
    return source


def find_denoiser(name: str, presets: dict[str, Preset] = PRESETS) -> DenoiserSource:
    """A preset by name, a configuration file (JSON), or a pretrained folder or Hub id of a model or its pipeline.

    Raises:
        InputError: none of these, or a configuration this trainer cannot train.
    """
    if name in presets:
        return DenoiserSource(presets[name])
    if name.endswith(".json"):
        return DenoiserSource(_preset_from_config(name, _read_json(name)))
    looks_like_hub_id = name.count("/") == 1 and not name.startswith((".", "/"))
    if not Path(name).is_dir() and not looks_like_hub_id:
        raise InputError(
            f"--denoiser {name}: neither a preset ({', '.join(presets)}) nor a JSON file or folder"
            f"{closest(name, presets)}."
        )
    for subfolder in (*(backbone.subfolder for backbone in BACKBONES), None):
        options = {} if subfolder is None else {"subfolder": subfolder}
        try:
            config = DiTBackbone.model_class.load_config(name, **options)
        except OSError:
            continue
        # The trainer's DiT embeds timesteps as stock diffusers does.
        require(
            OriginalDiTPipeline.__name__ not in str(_index(name).get("_class_name")),
            f"--denoiser {name}: its timestep embedding is that of DiT's own code, which cannot be trained here; "
            "convert the weights anew with --stock.",
        )
        preset = _with_noise_schedule(_preset_from_config(name, config, is_pretrained=True), name)
        return DenoiserSource(preset, name, subfolder, _id2label(name))
    models = " or ".join(backbone.model_class.__name__ for backbone in BACKBONES)
    raise InputError(f"--denoiser {name}: found no configuration of a {models} there.")


def _read_json(path: str) -> dict:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--denoiser {path}: cannot be read as JSON ({error}).") from error
    if not isinstance(config, dict):
        raise InputError(f"--denoiser {path}: expected a JSON object with the model's configuration.")
    return config


def _preset_from_config(name: str, config: dict, is_pretrained: bool = False) -> Preset:
    class_name = config.get("_class_name", DiTBackbone.known_as[0])
    backbone = next((backbone for backbone in BACKBONES if class_name in backbone.known_as), None)
    if backbone is None:
        models = " or a ".join(backbone.model_class.__name__ for backbone in BACKBONES)
        raise InputError(f"--denoiser {name}: a {class_name} cannot be trained here, only a {models}.")
    known = set(inspect.signature(backbone.model_class).parameters)
    unknown = sorted(key for key in config if not key.startswith("_") and key not in known)
    # In a file that a person wrote it is a mistake; in a saved model it is of another version of diffusers.
    if unknown and not is_pretrained and class_name == backbone.model_class.__name__:
        raise InputError(f"--denoiser {name}: unknown key {unknown[0]!r}{closest(unknown[0], known)}.")
    learned_variance = _learns_variance(name, config, backbone)
    kept = {key: value for key, value in config.items() if key in known and key != "out_channels"}
    if backbone is UNetBackbone:  # a U-Net's noise schedule and first stage, where the pipeline states none
        return replace(PRESETS["ldm-4"], config=kept)
    return Preset(kept, backbone, learned_variance)


def _learns_variance(name: str, config: dict, backbone: type) -> bool:
    channels, out_channels = config.get("in_channels"), config.get("out_channels")
    if channels is None and out_channels is not None:
        raise InputError(f"--denoiser {name}: it has out_channels, {out_channels}, but no in_channels; give both.")
    out_channels = out_channels or channels
    allowed = (channels, 2 * channels) if channels and backbone.can_learn_variance else (channels,)
    if out_channels not in allowed:
        raise InputError(
            f"--denoiser {name}: out_channels is {out_channels}, but must equal in_channels ({channels})"
            + (" or twice that (a learned variance)." if backbone.can_learn_variance else ".")
        )
    return channels is not None and out_channels == 2 * channels


def _with_noise_schedule(preset: Preset, name: str) -> Preset:
    """The preset with noise schedule and prediction type of the pretrained pipeline's scheduler, where it has one."""
    try:
        config = DDIMScheduler.load_config(name, subfolder="scheduler")
    except OSError:
        return preset
    if config.get("trained_betas") is not None:  # they win over the names beside them
        named = named_schedule(config["trained_betas"])
        require(
            named,
            f"--denoiser {name}: its scheduler spells out {len(config['trained_betas'])} betas (trained_betas) of no "
            "schedule that can be trained with here.",
        )
        config = config | named
    known = ("beta_schedule", "beta_start", "beta_end", "prediction_type")
    return replace(preset, **{key: config[key] for key in known if key in config})


def _index(name: str) -> dict:
    """The index of a pipeline; empty where there is none."""
    try:
        return DiffusionPipeline.load_config(name)
    except OSError:
        return {}


def _id2label(name: str) -> dict[int, str] | None:
    names = _index(name).get("id2label")
    return {int(label): title for label, title in names.items()} if isinstance(names, dict) else None
