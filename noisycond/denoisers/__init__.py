"""Presets to diffusers models, and the one module that the training loop knows: ConditionalDenoiser."""

from noisycond.denoisers.building import build_denoiser, build_text_denoiser
from noisycond.denoisers.conditional import ClassEncoder, ConditionalDenoiser
from noisycond.denoisers.presets import PRESETS, TEXT_PRESETS, find_denoiser, find_text_denoiser
from noisycond.denoisers.text import TextEmbedding, TextEncoder, open_text_encoder, peek_text_encoder


__all__ = [
    "PRESETS",
    "TEXT_PRESETS",
    "ClassEncoder",
    "ConditionalDenoiser",
    "TextEmbedding",
    "TextEncoder",
    "build_denoiser",
    "build_text_denoiser",
    "find_denoiser",
    "find_text_denoiser",
    "open_text_encoder",
    "peek_text_encoder",
]
