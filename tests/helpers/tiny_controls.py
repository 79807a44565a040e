"""What draws after control images, far smaller than the miniatures: images of 16×16."""

from pathlib import Path

import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from released_layout import change_json, write_ldm
from tiny_models import tiny_text_pipeline, tiny_unet

from noisycond.control_pipelines import AdapterFacts, assemble, save_adapter
from noisycond.pipelines import LDMClassToImagePipeline


def _noisy(model: torch.nn.Module) -> torch.nn.Module:
    """With weights so large that images depend on the control: a ControlNet starts from zeros."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        is_of_control = "controlnet_" in name or "adapter" in name
        torch.nn.init.normal_(parameter, std=0.8 if is_of_control else 0.3, generator=generator)
    return model


def tiny_controlnet_pipeline(folder: Path) -> Path:
    """A Stable Diffusion with a ControlNet, saved in the folder."""
    base = StableDiffusionPipeline.from_pretrained(tiny_text_pipeline(folder / "base"))
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8))
    parts = base.components | {"controlnet": _noisy(controlnet)}
    StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def tiny_adapter_pipeline(folder: Path, in_channels: int = 3) -> Path:
    """A Stable Diffusion with a T2I-Adapter, saved in the folder. Stock adapters fit a U-Net that begins with
    attention."""
    base = StableDiffusionPipeline.from_pretrained(tiny_text_pipeline(folder / "base"))
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    adapter = T2IAdapter(in_channels, [8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    parts = base.components | {"adapter": _noisy(adapter), "unet": _noisy(tiny_unet(**blocks))}
    parts.pop("image_encoder", None)
    StableDiffusionAdapterPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def tiny_adapter_folder(folder: Path, condition: str, column: str = "canny") -> Path:
    """A folder as a personalization leaves it, of a ControlNet on a base beside it whose images are of 16×16.

    Args:
        condition: `class labels`, a class-conditional LDM with digits as classes, or `captions`, Stable Diffusion.
    """
    base_folder = folder.with_name(f"{folder.name}-base")
    if condition == "captions":
        base = StableDiffusionPipeline.from_pretrained(tiny_text_pipeline(base_folder))
    else:
        names = {str(digit): str(digit) for digit in range(10)}
        change_json(write_ldm(base_folder) / "model_index.json", id2label=names)
        base = LDMClassToImagePipeline.from_pretrained(base_folder)
    controlnet = _noisy(ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(4, 8)))
    facts = AdapterFacts(base_folder.name, None, condition, "controlnet", column, column)
    folder.mkdir()
    save_adapter(controlnet, assemble(base, controlnet), facts, {"base": str(base_folder)}, folder)
    return folder
