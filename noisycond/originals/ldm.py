"""LDM under the names of its own code (arXiv:2112.10752) to diffusers' U-Net, first stage and scheduler. The weights
are renamed by diffusers itself; what it needs to know beforehand, the architecture, is read from their shapes.

Letters: C latent channels, D the dimension of the condition embedding, K classes.
"""

import inspect
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, VQModel
from diffusers.loaders import single_file_utils

from noisycond.errors import InputError, require
from noisycond.noise_schedule import named_schedule
from noisycond.objective import make_betas
from noisycond.originals.reading import StateDict
from noisycond.pipelines import ClassEmbedder, LDMClassToImagePipeline


logger = logging.getLogger(__name__)
UNET, EMA, FIRST_STAGE = "model.diffusion_model.", "model_ema.", "first_stage_model."
TABLE = "cond_stage_model.embedding.weight"
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


@dataclass
class Settings:
    """What shapes do not tell. The defaults are those of LDM's code and of its class-conditional ImageNet model.

    Attributes:
        attention_heads: of every attention; head_channels: channels per head instead, where a configuration says so.
        latent_size: side of the latents the model was trained on; None: the resolution over the first stage's factor.
        prediction_type: by diffusers' names.
        betas: (linear_start, linear_end, timesteps), for weights that do not spell them out.
        scaling_factor: for weights that do not state it.
    """

    attention_heads: int = 1
    head_channels: int | None = None
    latent_size: int | None = None
    prediction_type: str = "epsilon"
    betas: tuple[float, float, int] = (0.0015, 0.0195, 1000)
    scaling_factor: float = 1.0


def read_settings(config: dict, path: Path) -> Settings:
    """Settings from a configuration in the format of LDM's repository.

    Raises:
        InputError: no such configuration, or a schedule or parameterization that is not supported.
    """
    try:
        params = config["model"]["params"]
        unet = params["unet_config"]["params"]
        heads, head_channels = int(unet.get("num_heads", -1)), int(unet.get("num_head_channels", -1))
        settings = Settings(
            attention_heads=heads if heads > 0 else 1,
            head_channels=head_channels if head_channels > 0 else None,
            latent_size=int(unet["image_size"]) if "image_size" in unet else None,
            prediction_type=PREDICTIONS.get(params.get("parameterization", "eps"), ""),
            betas=(
                float(params.get("linear_start", 0.0001)),  # the defaults of LDM's code
                float(params.get("linear_end", 0.02)),
                int(params.get("timesteps", 1000)),
            ),
            scaling_factor=float(params.get("scale_factor", 1.0)),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"--config {path}: expected a configuration of LDM, with model.params.unet_config.params "
            f"({type(error).__name__}: {error})."
        ) from error
    schedule = params.get("beta_schedule", "linear")  # linear in √β, which diffusers calls scaled_linear
    require(schedule == "linear", f"--config {path}: the beta_schedule is {schedule!r}, but must be 'linear'.")
    require(
        settings.prediction_type,
        f"--config {path}: the parameterization is {params.get('parameterization')!r}, but must be one of "
        f"{', '.join(PREDICTIONS)}.",
    )
    return settings


def convert_ldm(
    state: StateDict,
    path: Path,
    settings: Settings,
    *,
    resolution: int = 256,
    scaling_factor: float | None = None,
    first_stage: AutoencoderKL | VQModel | None = None,
) -> LDMClassToImagePipeline:
    """The pipeline of a class-conditional model, in eval mode and float32; with the averaged weights where the file
    has them.

    Args:
        state: the original's weights; its table [K + 1, D] has the null embedding last.
        path: names the file in messages. resolution: of the images, where the settings give no latent size.
        scaling_factor: instead of the weights' own. first_stage: instead of the weights' own.

    Raises:
        InputError: a weight is missing, unknown or of another shape.
    """
    if first_stage is None:
        first_stage = convert_first_stage(pick(state, FIRST_STAGE), path, resolution)
        factor = state["scale_factor"].item() if "scale_factor" in state else settings.scaling_factor
        first_stage.register_to_config(scaling_factor=float(f"{factor:.7g}"))
    if scaling_factor is not None:
        first_stage.register_to_config(scaling_factor=scaling_factor)
    size = settings.latent_size or resolution // 2 ** (len(first_stage.config.block_out_channels) - 1)
    weights = averaged(state, path) or pick(state, UNET)
    unet = convert_unet(weights, path, settings, size)
    table = state[TABLE].float()
    require(
        table.shape[1] == unet.config.cross_attention_dim,
        f"{path}: the U-Net attends to embeddings of {unet.config.cross_attention_dim} numbers, but {TABLE} has "
        f"{table.shape[1]}.",
    )
    return LDMClassToImagePipeline(unet, ClassEmbedder.from_table(table), scheduler(state, settings), first_stage)


