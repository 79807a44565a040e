"""Pipelines that diffusers does not have. Each file stands alone (torch, diffusers and transformers only): exports
carry a copy of it, and load where nothing of noisycond is installed."""

from .ldm_class_to_image import ClassEmbedder, LDMClassToImagePipeline, get_guidance_scale_embedding
from .ldm_class_to_image_control import LDMClassToImageControlPipeline
from .ldm_text_to_image import LDMTextToImagePipeline
from .ldm_text_to_image_control import LDMTextToImageControlPipeline
from .original_dit import OriginalDiTPipeline


__all__ = [
    "ClassEmbedder",
    "LDMClassToImageControlPipeline",
    "LDMClassToImagePipeline",
    "LDMTextToImageControlPipeline",
    "LDMTextToImagePipeline",
    "OriginalDiTPipeline",
    "get_guidance_scale_embedding",
]
