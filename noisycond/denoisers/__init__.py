"""Presets to diffusers models, and the one module that the training loop knows: ConditionalDenoiser."""

from noisycond.denoisers.conditional import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.presets import PRESETS, build_denoiser, find_denoiser


__all__ = ["PRESETS", "ClassEncoder", "ConditionalDenoiser", "build_denoiser", "find_denoiser"]