def pick(state: StateDict, prefix: str) -> StateDict:
    """What stands under a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def averaged(state: StateDict, path: Path) -> StateDict | None:
    """The U-Net's moving average, which LDM keeps under names without dots; None where there is none."""
    if not any(name.startswith(f"{EMA}diffusion_model") for name in state):
        return None
    names = {name: EMA + name.removeprefix("model.").replace(".", "") for name in state if name.startswith(UNET)}
    missing = [average for average in names.values() if average not in state]
    require(not missing, f"{path}: its moving average ({EMA}*) lacks {missing[0] if missing else ''}.")
    logger.info("%s: the moving average of its weights (%s*) is used.", path, EMA)
    return {name.removeprefix(UNET): state[average] for name, average in names.items()}


def scheduler(state: StateDict, settings: Settings) -> DDIMScheduler:
    """LDM's DDIM sampler, with the weights' own betas where they are there. It does not clip latents."""
    start, end, count = settings.betas
    betas = state["betas"] if "betas" in state else make_betas("scaled_linear", start, end, count)
    schedule = named_schedule(betas) or {"trained_betas": betas.double().tolist()}
    return DDIMScheduler(
        num_train_timesteps=len(betas),
        prediction_type=settings.prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **schedule,
    )


def convert_unet(state: StateDict, path: Path, settings: Settings, latent_size: int) -> UNet2DConditionModel:
    """The U-Net, from weights whose names start at its own root (`input_blocks.0.0.weight`, …)."""
    config = infer_unet(state, path)
    widths = config["block_out_channels"]
    config["sample_size"] = latent_size
    config["attention_head_dim"] = settings.attention_heads  # diffusers' name for the number of heads
    if settings.head_channels:
        config["attention_head_dim"] = [max(1, width // settings.head_channels) for width in widths]
    for width, heads in zip(widths, _per_level(config["attention_head_dim"], widths), strict=True):
        require(
            width % heads == 0,
            f"{path}: {heads} attention heads do not divide a width of {width}; give the right --attention_heads or "
            "--config.",
        )
    renamed = single_file_utils.convert_ldm_unet_checkpoint(
        {UNET + name: tensor.float() for name, tensor in state.items()}, config
    )
    return _fill(UNet2DConditionModel, config, renamed, len(state), path, "U-Net")


def _per_level(value: int | list[int], widths: list[int]) -> list[int]:
    return value if isinstance(value, list) else [value] * len(widths)


@dataclass
class _Level:
    width: int
    blocks: int = 0
    attends: bool = False


def infer_unet(state: StateDict, path: Path) -> dict:
    """The arguments of `UNet2DConditionModel`, from shapes.

    Raises:
        InputError: weights of another U-Net than the one that attends to a condition on some of its levels.
    """
    try:
        base, channels = state["input_blocks.0.0.weight"].shape[:2]
        levels = [_Level(base)]
        for number in range(1, 1 + max(int(name.split(".")[1]) for name in state if name.startswith("input_blocks"))):
            block = f"input_blocks.{number}"
            if f"{block}.0.op.weight" in state:
                levels.append(_Level(0))
                continue
            level = levels[-1]
            level.width, level.blocks = len(state[f"{block}.0.in_layers.2.weight"]), level.blocks + 1
            level.attends = f"{block}.1.proj_in.weight" in state
        middle = "middle_block.1.transformer_blocks"
        dim = state[f"{middle}.0.attn2.to_k.weight"].shape[1]
        depth = len({name.split(".")[3] for name in state if name.startswith(middle)})
        modulation, width = state["input_blocks.1.0.emb_layers.1.weight"].shape[0], levels[0].width
        projection = state["middle_block.1.proj_in.weight"].dim()
        out_channels = len(state["out.2.weight"])
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"{path}: its U-Net is not one that attends to a class embedding (no {error}); expected LDM's, with "
            "use_spatial_transformer."
        ) from error
    require(
        "label_emb.weight" not in state and not any(name.startswith("label_emb") for name in state),
        f"{path}: its U-Net adds a label embedding to the timestep's (label_emb); expected one that attends to it.",
    )
    blocks = [level.blocks for level in levels]
    require(
        len(set(blocks)) == 1, f"{path}: its U-Net has {blocks} residual blocks per level; expected equal numbers."
    )
    return {
        "in_channels": channels,
        "out_channels": out_channels,
        "block_out_channels": [level.width for level in levels],
        "layers_per_block": levels[0].blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if level.attends else "DownBlock2D" for level in levels],
        "up_block_types": ["CrossAttnUpBlock2D" if level.attends else "UpBlock2D" for level in reversed(levels)],
        "cross_attention_dim": dim,
        "transformer_layers_per_block": depth,
        "use_linear_projection": projection == 2,
        "resnet_time_scale_shift": "scale_shift" if modulation == 2 * width else "default",
    }


