"""DiT under the names of its own code (arXiv:2212.09748) to diffusers' `DiTTransformer2DModel`.

Letters: K classes, D the width, C latent channels, P the patch size, T patches.
"""

import math
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import PatchEmbed

from noisycond.denoisers.dit import DiTBackbone
from noisycond.denoisers.presets import PRESETS
from noisycond.errors import InputError, require
from noisycond.originals.reading import StateDict


BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
OUTSIDE = {
    "x_embedder.proj": "model.pos_embed.proj",
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "model.proj_out_1",
    "final_layer.linear": "model.proj_out_2",
}
TABLE, POSITIONS = "y_embedder.embedding_table.weight", "pos_embed"


def convert_dit(state: StateDict, path: Path, attention_heads: int | None = None) -> DiTTransformer2DModel:
    """The stock model, in eval mode and float32, null embedding in row 1000.

    It predicts what the original does once [`noisycond.pipelines.OriginalDiTPipeline`] holds it: stock diffusers
    spaces the 128 frequencies of the timestep embedding over 127 steps, the original over 128.

    Args:
        state: the original's weights; its table [K + 1, D] has the null embedding last.
        path: names the file in messages. attention_heads: the default is that of the preset of this size.

    Raises:
        InputError: a weight is missing, unknown or of another shape, or the number of heads is not known.
    """
    require(TABLE in state and "x_embedder.proj.weight" in state, f"{path}: these are no weights of a DiT.")
    config = infer_config(state, path, attention_heads)
    try:
        # Initializing what is replaced at once takes long.
        with torch.device("meta"):
            backbone = DiTBackbone(**config)
        backbone.load_state_dict(rename(state), strict=True, assign=True)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: its weights are not those of a DiT of this size ({reason}).") from error
    backbone.model.pos_embed.pos_embed = positions(state, config, path)
    return backbone.export(state[TABLE])


def infer_config(state: StateDict, path: Path, attention_heads: int | None) -> dict:
    """The arguments of `DiTTransformer2DModel`, from shapes; heads leave no trace in them."""
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    layers = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if attention_heads is None:
        sizes = [preset.config for preset in PRESETS.values() if preset.backbone is DiTBackbone]
        heads = {
            size["num_attention_heads"]: size["attention_head_dim"] for size in sizes if size["num_layers"] == layers
        }
        attention_heads = next((number for number, dim in heads.items() if number * dim == width), None)
        require(
            attention_heads,
            f"{path}: a DiT of {layers} blocks of width {width} is none of the paper's; give its --attention_heads.",
        )
    require(
        width % attention_heads == 0,
        f"--attention_heads is {attention_heads}, but must divide the width of {path.name}, {width}.",
    )
    patches = state[POSITIONS].shape[-2] if POSITIONS in state else 0
    side = math.isqrt(patches)
    require(
        patches and side**2 == patches, f"{path}: {POSITIONS}, the position of every patch, is missing or no square."
    )
    return {
        "num_layers": layers,
        "num_attention_heads": attention_heads,
        "attention_head_dim": width // attention_heads,
        "patch_size": patch_size,
        "in_channels": channels,
        "out_channels": len(state["final_layer.linear.bias"]) // patch_size**2,
        "sample_size": side * patch_size,
        "norm_eps": 1e-6,  # diffusers' default is 1e-5
    }


def rename(state: StateDict) -> StateDict:
    """Original names to those of [`DiTBackbone`], in float32; the table and the fixed positions are left out."""
    renamed = {}
    for name, tensor in state.items():
        if name in (TABLE, POSITIONS):
            continue
        tensor = tensor.float()
        module, _, parameter = name.rpartition(".")
        if not module.startswith("blocks."):
            renamed[f"{OUTSIDE.get(module, module)}.{parameter}"] = tensor
            continue
        _, number, inside = module.split(".", 2)
        block = f"model.transformer_blocks.{number}"
        if inside == "attn.qkv":
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{block}.attn1.to_{letter}.{parameter}"] = part.clone()
        else:
            renamed[f"{block}.{BLOCK.get(inside, inside)}.{parameter}"] = tensor
    return renamed


def positions(state: StateDict, config: dict, path: Path) -> torch.Tensor:
    """The stock position embedding [1, T, D], which is computed and not saved: the original's must equal it."""
    size, width = config["sample_size"], state[POSITIONS].shape[-1]
    stock = PatchEmbed(size, size, config["patch_size"], config["in_channels"], width).pos_embed
    require(
        stock.shape == state[POSITIONS].shape and (stock - state[POSITIONS]).abs().max() < 1e-3,
        f"{path}: its {POSITIONS} is not the fixed sine-cosine embedding that diffusers computes.",
    )
    return stock
