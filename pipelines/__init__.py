"""Pipelines that diffusers does not have. Each file stands alone (torch, diffusers and transformers only): exports
carry a copy of it, and load where nothing of noisycond is installed."""

from .ldm_class_to_image import ClassEmbedder, LDMClassToImagePipeline, get_guidance_scale_embedding
from .ldm_text_to_image import LDMTextToImagePipeline
from .original_dit import OriginalDiTPipeline


__all__ = [
    "ClassEmbedder",
    "LDMClassToImagePipeline",
    "LDMTextToImagePipeline",
    "OriginalDiTPipeline",
    "get_guidance_scale_embedding",
]
