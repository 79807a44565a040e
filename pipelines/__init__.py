"""Pipelines that diffusers does not have. Each file stands alone (torch and diffusers only): exports carry a copy of
it, and load where nothing of noisycond is installed."""

from .ldm_class_to_image import ClassEmbedder, LDMClassToImagePipeline
from .original_dit import OriginalDiTPipeline


__all__ = ["ClassEmbedder", "LDMClassToImagePipeline", "OriginalDiTPipeline"]
