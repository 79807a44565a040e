"""Presets to diffusers models, and the one module that the training loop knows: ConditionalDenoiser."""

from noisycond.denoisers.building import build_denoiser
from noisycond.denoisers.conditional import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.presets import PRESETS, find_denoiser


__all__ = ["PRESETS", "ClassEncoder", "ConditionalDenoiser", "build_denoiser", "find_denoiser"]
