"""Models of diffusers far smaller than the miniatures, with random weights: latents of 8×8, images of 16×16."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)


# A U-Net as a configuration file for --denoiser.
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _first_stage(levels: int) -> dict:
    return {
        "block_out_channels": (8,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 4,
    }


def tiny_unet(**options) -> UNet2DConditionModel:
    """A U-Net of 3 latent channels that attends to embeddings of 12 numbers."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=4,
        **{
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 12,
            **options,
        },
    )


def tiny_vq(levels: int = 2, **options) -> VQModel:
    """A VQ first stage of factor 2^(levels - 1) with 16 codes of 3 numbers."""
    return VQModel(**_first_stage(levels), num_vq_embeddings=16, **options)


def tiny_kl(latent_channels: int, levels: int = 2) -> AutoencoderKL:
    """A KL first stage of factor 2^(levels - 1)."""
    return AutoencoderKL(**_first_stage(levels), latent_channels=latent_channels)


def letters_tokenizer(folder: Path, longest: int = 16) -> CLIPTokenizer:
    """A tokenizer of single letters, whose texts are at most so long; its files are written into the folder."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=longest)


def tiny_text_pipeline(folder: Path, kind: type = StableDiffusionPipeline) -> Path:
    """A text-to-image pipeline of diffusers with weights so large that its images depend on the prompt, saved in the
    folder, without a safety checker.

    Args:
        kind: `StableDiffusionPipeline`, or `LatentConsistencyModelPipeline`, whose U-Net takes the guidance scale.
    """
    torch.manual_seed(0)
    is_consistency = kind is LatentConsistencyModelPipeline
    folder.mkdir(parents=True)
    tokenizer = letters_tokenizer(folder, 64)
    config = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {name: tokenizer.convert_tokens_to_ids(getattr(tokenizer, name[:-3])) for name in ENDS}
    text = CLIPTextConfig(**config, **ends, vocab_size=len(tokenizer), max_position_embeddings=64)
    unet = tiny_unet(time_cond_proj_dim=8 if is_consistency else None)
    scheduler = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
    pipeline = kind(
        vae=tiny_kl(3),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=LCMScheduler(**scheduler) if is_consistency else DDIMScheduler(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    generator = torch.Generator().manual_seed(0)
    for model in (pipeline.unet, pipeline.text_encoder):
        for name, parameter in model.named_parameters():  # at the start a U-Net hardly heeds its condition
            is_of_condition = model is pipeline.text_encoder or "attn2" in name or "time_embedding" in name
            std = 1.5 if is_of_condition else 0.3
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    pipeline.save_pretrained(folder)
    return folder


def save_tiny_clip(folder: Path) -> None:
    """A CLIP with random weights, images of 8×8, and a tokenizer of single letters."""
    tokenizer = letters_tokenizer(folder)
    start, end = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "bos_token_id": start, "eos_token_id": end}
    vision = {"image_size": 8, "patch_size": 4}
    model = CLIPModel(
        CLIPConfig(text_config={**layers, **text}, vision_config={**layers, **vision}, projection_dim=12)
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # the initial weights are so small that all embeddings are alike
        torch.nn.init.normal_(parameter, std=0.8, generator=generator)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