def convert_first_stage(state: StateDict, path: Path, resolution: int) -> AutoencoderKL | VQModel:
    """The first stage, from weights whose names start at its own root (`encoder.conv_in.weight`, …).

    Raises:
        InputError: there is none, or one that diffusers' classes cannot hold.
    """
    # What trained it, and which codes were used: not part of the model.
    state = {name: tensor for name, tensor in state.items() if not name.startswith(("loss.", "model_ema."))}
    require(state, f"{path}: holds no first stage ({FIRST_STAGE}*); name one with --first_stage.")
    require(
        not any(re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", name) for name in state),
        f"{path}: its first stage attends on its levels, which diffusers' autoencoders do not; name another with "
        "--first_stage.",
    )
    codes = state.get("quantize.embedding.weight")
    kind = AutoencoderKL if codes is None else VQModel
    try:
        config = infer_first_stage(state, kind, resolution)
        rest = {name: tensor.float() for name, tensor in state.items() if not name.startswith("quantize.")}
        renamed = single_file_utils.convert_ldm_vae_checkpoint(rest, config)
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"{path}: its first stage is neither LDM's KL nor its VQ autoencoder (no {error})."
        ) from error
    if codes is not None:
        renamed["quantize.embedding.weight"] = codes.float()
    return _fill(kind, config, renamed, len(rest) + (codes is not None), path, "first stage")


def infer_first_stage(state: StateDict, kind: type, resolution: int) -> dict:
    """The arguments of `AutoencoderKL` or `VQModel`, from shapes."""
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    blocks = len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")})
    widths = [len(state[f"encoder.down.{level}.block.0.conv1.weight"]) for level in range(levels)]
    config = {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": len(state["decoder.conv_out.weight"]),
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": state["decoder.conv_in.weight"].shape[1],
        "sample_size": resolution,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
    }
    if kind is VQModel:
        config["num_vq_embeddings"], config["vq_embed_dim"] = state["quantize.embedding.weight"].shape
    return config


def _fill(kind: type, config: dict, renamed: StateDict, expected: int, path: Path, what: str):
    """The model with these weights; every one of the original's must have found its place."""
    assert set(config) <= set(inspect.signature(kind).parameters)
    try:
        if len(renamed) != expected:
            raise RuntimeError(f"{expected} weights of the original became {len(renamed)}")
        # Built on the meta device and filled by reference: initializing what is replaced at once takes long.
        with torch.device("meta"):
            model = kind(**config)
        model.load_state_dict(renamed, strict=True, assign=True)
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{path}: its {what} has another architecture than expected ({reason}).") from error
    return model.eval()
