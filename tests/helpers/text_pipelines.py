"""Text-to-image pipelines of diffusers at the smallest size, with random weights and tokenizers of single letters.

Images are of 16×16 pixels, latents of 8×8.
"""

import string

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from noisycond.denoisers import digits_tokenizer


SIZE = 16
TEXTS = ["A red 7 ", "x"]
LETTERS = string.ascii_lowercase + string.digits
VAE = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.5,
}


def clip_tokenizer() -> CLIPTokenizer:
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({piece: number for number, piece in enumerate(pieces)}, [], model_max_length=9)


def clip_config(tokenizer: CLIPTokenizer, **options) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "max_position_embeddings": 9,
            "projection_dim": 12,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **options,
        }
    )


def unet(cross_attention_dim: int, **options) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, norm_num_groups=4, cross_attention_dim=cross_attention_dim, **options,
    )  # fmt: skip


def scheduler(**options) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1, **options
    )


def stable_diffusion(unet_options: dict | None = None, text_options: dict | None = None, **scheduler_options):
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        AutoencoderKL(**VAE), CLIPTextModel(clip_config(tokenizer, **(text_options or {}))), tokenizer,
        unet(16, **(unet_options or {})), scheduler(**scheduler_options), None, None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(**options):
    first, second = clip_tokenizer(), clip_tokenizer()
    second.pad_token = "a</w>"  # SDXL's second tokenizer pads with another token
    return diffusers.StableDiffusionXLPipeline(
        AutoencoderKL(**VAE), CLIPTextModel(clip_config(first)),
        CLIPTextModelWithProjection(clip_config(second, hidden_size=20)), first, second,
        unet(36, addition_embed_type="text_time", addition_time_embed_dim=4,
             projection_class_embeddings_input_dim=24 + 12), scheduler(), add_watermarker=False, **options,
    )  # fmt: skip


def latent_diffusion(vae_options: dict | None = None):
    """Of LDM's own text encoder, with its dropout."""
    tokenizer = BertTokenizer.from_pretrained(digits_tokenizer.FOLDER, model_max_length=512)
    config = LDMBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=77, encoder_layers=2, encoder_ffn_dim=12,
        encoder_attention_heads=2, head_dim=4, d_model=8,
    )  # fmt: skip
    vae = AutoencoderKL(**VAE | (vae_options or {}))
    return diffusers.LDMTextToImagePipeline(vae, LDMBertModel(config), tokenizer, unet(8), scheduler())


def pixart(**options):
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    tokenizer = T5Tokenizer([(piece, -1.0) for piece in pieces], extra_ids=0)
    text = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.3)
    )
    model = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, num_layers=2, cross_attention_dim=24, sample_size=8,
        caption_channels=16, out_channels=8, norm_num_groups=4, **options,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return diffusers.PixArtAlphaPipeline(tokenizer, text, AutoencoderKL(**VAE), model, scheduler)


FAMILIES = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "ldm": latent_diffusion,
    "pixart": pixart,
}


def make(kind: str, **options):
    """One of FAMILIES, with weights that do not start at 0."""
    torch.manual_seed(0)
    pipeline = FAMILIES[kind](**options)
    with torch.no_grad():
        for value in getattr(pipeline, "unet", None or getattr(pipeline, "transformer", None)).parameters():
            if value.abs().max() == 0:
                value.normal_(std=0.1)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline, **options) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    if isinstance(pipeline, diffusers.PixArtAlphaPipeline):
        options |= {"use_resolution_binning": False, "clean_caption": False}  # no bin is as small as these images
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"} | options
    return pipeline(TEXTS, generator=generator, height=SIZE, width=SIZE, **options).images


def condition(text) -> dict:
    """Both empty prompts, then both captions."""
    null, captions = text.null(), text.encode(TEXTS)
    tokens = {name: torch.cat([null[name]] * 2 + [captions[name]]) for name in null}
    return tokens | {"is_null": torch.tensor([True, True, False, False])}
